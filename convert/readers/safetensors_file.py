"""The safetensors format: its header, read and checked.

Format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors/index#format).
"""

import json
import math
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import MAX_HEADER_BYTES, MAX_HEADER_ITEMS, json_entries

from .dtypes import STORED_AS
from .tensors import Tensor, file_tensor
from .wording import shown


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, by name, and its metadata. Only the header is read.

    Raises:
        PararnnError: the file is cut short, damaged or not of this format.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise PararnnError(
                f"{path}: this safetensors file is cut short or damaged; save or download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise PararnnError(f"{path}: the safetensors header claims {length} bytes; the file is damaged")
        raw = file.read(length)
    if json_entries(raw) > MAX_HEADER_ITEMS:
        raise _damaged(path, "its header has more entries than a checkpoint has tensors")
    header = _parse(raw, path)
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where it has none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not text")
    tensors = {name: _tensor(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, header, size - 8 - length)
    return tensors, metadata


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _tensor(path: Path, name: str, value: Any, data_start: int) -> Tensor:
    match value:
        case {"dtype": str() as dtype, "shape": list() as shape, "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
            if dtype not in STORED_AS:
                raise PararnnError(
                    f"{path}: {shown(name)} has the number format {shown(dtype)}, which is not supported"
                )
            if len(shape) <= 32 and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
                if math.prod(shape) * STORED_AS[dtype].itemsize == end - begin:
                    return file_tensor(path, shown(name), dtype, tuple(shape), data_start + begin)
                raise _damaged(path, f"shape and size of {shown(name)} disagree")
    raise _damaged(path, f"the header entry of {shown(name)} is malformed")


def _check_layout(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    position = 0
    for begin, end in sorted(value["data_offsets"] for value in header.values()):
        if begin != position:
            raise _damaged(path, "its tensors overlap or leave gaps")
        position = end
    if position > data_bytes:
        raise PararnnError(
            f"{path}: this safetensors file is cut short ({data_bytes} bytes of tensors where its header "
            f"says {position}); save or download it again"
        )
    if position != data_bytes:
        raise _damaged(path, "it is longer than its header says")


def _damaged(path: Path, why: str) -> PararnnError:
    return PararnnError(f"{path}: this safetensors file is damaged ({why}); save or download it again")
