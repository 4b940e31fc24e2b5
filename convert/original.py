"""What quantizing cost a model: its predictions beside those of the weights that were quantized."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_pararnn.blocks import Layer
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.whole_file import write_whole
from mlx_pararnn.loading import load_model
from mlx_pararnn.model_config import ModelArgs
from mlx_pararnn.tools.quantization_cost import (
    FIELD,
    Cost,
    bundled_tokens,
    model_logits,
    quantization_cost,
    run_layers,
)

from .families import find_family
from .families.base import Canonical, Output
from .readers.checkpoint import open_checkpoint
from .readers.dtypes import Array, cast
from .readers.forms import is_mlx_model, read_json_object

M = TypeVar("M", bound=nn.Module)


def cost_against(folder: Path, source: str | Path, family: str | None = None) -> Cost:
    """What quantizing cost the model in `folder`: its predictions beside those of `source`.

    A checkpoint is read a layer at a time, so that one larger than memory can be compared with.

    Args:
        source: the checkpoint that it was converted from, or the MLX model folder that is not quantized.
        family: a name of `families.family_names()`; None finds it out.

    Raises:
        PararnnError: `source` is not what the model was made of.
    """
    config = read_json_object(folder / "config.json") or {}
    if config.get("model_type") != "pararnn":
        raise PararnnError(f"{folder} is not a language model")
    args = ModelArgs.from_dict(config)
    tokens, is_text = bundled_tokens(folder, args, config)
    original = source_logits(args, source, family, tokens[:-1])
    model, _ = load_model(folder, lazy=True)
    return quantization_cost(model_logits(model, tokens[:-1]), original, tokens, is_text)


def note_cost(folder: Path, cost: Cost) -> None:
    """Write the cost into the folder's config.json, where `verify` finds it."""
    file = folder / "config.json"
    config = (read_json_object(file) or {}) | {FIELD: asdict(cost)}
    write_whole(file, (json.dumps(config, indent=2) + "\n").encode())


def source_logits(args: ModelArgs, source: str | Path, family: str | None, tokens: list[int]) -> Array:
    """The logits (T, V) of a checkpoint or MLX model after each of T tokens, in float32.

    Args:
        args: of the model that was made of it.
        source, family: as in `cost_against`.
        tokens: T token ids.

    Raises:
        PararnnError: the source is quantized, or another model.
    """
    if is_mlx_model(source):
        model, config = load_model(source, lazy=True)
        if "quantization" in config:
            raise PararnnError(f"{source} is quantized too; name the model or checkpoint that is not")
        _check_shape(args, model.args, source)
        return np.concatenate([np.array(logits, np.float32) for logits in model_logits(model, tokens)])
    checkpoint = open_checkpoint(source)
    canonical = find_family(checkpoint, family).map(checkpoint, args.tie_word_embeddings)
    _check_shape(args, ModelArgs.from_dict(canonical.args), source)
    try:
        return _layer_by_layer(args, canonical, tokens)
    except (KeyError, ValueError) as error:
        raise PararnnError(f"{source} is another model: {str(error).splitlines()[0]}") from error


def _check_shape(args: ModelArgs, theirs: ModelArgs, source: str | Path) -> None:
    if any(getattr(args, name) != getattr(theirs, name) for name in _SHAPE):
        raise PararnnError(f"{source} is another model: its sizes differ")


_SHAPE = ("cell", "hidden_size", "num_hidden_layers", "vocab_size", "num_heads", "intermediate_size")


def _layer_by_layer(args: ModelArgs, canonical: Canonical, tokens: list[int]) -> Array:
    outputs = {output.name: output for output in canonical.outputs}
    x = mx.array(_rows(outputs["model.embed_tokens.weight"], np.array(tokens)))[None]
    if args.max_position_embeddings is not None:
        x += mx.array(_rows(outputs["model.embed_positions.weight"], np.arange(len(tokens))))

    def layer(number: int) -> Layer:
        return _loaded(Layer(args), outputs, f"model.layers.{number}.")

    norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
    last = _loaded(norm(args.hidden_size, args.norm_eps), outputs, "model.norm.")
    layers = [partial(layer, number) for number in range(args.num_hidden_layers)]
    hidden = np.array(run_layers(args, layers, x, last)[0])
    head = outputs["model.embed_tokens.weight" if args.tie_word_embeddings else "lm_head.weight"]
    logits = np.empty((len(tokens), args.vocab_size), np.float32)
    for first, block in _blocks(head):
        np.matmul(hidden, block.T, out=logits[:, first : first + len(block)])
    return logits


def _loaded(module: M, outputs: dict[str, Output], prefix: str) -> M:
    names = [name for name in outputs if name.startswith(prefix)]
    module.load_weights([(name.removeprefix(prefix), _float32(outputs[name])) for name in names])
    return module


def _float32(output: Output) -> mx.array:
    pieces = [cast(np.asarray(piece()).reshape(-1), output.dtype, "F32") for piece in output.pieces()]
    return mx.array(np.concatenate(pieces).reshape(output.shape))


def _rows(output: Output, wanted: Array) -> Array:
    """The rows `wanted` (n,) of a matrix, in float32."""
    found = np.empty((len(wanted), output.shape[1]), np.float32)
    for first, block in _blocks(output):
        here = (wanted >= first) & (wanted < first + len(block))
        found[here] = block[wanted[here] - first]
    return found


def _blocks(output: Output) -> Iterator[tuple[int, Array]]:
    """A matrix in blocks of rows in float32, each with the number of its first row."""
    width, first, rest = output.shape[1], 0, np.empty(0, np.float32)
    for piece in output.pieces():
        numbers = np.concatenate([rest, cast(np.asarray(piece()).reshape(-1), output.dtype, "F32")])
        whole = len(numbers) // width
        yield first, numbers[: whole * width].reshape(whole, width)
        first, rest = first + whole, numbers[whole * width :]
