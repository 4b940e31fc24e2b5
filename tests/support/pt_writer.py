"""Writes files as torch.save does, without torch: a pickle of our own making and one record a storage."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"<f4": "FloatStorage", "<f8": "DoubleStorage", "<f2": "HalfStorage", "<u2": "BFloat16Storage",
            "<i8": "LongStorage", "|i1": "CharStorage"}  # fmt: skip


@dataclass
class Call:
    """GLOBAL, its arguments, REDUCE: what a pickle does to run a function."""

    module: str
    name: str
    arguments: tuple


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle only names."""

    module: str
    name: str


@dataclass
class Made:
    """NEWOBJ and BUILD: an object of a class, and its state."""

    module: str
    name: str
    state: Any


@dataclass
class Raw:
    """Instructions put into the pickle as they are."""

    code: bytes


@dataclass
class View:
    """A strided view of a storage; what torch writes for a slice, a transpose or a tied weight."""

    storage: np.ndarray
    offset: int
    shape: tuple
    strides: tuple
    numel: int | None = None


def write_pt(path: Path, value: Any, extra: dict[str, bytes] | None = None) -> Path:
    """`value` (dicts, lists, scalars, arrays, Views, Calls) as a .pt file; uint16 means bfloat16."""
    records: list[np.ndarray] = []
    code = b"\x80\x02" + _encode(value, records) + b"."
    return write_archive(
        path, code, {f"data/{i}": r.tobytes() for i, r in enumerate(records)} | (extra or {})
    )


def write_archive(path: Path, pickle: bytes, records: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in {
            "data.pkl": pickle,
            "byteorder": b"little",
            **records,
            "version": b"3\n",
        }.items():
            archive.writestr(f"{path.stem}/{name}", content)
    return path


def _encode(value: Any, records: list[np.ndarray]) -> bytes:
    match value:
        case Raw():
            return value.code
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        case dict():
            items = b"".join(_encode(k, records) + _encode(v, records) for k, v in value.items())
            return b"}(" + items + b"u"
        case list():
            return b"](" + b"".join(_encode(v, records) for v in value) + b"e"
        case tuple():
            return b"(" + b"".join(_encode(v, records) for v in value) + b"t"
        case Named():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            function = _encode(Named(value.module, value.name), records)
            return function + _encode(value.arguments, records) + b"R"
        case Made():
            kind = _encode(Named(value.module, value.name), records)
            return kind + b")\x81" + _encode(value.state, records) + b"b"
        case np.ndarray():
            strides = tuple(s // value.itemsize for s in value.strides)
            return _encode(View(np.ascontiguousarray(value), 0, value.shape, strides), records)
        case View():
            return _encode_view(value, records)
    raise TypeError(type(value))


def _encode_view(view: View, records: list[np.ndarray]) -> bytes:
    index = next((i for i, known in enumerate(records) if known is view.storage), len(records))
    if index == len(records):
        records.append(view.storage)
    kind = STORAGES[view.storage.dtype.str]
    numel = view.storage.size if view.numel is None else view.numel
    storage = (
        b"(" + _encode("storage", records) + f"ctorch\n{kind}\n".encode() + _encode(str(index), records)
        + _encode("cpu", records) + _encode(numel, records) + b"tQ"
    )  # fmt: skip
    hooks = Call("collections", "OrderedDict", ())
    parts = (Raw(storage), view.offset, tuple(view.shape), tuple(view.strides), False, hooks)
    return _encode(Call("torch._utils", "_rebuild_tensor_v2", parts), records)
