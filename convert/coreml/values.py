"""MIL variables with operators, and the op namespace F over them: what a cell's `step` runs on."""

from collections.abc import Callable
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from mlx_pararnn.cells.activations import ACTIVATIONS, LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE, Functions
from mlx_pararnn.errors import PararnnError

_NUMBERS: Any = (int, float, np.generic)
_MIL_NAMES = {"float16": "fp16", "float32": "fp32"}


class Value:
    """A variable of a MIL program; arithmetic adds operations to the program.

    Numbers join with the variable's type; + 0, * 1 and * 0 add nothing, so derivatives that are constant
    cost nothing.
    """

    __array_ufunc__ = None  # NumPy numbers leave `number * value` to Value
    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("var",)

    def __init__(self, var: Any) -> None:
        self.var = var

    @property
    def dtype(self) -> Any:
        """Its NumPy dtype."""
        return np.dtype(types.nptype_from_builtin(self.var.dtype))

    def __add__(self, other: Any) -> Any:
        if isinstance(other, _NUMBERS) and other == 0:
            return self
        return _binary(mb.add, self, other)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, _NUMBERS) and other == 0:
            return self
        return _binary(mb.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return -self if isinstance(other, _NUMBERS) and other == 0 else _binary(mb.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, _NUMBERS) and other in (0, 1):
            return 0.0 if other == 0 else self
        return _binary(mb.mul, self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self if isinstance(other, _NUMBERS) and other == 1 else _binary(mb.real_div, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return 0.0 if isinstance(other, _NUMBERS) and other == 0 else _binary(mb.real_div, other, self)

    def __pow__(self, exponent: Any) -> Any:
        if isinstance(exponent, _NUMBERS) and exponent in (1, 2):
            return self if exponent == 1 else self * self
        return _binary(mb.pow, self, exponent)

    def __neg__(self) -> Any:
        return self * -1.0

    def __eq__(self, other: Any) -> Any:
        return _binary(mb.equal, self, other)

    def __ne__(self, other: Any) -> Any:
        return _binary(mb.not_equal, self, other)

    def __lt__(self, other: Any) -> Any:
        return _binary(mb.less, self, other)

    def __le__(self, other: Any) -> Any:
        return _binary(mb.less_equal, self, other)

    def __gt__(self, other: Any) -> Any:
        return _binary(mb.greater, self, other)

    def __ge__(self, other: Any) -> Any:
        return _binary(mb.greater_equal, self, other)

    def __and__(self, other: "Value") -> "Value":
        return Value(mb.logical_and(x=self.var, y=other.var))

    def __or__(self, other: "Value") -> "Value":
        return Value(mb.logical_or(x=self.var, y=other.var))

    def __invert__(self) -> "Value":
        return Value(mb.logical_not(x=self.var))

    def __bool__(self) -> bool:
        raise TypeError("the value of an array is not known while a Core ML program is built; use F.where")


class ValueFunctions:
    """The op namespace F over `Value`s of type `dtype` (np.float16 or np.float32); numbers stay numbers."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        for name in ACTIVATIONS:
            setattr(self, name, _function(getattr(self, f"_{name}"), getattr(_NUMPY, name)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"F.{name}: no such function (there are: {', '.join(_F_NAMES)})")

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger of a and b, elementwise."""
        if isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS):
            return max(a, b)
        return _binary(mb.maximum, a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a where the condition holds, else b."""
        if not isinstance(condition, Value):
            return a if condition else b
        if isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS):  # MIL selects between arrays only
            chosen = Value(mb.cast(x=condition.var, dtype=_MIL_NAMES[self._dtype.name]))
            return chosen * (a - b) + b
        return Value(mb.select(cond=condition.var, a=_operand(a, self._dtype), b=_operand(b, self._dtype)))

    def _identity(self, x: Value) -> Value:
        return x

    def _relu(self, x: Value) -> Value:
        return Value(mb.relu(x=x.var))

    def _leaky_relu(self, x: Value) -> Value:
        return Value(mb.leaky_relu(x=x.var, alpha=_operand(LEAKY_SLOPE, x.dtype)))

    def _elu(self, x: Value) -> Value:
        return Value(mb.elu(x=x.var, alpha=_operand(1.0, x.dtype)))

    def _selu(self, x: Value) -> Value:
        return SELU_SCALE * Value(mb.elu(x=x.var, alpha=_operand(SELU_ALPHA, x.dtype)))

    def _gelu(self, x: Value) -> Value:
        return Value(mb.gelu(x=x.var, mode="TANH_APPROXIMATION"))

    def _silu(self, x: Value) -> Value:
        return x * self._sigmoid(x)

    def _softplus(self, x: Value) -> Value:
        return Value(mb.softplus(x=x.var))

    def _sigmoid(self, x: Value) -> Value:
        return Value(mb.sigmoid(x=x.var))

    def _half_sigmoid(self, x: Value) -> Value:
        return 0.5 * self._sigmoid(x)

    def _tanh(self, x: Value) -> Value:
        return Value(mb.tanh(x=x.var))

    def _exp(self, x: Value) -> Value:
        return Value(mb.exp(x=x.var))


_NUMPY = Functions(np)
_F_NAMES = (*ACTIVATIONS, "maximum", "where")


def _function(on_value: Callable[[Value], Value], on_number: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: on_value(x) if isinstance(x, Value) else float(on_number(np.float64(x)))


def _binary(op: Callable[..., Any], x: Any, y: Any) -> Any:
    if not all(isinstance(a, (Value, *_NUMBERS)) for a in (x, y)):
        return NotImplemented
    dtype = x.dtype if isinstance(x, Value) else y.dtype
    return Value(op(x=_operand(x, dtype), y=_operand(y, dtype)))


def _operand(x: Any, dtype: Any) -> Any:
    if isinstance(x, Value):
        return x.var
    with np.errstate(all="ignore"):
        number = np.dtype(dtype).type(x)
    if not np.isfinite(number) or (x != 0 and number == 0):
        raise PararnnError(
            f"the cell's step uses the number {x!r}, which {np.dtype(dtype).name} cannot hold; export with "
            "--state io, where the recurrence runs in float32"
        )
    return number
