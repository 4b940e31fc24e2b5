"""The layers of the ParaRNN language model: cell, convolution, mixers, MLP.

Two kinds of layer exist. "gated_conv" is the paper's (arXiv 2510.21450, Fig. 9) and ml-pararnn's: input
projection to a main branch and a gate, causal convolution, SiLU, the recurrent cell, gated RMSNorm, output
projection. "plain" is pararnn-torch's: the cell alone. Both are followed by an MLP.

Letters in shapes: B sequences, T tokens, D channels (hidden_size).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from .cache import RecurrentCache
from .cells import Cell, get_cell
from .compute import layer_ops, matrix_products
from .compute.choice import PLAIN, Choice
from .compute.module_arrays import handed_arrays, norm_arrays, plain_arrays
from .compute.recurrence import recurrence
from .model_config import ModelArgs
from .sharding import Shard, Whole


class RecurrentLayer(nn.Module):
    """A cell with its input projection: x (B, T, input_size) -> hidden (B, T, D) and the last state.

    Weights:
        input_proj.weight: (heads, gates * D / heads, input_size / heads), block diagonal over heads.
        bias: (heads, gates * D / heads).
        recurrent_weight: (P, D), one row for each of the cell's params; diagonal, kept in float32.
        initial_state: (slots, D), where one was learned (`mlx-pararnn train --tune state`): the state before
            the first token, instead of zeros.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_heads: int = 1,
        activations: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._cell = get_cell(cell, activations)
        self.num_heads = num_heads
        width = len(self._cell.gates) * hidden_size // num_heads
        self.input_proj = MultiLinear(input_size // num_heads, width, num_heads)
        self.bias = mx.zeros((num_heads, width))
        scale = hidden_size**-0.5
        self.recurrent_weight = mx.random.uniform(-scale, scale, (len(self._cell.params), hidden_size))

    def __call__(
        self,
        x: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Run the layer; `options` are those of `recurrence`, and so is what is returned.

        Args:
            x: (B, T, input_size).
            state: (B, slots, D) or None for zeros.
            mask: (B, T), False at padding; or None.
        """
        u = self._project(x)
        return recurrence(self._cell, self.recurrent_weight, u, state, bias=self.bias, mask=mask, **options)

    def run(
        self,
        x: mx.array,
        state: mx.array | None,
        mask: mx.array | None,
        every: int,
        choice: Choice,
        *norm: Any,
    ) -> tuple[mx.array, ...]:
        """`__call__` in a model's layer: `layer_ops.recurrence_and_norm` of x (B, T, input_size)."""
        u, weight = self._project(x), self.recurrent_weight
        return layer_ops.recurrence_and_norm(
            choice, self._cell, weight, u, self.bias, state, mask, every, *norm
        )

    @property
    def cell(self) -> Cell:
        """What one step computes."""
        return self._cell

    def add_initial_state(self, values: mx.array | None = None) -> None:
        """Begin from these values (slots, D), which can be learned; None for zeros."""
        shape = len(self._cell.slots), self.recurrent_weight.shape[1]
        self.initial_state = mx.zeros(shape) if values is None else values.astype(mx.float32).reshape(shape)

    def token_arrays(self) -> dict[str, mx.array]:
        """What a token reads, by its names in struct Layer of metal/cpu_token.cpp."""
        arrays = {"bias": self["bias"], "params": self["recurrent_weight"]}
        return arrays | plain_arrays("cell_proj", self["input_proj"])

    def _project(self, x: mx.array) -> mx.array:
        """u (B, heads, T, gates, D / heads) without its bias."""
        return matrix_products.input_projection(self.input_proj, x, self.num_heads, len(self._cell.gates))


class CausalConv(nn.Module):
    """Depthwise causal convolution over time and SiLU; tap K - 1 is the current token.

    Weights as nn.Conv1d has them: weight (D, K, 1), bias (D).
    """

    def __init__(self, dims: int, kernel_size: int) -> None:
        super().__init__()
        scale = kernel_size**-0.5
        self.weight = mx.random.uniform(-scale, scale, (dims, kernel_size, 1))
        self.bias = mx.zeros(dims)

    def __call__(
        self,
        x: mx.array,
        window: mx.array | None,
        spans: list[tuple[int, int]] | None,
        choice: Choice = PLAIN,
    ) -> tuple[mx.array, mx.array]:
        """`layer_ops.conv_silu` of x (B, T, D) after its last K - 1 inputs, `window`; None for zeros."""
        if window is None:
            window = mx.zeros((x.shape[0], self.weight.shape[1] - 1, x.shape[2]), x.dtype)
        return layer_ops.conv_silu(x, window, self.weight.squeeze(-1), self.bias, spans, backend=choice.state)

    def token_arrays(self) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        return {"conv": self["weight"], "conv_bias": self["bias"]}


class GatedConvMixer(nn.Module):
    """Input projection, convolution, cell, gated norm, output projection: (B, T, D) -> (B, T, D)."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        D = args.hidden_size
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.conv1d = CausalConv(D, args.conv_kernel)
        self.cell = RecurrentLayer(args.cell, D, D, args.num_heads, args.activations)
        self.norm = nn.RMSNorm(D, eps=args.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)

    def __call__(self, x: mx.array, cache: RecurrentCache, mask: mx.array | None, choice: Choice) -> mx.array:
        """x (B, T, D) to (B, T, D); the cache takes the new state and window."""
        T, window, part = x.shape[1], cache[1], self.part
        main, gate = mx.split(matrix_products.linear(self.in_proj, part.entered(x)), 2, axis=-1)
        x, cache[1] = self.conv1d(main, window, cache.spans(T), choice)
        x, norm = part.own_to_heads(x), part.cell_norm(gate, self.norm)
        y, cache[0], *states = self.cell.run(x, cache[0], mask, cache.stride(T), choice, *norm)
        cache.keep(states, T, window, main)
        return part.normed_product(y, gate, self.norm, self.out_proj, choice.output)

    def token_arrays(self, eps: float) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        return (
            plain_arrays("in_proj", self["in_proj"])
            | handed_arrays(self["conv1d"], CausalConv)
            | handed_arrays(self["cell"], RecurrentLayer)
            | norm_arrays("mixer_norm", self["norm"], eps)
            | plain_arrays("out_proj", self["out_proj"])
        )


class PlainMixer(nn.Module):
    """The cell alone: (B, T, D) -> (B, T, D)."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.cell = RecurrentLayer(
            args.cell, args.hidden_size, args.hidden_size, args.num_heads, args.activations
        )

    def __call__(self, x: mx.array, cache: RecurrentCache, mask: mx.array | None, choice: Choice) -> mx.array:
        """x (B, T, D) to (B, T, D); the cache takes the new state."""
        T, part = x.shape[1], self.part
        x = part.of_heads(part.entered(x))
        hidden, cache[0], *states = self.cell.run(x, cache[0], mask, cache.stride(T), choice)
        cache.keep(states, T)
        return part.whole(hidden)

    def token_arrays(self, eps: float) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        return handed_arrays(self["cell"], RecurrentLayer)


class MLP(nn.Module):
    """SwiGLU or GELU, (B, T, D) -> (B, T, D)."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        gated = args.mlp == "swiglu"
        if gated:
            self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x: mx.array, choice: Choice) -> mx.array:
        """x (B, T, D) to (B, T, D)."""
        x = self.part.entered(x)
        up = matrix_products.linear(self.up_proj, x)
        if "gate_proj" in self:
            y = layer_ops.swiglu(matrix_products.linear(self.gate_proj, x), up, backend=choice.output)
        else:
            y = nn.gelu(up)
        return self.part.product(self.down_proj, y)

    def token_arrays(self) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        gate = plain_arrays("gate", self["gate_proj"]) if "gate_proj" in self else {}
        return gate | plain_arrays("up", self["up_proj"]) | plain_arrays("down", self["down_proj"])


class Layer(nn.Module):
    """Norm, mixer, residual; norm, MLP, residual: (B, T, D) -> (B, T, D)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
        self.norm = norm(args.hidden_size, eps=args.norm_eps)
        self.mixer = GatedConvMixer(args) if args.mixer == "gated_conv" else PlainMixer(args)
        self.mlp_norm = norm(args.hidden_size, eps=args.norm_eps)
        self.mlp = MLP(args)
        if args.residual_scale:
            self.residual_scale = mx.ones(1)
        self._mlp_residual = args.mlp_residual

    def __call__(
        self,
        x: mx.array | tuple[mx.array, mx.array],
        cache: RecurrentCache,
        mask: mx.array | None,
        choice: Choice = PLAIN,
        apart: bool = False,
        before: Sequence[mx.array | None] | None = None,
    ) -> Any:
        """x (B, T, D) to (B, T, D); the cache takes what the mixer keeps.

        Args:
            x: or two arrays, whose sum it is.
            before: what the cache holds: a layer that is computed a second time for its gradient
                (mx.checkpoint) finds it moved on.
            apart: give two arrays, whose sum it is, where the MLP has a residual: the next norm adds them.
        """
        if before is not None:
            cache.cache = list(before)
        x, added = x if isinstance(x, tuple) else (x, None)
        x, normed = sum_and_norm(self.norm, x, added, None, choice)
        mixed = self.mixer(normed, cache, mask, choice)
        x, normed = sum_and_norm(self.mlp_norm, x, mixed, self.get("residual_scale"), choice)
        y = self.mlp(normed, choice)
        if not self._mlp_residual:
            return y
        return (x, y) if apart else x + y

    def token_arrays(self, eps: float) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        scale = {"residual_scale": self["residual_scale"]} if "residual_scale" in self else {}
        return (
            scale
            | norm_arrays("norm", self["norm"], eps)
            | handed_arrays(self["mixer"], GatedConvMixer, PlainMixer, eps=eps)
            | norm_arrays("mlp_norm", self["mlp_norm"], eps)
            | handed_arrays(self["mlp"], MLP)
        )

    def token_constants(self) -> tuple[Cell, int, bool]:
        """What one call for all layers needs to be the same in each: cell, heads, whether the MLP adds."""
        cell = self["mixer"]["cell"]
        return cell._cell, cell.num_heads, self._mlp_residual


def sum_and_norm(
    norm: nn.Module, x: mx.array, added: mx.array | None, scale: mx.array | None, choice: Choice
) -> tuple[mx.array, mx.array]:
    """The residual sum, added + scale * x, and its norm; x itself where nothing is to be added."""
    backend = choice.output
    if added is not None and type(norm) in (nn.RMSNorm, nn.LayerNorm) and "weight" in norm:
        weights = norm.weight, norm.get("bias"), norm.eps
        return layer_ops.sum_and_norm(x, added, scale, *weights, backend=backend)
    if added is not None:
        x = layer_ops.residual_sum(x, added, scale)
    if isinstance(norm, nn.RMSNorm):
        return x, layer_ops.rms_norm(x, norm.weight, norm.eps, backend=backend)
    return x, norm(x)
