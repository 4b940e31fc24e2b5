"""Dual numbers over arrays: a cell's `step` run on them gives its value and its Jacobian at once.

A `Dual` is a value and one tangent array a direction; elementwise arithmetic carries the tangents by the
chain rule, so nothing is derived by hand for a cell. The derivatives of the op namespace F are here.
"""

from collections.abc import Callable
from typing import Any

from .activations import ACTIVATIONS, GELU_CUBIC, GELU_INNER, LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE, Functions


class Dual:
    """`value` and its `tangents`, one array a direction; a constant has no tangents (an empty tuple)."""

    __array_ufunc__ = None  # NumPy arrays leave `array + dual` to Dual
    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("tangents", "value")

    def __init__(self, value: Any, tangents: tuple[Any, ...] = ()) -> None:
        self.value = value
        self.tangents = tangents

    def chain(self, value: Any, derivative: Any) -> "Dual":
        """f(self), given its value and its derivative with respect to self."""
        return Dual(value, tuple(derivative * t for t in self.tangents))

    def __add__(self, other: Any) -> "Dual":
        other = _dual(other)
        return Dual(self.value + other.value, _add(self.tangents, other.tangents))

    def __sub__(self, other: Any) -> "Dual":
        other = _dual(other)
        return Dual(self.value - other.value, _add(self.tangents, (-other).tangents))

    def __rsub__(self, other: Any) -> "Dual":
        return _dual(other) - self

    def __neg__(self) -> "Dual":
        return Dual(-self.value, tuple(-t for t in self.tangents))

    def __mul__(self, other: Any) -> "Dual":
        other = _dual(other)
        return Dual(
            self.value * other.value,
            _add(
                tuple(t * other.value for t in self.tangents), tuple(self.value * t for t in other.tangents)
            ),
        )

    def __truediv__(self, other: Any) -> "Dual":
        other = _dual(other)
        value = self.value / other.value
        return Dual(
            value,
            _add(
                tuple(t / other.value for t in self.tangents),
                tuple(-value * t / other.value for t in other.tangents),
            ),
        )

    def __rtruediv__(self, other: Any) -> "Dual":
        return _dual(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def __pow__(self, exponent: float) -> "Dual":
        """A constant power; anything else has no derivative by this rule."""
        return self.chain(self.value**exponent, exponent * self.value ** (exponent - 1))

    # Comparisons look at values alone: they choose a branch, for F.where.

    def __eq__(self, other: Any) -> Any:
        return self.value == _dual(other).value

    def __ne__(self, other: Any) -> Any:
        return self.value != _dual(other).value

    def __lt__(self, other: Any) -> Any:
        return self.value < _dual(other).value

    def __le__(self, other: Any) -> Any:
        return self.value <= _dual(other).value

    def __gt__(self, other: Any) -> Any:
        return self.value > _dual(other).value

    def __ge__(self, other: Any) -> Any:
        return self.value >= _dual(other).value


class DualFunctions:
    """The op namespace F for duals whose arrays belong to `functions`."""

    def __init__(self, functions: Functions) -> None:
        self._F = functions
        for name in ACTIVATIONS:
            setattr(self, name, self._function(getattr(functions, name), getattr(self, f"_d_{name}")))

    def _function(
        self, f: Callable[[Any], Any], derivative: Callable[[Any, Any], Any]
    ) -> Callable[[Dual], Dual]:
        def apply(x: Dual) -> Dual:
            y = f(x.value)
            return x.chain(y, derivative(x.value, y)) if x.tangents else Dual(y)

        return apply

    def maximum(self, a: Any, b: Any) -> Dual:
        """A tie gives each side half of the derivative, as PyTorch does."""
        a, b = _dual(a), _dual(b)
        first = self._F.where(a.value > b.value, 1.0, self._F.where(a.value < b.value, 0.0, 0.5))
        tangents = _add(
            tuple(first * t for t in a.tangents),
            tuple((1 - first) * t for t in b.tangents),
        )
        return Dual(self._F.maximum(a.value, b.value), tangents)

    def where(self, condition: Any, a: Any, b: Any) -> Dual:
        """a where the condition holds, else b; the condition has no derivative."""
        a, b = _dual(a), _dual(b)
        tangents = _add(
            tuple(self._F.where(condition, t, 0.0) for t in a.tangents),
            tuple(self._F.where(condition, 0.0, t) for t in b.tangents),
        )
        return Dual(self._F.where(condition, a.value, b.value), tangents)

    # Derivatives of y = f(x), each from whichever of x and y is cheaper.

    def _d_identity(self, x: Any, y: Any) -> Any:
        return 1.0

    def _d_relu(self, x: Any, y: Any) -> Any:
        return self._F.where(x > 0, 1.0, 0.0)

    def _d_leaky_relu(self, x: Any, y: Any) -> Any:
        return self._F.where(x > 0, 1.0, LEAKY_SLOPE)

    def _d_elu(self, x: Any, y: Any) -> Any:
        return self._F.where(x > 0, 1.0, y + 1)

    def _d_selu(self, x: Any, y: Any) -> Any:
        return self._F.where(x > 0, SELU_SCALE, y + SELU_SCALE * SELU_ALPHA)

    def _d_gelu(self, x: Any, y: Any) -> Any:
        t = self._F.tanh(GELU_INNER * (x + GELU_CUBIC * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_INNER * (1 + 3 * GELU_CUBIC * x * x)

    def _d_silu(self, x: Any, y: Any) -> Any:
        s = self._F.sigmoid(x)
        return s + y * (1 - s)

    def _d_softplus(self, x: Any, y: Any) -> Any:
        return self._F.sigmoid(x)

    def _d_sigmoid(self, x: Any, y: Any) -> Any:
        return y * (1 - y)

    def _d_half_sigmoid(self, x: Any, y: Any) -> Any:
        return y * (1 - 2 * y)

    def _d_tanh(self, x: Any, y: Any) -> Any:
        return 1 - y * y

    def _d_exp(self, x: Any, y: Any) -> Any:
        return y


def _dual(x: Any) -> Dual:
    return x if isinstance(x, Dual) else Dual(x)


def _add(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    if not a or not b:
        return a or b
    return tuple(x + y for x, y in zip(a, b, strict=True))
