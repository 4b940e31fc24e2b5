"""Small models that see and draw, with random weights, and their folders."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.compute.module_arrays import named_arrays
from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from mlx_pararnn.convert.writers.image_folder import save_image_model
from mlx_pararnn.images.config import ImageArgs
from mlx_pararnn.images.image_model import ImageModel

TRANSFORMER = {"patch": 2, "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24}
VOCABULARY, LEVELS = 258, (4, 3, 2)


def image_args(**changes: object) -> ImageArgs:
    values = {
        "size": 8,
        "stride": 2,
        "levels": LEVELS,
        "encoder": TRANSFORMER,
        "decoder": TRANSFORMER,
        "begin_token": 256,
        "end_token": 257,
        "first_token": VOCABULARY,
    }
    return ImageArgs.from_dict({**values, **changes})


def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Normal numbers for all weights, those too that begin as zeros."""
    mx.random.seed(seed)
    module.update(tree_map(lambda w: 0.3 * mx.random.normal(w.shape), module.parameters()))
    mx.eval(module.parameters())


def image_model(cell: str = "gru", width: int = 16, **changes: object) -> ImageModel:
    args = image_args(**changes)
    language = ModelArgs(width, 2, VOCABULARY + args.codes, 24, cell=cell, num_heads=2)
    model = ImageModel(args, Model(language))
    random_weights(model)
    return model


def write_image_model(model: ImageModel, folder: Path, **options: Any) -> Path:
    """Its folder, with a tokenizer of bytes beside it, whose ids 256 and 257 it does not have."""
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name, text in byte_tokenizer_files().items():
        (tokenizer / name).write_text(text)
    save_image_model(model, tokenizer, folder, **options)
    return folder


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(w, dtype=np.float64) for name, w in named_arrays(module.parameters())}
