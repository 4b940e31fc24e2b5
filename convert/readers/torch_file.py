"""The zip files that torch.save writes: one pickle that says what is there, one stored record a storage."""

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from mlx_pararnn.errors import PararnnError

from .budget import MAX_DIRECTORY_BYTES, MAX_PICKLE_BYTES, OverBudget, check_count
from .dtypes import STORED_AS
from .pickle_names import EXPANDED, QUANTIZED, UNREADABLE_TENSOR, Record, TensorRef
from .pickles import load_pickle
from .tensors import Tensor, file_tensor
from .wording import shown

_SAVE = 'torch.save(model.state_dict(), "weights.pt")'
_RESAVE = f"load it in PyTorch and save the weights: {_SAVE}"
_STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model", "module")
_CONFIG_KEYS = ("cfg", "config")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of the model's state dict, by name, and the training configuration where it is plain data.

    A training checkpoint is searched under model_state_dict, state_dict, model and module; what else it
    holds (optimizer, scheduler) is named by the pickle but its bytes are never read.

    Raises:
        PararnnError: it is damaged, TorchScript, quantized, or names anything but plain data and tensors.
    """
    archive = _Archive(path)
    content = load_pickle(archive.pickle_bytes(), str(path))
    state_dict, config = _state_dict(content, path)
    check_count(path, len(state_dict))
    for name, value in state_dict.items():
        # PyTorch's quantized layers keep a pair of weight and bias.
        for part in value[:2] if isinstance(value, tuple) else (value,):
            if isinstance(part, Record) and part.kind == UNREADABLE_TENSOR:
                raise PararnnError(f"{path}: {shown(str(name))} {_unreadable(part.arguments[0])}")
    tensors = {
        name: archive.tensor(name, value)
        for name, value in state_dict.items()
        if isinstance(name, str) and isinstance(value, TensorRef)
    }
    return tensors, config


def _unreadable(kind: str) -> str:
    if kind == EXPANDED:
        return "is an expanded view, of more numbers than the file holds; save it whole: .contiguous()"
    if kind == QUANTIZED:
        return f"is quantized, which cannot be converted; save the unquantized model: {_SAVE}"
    return f"has the number format {kind}, which is not supported"


def read_torch_slice(path: Path, start: int, length: int, name: str) -> Tensor:
    """The single tensor that `torch.save` wrote to `length` bytes of the file, from byte `start`.

    Raises:
        PararnnError: those bytes are not such a file.
    """
    archive = _Archive(path, start, length)
    content = load_pickle(archive.pickle_bytes(), str(path))
    if not isinstance(content, TensorRef):
        raise PararnnError(f"{path}: where {shown(name)} should be is no tensor; save or copy the file again")
    return archive.tensor(name, content)


class _Archive:
    """Where each record of a zip file lies; records are stored, not compressed, and read by offset.

    The archive may be a part of the file: `length` bytes from byte `start`.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.path = path
        self.start = start
        self.begins: dict[str, int] = {}
        self.size = path.stat().st_size if length is None else length
        self.records = self._directory()
        self._check_layout()
        pickles = [name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in self.records):
            raise PararnnError(
                f"{path}: this is a TorchScript archive, which holds a program; load it with "
                'torch.jit.load and save its weights: torch.save(model.state_dict(), "weights.pt")'
            )
        if len(pickles) != 1:
            raise PararnnError(
                f"{path}: this is a zip file, but not a PyTorch checkpoint (no data.pkl inside)"
            )
        self.root = pickles[0].removesuffix("data.pkl")
        byteorder = self.records.get(self.root + "byteorder")
        if byteorder and self.read(byteorder, limit=16).strip() != b"little":
            raise PararnnError(
                f"{path}: it was written on a big-endian machine, which is not supported; {_RESAVE}"
            )

    def pickle_bytes(self) -> bytes:
        return self.read(self.records[self.root + "data.pkl"], MAX_PICKLE_BYTES)

    def tensor(self, name: str, ref: TensorRef) -> Tensor:
        """The tensor called `name`, checked to lie inside its record."""
        record = self.records.get(f"{self.root}data/{ref.storage.key}")
        itemsize = STORED_AS[ref.storage.dtype].itemsize
        if record is None or record.file_size < ref.storage.numel * itemsize:
            raise PararnnError(
                f"{self.path}: the data of {shown(name)} is missing or too short; save or download the file "
                "again"
            )
        offset = self.offset(record) + ref.offset * itemsize
        return file_tensor(self.path, shown(name), ref.storage.dtype, ref.shape, offset, ref.strides)

    def read(self, record: zipfile.ZipInfo, limit: int) -> bytes:
        if record.file_size > limit:
            raise self._damaged()
        with open(self.path, "rb") as file:
            file.seek(self.offset(record))
            return file.read(record.file_size)

    def offset(self, record: zipfile.ZipInfo) -> int:
        """Where in the file the record's bytes begin."""
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise PararnnError(
                f"{self.path}: its records are compressed, which torch.save never does; unzip and re-zip it "
                f"without compression, or {_RESAVE}"
            )
        if record.flag_bits & 1:
            raise PararnnError(
                f"{self.path}: its records are encrypted, which torch.save never does; {_RESAVE}"
            )
        return self.start + self.begins[record.filename]

    def _check_layout(self) -> None:
        """Find where each record's bytes begin, and refuse an archive that others may read as another one.

        torch.save writes records one after the other from the first byte on, each with its name before it.
        """
        end = 0
        if any(record.header_offset >= self.size for record in self.records.values()):
            raise self._damaged()
        with open(self.path, "rb") as file:
            for name, record in sorted(self.records.items(), key=lambda item: item[1].header_offset):
                file.seek(self.start + record.header_offset)
                header = file.read(_LOCAL_HEADER.size)
                if len(header) < _LOCAL_HEADER.size:
                    raise self._damaged()
                signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
                start = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
                if signature != b"PK\x03\x04" or start + record.compress_size > self.size:
                    raise self._damaged()
                if not self.begins and record.header_offset:
                    raise self._untidy("bytes stand before its first record")
                if record.header_offset < end:
                    raise self._untidy(f"{shown(name)} lies inside another record")
                if file.read(name_length) != name.encode():
                    raise self._untidy(f"{shown(name)} is called otherwise where it stands")
                if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise self._untidy(f"{shown(name)} is the name of a file elsewhere")
                self.begins[name] = start
                end = start + record.compress_size

    def _untidy(self, what: str) -> PararnnError:
        return PararnnError(f"{self.path}: {what}, as in no file of torch.save; {_RESAVE}")

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with (
                open(self.path, "rb") as file,
                zipfile.ZipFile(_Window(file, self.start, self.size)) as archive,
            ):
                records = archive.infolist()
        except OverBudget as error:
            raise PararnnError(f"{self.path}: {error}; {_RESAVE}") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
            raise self._damaged() from error
        by_name = {record.filename: record for record in records}
        if len(by_name) != len(records) or any(record.header_offset < 0 for record in records):
            raise self._damaged()
        return by_name

    def _damaged(self) -> PararnnError:
        return PararnnError(
            f"{self.path}: this PyTorch file is cut short or damaged; save or download it again"
        )


