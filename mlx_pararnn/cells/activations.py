"""The op namespace F that a cell's `step` is written with, for MLX and for NumPy.

The twelve activations are those of Apple's ParaRNN cells, with its constants: gelu is the tanh
approximation, leaky_relu has slope 0.01, elu and softplus parameter 1, half_sigmoid is sigmoid(x) / 2.
"""

import math
from typing import Any

ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "softplus",
    "sigmoid",
    "half_sigmoid",
    "tanh",
    "exp",
)

LEAKY_SLOPE = 0.01
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805
GELU_INNER = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


class Functions:
    """F over an array library `xp` that has exp, expm1, log1p, tanh, maximum, minimum, where and abs.

    `mlx.core` and `numpy` are such libraries.
    """

    def __init__(self, xp: Any) -> None:
        self.exp = xp.exp
        self.tanh = xp.tanh
        self.maximum = xp.maximum
        self.where = xp.where
        self._xp = xp

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x))."""
        if hasattr(self._xp, "sigmoid"):
            return self._xp.sigmoid(x)
        e = self.exp(-self._xp.abs(x))  # never above 1: no overflow on either side
        return self.where(x >= 0, 1.0, e) / (1 + e)

    def identity(self, x: Any) -> Any:
        """x."""
        return x

    def half_sigmoid(self, x: Any) -> Any:
        """sigmoid(x) / 2."""
        return 0.5 * self.sigmoid(x)

    def relu(self, x: Any) -> Any:
        """max(x, 0)."""
        return self.maximum(x, 0.0)

    def leaky_relu(self, x: Any) -> Any:
        """x where it is positive, else `LEAKY_SLOPE` x."""
        return self.maximum(x, LEAKY_SLOPE * x)

    def elu(self, x: Any) -> Any:
        """x where it is positive, else exp(x) - 1."""
        return self.where(x > 0, x, self._xp.expm1(self._xp.minimum(x, 0.0)))

    def selu(self, x: Any) -> Any:
        """ELU with its two constants: `SELU_SCALE` x, or `SELU_SCALE` `SELU_ALPHA` (exp(x) - 1)."""
        return SELU_SCALE * self.where(x > 0, x, SELU_ALPHA * self._xp.expm1(self._xp.minimum(x, 0.0)))

    def gelu(self, x: Any) -> Any:
        """GELU in its tanh approximation."""
        return 0.5 * x * (1 + self.tanh(GELU_INNER * (x + GELU_CUBIC * x * x * x)))

    def silu(self, x: Any) -> Any:
        """x sigmoid(x)."""
        return x * self.sigmoid(x)

    def softplus(self, x: Any) -> Any:
        """log(1 + exp(x))."""
        return self.maximum(x, 0.0) + self._xp.log1p(self.exp(-self._xp.abs(x)))
