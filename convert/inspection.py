"""What a checkpoint or a converted model is, from its headers alone: `mlx-pararnn inspect`."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_pararnn.cells import get_cell
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import VOCABULARY_FILES, disk_bytes, read_json
from mlx_pararnn.model_config import ModelArgs, check_end_ids, check_layers, weight_bits

from .families import find_family
from .package.description import checked_description, state_bytes
from .readers.checkpoint import Checkpoint, open_checkpoint
from .readers.dtypes import NAMES, STORED_AS
from .readers.forms import (
    PACKAGE_FILE,
    PACKAGE_KINDS,
    find_weights,
    package_kind,
    read_json_object,
    read_weights,
)
from .writers.quantize import is_matrix

# Bytes a weight: quantized matrices carry a float16 scale and bias for each group of 64.
_PRECISIONS = {"float32": 4.0, "float16": 2.0, "8-bit": 1 + 4 / 64, "4-bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        kind: "checkpoint", "model" or "package", which is for Core ML or Core AI.
        family: where a checkpoint comes from; None for what is converted.
        config: config.json's fields, of the model as it is or as `convert` would write it.
        parameters: how many numbers the model has.
        dtypes: number format -> how many numbers are stored in it.
        state_bytes: size of the state of one sequence, in float32; it does not grow.
        memory: precision -> bytes that the weights and one state take.
        disk_bytes: size of the file, or of all files of the folder.
        quantization: how weights are quantized; None where they are not.
        tokenizer: its kind and number of tokens; None where there is none.
        chat_template: whether there is one.
        end_tokens: the ids that end a text.
    """

    kind: str
    family: str | None
    config: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    state_bytes: int
    memory: dict[str, int]
    disk_bytes: int = 0
    quantization: str | None = None
    tokenizer: str | None = None
    chat_template: bool = False
    end_tokens: list[int] = field(default_factory=list)


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint (in any form that `convert` takes), a model folder or an app's package.

    No weight is read.

    Raises:
        PararnnError: it is none of these.
    """
    folder = _beside_package(Path(path))
    if kind := package_kind(folder):
        return _with_files(_package(checked_description(folder, kind)), folder)
    config = read_json_object(folder / "config.json") if folder.is_dir() else None
    if config and config.get("model_type") in ("pararnn", "pararnn_cell"):
        return _with_files(_model(folder, config), folder)
    found = inspect_checkpoint(open_checkpoint(path))
    return replace(found, disk_bytes=disk_bytes(folder))


def held_package(path: str | Path) -> str | None:
    """Which runtime the package in a folder is for, "Core ML" or "Core AI"; None for any other path."""
    kind = package_kind(_beside_package(Path(path)))
    return kind.title if kind else None


def _beside_package(path: Path) -> Path:
    """The folder that holds a package, also by the package's own path."""
    is_package = path.name in {kind.name for kind in PACKAGE_KINDS}
    return path.parent if is_package and (path.parent / PACKAGE_FILE).is_file() else path


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
        check_end_ids(config, folder / "config.json")
    tensors = read_weights(find_weights(folder)).tensors
    if config["model_type"] == "pararnn":
        check_layers(config, tensors, folder)
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
    found = _inspection("model", None, config, shapes, _counted(numbers))
    return replace(found, quantization=_quantization(config))


def _package(settings: dict[str, Any]) -> Inspection:
    weights, parameters, state = settings["weights"], settings["parameters"], state_bytes(settings)
    width = {"float32": 4.0, "float16": 2.0, "int8": 1.0}.get(weights, 0.5)
    return Inspection(
        "package",
        None,
        settings,
        parameters,
        {weights: parameters},
        state,
        {weights: round(parameters * width) + state},
        quantization=None if weights.startswith("float") else weights,
    )


def _with_files(found: Inspection, folder: Path) -> Inspection:
    """With what a folder's other files say."""
    named = read_json_object(folder / "tokenizer_config.json") or {}
    ends = found.config.get("eos_token_id")
    return replace(
        found,
        disk_bytes=disk_bytes(folder),
        tokenizer=_tokenizer(folder),
        chat_template=(folder / "chat_template.jinja").is_file() or bool(named.get("chat_template")),
        end_tokens=ends if isinstance(ends, list) else [] if ends is None else [ends],
    )


def _tokenizer(folder: Path) -> str | None:
    if not (folder / "tokenizer.json").is_file():
        return next((name for name in VOCABULARY_FILES[1:] if (folder / name).is_file()), None)
    content = read_json(folder / "tokenizer.json")
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        return "tokenizer.json"
    added = content.get("added_tokens")
    names = {str(token) for token in model["vocab"]} if isinstance(model["vocab"], dict) else set()
    more = [t for t in added or () if isinstance(t, dict) and t.get("content") not in names]
    count = len(model["vocab"]) + (len(more) if names else 0)
    return f"{model.get('type', 'BPE')}, {count:,} tokens"


def _quantization(config: dict[str, Any]) -> str | None:
    """How a model's weights are quantized, in a few words."""
    settings = config.get("quantization")
    if not isinstance(settings, dict):
        return None
    words = f"{settings.get('mode', 'affine')}, {settings['bits']} bits in groups of {settings['group_size']}"
    others = sum(isinstance(value, dict) for value in settings.values())
    kept = sum(value is False for value in settings.values())
    words += f"; {others} matrices otherwise" if others else ""
    return words + (f"; {kept} matrices not" if kept else "")


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