class _Window(io.RawIOBase):
    """`length` bytes of a file from byte `start`, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise ValueError("before the beginning")
        self.position = origin + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.length - self.position)
        size = rest if size < 0 else min(size, rest)
        if size > MAX_DIRECTORY_BYTES:
            raise OverBudget("the zip file lists more records than a checkpoint has")
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _state_dict(content: Any, path: Path) -> tuple[dict[Any, Any], dict[str, Any] | None]:
    config = None
    # Bounded: a pickle can nest a dict in itself.
    for _ in range(8):
        if not isinstance(content, dict):
            break
        config = config or next(
            (plain for key in _CONFIG_KEYS if (plain := _plain_dict(content.get(key)))), None
        )
        inner = next((content[key] for key in _STATE_DICT_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            if any(map(_is_tensor, content.values())):
                return content, config
            break
        content = inner
    raise PararnnError(f"{path}: there is no state dict inside (a dict of names and tensors); {_RESAVE}")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRef) or (isinstance(value, Record) and value.kind == UNREADABLE_TENSOR)


def _plain_dict(value: Any) -> dict[str, Any] | None:
    """`value` where it is a dict of JSON's kinds of value and not very large, else None."""
    return value if isinstance(value, dict) and _plain_size(value, depth=16) <= 10_000 else None


def _plain_size(value: Any, depth: int) -> float:
    # Not a plain recursion over everything: shared parts can make a small pickle describe a huge tree.
    if value is None or isinstance(value, (bool, int, str)):
        return 1
    if isinstance(value, float):
        return 1 if math.isfinite(value) else math.inf
    if not isinstance(value, (dict, list, tuple)) or depth == 0:
        return math.inf
    parts = list(value.values()) if isinstance(value, dict) else list(value)
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return math.inf
    total = 1.0
    for part in parts:
        total += _plain_size(part, depth - 1)
        if total > 10_000:
            return math.inf
    return total
