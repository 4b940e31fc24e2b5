"""What a checkpoint or a converted model is, from its headers alone: `mlx-pararnn inspect`."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_pararnn.cells import get_cell
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_config import ModelArgs, weight_bits

from .families import find_family
from .readers.checkpoint import Checkpoint, open_checkpoint
from .readers.dtypes import NAMES, STORED_AS
from .readers.forms import find_weights, read_json_object, read_weights
from .writers.quantize import is_matrix

# Bytes a weight: quantized matrices carry a float16 scale and bias for each group of 64.
_PRECISIONS = {"float32": 4.0, "float16": 2.0, "8-bit": 1 + 4 / 64, "4-bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        kind: "checkpoint" or "model".
        family: where a checkpoint comes from; None for a model.
        config: config.json's fields, of the model as it is or as `convert` would write it.
        parameters: how many numbers the model has.
        dtypes: number format -> how many numbers are stored in it.
        state_bytes: size of the state of one sequence, in float32; it does not grow.
        memory: precision -> bytes that the weights and one state take.
    """

    kind: str
    family: str | None
    config: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    state_bytes: int
    memory: dict[str, int]


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint (in any form that `convert` takes) or a model folder; no weight is read.

    Raises:
        PararnnError: it is neither.
    """
    config = read_json_object(Path(path) / "config.json") if Path(path).is_dir() else None
    if config and config.get("model_type") in ("pararnn", "pararnn_cell"):
        return _model(Path(path), config)
    return inspect_checkpoint(open_checkpoint(path))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """`inspect` of a checkpoint that is open already."""
    checkpoint = replace(checkpoint, headers_only=True)
    family = find_family(checkpoint)
    canonical = family.map(checkpoint, None)
    shapes = {output.name: output.shape for output in canonical.outputs}
    dtypes = _counted((output.dtype, math.prod(output.shape)) for output in canonical.outputs)
    config = {"model_type": canonical.model_type, **canonical.args}
    return _inspection("checkpoint", family.title, config, shapes, dtypes)


def _model(folder: Path, config: dict[str, Any]) -> Inspection:
    if config["model_type"] == "pararnn":  # fields left out have the model's defaults
        config = {**asdict(ModelArgs.from_dict(config)), **config}
    tensors = read_weights(find_weights(folder)).tensors
    bits = weight_bits(config, folder / "config.json")
    shapes, numbers = {}, []
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".biases")) and f"{name.rpartition('.')[0]}.weight" in tensors:
            continue
        shape = tensor.shape
        if tensor.dtype == "U32":  # packed
            width = bits.get(name.removesuffix(".weight"), bits[""])
            shape = (*shape[:-1], shape[-1] * 32 // width)
            numbers.append((f"{width}-bit", math.prod(shape)))
        else:
            numbers.append((tensor.dtype, math.prod(shape)))
        shapes[name] = shape
    return _inspection("model", None, config, shapes, _counted(numbers))


def _inspection(
    kind: str,
    family: str | None,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, int],
) -> Inspection:
    state = _state_bytes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    matrices = sum(size for name, size in sizes.items() if is_matrix(name))
    recurrent = sum(size for name, size in sizes.items() if name.endswith("recurrent_weight"))
    rest = sum(sizes.values()) - matrices - recurrent
    memory = {}
    for precision, width in _PRECISIONS.items():
        other = rest * (4 if precision == "float32" else 2) + recurrent * 4
        memory[precision] = round(matrices * width) + other + state
    return Inspection(kind, family, config, sum(sizes.values()), dtypes, state, memory)


def _state_bytes(config: dict[str, Any]) -> int:
    try:
        slots = len(get_cell(config["cell"], config.get("activations")).slots)
        width = config["hidden_size"]
        layers = config.get("num_hidden_layers", 1)
        window = config["conv_kernel"] - 1 if config.get("mixer") == "gated_conv" else 0
        return 4 * layers * width * (slots + window)
    except KeyError as error:
        raise PararnnError(f"config.json lacks {error.args[0]!r}") from None
    except (TypeError, AttributeError) as error:
        raise PararnnError("config.json: its fields are not those of a model; convert it again") from error


def _counted(numbers: Iterable[tuple[str, int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tag, size in numbers:
        name = NAMES.get(tag, tag if tag.endswith("bit") else STORED_AS[tag].name)
        counts[name] = counts.get(name, 0) + size
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
