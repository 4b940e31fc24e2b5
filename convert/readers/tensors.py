"""A tensor in a file: its shape and format are known, its bytes are read when asked for, a box at a time."""

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from mlx_pararnn.errors import PararnnError

from .dtypes import STORED_AS, Array

# (start, stop) of each axis.
Box = tuple[tuple[int, int], ...]
# Reads some numbers when it is called, on any thread.
Piece = Callable[[], Array]

# How much of a tensor is in memory at once, on each thread.
PIECE_BYTES = 4 << 20
# Reading costs as much as so many bytes more: where strides leave smaller gaps, they are read too.
_READ_COST = 16 << 10
# How far ahead the system is told what will be read, where it can be told: several threads read a piece
# each, in which it sees no order by itself.
_READ_AHEAD = 8 << 20


@dataclass(frozen=True)
class Tensor:
    """`load(box)` gives the numbers in `box`, in an array of its shape.

    Attributes:
        name: as the file spells it, for messages.
        dtype: safetensors' tag ("F32", "BF16", ...); BF16 arrays are uint16 bits.
        storage: equal for two tensors that are the same bytes of the same file; None where not known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[Box], Array] = field(repr=False)
    storage: object = None

    def read(self) -> Array:
        """All its numbers."""
        return self.load(tuple((0, n) for n in self.shape))

    def rows(self, start: int, stop: int) -> "Tensor":
        """Rows start..stop of the first axis as a tensor of their own, still unread."""
        load = self.load
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            load=lambda box: load(((start + box[0][0], start + box[0][1]), *box[1:])),
            storage=None,
        )

    def pieces(self) -> Iterator[Piece]:
        """The whole tensor in C order, some numbers at a time."""
        for box in boxes(self.shape, STORED_AS[self.dtype].itemsize):
            yield partial(self.load, box)


def boxes(shape: Sequence[int], itemsize: int) -> Iterator[Box]:
    """Cut a tensor of `shape` into boxes of at most PIECE_BYTES, in C order; rows of a matrix stay whole."""
    if math.prod(shape) == 0:
        return
    limit = PIECE_BYTES // itemsize
    cut = range(max(1, len(shape) - 1))
    axis = next((axis for axis in cut if math.prod(shape[axis + 1 :]) <= limit), cut[-1])
    step = max(1, limit // math.prod(shape[axis + 1 :]))
    steps = [1] * axis + [step] + list(shape[axis + 1 :])  # one more than axes for a scalar
    yield from product(
        *(
            [(start, min(start + step, n)) for start in range(0, n, step)]
            for n, step in zip(shape, steps, strict=False)
        )
    )


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
    steps = strides or _c_strides(shape)

    def load(box: Box) -> Array:
        array = np.empty([stop - start for start, stop in box], stored)
        first = sum(start * step for (start, _), step in zip(box, steps, strict=True))
        try:
            with open(path, "rb", buffering=0) as file:
                _fill(file, array, offset + first * stored.itemsize, steps)
        except EOFError as error:
            raise PararnnError(
                f"{path}: the file ended while {name} was read; it changed during the conversion"
            ) from error
        except OSError as error:
            raise PararnnError(f"{path}: cannot be read ({error.strerror})") from error
        return array

    return Tensor(name, shape, dtype, load, (path, offset, dtype, shape, steps))


def _fill(file: io.RawIOBase, out: Array, offset: int, strides: tuple[int, ...]) -> None:
    """Fill `out` with numbers that stand `strides` elements apart, the first at byte `offset`.

    The axis with the longest strides is cut up until what is read is small or dense enough.
    """
    if out.size == 0:
        return
    if out.flags.c_contiguous and _is_c_order(out.shape, strides):
        _read_into(file, out.reshape(-1), offset)
        return
    item = out.itemsize
    axis = max(range(out.ndim), key=lambda axis: (out.shape[axis] > 1, strides[axis]))
    count, stride = out.shape[axis], strides[axis]
    span = 1 + sum((n - 1) * s for n, s in zip(out.shape, strides, strict=True))
    gaps = (count - 1) * (stride - 1 - (span - 1 - (count - 1) * stride))
    if count > 1 and (gaps * item > count * _READ_COST or span * item > PIECE_BYTES):
        step = 1 if gaps * item > count * _READ_COST else (count + 1) // 2
        for start in range(0, count, step):
            part = out[(slice(None),) * axis + (slice(start, start + step),)]
            _fill(file, part, offset + start * stride * item, strides)
        return
    flat = np.empty([span], out.dtype)
    _read_into(file, flat, offset)
    out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, [s * item for s in strides], writeable=False)


def _read_into(file: io.RawIOBase, flat: Array, offset: int) -> None:
    buffer = flat.data.cast("B")
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), offset + _READ_AHEAD, len(buffer), os.POSIX_FADV_WILLNEED)
    file.seek(offset)
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return math.prod(shape) == 0 or all(
        n == 1 or s == c for n, s, c in zip(shape, strides, _c_strides(shape), strict=True)
    )
