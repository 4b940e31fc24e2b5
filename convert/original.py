"""The model with the weights that were quantized, and what quantizing them cost."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.loading import load_model
from mlx_pararnn.model import Model
from mlx_pararnn.model_config import ModelArgs
from mlx_pararnn.tools.quantization_cost import FIELD, Cost, quantization_cost

from .coreml.memory import available_memory
from .families import find_family
from .families.base import Output, element_count
from .readers.checkpoint import open_checkpoint
from .readers.dtypes import cast
from .readers.forms import read_json_object


def cost_against(folder: Path, source: str | Path, family: str | None = None) -> Cost:
    """What quantizing cost the model in `folder`: its predictions beside those of `source`.

    Args:
        source: the checkpoint that it was converted from, or the MLX model folder that is not quantized.
        family: a name of `families.family_names()`; None finds it out.

    Raises:
        PararnnError: `source` is not what the model was made of, or does not fit into memory.
    """
    model, config = load_model(folder)
    return quantization_cost(model, _original(config, source, family), folder, config)


def note_cost(folder: Path, cost: Cost) -> None:
    """Write the cost into the folder's config.json, where `verify` finds it."""
    file = folder / "config.json"
    config = (read_json_object(file) or {}) | {FIELD: asdict(cost)}
    partial = folder / f".config-{os.getpid()}.json"
    try:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def is_mlx_model(source: str | Path) -> bool:
    """Whether `source` is a folder with a model for MLX."""
    config = read_json_object(Path(source) / "config.json") if Path(source).is_dir() else None
    return config is not None and config.get("model_type") == "pararnn"


def _original(config: dict[str, Any], source: str | Path, family: str | None) -> Model:
    if is_mlx_model(source):
        model, theirs = load_model(source)
        if "quantization" in theirs:
            raise PararnnError(f"{source} is quantized too; name the model or checkpoint that is not")
        if any(getattr(model.args, name) != config.get(name) for name in _SHAPE):
            raise PararnnError(f"{source} is another model: its sizes differ")
        return model
    checkpoint = open_checkpoint(source)
    canonical = find_family(checkpoint, family).map(checkpoint, config.get("tie_word_embeddings"))
    needed, free = 5 * element_count(canonical.outputs), available_memory()  # a copy of one matrix, logits
    if needed > free:
        raise PararnnError(
            f"the original weights need about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        )
    model = Model(ModelArgs.from_dict(config))
    try:
        model.load_weights([(output.name, _float32(output)) for output in canonical.outputs])
    except ValueError as error:
        raise PararnnError(f"{source} is another model: {str(error).splitlines()[0]}") from error
    model.eval()
    return model


_SHAPE = ("cell", "hidden_size", "num_hidden_layers", "vocab_size", "num_heads", "intermediate_size")


def _float32(output: Output) -> mx.array:
    pieces = [cast(np.asarray(piece()).reshape(-1), output.dtype, "F32") for piece in output.pieces()]
    return mx.array(np.concatenate(pieces).reshape(output.shape))
