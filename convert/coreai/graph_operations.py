"""The operations of `package/operations.py` in Core AI's language."""

from collections.abc import Callable, Sequence
from typing import Any

import coreai.authoring as core
import numpy as np

from ..package.constants import Array, Linear, Palette, Plain, Stored
from ..package.operations import Operations

_TYPES = {"float16": core.float16, "float32": core.float32, "int32": core.int32}


def _one(op: Callable[..., Any]) -> Any:
    return staticmethod(lambda x: op(x))


def _two(op: Callable[..., Any]) -> Any:
    return staticmethod(lambda x, y: op(x, y))


class CoreAI(Operations):
    """Operations of the Core AI graph that is open, whose activations are of type `dtype`.

    Attributes:
        written: name -> the variable that a state becomes.
    """

    title = "Core AI"

    add, sub = _two(core.broadcasting_add), _two(core.broadcasting_sub)
    mul, divide = _two(core.broadcasting_mul), _two(core.broadcasting_divide)
    power, maximum = _two(core.broadcasting_pow), _two(core.broadcasting_maximum)
    equal, not_equal = _two(core.broadcasting_equal), _two(core.broadcasting_not_equal)
    greater = _two(core.broadcasting_greater)
    logical_and, logical_or = _two(core.broadcasting_and), _two(core.broadcasting_or)
    logical_not = _one(core.not_)
    abs, exp, rsqrt, sigmoid = map(_one, (core.abs_, core.exp, core.rsqrt, core.sigmoid))
    silu, tanh, relu = map(_one, (core.silu, core.tanh, core.relu))

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self.written: dict[str, Any] = {}

    def dtype(self, x: Any) -> "np.dtype[Any]":
        """See `Operations`."""
        return np.dtype(x.dtype if isinstance(x, np.ndarray | np.generic) else x.type.dtype.numpy)

    def shape(self, x: Any) -> tuple[int, ...]:
        """See `Operations`."""
        return tuple(x.shape if isinstance(x, np.ndarray) else x.type.shape)

    def named(self, x: Any, name: str) -> Any:
        """`x`: the graph's signature has the names."""
        return x

    def constant(self, values: Array) -> Any:
        """See `Operations`."""
        return core.constant.constant(np.ascontiguousarray(values))

    def matrix(self, stored: Stored) -> "_Matrix":
        """See `Operations`."""
        return _Matrix(stored, self._dtype)

    def gather(self, matrix: "_Matrix", indices: Any) -> Any:
        """See `Operations`."""
        return matrix.rows(core.expand_dims(indices, _int32(len(self.shape(indices)))))

    def linear(self, x: Any, matrix: "_Matrix", bias: Array | None = None) -> Any:
        """See `Operations`."""
        y = core.broadcasting_batch_matmul(x, matrix.transposed())
        return y if bias is None else self.add(y, bias)

    def linear_by_head(self, x: Any, matrix: "_Matrix") -> Any:
        """See `Operations`."""
        return core.broadcasting_batch_matmul(x, matrix.transposed())

    def convolve(self, x: Any, kernels: Any, bias: Array | None, groups: int) -> Any:
        """See `Operations`; by an array. Core AI has no convolution of one dimension: a second is 1 long."""
        one = np.array([1, 1], np.uint32)
        flat = len(self.shape(x)) == 3
        if flat:
            x, kernels = core.expand_dims(x, _int32(2)), kernels[:, :, None]
        y = core.conv2d(x, kernels, one, one, np.uint32(groups))
        y = core.shrink_dims(y, _int32(2)) if flat else y
        return y if bias is None else self.add(y, bias.reshape(-1, *[1] * (len(self.shape(y)) - 2)))

    def read_state(self, state: Any) -> Any:
        """See `Operations`."""
        return state

    def write_state(self, name: str, state: Any, x: Any) -> None:
        """See `Operations`."""
        self.written[name] = x

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """See `Operations`."""
        return core.reshape(x, np.array(shape, np.uint32))

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        """See `Operations`."""
        return core.transpose(x, np.array(axes, np.uint32))

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        """See `Operations`."""
        return parts[0] if len(parts) == 1 else core.concat(np.int32(axis), list(parts))

    def split(self, x: Any, count: int, axis: int) -> list[Any]:
        """See `Operations`."""
        size = list(self.shape(x))
        size[axis] //= count
        begins = [[i * size[axis] if a == axis else 0 for a in range(len(size))] for i in range(count)]
        return [self.slice(x, begin, size) for begin in begins]

    def slice(self, x: Any, begin: Sequence[int], size: Sequence[int]) -> Any:
        """See `Operations`."""
        ends = [b + n for b, n in zip(begin, size, strict=True)]
        return core.slice_(x, _int32(*begin), _int32(*ends), _int32(*[1] * len(ends)))

    def pad(self, x: Any, sides: Sequence[int], number: Any) -> Any:
        """See `Operations`."""
        sides = [*sides, *[0] * (2 * len(self.shape(x)) - len(sides))]
        return core.pad(x, np.array(sides, np.uint32), self.dtype(x).type(number))

    def mean(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return core.reduce_mean(x, _int32(axis))

    def largest(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return core.reduce_max(x, _int32(axis))

    def length(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return core.sqrt(self.total(self.mul(x, x), axis))

    def total(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return core.reduce_sum(x, _int32(axis))

    def cast(self, x: Any, dtype: Any) -> Any:
        """See `Operations`."""
        return _cast(x, np.dtype(dtype))

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        """See `Operations`."""
        return core.broadcasting_where(condition, a, b)

    def less(self, x: Any, y: Any) -> Any:
        """See `Operations`."""
        return self.greater(y, x)

    def less_equal(self, x: Any, y: Any) -> Any:
        """See `Operations`."""
        return self.greater_equal(y, x)

    def greater_equal(self, x: Any, y: Any) -> Any:
        """See `Operations`."""
        return self.logical_or(self.greater(x, y), self.equal(x, y))

    def softplus(self, x: Any) -> Any:
        """max(x, 0) + log(1 + exp(-|x|))."""
        one = self.dtype(x).type(1)
        return self.add(self.relu(x), core.log(self.add(self.exp(self.sub(one - one, self.abs(x))), one)))

    def leaky_relu(self, x: Any, slope: Any) -> Any:
        """See `Operations`; for slopes below 1."""
        return self.maximum(x, self.mul(x, slope))

    def elu(self, x: Any, alpha: Any) -> Any:
        """See `Operations`."""
        zero, one = self.dtype(x).type(0), self.dtype(x).type(1)
        below = self.mul(self.sub(self.exp(core.broadcasting_minimum(x, zero)), one), alpha)
        return self.select(self.greater(x, zero), x, below)

    def gelu(self, x: Any, exact: bool) -> Any:
        """See `Operations`."""
        return core.gelu(x, approximate="none" if exact else "tanh")


class _Matrix:
    """A stored matrix in a graph: its constants, unpacked for a product and by the row for a look-up.

    This version of coreai-core writes numbers of 4 bits a byte each, and its runtime reads two from a byte.
    So two neighbours are one index of 8 bits here, into a table of 256 pairs: as small, and right.
    """

    def __init__(self, stored: Stored, dtype: "np.dtype[Any]") -> None:
        self._stored, self._dtype = stored, dtype
        self._length = 0  # of a row in 4 bits
        if isinstance(stored, Plain):
            self._parts = [_constant(stored.numbers)]
        elif isinstance(stored, Linear) and stored.bits == 8:
            self._parts = [_constant(stored.integers), _constant(stored.scale.astype(dtype))]
        elif isinstance(stored, Linear):
            self._length = stored.integers.shape[-1]
            self._parts = [_constant(_paired(stored.integers & 15)), _constant(stored.scale.astype(dtype))]
        else:
            assert isinstance(stored, Palette)
            self._length = stored.indices.shape[-1]
            self._parts = [_constant(_paired(stored.indices))]
        self._whole: Any = None

    def transposed(self) -> Any:
        """Its last two axes exchanged, with an axis of length 1 in front."""
        if self._whole is None:
            whole = self._unpacked(self._parts)
            axes = list(range(len(whole.type.shape)))
            whole = core.transpose(whole, np.array([*axes[:-2], axes[-1], axes[-2]], np.uint32))
            self._whole = core.expand_dims(whole, _int32(0))
        return self._whole

    def rows(self, places: Any) -> Any:
        """The rows at `places` (..., 1)."""
        return self._unpacked([core.gather_nd(part, places) for part in self._parts])

    def _unpacked(self, parts: list[Any]) -> Any:
        stored, numbers = self._stored, parts[0]
        if isinstance(stored, Plain):
            return numbers
        if isinstance(stored, Palette):
            return self._from_pairs(numbers, stored.table.astype(self._dtype))
        assert isinstance(stored, Linear)
        if stored.bits == 4:
            integers = np.arange(16) - 16 * (np.arange(16) > 7)
            numbers = self._from_pairs(numbers, integers.astype(self._dtype))
        scale = parts[1]
        shape = tuple(scale.type.shape)
        return core.blockwise_shift_scale(
            numbers, scale, _zeros(shape, numbers), _constant(np.zeros(shape, self._dtype))
        )

    def _from_pairs(self, indices: Any, table: Array) -> Any:
        """table[i] of the two numbers in each byte of `indices`."""
        pairs = np.stack([table[np.arange(256) & 15], table[np.arange(256) >> 4]], axis=-1)
        rank = len(indices.type.shape)
        lut = _constant(pairs.reshape(*(1,) * rank, 256, 2))
        found = core.lut_to_dense(indices, lut, np.int16(rank - 1))
        *shape, even = found.type.shape
        if even == self._length:
            return found
        return core.slice_(found, _int32(*[0] * rank), _int32(*shape, self._length), _int32(*[1] * rank))


def _paired(numbers: Array) -> Array:
    """Numbers of 4 bits, two of the last axis in a byte; a 0 is added to an odd number of them."""
    numbers = np.pad(numbers, [*[(0, 0)] * (numbers.ndim - 1), (0, numbers.shape[-1] % 2)])
    return (numbers[..., ::2] | numbers[..., 1::2] << 4).astype(np.uint8)


def _zeros(shape: tuple[int, ...], like: Any) -> Any:
    return _constant(np.zeros(shape, like.type.dtype.numpy))


def _constant(values: Array) -> Any:
    return core.constant.constant(np.ascontiguousarray(values))


def _cast(x: Any, dtype: "np.dtype[Any]") -> Any:
    return x if np.dtype(x.type.dtype.numpy) == dtype else core.cast(x, _TYPES[dtype.name])


def _int32(*numbers: int) -> Array:
    return np.array(numbers, np.int32)
