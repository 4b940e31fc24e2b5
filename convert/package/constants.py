"""How a package stores its matrices: as they are, integers with scales, or indices into a palette."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 32  # weights that share a scale in 4 bits
_ROUNDS = 25  # of k-means
_SAMPLE = 1 << 18  # numbers of a matrix that its palette is made from


class Stored(Protocol):
    """A matrix as the package holds it."""

    @property
    def nbytes(self) -> int:
        """Bytes in the package."""

    def values(self, unpacked: Any = np.float16) -> Array:
        """Its numbers, in float32, as they are where they are unpacked in the type `unpacked`."""


class Plain(NamedTuple):
    """Numbers as they are computed with."""

    numbers: Array  # float16 or float32

    @property
    def nbytes(self) -> int:
        """Bytes in the package."""
        return self.numbers.nbytes

    def values(self, unpacked: Any = np.float16) -> Array:
        """Its numbers, in float32, as they are where they are unpacked in the type `unpacked`."""
        return self.numbers.astype(np.float32)


class Linear(NamedTuple):
    """numbers = scale * integers; `scale` has one number for each block of the last axis."""

    integers: Array  # int8
    scale: Array  # float16, as many axes
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes in the package."""
        return self.integers.size * self.bits // 8 + self.scale.nbytes

    def values(self, unpacked: Any = np.float16) -> Array:
        """Its numbers, in float32, as they are where they are unpacked in the type `unpacked`."""
        # The product is rounded to the type; coremltools unpacks in float16.
        block = self.integers.shape[-1] // self.scale.shape[-1]
        scale = np.repeat(self.scale, block, -1).astype(unpacked)
        return (scale * self.integers.astype(unpacked)).astype(np.float32)


class Palette(NamedTuple):
    """numbers = table[indices]."""

    indices: Array  # uint8, below 16
    table: Array  # float16, (16,)

    @property
    def nbytes(self) -> int:
        """Bytes in the package."""
        return self.indices.size // 2 + self.table.nbytes

    def values(self, unpacked: Any = np.float16) -> Array:
        """Its numbers, in float32, as they are where they are unpacked in the type `unpacked`."""
        return self.table[self.indices].astype(np.float32)


def stored(matrix: Array, how: str, plain: Any = np.float16) -> Stored:
    """`matrix` (float32) as "int8", "int4" or "palette4"; else, or where that fails, in the type `plain`.

    int8 has a scale for each row (output channel), int4 one for each `BLOCK` weights of a row, both symmetric
    about zero. What is left plain: rows that `BLOCK` does not divide in int4, and an odd number of weights in
    4 bits.
    """
    if how == "int8":
        return _linear(matrix, matrix.shape[-1], 8)
    if how == "int4" and matrix.shape[-1] % BLOCK == 0:
        return _linear(matrix, BLOCK, 4)
    if how == "palette4" and matrix.size % 2 == 0:
        return _palette(matrix)
    return Plain(matrix.astype(plain))


def kernels(matrices: Stored, begin: int = 0, end: int | None = None) -> Stored:
    """Rows of matrices (..., E, D) as 1x1 convolutions hold them: (n, D, 1, 1), stored in the same way."""

    def cut(array: Array) -> Array:
        return array[..., begin:end, :].reshape(-1, array.shape[-1], 1, 1)

    if isinstance(matrices, Plain):
        return Plain(cut(matrices.numbers))
    if isinstance(matrices, Linear):
        return Linear(cut(matrices.integers), cut(matrices.scale), matrices.bits)
    assert isinstance(matrices, Palette)
    return Palette(cut(matrices.indices), matrices.table)


def _linear(matrix: Array, block: int, bits: int) -> Linear:
    limit = 2 ** (bits - 1) - 1
    grouped = matrix.reshape(*matrix.shape[:-1], -1, block)
    scale = (np.abs(grouped).max(-1) / limit).astype(np.float16)
    # A block too small for float16's normal numbers would lose its scale; it is zero to float16 anyway.
    safe = np.where(scale < np.finfo(np.float16).tiny, np.float16(1), scale)
    integers = np.rint(grouped / safe[..., None].astype(np.float32)).clip(-limit, limit)
    return Linear(integers.astype(np.int8).reshape(matrix.shape), safe, bits)


def _palette(matrix: Array) -> Palette:
    """Sixteen numbers by k-means (Lloyd), which in one dimension is a search in sorted numbers."""
    flat = matrix.reshape(-1)
    sample = np.sort(flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(sample)])
    centres = np.quantile(sample, (np.arange(16) + 0.5) / 16)
    for _ in range(_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(sample, _middles(centres)), [sample.size]])
        counts = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(counts, 1)
        centres = np.where(counts > 0, means, centres)
    table = centres.astype(np.float16)
    indices = np.searchsorted(_middles(table.astype(np.float32)), flat).astype(np.uint8)
    return Palette(indices.reshape(matrix.shape), table)


def _middles(centres: Array) -> Array:
    return (centres[1:] + centres[:-1]) / 2


def total_bytes(weights: Iterable[Stored]) -> int:
    """Size of all weights as stored."""
    return sum(w.nbytes for w in weights)
