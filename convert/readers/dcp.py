"""Folders of torch.distributed.checkpoint: `.metadata` says where in which .distcp file each part lies.

`.metadata` is a bare pickle of plain objects (torch/distributed/checkpoint/metadata.py, filesystem.py):
state_dict_metadata maps a name to the tensor's size and chunks, storage_data maps (name, offset of a chunk)
to (file, first byte, length), and what stands there is a small file as torch.save writes it.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError

from .budget import MAX_PICKLE_BYTES
from .dtypes import STORED_AS, Array
from .links import check_link
from .pickle_names import Record
from .pickles import load_pickle
from .tensors import Box, Tensor
from .torch_file import read_torch_slice
from .wording import shape_text, shown

METADATA = ".metadata"
# Where a trainer keeps the model among other things; the first that is there is taken alone.
_MODEL_PREFIXES = ("model_state_dict.", "state_dict.", "model.")
_OTHER_PREFIXES = ("optimizer", "optim", "scheduler", "lr_scheduler", "step", "epoch", "cfg", "config", "rng")
# More ranks than anyone has: chunks are compared pair by pair.
_MAX_CHUNKS = 10_000

_Chunk = tuple[tuple[int, ...], Tensor]


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """The model's tensors by name; optimizer, scheduler, counters and settings are left out.

    Raises:
        PararnnError: damaged, or a part of a tensor is not there.
    """
    metadata = _metadata(folder)
    try:
        sizes, parts = _described(metadata), _stored(metadata)
    except (TypeError, AttributeError) as error:
        raise _unreadable(folder) from error
    names = _model_names(list(sizes))
    _check_extent(folder, [(key, offset) for key in names for offset in sizes[key][1]], parts)
    tensors = {}
    for key, name in names.items():
        size, offsets = sizes[key]
        chunks = []
        for offset in offsets:
            if (key, offset) not in parts:
                raise PararnnError(
                    f"{folder}: .metadata does not say where a part of {shown(key)} is (at "
                    f"{shape_text(offset)}); it belongs to another run, save the checkpoint again"
                )
            chunks.append((offset, _slice(folder, key, *parts[key, offset])))
        tensors[name] = _assembled(folder, key, size, chunks)
    return tensors


def _metadata(folder: Path) -> Record:
    path = folder / METADATA
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise _unreadable(folder)
    content = load_pickle(path.read_bytes(), str(path))
    if not isinstance(content, Record) or content.kind != "Metadata":
        raise _unreadable(folder)
    return content


def _check_extent(
    folder: Path,
    chunks: list[tuple[str, tuple[int, ...]]],
    parts: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]],
) -> None:
    """Each part has bytes of its own: one that many names share could be opened without end."""
    named = [parts[chunk] for chunk in chunks if chunk in parts]
    files = {file: folder / file for file, _, _ in named if file == Path(file).name}
    # Not Path.is_file, which raises where a name is too long for any file.
    sizes = {file: path.stat().st_size for file, path in files.items() if os.path.isfile(path)}
    # A file that is not there or is too short is named where its part is opened.
    inside = [length for file, start, length in named if start + length <= sizes.get(file, -1)]
    if sum(inside) > sum(sizes.values()):
        raise PararnnError(
            f"{folder}: its .metadata names more bytes than the .distcp files beside it have; copy the files "
            "of all ranks into one folder, or save the checkpoint again"
        )


def _described(metadata: Record) -> dict[str, tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """name -> size, and each chunk's offset; entries that are no tensors are left out."""
    found = {}
    # Every chunk is stored somewhere: a list that many tensors share is no checkpoint's.
    left = len(metadata.get("storage_data"))
    for name, entry in metadata.get("state_dict_metadata").items():
        if isinstance(entry, Record) and entry.kind == "TensorStorageMetadata":
            left -= len(entry.get("chunks"))
            if left < 0:
                raise TypeError("more chunks than are stored")
            found[_text(name)] = (
                _numbers(entry.get("size")),
                [_numbers(chunk.get("offsets")) for chunk in entry.get("chunks")],
            )
    return found


