"""The operations of `package/operations.py` in MIL, Core ML's language."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from ..package.constants import Array, Linear, Palette, Plain, Stored
from ..package.operations import Operations

_NAMES = {"float16": "fp16", "float32": "fp32"}


def _one(op: Callable[..., Any]) -> Any:
    return staticmethod(lambda x: op(x=x))


def _two(op: Callable[..., Any]) -> Any:
    return staticmethod(lambda x, y: op(x=x, y=y))


class MIL(Operations):
    """Operations of the MIL function that is open."""

    title = "Core ML"

    add, sub, mul, divide, power = map(_two, (mb.add, mb.sub, mb.mul, mb.real_div, mb.pow))
    maximum, equal, not_equal = map(_two, (mb.maximum, mb.equal, mb.not_equal))
    less, less_equal, greater, greater_equal = map(
        _two, (mb.less, mb.less_equal, mb.greater, mb.greater_equal)
    )
    logical_and, logical_or, logical_not = _two(mb.logical_and), _two(mb.logical_or), _one(mb.logical_not)
    abs, exp, sigmoid, silu = map(_one, (mb.abs, mb.exp, mb.sigmoid, mb.silu))
    softplus, tanh, relu = map(_one, (mb.softplus, mb.tanh, mb.relu))

    def leaky_relu(self, x: Any, slope: Any) -> Any:
        """See `Operations`."""
        return mb.leaky_relu(x=x, alpha=slope)

    def elu(self, x: Any, alpha: Any) -> Any:
        """See `Operations`."""
        return mb.elu(x=x, alpha=alpha)

    def dtype(self, x: Any) -> "np.dtype[Any]":
        """See `Operations`."""
        return np.dtype(types.nptype_from_builtin(x.dtype))

    def shape(self, x: Any) -> tuple[int, ...]:
        """See `Operations`."""
        return tuple(x.shape)

    def named(self, x: Any, name: str) -> Any:
        """See `Operations`."""
        x.set_name(name)
        return x

    def constant(self, values: Array) -> Any:
        """See `Operations`."""
        return mb.const(val=values)

    def matrix(self, stored: Stored) -> Any:
        """The variable of its float16 numbers."""
        if isinstance(stored, Linear):
            kind = types.nptype_from_builtin(types.int4 if stored.bits == 4 else types.int8)
            return mb.constexpr_blockwise_shift_scale(data=stored.integers.astype(kind), scale=stored.scale)
        if isinstance(stored, Palette):
            kind = types.nptype_from_builtin(types.uint4)
            lut = stored.table.reshape(*(1,) * stored.indices.ndim, -1, 1)
            return mb.constexpr_lut_to_dense(indices=stored.indices.astype(kind), lut=lut)
        assert isinstance(stored, Plain)
        return mb.const(val=stored.numbers)

    def gather(self, matrix: Any, indices: Any) -> Any:
        """See `Operations`."""
        return mb.gather(x=matrix, indices=indices, axis=0, validate_indices=False)

    def linear(self, x: Any, matrix: Any, bias: Array | None = None) -> Any:
        """See `Operations`."""
        return mb.linear(x=x, weight=matrix, **({} if bias is None else {"bias": bias}))

    def linear_by_head(self, x: Any, matrix: Any) -> Any:
        """See `Operations`."""
        return mb.matmul(x=x, y=matrix, transpose_y=True)

    def convolve(self, x: Any, kernels: Any, bias: Array | None, groups: int) -> Any:
        """See `Operations`."""
        added = {} if bias is None else {"bias": bias}
        return mb.conv(x=x, weight=kernels, groups=groups, pad_type="valid", **added)

    def write_state(self, name: str, state: Any, x: Any) -> None:
        """See `Operations`."""
        mb.coreml_update_state(state=state, value=x)

    def read_state(self, state: Any) -> Any:
        """See `Operations`."""
        return mb.read_state(input=state)

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """See `Operations`."""
        return mb.reshape(x=x, shape=shape)

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        """See `Operations`."""
        return mb.transpose(x=x, perm=axes)

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        """See `Operations`."""
        return mb.concat(values=parts, axis=axis)

    def split(self, x: Any, count: int, axis: int) -> list[Any]:
        """See `Operations`."""
        return list(mb.split(x=x, num_splits=count, axis=axis))

    def slice(self, x: Any, begin: Sequence[int], size: Sequence[int]) -> Any:
        """See `Operations`."""
        return mb.slice_by_size(x=x, begin=begin, size=size)

    def argmax(self, x: Any) -> Any:
        """See `Operations`."""
        return mb.reduce_argmax(x=x, axis=-1, keep_dims=False)

    def mean(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return mb.reduce_mean(x=x, axes=[axis], keep_dims=True)

    def largest(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return mb.reduce_max(x=x, axes=[axis], keep_dims=True)

    def length(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return mb.reduce_l2_norm(x=x, axes=[axis], keep_dims=True)

    def total(self, x: Any, axis: int) -> Any:
        """See `Operations`."""
        return mb.reduce_sum(x=x, axes=[axis], keep_dims=True)

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        """See `Operations`."""
        return mb.select(cond=condition, a=a, b=b)

    def pad(self, x: Any, sides: Sequence[int], number: Any) -> Any:
        """See `Operations`."""
        return mb.pad(x=x, pad=sides, mode="constant", constant_val=self.dtype(x).type(number))

    def cast(self, x: Any, dtype: Any) -> Any:
        """See `Operations`."""
        name = np.dtype(dtype).name
        return x if self.dtype(x) == name else mb.cast(x=x, dtype=_NAMES[name])

    def rsqrt(self, x: Any) -> Any:
        """See `Operations`."""
        return mb.rsqrt(x=x, epsilon=self.dtype(x).type(0))

    def gelu(self, x: Any, exact: bool) -> Any:
        """See `Operations`."""
        return mb.gelu(x=x, mode="EXACT" if exact else "TANH_APPROXIMATION")
