"""The operations that a program is written in: one text of the model, emitted to MIL and to Core AI alike.

coreml/mil.py has them for Core ML, coreai/graph_operations.py for Core AI. A variable is whatever the builder
of such a program gives; where one is taken, a NumPy array or number of its type may stand instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .constants import Stored

Variable = Any
Unary = Callable[[Variable], Variable]
Binary = Callable[[Variable, Variable], Variable]
Array = npt.NDArray[Any]


class Operations:
    """Adds operations to the function that is being built; each gives the variable of its result.

    Attributes:
        title: what the program is for, as messages name it.
    """

    title: str

    def dtype(self, x: Variable) -> "np.dtype[Any]":
        """Its NumPy type."""
        raise NotImplementedError

    def shape(self, x: Variable) -> tuple[int, ...]:
        """Its shape."""
        raise NotImplementedError

    def named(self, x: Variable, name: str) -> Variable:
        """`x`, which the function gives under this name."""
        raise NotImplementedError

    def constant(self, values: Array) -> Variable:
        """A constant."""
        raise NotImplementedError

    def matrix(self, stored: Stored) -> Any:
        """What `gather`, `linear` and `linear_by_head` take: a matrix, stored once for all functions."""
        raise NotImplementedError

    def gather(self, matrix: Any, indices: Variable) -> Variable:
        """The rows of a matrix (V, D) at `indices` (1, T): (1, T, D)."""
        raise NotImplementedError

    def linear(self, x: Variable, matrix: Any, bias: Array | None = None) -> Variable:
        """(1, T, D) by a matrix (E, D): (1, T, E)."""
        raise NotImplementedError

    def linear_by_head(self, x: Variable, matrix: Any) -> Variable:
        """(1, H, T, w) by matrices (H, e, w): (1, H, T, e)."""
        raise NotImplementedError

    def convolve(self, x: Variable, kernels: Any, bias: Array | None, groups: int) -> Variable:
        """(1, C, 1, T + K - 1) by `kernels` (E, C / groups, 1, K), an array or a `matrix`: (1, E, 1, T).

        The axis of length 1 may be left out of both.
        """
        raise NotImplementedError

    def read_state(self, state: Variable) -> Variable:
        """What the program's own state holds."""
        raise NotImplementedError

    def write_state(self, name: str, state: Variable, x: Variable) -> None:
        """Let the program's own state hold `x`."""
        raise NotImplementedError

    def reshape(self, x: Variable, shape: Sequence[int]) -> Variable:
        """The same numbers in another shape."""
        raise NotImplementedError

    def transpose(self, x: Variable, axes: Sequence[int]) -> Variable:
        """The axes in another order."""
        raise NotImplementedError

    def concat(self, parts: Sequence[Variable], axis: int) -> Variable:
        """One after the other along an axis."""
        raise NotImplementedError

    def split(self, x: Variable, count: int, axis: int) -> list[Variable]:
        """`count` equal parts of an axis."""
        raise NotImplementedError

    def slice(self, x: Variable, begin: Sequence[int], size: Sequence[int]) -> Variable:
        """The box that begins at `begin`."""
        raise NotImplementedError

    def pad(self, x: Variable, sides: Sequence[int], number: Any) -> Variable:
        """`number` before and after each axis, `sides[2 i]` and `sides[2 i + 1]` times."""
        raise NotImplementedError

    def argmax(self, x: Variable) -> Variable:
        """The place of the largest number of the last axis, which goes."""
        raise NotImplementedError

    def mean(self, x: Variable, axis: int) -> Variable:
        """Over an axis, which stays with length 1."""
        raise NotImplementedError

    def largest(self, x: Variable, axis: int) -> Variable:
        """Over an axis, which stays with length 1."""
        raise NotImplementedError

    def length(self, x: Variable, axis: int) -> Variable:
        """The root of the sum of squares over an axis, which stays with length 1."""
        raise NotImplementedError

    def total(self, x: Variable, axis: int) -> Variable:
        """The sum over an axis, which stays with length 1."""
        raise NotImplementedError

    def cast(self, x: Variable, dtype: Any) -> Variable:
        """In another type; itself where it is of that type."""
        raise NotImplementedError

    def select(self, condition: Variable, a: Variable, b: Variable) -> Variable:
        """a where the condition holds, else b."""
        raise NotImplementedError

    # Elementwise. Two operands are broadcast.
    add: Binary
    sub: Binary
    mul: Binary
    divide: Binary
    power: Binary
    maximum: Binary
    equal: Binary
    not_equal: Binary
    less: Binary
    less_equal: Binary
    greater: Binary
    greater_equal: Binary
    logical_and: Binary
    logical_or: Binary
    logical_not: Unary
    abs: Unary
    exp: Unary
    rsqrt: Unary
    sigmoid: Unary
    silu: Unary
    softplus: Unary
    tanh: Unary
    relu: Unary
    leaky_relu: Binary  # x, the slope below zero
    elu: Binary  # x, alpha

    def gelu(self, x: Variable, exact: bool) -> Variable:
        """By the error function, or by its approximation with tanh."""
        raise NotImplementedError
