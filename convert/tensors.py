"""A tensor in a file: its shape and format are known, its bytes are read when asked for, by rows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mlx_pararnn.errors import PararnnError

from .dtypes import STORED_AS, Array

PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class Tensor:
    """`load(start, stop)` gives rows start..stop of the first axis (a scalar is one row).

    Attributes:
        name: as the file spells it, for messages.
        dtype: safetensors' tag ("F32", "BF16", ...); BF16 arrays are uint16 bits.
        storage: equal for two tensors that are the same bytes of the same file; None where not known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[int, int], Array] = field(repr=False)
    storage: object = None

    @property
    def row_count(self) -> int:
        return self.shape[0] if self.shape else 1

    def read(self) -> Array:
        return self.load(0, self.row_count).reshape(self.shape)

    def rows(self, start: int, stop: int) -> "Tensor":
        """Rows start..stop as a tensor of their own, still unread."""
        load = self.load
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            load=lambda first, last: load(start + first, start + last),
            storage=None,
        )

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[Array]:
        """The whole tensor, some rows at a time."""
        if math.prod(self.shape) == 0:
            return
        row_bytes = math.prod(self.shape[1:]) * STORED_AS[self.dtype].itemsize
        step = max(1, piece_bytes // row_bytes)
        for start in range(0, self.row_count, step):
            yield self.load(start, min(start + step, self.row_count))


def file_tensor(
    path: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offset: int,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """The tensor whose first element stands at byte `offset`; strides count elements, None means C order.

    The caller has checked that all of it lies inside the file.
    """
    stored = STORED_AS[dtype]
    storage = (path, offset, dtype, shape, strides or _c_strides(shape))
    if strides is None or _is_c_order(shape, strides):
        row = math.prod(shape[1:])

        def load(start: int, stop: int) -> Array:
            flat = _read(path, name, offset + start * row * stored.itemsize, (stop - start) * row, stored)
            return flat.reshape(stop - start, *shape[1:])

    else:

        def load(start: int, stop: int) -> Array:
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            flat = _read(path, name, offset, span, stored)
            view = np.lib.stride_tricks.as_strided(
                flat, shape, [s * stored.itemsize for s in strides], writeable=False
            )
            return np.ascontiguousarray(view[start:stop])

    return Tensor(name, shape, dtype, load, storage)


def _read(path: Path, name: str, offset: int, count: int, stored: np.dtype) -> Array:
    with open(path, "rb") as file:
        file.seek(offset)
        array = np.fromfile(file, stored, count)
    if array.size != count:
        raise PararnnError(f"{path}: the file ended while {name} was read; it changed during the conversion")
    return array


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return math.prod(shape) == 0 or all(
        n == 1 or s == c for n, s, c in zip(shape, strides, _c_strides(shape), strict=True)
    )
