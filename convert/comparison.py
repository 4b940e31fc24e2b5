"""A converted model against the checkpoint it came from, tensor by tensor: `mlx-pararnn verify --against`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.tools.verification import Check

from .families import find_family
from .families.base import Output
from .readers.checkpoint import open_checkpoint
from .readers.dtypes import Array, cast
from .readers.forms import find_weights, is_mlx_model, read_json_object, read_weights
from .readers.tensors import Tensor
from .writers.quantize import Quantization

# How a tensor came into the model, and what it is compared with.
_KINDS = {
    "unchanged": "as in the source",
    "cast": "against the source, cast",
    "quantized": "against the source, quantized again",
}


def compare_with_source(model: Path, source: str | Path) -> Iterator[Check]:
    """Every tensor of the model folder `model` against what `source` says it is.

    That is a checkpoint, or an MLX model folder that is not quantized. All must be the source's to the bit:
    as it is, cast, or quantized again here; of a folder, what is quantized is counted only.
    One check for each kind.

    Raises:
        PararnnError: the source cannot be read, or is not one of this model's shape.
    """
    config = read_json_object(model / "config.json") or {}
    tensors = read_weights(find_weights(model)).tensors
    outputs = _outputs(source, config)
    names = {output.name for output in outputs}
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith((".scales", ".biases"))}
    extra = [n for n in tensors if n not in names and n.rpartition(".")[0] not in packed]
    missing = [name for name in names if name not in tensors]
    if extra or missing:
        raise PararnnError(
            f"{source} is not what {model} was converted from: {(extra + missing)[0]} is in one of them only"
        )
    differing: dict[str, tuple[int, float]] = {}
    for output in outputs:
        stored = tensors[output.name]
        if f"{output.name.removesuffix('.weight')}.scales" in tensors:
            kind, difference = "quantized", _packed_that_differ(output, tensors, config)
        elif stored.dtype == output.dtype:
            kind, difference = "unchanged", _bits_that_differ(output, stored)
        else:
            kind, difference = "cast", _bits_that_differ(output, stored)
        count, total = differing.get(kind, (0, 0.0))
        differing[kind] = count + 1, total + difference
    # What was quantized by MLX-LM's commands may have been fitted since, as DWQ does.
    told = {"quantized"} if is_mlx_model(source) else set()
    for kind, (count, total) in differing.items():
        tensors_of = f"{count} tensor{'s' * (count != 1)}"
        name = f"{tensors_of} {_KINDS[kind]}"
        allowed = None if kind in told else 0.0
        yield Check(name, total, allowed, "" if total else "to the bit", counted="numbers")


def _outputs(source: str | Path, config: dict[str, Any]) -> list[Output]:
    """The tensors that a model made of `source` has."""
    if not is_mlx_model(source):
        checkpoint = open_checkpoint(source)
        return find_family(checkpoint).map(checkpoint, config.get("tie_word_embeddings")).outputs
    folder = Path(source)
    if "quantization" in (read_json_object(folder / "config.json") or {}):
        raise PararnnError(f"{source} is quantized too; name the model or checkpoint that is not")
    tensors = read_weights(find_weights(folder)).tensors
    return [Output(name, tensor.shape, tensor.dtype, tensor.pieces) for name, tensor in tensors.items()]


def _bits_that_differ(output: Output, stored: Tensor) -> float:
    """How many numbers are not the source's, cast to the stored type."""
    if stored.shape != output.shape:
        raise PararnnError(f"{output.name} is {stored.shape} in the model and {output.shape} in the source")
    expected = cast(_whole(output), output.dtype, stored.dtype)
    return float((_raw(expected) != _raw(stored.read().reshape(-1))).sum())


def _packed_that_differ(output: Output, tensors: dict[str, Tensor], config: dict[str, Any]) -> float:
    """How many packed integers, scales and biases are not those of quantizing the source again."""
    path = output.name.removesuffix(".weight")
    settings = config["quantization"]
    chosen = settings[path] if isinstance(settings.get(path), dict) else settings
    how = Quantization(chosen["group_size"], chosen["bits"], chosen.get("mode", "affine"))
    names = [
        name for name in (f"{path}.{part}" for part in ("weight", "scales", "biases")) if name in tensors
    ]
    tag = tensors["model.norm.weight"].dtype  # what all but the recurrent weights were cast to
    rows = cast(_whole(output), output.dtype, tag).reshape(-1, output.shape[-1])
    shapes = [entry.shape for entry in how.entries(output.name, output.shape, tag)]
    if [tensors[name].shape for name in names] != shapes:
        raise PararnnError(
            f"{output.name} is {tensors[names[0]].shape} in the model, packed, and {output.shape} in the "
            f"checkpoint, which would give {shapes[0]}"
        )
    differing = 0
    for name, expected in zip(names, how.quantized(rows, tag), strict=True):
        stored = tensors[name].read()
        differing += int((_raw(expected.reshape(-1)) != _raw(stored.reshape(-1))).sum())
    return float(differing)


def _whole(output: Output) -> Array:
    return np.concatenate([np.asarray(piece()).reshape(-1) for piece in output.pieces()])


def _raw(array: Array) -> Array:
    return array.view(f"<u{array.dtype.itemsize}")
