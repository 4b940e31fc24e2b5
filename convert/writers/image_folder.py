"""The folder of a model that sees: whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm.utils

from mlx_pararnn.compute.module_arrays import named_arrays
from mlx_pararnn.images.image_model import WEIGHTS, ImageModel
from mlx_pararnn.model import Model

from .output_folder import whole_or_nothing
from .tokenizer import prepare_tokenizer


def save_image_model(
    model: ImageModel,
    tokenizer: Path,
    out: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    force: bool = False,
) -> None:
    """Write config.json, model.safetensors, images.safetensors and the tokenizer's files.

    Args:
        tokenizer: a folder that has them.
        bits, group_size: the matrices are quantized so, `model`'s too; None leaves them.
        force: a model folder that is there is replaced.

    Raises:
        PararnnError: `out` is there, or cannot be written; MLX has no such bits; the tokenizer does not fit.
    """
    language = model.language_model
    config: dict[str, Any] = asdict(language.args)
    if bits is not None:
        model.quantize(bits, group_size)
        packed, config = mlx_lm.utils.quantize_model(language, config, group_size, bits)
        language = cast(Model, packed)
    files = prepare_tokenizer(tokenizer, tokenizer, language.args.vocab_size, {})
    config |= {**files.token_ids, "images": model.args.to_dict()}
    weights = model.image_weights()
    texts = dict(named_arrays(language.parameters()))
    nbytes = sum(weight.nbytes for weight in [*weights.values(), *texts.values()])
    with whole_or_nothing(out, force, tokenizer, nbytes) as partial:
        mlx_lm.utils.save_model(partial, language)
        mx.save_safetensors(str(partial / WEIGHTS), weights, metadata={"format": "mlx"})
        files.write(partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