def _stored(metadata: Record) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """(name, offset) -> file, first byte, length."""
    found = {}
    for index, info in metadata.get("storage_data").items():
        if index.get("offset") is not None:
            start, length = _numbers((info.get("offset"), info.get("length")))
            place = (_text(info.get("relative_path")), start, length)
            found[_text(index.get("fqn")), _numbers(index.get("offset"))] = place
    return found


def _model_names(keys: list[str]) -> dict[str, str]:
    """Key -> name without the trainer's prefix, for those keys that are the model's."""
    for prefix in _MODEL_PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            inside = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
            return inside | {key: key for key in keys if key.startswith("lm_head.")}
    return {key: key for key in keys if not key.split(".")[0].startswith(_OTHER_PREFIXES)}


def _slice(folder: Path, key: str, file: str, start: int, length: int) -> Tensor:
    path = folder / file
    if file != Path(file).name or not os.path.isfile(path):
        raise PararnnError(
            f"{folder}: {shown(file)}, which holds a part of {shown(key)}, is not there; copy the files of "
            "all ranks into one folder"
        )
    check_link(path, folder)
    if start + length > path.stat().st_size:
        raise PararnnError(f"{path}: it is cut short, or of another run than .metadata; copy it again")
    return read_torch_slice(path, start, length, key)


def _assembled(folder: Path, key: str, size: tuple[int, ...], chunks: list[_Chunk]) -> Tensor:
    """The whole tensor from its chunks, which must fill it without overlapping."""
    if len({chunk.dtype for _, chunk in chunks}) != 1 or not _fills(size, chunks):
        raise PararnnError(
            f"{folder}: the parts of {shown(key)} do not make up its shape {shape_text(size)}; files of "
            "different runs are mixed, copy those of one"
        )
    first = chunks[0][1]
    if len(chunks) == 1:
        return first

    def load(box: Box) -> Array:
        array = np.empty([stop - start for start, stop in box], STORED_AS[first.dtype])
        for offset, chunk in chunks:
            ranges = [
                (max(start, at), min(stop, at + n))
                for (start, stop), at, n in zip(box, offset, chunk.shape, strict=True)
            ]
            if all(start < stop for start, stop in ranges):
                inside = tuple((a - at, b - at) for (a, b), at in zip(ranges, offset, strict=True))
                place = tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(ranges, box, strict=True))
                array[place] = chunk.load(inside)
        return array

    return replace(first, shape=size, load=load, storage=None)


def _fills(size: tuple[int, ...], chunks: list[_Chunk]) -> bool:
    if len(chunks) > _MAX_CHUNKS or any(len(o) != len(size) or len(c.shape) != len(size) for o, c in chunks):
        return False
    begins = np.array([offset for offset, _ in chunks], np.int64).reshape(len(chunks), -1)
    ends = begins + np.array([chunk.shape for _, chunk in chunks], np.int64).reshape(len(chunks), -1)
    inside = bool((ends <= np.array(size)).all())
    apart = all(
        ((ends[i + 1 :] <= begins[i]) | (begins[i + 1 :] >= ends[i])).any(axis=1).all()
        for i in range(len(chunks) - 1)
    )
    volume = sum(int(np.prod(chunk.shape, dtype=object)) for _, chunk in chunks)
    return inside and apart and volume == int(np.prod(size, dtype=object))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) > 32
        or any(type(n) is not int or not 0 <= n < 1 << 62 for n in value)
    ):
        raise TypeError("not sizes")
    return value


def _unreadable(folder: Path) -> PararnnError:
    return PararnnError(
        f"{folder}: its .metadata is damaged or of an unknown version; turn the folder into one file in "
        f"PyTorch: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
    )
