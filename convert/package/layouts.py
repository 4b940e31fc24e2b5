"""Where channels and time stand in a program's activations: all in which the layouts of one model differ.

Shapes: T tokens, D channels (hidden_size), H heads, w = D / H. program.py is the model's text for both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_pararnn.model_config import ModelArgs

from .constants import Array, Stored, kernels
from .operations import Operations, Variable

HEAD_ROWS = 1 << 14  # of the vocabulary in one product of the Neural Engine's layout, at most


class Layout:
    """What `program.py` asks of a layout.

    Attributes:
        channels, time: the axes of an activation on which they stand.
        inner_time: the axis of time inside a layer's recurrence.
        inner_shape: the shape of a gate or a slot there.
        row_shape: the shape there of a number for each channel.
    """

    channels: int
    time: int
    inner_time: int
    inner_shape: tuple[int, ...]
    row_shape: tuple[int, ...]

    def __init__(
        self, ops: Operations, args: ModelArgs, weights: Mapping[str, Stored], dtype: Any, steps: int
    ) -> None:
        self.ops, self.args, self.weights, self._dtype, self.T = ops, args, weights, dtype, steps
        self.D, self.H = args.hidden_size, args.num_heads
        self.w = self.D // self.H
        self._emitted: dict[Any, Any] = {}

    @staticmethod
    def shape(args: ModelArgs, steps: int) -> tuple[int, ...]:
        """That of an activation of so many steps."""
        raise NotImplementedError

    def numbers(self, name: str) -> Array:
        """A weight in the type of the activations."""
        return self.weights[name].values().astype(self._dtype)

    def vector(self, numbers: Array) -> Array:
        """A number for each channel, as it joins an activation."""
        raise NotImplementedError

    def look_up(self, name: str, indices: Variable) -> Variable:
        """The rows of a matrix at T indices."""
        raise NotImplementedError

    def linear(self, x: Variable, path: str) -> Variable:
        """x by the matrix of a layer, and its bias if it has one."""
        raise NotImplementedError

    def logits(self, x: Variable, name: str) -> Variable:
        """The last step by the matrix of the vocabulary: (1, 1, V)."""
        raise NotImplementedError

    def convolve(self, x: Variable, path: str) -> Variable:
        """The causal convolution of each channel; x has K - 1 earlier steps in front."""
        raise NotImplementedError

    def gates(self, x: Variable, path: str, count: int) -> list[Variable]:
        """The block-diagonal input projection of a recurrence, and its bias: its gates."""
        raise NotImplementedError

    def inner(self, x: Variable) -> Variable:
        """One step as it is inside the recurrence."""
        raise NotImplementedError

    def outer(self, x: Variable, steps: int) -> Variable:
        """Steps as they are outside it."""
        raise NotImplementedError

    def read(self, state: Variable) -> Variable:
        """A state (layers, rows, padded) as `state_rows` takes it."""
        raise NotImplementedError

    def state_rows(self, state: Variable, i: int, begin: int, count: int) -> Variable:
        """Rows of the state of layer `i`, as an activation of so many steps."""
        raise NotImplementedError

    def kept(self, layers: Sequence[Variable], padded: int) -> Variable:
        """A state (layers, rows, padded) of the activations that are its rows, one a layer."""
        raise NotImplementedError

    def _bias(self, path: str) -> Array | None:
        return self.numbers(f"{path}.bias") if f"{path}.bias" in self.weights else None

    def _padded(self, layers: Sequence[Variable], padded: int) -> Variable:
        x = self.ops.concat(layers, 0)
        sides = [0] * (2 * len(self.ops.shape(x)))
        sides[2 * self.channels + 1] = padded - self.D
        return self.ops.pad(x, sides, 0) if padded > self.D else x


class Rows(Layout):
    """(1, T, D); inside the recurrence (1, H, T, w), as the block-diagonal input projection gives it.

    Time never stands on the innermost axis, so the solver's shifts in time move whole rows.
    """

    channels, time, inner_time = 2, 1, 2

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inner_shape, self.row_shape = (1, self.H, self.T, self.w), (1, self.H, 1, self.w)

    @staticmethod
    def shape(args: ModelArgs, steps: int) -> tuple[int, ...]:
        """See `Layout`."""
        return 1, steps, args.hidden_size

    def vector(self, numbers: Array) -> Array:
        """See `Layout`."""
        return numbers

    def look_up(self, name: str, indices: Variable) -> Variable:
        """See `Layout`."""
        return self.ops.gather(self._matrix(name), indices)

    def linear(self, x: Variable, path: str) -> Variable:
        """See `Layout`."""
        return self.ops.linear(x, self._matrix(f"{path}.weight"), self._bias(path))

    def logits(self, x: Variable, name: str) -> Variable:
        """See `Layout`."""
        return self.ops.linear(x, self._matrix(name))

    def convolve(self, x: Variable, path: str) -> Variable:
        """See `Layout`."""
        taps, bias = self.numbers(f"{path}.weight"), self.numbers(f"{path}.bias")  # (D, K, 1)
        if self.T == 1:
            x = self.ops.mul(x, np.ascontiguousarray(taps[..., 0].T)[None])
            return self.ops.add(self.ops.total(x, 1), bias)
        x = self.ops.transpose(x, [0, 2, 1])
        x = self.ops.convolve(x, taps.transpose(0, 2, 1).copy(), bias, self.D)
        return self.ops.transpose(x, [0, 2, 1])

    def gates(self, x: Variable, path: str, count: int) -> list[Variable]:
        """See `Layout`."""
        weight, bias = self._matrix(f"{path}.input_proj.weight"), self.numbers(f"{path}.bias")
        x = self.ops.reshape(x, [1, self.T, self.H, self.w])
        x = self.ops.linear_by_head(self.ops.transpose(x, [0, 2, 1, 3]), weight)
        u = self.ops.add(x, bias.reshape(1, self.H, 1, -1))
        return self.ops.split(u, count, 3) if count > 1 else [u]

    def inner(self, x: Variable) -> Variable:
        """See `Layout`."""
        return self.ops.reshape(x, self.row_shape)

    def outer(self, x: Variable, steps: int) -> Variable:
        """See `Layout`."""
        if steps > 1:
            x = self.ops.transpose(x, [0, 2, 1, 3])
        return self.ops.reshape(x, [1, steps, self.D])

    def read(self, state: Variable) -> Variable:
        """See `Layout`."""
        return state

    def state_rows(self, state: Variable, i: int, begin: int, count: int) -> Variable:
        """See `Layout`."""
        return self.ops.slice(state, [i, begin, 0], [1, count, self.D])

    def kept(self, layers: Sequence[Variable], padded: int) -> Variable:
        """See `Layout`."""
        return self._padded(layers, padded)

    def _matrix(self, name: str) -> Any:
        if name not in self._emitted:
            self._emitted[name] = self.ops.matrix(self.weights[name])
        return self._emitted[name]


class Channels(Layout):
    """(1, D, 1, T), everywhere: the Neural Engine's (B, C, 1, S), where matrices are 1x1 convolutions.

    A head's block of the input projection is a group of such a convolution, one convolution a gate; the
    vocabulary is several, of at most `HEAD_ROWS` rows.
    """

    channels, time, inner_time = 1, 3, 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inner_shape, self.row_shape = (1, self.D, 1, self.T), (1, self.D, 1, 1)

    @staticmethod
    def shape(args: ModelArgs, steps: int) -> tuple[int, ...]:
        """See `Layout`."""
        return 1, args.hidden_size, 1, steps

    def vector(self, numbers: Array) -> Array:
        """See `Layout`."""
        return numbers.reshape(1, -1, 1, 1)

    def look_up(self, name: str, indices: Variable) -> Variable:
        """See `Layout`."""
        x = self.ops.gather(self._kernels(name), self.ops.reshape(indices, [self.T]))  # (T, D, 1, 1)
        return self.ops.transpose(x, [2, 1, 3, 0]) if self.T > 1 else x

    def linear(self, x: Variable, path: str) -> Variable:
        """See `Layout`."""
        return self.ops.convolve(x, self._kernels(f"{path}.weight"), self._bias(path), 1)

    def logits(self, x: Variable, name: str) -> Variable:
        """See `Layout`."""
        vocabulary = self.args.vocab_size
        pieces = -(-vocabulary // HEAD_ROWS)
        begins = [vocabulary * i // pieces for i in range(pieces)]
        parts = [  # one piece is the whole table, which the look-up of tied embeddings has emitted
            self.ops.convolve(x, self._kernels(name, begin, end), None, 1)
            for begin, end in zip(begins, [*begins[1:], None], strict=True)
        ]
        whole = self.ops.concat(parts, 1) if pieces > 1 else parts[0]
        return self.ops.reshape(whole, [1, 1, vocabulary])

    def convolve(self, x: Variable, path: str) -> Variable:
        """See `Layout`."""
        taps, bias = self.numbers(f"{path}.weight"), self.numbers(f"{path}.bias")  # (D, K, 1)
        return self.ops.convolve(x, taps.transpose(0, 2, 1)[:, :, None].copy(), bias, self.D)

    def gates(self, x: Variable, path: str, count: int) -> list[Variable]:
        """See `Layout`."""
        name, w, bias = f"{path}.input_proj.weight", self.w, self.numbers(f"{path}.bias")  # (H, count w)
        bias = bias.reshape(self.H, count, w).transpose(1, 0, 2).reshape(count, self.D)
        return [
            self.ops.convolve(x, self._kernels(name, g * w, (g + 1) * w), bias[g], self.H)
            for g in range(count)
        ]

    def inner(self, x: Variable) -> Variable:
        """See `Layout`."""
        return x

    def outer(self, x: Variable, steps: int) -> Variable:
        """See `Layout`."""
        return x

    def read(self, state: Variable) -> Variable:
        """See `Layout`."""
        layers, rows, padded = self.ops.shape(state)
        return self.ops.transpose(self.ops.reshape(state, [layers, 1, rows, padded]), [0, 3, 1, 2])

    def state_rows(self, state: Variable, i: int, begin: int, count: int) -> Variable:
        """See `Layout`."""
        return self.ops.slice(state, [i, 0, 0, begin], [1, self.D, 1, count])

    def kept(self, layers: Sequence[Variable], padded: int) -> Variable:
        """See `Layout`."""
        x = self.ops.transpose(self._padded(layers, padded), [0, 2, 3, 1])
        count, _, rows, _ = self.ops.shape(x)
        return self.ops.reshape(x, [count, rows, padded])

    def _kernels(self, name: str, begin: int = 0, end: int | None = None) -> Any:
        key = name, begin, end
        if key not in self._emitted:
            self._emitted[key] = self.ops.matrix(kernels(self.weights[name], begin, end))
        return self._emitted[key]


LAYOUTS: dict[str, type[Layout]] = {"plain": Rows, "ane": Channels}
