"""A program's variables with operators, and the op namespace F over them: what a cell's `step` runs on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_pararnn.cells.activations import ACTIVATIONS, LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE, Functions
from mlx_pararnn.errors import PararnnError

from .operations import Operations

_NUMBERS: Any = (int, float, np.generic)


class Value:
    """A variable of a program; arithmetic adds operations to the program.

    Numbers join with the variable's type; + 0, * 1 and * 0 add nothing, so derivatives that are constant
    cost nothing.
    """

    __array_ufunc__ = None  # NumPy numbers leave `number * value` to Value
    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("ops", "var")

    def __init__(self, ops: Operations, var: Any) -> None:
        self.ops, self.var = ops, var

    @property
    def dtype(self) -> Any:
        """Its NumPy dtype."""
        return self.ops.dtype(self.var)

    def _like(self, var: Any) -> "Value":
        return Value(self.ops, var)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, _NUMBERS) and other == 0:
            return self
        return _binary("add", self, other)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, _NUMBERS) and other == 0:
            return self
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return -self if isinstance(other, _NUMBERS) and other == 0 else _binary("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, _NUMBERS) and other in (0, 1):
            return 0.0 if other == 0 else self
        return _binary("mul", self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self if isinstance(other, _NUMBERS) and other == 1 else _binary("divide", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return 0.0 if isinstance(other, _NUMBERS) and other == 0 else _binary("divide", other, self)

    def __pow__(self, exponent: Any) -> Any:
        if isinstance(exponent, _NUMBERS) and exponent in (1, 2):
            return self if exponent == 1 else self * self
        return _binary("power", self, exponent)

    def __neg__(self) -> Any:
        return self * -1.0

    def __eq__(self, other: Any) -> Any:
        return _binary("equal", self, other)

    def __ne__(self, other: Any) -> Any:
        return _binary("not_equal", self, other)

    def __lt__(self, other: Any) -> Any:
        return _binary("less", self, other)

    def __le__(self, other: Any) -> Any:
        return _binary("less_equal", self, other)

    def __gt__(self, other: Any) -> Any:
        return _binary("greater", self, other)

    def __ge__(self, other: Any) -> Any:
        return _binary("greater_equal", self, other)

    def __and__(self, other: "Value") -> "Value":
        return Value(self.ops, self.ops.logical_and(self.var, other.var))

    def __or__(self, other: "Value") -> "Value":
        return Value(self.ops, self.ops.logical_or(self.var, other.var))

    def __invert__(self) -> "Value":
        return Value(self.ops, self.ops.logical_not(self.var))

    def __bool__(self) -> bool:
        raise TypeError("the value of an array is not known while a program is built; use F.where")


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
        return _binary("maximum", a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a where the condition holds, else b."""
        if not isinstance(condition, Value):
            return a if condition else b
        if isinstance(a, _NUMBERS) and isinstance(b, _NUMBERS):  # programs select between arrays only
            chosen = condition._like(condition.ops.cast(condition.var, self._dtype))
            return chosen * (a - b) + b
        a, b = (_operand(x, condition.ops, self._dtype) for x in (a, b))
        return condition._like(condition.ops.select(condition.var, a, b))

    def _identity(self, x: Value) -> Value:
        return x

    def _relu(self, x: Value) -> Value:
        return x._like(x.ops.relu(x.var))

    def _leaky_relu(self, x: Value) -> Value:
        return x._like(x.ops.leaky_relu(x.var, _operand(LEAKY_SLOPE, x.ops, x.dtype)))

    def _elu(self, x: Value) -> Value:
        return x._like(x.ops.elu(x.var, _operand(1.0, x.ops, x.dtype)))

    def _selu(self, x: Value) -> Value:
        return SELU_SCALE * x._like(x.ops.elu(x.var, _operand(SELU_ALPHA, x.ops, x.dtype)))

    def _gelu(self, x: Value) -> Value:
        return x._like(x.ops.gelu(x.var, exact=False))

    def _silu(self, x: Value) -> Value:
        return x * self._sigmoid(x)

    def _softplus(self, x: Value) -> Value:
        return x._like(x.ops.softplus(x.var))

    def _sigmoid(self, x: Value) -> Value:
        return x._like(x.ops.sigmoid(x.var))

    def _half_sigmoid(self, x: Value) -> Value:
        return 0.5 * self._sigmoid(x)

    def _tanh(self, x: Value) -> Value:
        return x._like(x.ops.tanh(x.var))

    def _exp(self, x: Value) -> Value:
        return x._like(x.ops.exp(x.var))


_NUMPY = Functions(np)
_F_NAMES = (*ACTIVATIONS, "maximum", "where")


def _function(on_value: Callable[[Value], Value], on_number: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: on_value(x) if isinstance(x, Value) else float(on_number(np.float64(x)))


def _binary(op: str, x: Any, y: Any) -> Any:
    if not all(isinstance(a, (Value, *_NUMBERS)) for a in (x, y)):
        return NotImplemented
    ops, dtype = (x.ops, x.dtype) if isinstance(x, Value) else (y.ops, y.dtype)
    return Value(ops, getattr(ops, op)(_operand(x, ops, dtype), _operand(y, ops, dtype)))


def _operand(x: Any, ops: Operations, dtype: Any) -> Any:
    if isinstance(x, Value):
        return x.var
    with np.errstate(all="ignore"):
        number = np.dtype(dtype).type(x)
    if not np.isfinite(number) or (x != 0 and number == 0):
        raise PararnnError(
            f"the cell's step uses the number {x!r}, which {np.dtype(dtype).name} cannot hold; export with "
            "--recurrence float32"
        )
    return number
