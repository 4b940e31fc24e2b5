"""pararnn.json as a runner reads it: whole, of one model, and of a size that a model has."""

import math
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_config import ModelArgs

from ..readers.forms import COREAI, COREML, PACKAGE_FILE, PackageKind, read_json_object
from .form import part_name, state_shapes

MAX_CHUNK = 128  # a product of more Jacobians than that leaves float16's range too easily
# Many times what the widest models have. States are made before the program is looked at that they are for.
_MOST_STATE_BYTES = 1 << 28
_DTYPES = {"float32": 4, "float16": 2}
PACKED = ("int8", "int4", "palette4")
# What runners read of the model itself, where ModelArgs would take a default for what is missing.
_OF_THE_MODEL = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "mlp_residual",
                 "max_position_embeddings")  # fmt: skip


def checked_description(folder: Path, kind: PackageKind) -> dict[str, Any]:
    """pararnn.json of a folder that an export wrote.

    Raises:
        PararnnError: it is missing, of another kind of package, or says what no export says.
    """
    file = folder / PACKAGE_FILE
    try:
        settings = read_json_object(file) or {}
        wrong = _wrong_field(settings, kind)
    except PararnnError as error:
        raise PararnnError(f"{file}: not a description this version reads ({error}); export again") from error
    if wrong:
        raise PararnnError(f"{file}: not a description this version reads ({wrong} is wrong); export again")
    return settings


def state_bytes(settings: dict[str, Any]) -> int:
    """Size of the states of one sequence, by a description that was checked."""
    return sum(math.prod(state["shape"]) * _DTYPES[state["dtype"]] for state in settings["states"])


def _wrong_field(settings: dict[str, Any], kind: PackageKind) -> str | None:
    """The name of a field that is not as an export writes it; None where all are."""
    args = ModelArgs.from_dict(settings)
    chunk, functions = settings.get("chunk"), settings.get("functions")
    precisions = tuple(_DTYPES) if kind == COREAI else (None,)
    precision = settings.get("precision")
    right = {
        "format": settings.get("format") == kind.format,
        "format_version": settings.get("format_version") == (2 if "parts" in settings else 1),
        "package": settings.get("package") == kind.name,
        "precision": precision in precisions,
        "functions": isinstance(functions, list) and functions[:1] == ["decode"],
        "chunk": _is_chunk(chunk) if functions != ["decode"] else chunk is None,
        "parts": (divides := _divides(settings.get("parts", 1), functions, kind)),
        "chunks": divides and _has_chunks(prefills(settings), settings),
        "state": settings.get("state") in ("graph", "io"),
        "layout": settings.get("layout", "plain") == "plain" or _is_ane(settings, kind),
        "output": settings.get("output") in ("logits", "token"),
        "weights": settings.get("weights") in (*_DTYPES, *PACKED),
        "parameters": type(parameters := settings.get("parameters")) is int and 0 < parameters < 1 << 48,
        "states": _has_states(settings.get("states"), args),
        **{name: name in settings for name in _OF_THE_MODEL},
    }
    return next((name for name, is_right in right.items() if not is_right), None)


def prefills(settings: dict[str, Any]) -> dict[str, int]:
    """Name -> tokens that it reads, of the functions that read several, the largest first.

    Packages of earlier versions say `chunk` alone.
    """
    chunk = settings.get("chunk")
    return settings.get("chunks", {} if chunk is None else {"prefill": chunk})


def parts_of(settings: dict[str, Any], name: str) -> list[str]:
    """The functions that are called one after another for the prefill, or decode, of this name."""
    count = settings.get("parts", 1)
    return [name] if name == "decode" or count == 1 else [part_name(name, n + 1) for n in range(count)]


def _divides(parts: Any, functions: Any, kind: PackageKind) -> bool:
    """Whether there may be so many parts of each prefill."""
    most = len(functions) if isinstance(functions, list) and kind == COREML else 1
    return type(parts) is int and 1 <= parts <= most


def _has_chunks(chunks: Any, settings: dict[str, Any]) -> bool:
    if not isinstance(chunks, dict):
        return False
    divided = [part for name in chunks for part in parts_of(settings, name)]
    return (
        settings.get("functions") == ["decode", *divided]
        and chunks.get("prefill") == settings.get("chunk")
        and all(_is_chunk(count) for count in chunks.values())
        and list(chunks.values()) == sorted(set(chunks.values()), reverse=True)
    )


def _is_ane(settings: dict[str, Any], kind: PackageKind) -> bool:
    """Whether it is a description in the Neural Engine's layout."""
    return kind == COREML and settings["layout"] == "ane" and settings.get("state") == "io"


def _is_chunk(count: Any) -> bool:
    return type(count) is int and 2 <= count <= MAX_CHUNK


def _has_states(states: Any, args: ModelArgs) -> bool:
    if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
        return False
    shapes = {name: list(shape) for name, shape in state_shapes(args).items()}
    return (
        [state.get("name") for state in states] == list(shapes)
        and all(state.get("shape") == shapes[state["name"]] for state in states)
        and all(type(size) is int for state in states for size in state["shape"])  # true == 1
        and all(isinstance(state.get("dtype"), str) and state["dtype"] in _DTYPES for state in states)
        and 4 * sum(math.prod(shape) for shape in shapes.values()) <= _MOST_STATE_BYTES
    )
