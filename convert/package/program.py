"""A package's functions, operation by operation from the weights: one text for Core ML and for Core AI.

Shapes: T tokens, D channels (hidden_size), H heads, w = D / H. Activations are (1, T, D); inside a layer's
recurrence (1, H, T, w), as the block-diagonal input projection gives them. Time never stands on the innermost
axis, so the solver's shifts in time move whole rows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_pararnn.cells import Cell, get_cell
from mlx_pararnn.model_config import ModelArgs

from .constants import Stored
from .form import Form, state_shapes
from .operations import Operations
from .unrolled_newton import Library, State, explained, first_guess, iterate
from .values import Value, ValueFunctions

# The fields of config.json that a program is built by; of any other no program knows what it means.
EXPORTED = {
    "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "cell", "num_heads",
    "mixer", "conv_kernel", "norm", "norm_eps", "mlp", "mlp_bias", "mlp_residual", "residual_scale",
    "max_position_embeddings", "tie_word_embeddings", "activations",
}  # fmt: skip
SMALLEST_ROOT = 1e-4  # of a norm's eps: a normal number of float16 (they begin at 6.1e-5)


def input_shapes(args: ModelArgs, tokens: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the inputs beside the states, all int32, of a function that reads `tokens` tokens."""
    shapes: dict[str, tuple[int, ...]] = {"tokens": (1, tokens)}
    if args.max_position_embeddings is not None:
        shapes["position"] = (1,)
    return shapes


def emit(
    args: ModelArgs,
    weights: Mapping[str, Stored],
    form: Form,
    iterations: int,
    ops: Operations,
    inputs: Mapping[str, Any],
) -> list[Any]:
    """Add the model to the function that is open; its outputs, named.

    Args:
        iterations: Newton iterations, where `inputs` has more than one token.
        ops: what the function is written in.
        inputs: name -> variable, of `input_shapes` and of the states.

    Raises:
        PararnnError: the cell's step uses what a program cannot do.
    """
    return _Builder(args, weights, form, iterations, ops, inputs).outputs()


class _Builder:
    """Adds the model's operations to the function that is open."""

    def __init__(
        self,
        args: ModelArgs,
        weights: Mapping[str, Stored],
        form: Form,
        iterations: int,
        ops: Operations,
        inputs: Mapping[str, Any],
    ) -> None:
        self.args, self.weights, self.form, self.inputs = args, weights, form, inputs
        self.iterations, self.ops = iterations, ops
        self.T: int = ops.shape(inputs["tokens"])[1]
        self.cell: Cell = get_cell(args.cell, args.activations)
        self.F = ValueFunctions(form.recurrence_dtype)
        self.library = Library(self.F, self._delay, self._after, self._full)
        self.emitted: dict[str, Any] = {}

    def outputs(self) -> list[Any]:
        states = {
            name: self.ops.read_state(self.inputs[name]) if self.form.graph_state else self.inputs[name]
            for name in state_shapes(self.args)
        }
        x = self._embedding()
        new: dict[str, list[Any]] = {name: [] for name in states}
        for i in range(self.args.num_hidden_layers):
            x, after = self._layer(x, i, states)
            for name, rows in after.items():
                new[name].append(rows)
        written = self._write(new)
        if self.T > 1:
            x = self.ops.slice(x, [0, self.T - 1, 0], [1, 1, self.args.hidden_size])
        x = self._norm(x, "model.norm")
        head = "model.embed_tokens" if self.args.tie_word_embeddings else "lm_head"
        logits = self.ops.linear(x, self._matrix(f"{head}.weight"))
        if self.form.argmax:
            return [self.ops.named(self.ops.argmax(logits), "token"), *written]
        return [self.ops.named(logits, "logits"), *written]

    def _embedding(self) -> Any:
        x = self.ops.gather(self._matrix("model.embed_tokens.weight"), self.inputs["tokens"])
        if "position" in self.inputs:
            positions = self.ops.add(self.inputs["position"], np.arange(self.T, dtype=np.int32))
            x = self.ops.add(x, self.ops.gather(self._matrix("model.embed_positions.weight"), positions))
        return x

    def _layer(self, x: Any, i: int, states: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        path = f"model.layers.{i}"
        mixed, after = self._mixer(self._norm(x, f"{path}.norm"), i, states)
        if self.args.residual_scale:
            x = self.ops.mul(x, self._numbers(f"{path}.residual_scale"))
        x = self.ops.add(mixed, x)
        y = self._mlp(self._norm(x, f"{path}.mlp_norm"), f"{path}.mlp")
        return (self.ops.add(x, y) if self.args.mlp_residual else y), after

    def _mixer(self, x: Any, i: int, states: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        path = f"model.layers.{i}.mixer"
        if self.args.mixer == "plain":
            hidden, rows = self._recurrence(x, i, states["cell_state"])
            return hidden, {"cell_state": rows}
        x, gate = self.ops.split(self._linear(x, f"{path}.in_proj"), 2)
        x, window = self._conv(x, i, states.get("conv"))
        hidden, rows = self._recurrence(x, i, states["cell_state"])
        y = self.ops.mul(self._norm(hidden, f"{path}.norm", centred=False), self.ops.silu(gate))
        after = {"cell_state": rows} | ({} if window is None else {"conv": window})
        return self._linear(y, f"{path}.out_proj"), after

    def _conv(self, x: Any, i: int, states: Any) -> tuple[Any, Any]:
        """Causal convolution and SiLU; its new window (1, K - 1, D), None for a kernel of 1."""
        path, D, K = f"model.layers.{i}.mixer.conv1d", self.args.hidden_size, self.args.conv_kernel
        taps = self._numbers(f"{path}.weight")  # (D, K, 1)
        bias = self._numbers(f"{path}.bias")
        window = None
        if states is not None:
            past = self.ops.slice(states, [i, 0, 0], [1, K - 1, D])
            x = self.ops.concat([past, x], 1)
            window = self.ops.slice(x, [0, self.T, 0], [1, K - 1, D])
        if self.T == 1:
            x = self.ops.mul(x, np.ascontiguousarray(taps[..., 0].T)[None])
            x = self.ops.add(self.ops.total(x, 1), bias)
        else:
            x = self.ops.transpose(x, [0, 2, 1])
            x = self.ops.convolve(x, taps.transpose(0, 2, 1).copy(), bias)
            x = self.ops.transpose(x, [0, 2, 1])
        return self.ops.silu(x), window

    def _recurrence(self, x: Any, i: int, states: Any) -> tuple[Any, Any]:
        """hidden (1, T, D) and the last state (1, slots, D)."""
        ops, cell, H, T, D = self.ops, self.cell, self.args.num_heads, self.T, self.args.hidden_size
        w, dtype = D // H, self.form.recurrence_dtype
        u = self._input_projection(x, f"model.layers.{i}.mixer.cell")
        gates = ops.split(u, len(cell.gates)) if len(cell.gates) > 1 else [u]
        inputs = {g: Value(ops, ops.cast(gate, dtype)) for g, gate in zip(cell.gates, gates, strict=True)}
        rows = self._numbers(f"model.layers.{i}.mixer.cell.recurrent_weight").astype(dtype)
        params = {
            name: Value(ops, ops.constant(row.reshape(1, H, 1, w)))
            for name, row in zip(cell.params, rows, strict=True)
        }
        start = tuple(
            ops.reshape(ops.slice(states, [i, slot, 0], [1, 1, D]), [1, H, 1, w])
            for slot in range(len(cell.slots))
        )
        initial = self._initial_state(i)
        if initial is not None:
            start = tuple(ops.add(s, known) for s, known in zip(start, initial, strict=True))
        solved = self._solve(params, inputs, tuple(Value(ops, s) for s in start))
        hidden = solved[cell.output_slot].var
        hidden = ops.reshape(ops.transpose(hidden, [0, 2, 1, 3]), [1, T, D])
        last = [s.var if T == 1 else self._steps(s.var, T - 1, 1) for s in solved]
        if initial is not None:
            last = [ops.sub(s, known) for s, known in zip(last, initial, strict=True)]
        last = [ops.reshape(s, [1, 1, D]) for s in last]
        hidden = ops.cast(hidden, self.form.activations)
        return hidden, ops.concat(last, 1) if len(last) > 1 else last[0]

    def _initial_state(self, i: int) -> list[Any] | None:
        """A learned state's slots (1, H, 1, w), None without one.

        It is added to what is read and taken from what is kept, so that the zeros that an app and Core ML
        begin with stand for it.
        """
        name = f"model.layers.{i}.mixer.cell.initial_state"
        if name not in self.weights:
            return None
        H, w = self.args.num_heads, self.args.hidden_size // self.args.num_heads
        rows = self._numbers(name).astype(self.form.recurrence_dtype)
        return [row.reshape(1, H, 1, w) for row in rows]

    def _input_projection(self, x: Any, path: str) -> Any:
        """(1, T, D) -> (1, H, T, gates * w)."""
        H, T, D = self.args.num_heads, self.T, self.args.hidden_size
        weight, bias = self._matrix(f"{path}.input_proj.weight"), self._numbers(f"{path}.bias")
        x = self.ops.transpose(self.ops.reshape(x, [1, T, H, D // H]), [0, 2, 1, 3])
        return self.ops.add(self.ops.linear_by_head(x, weight), bias.reshape(1, H, 1, -1))

    def _solve(self, params: dict[str, Value], inputs: dict[str, Value], start: State) -> State:
        with explained(self.cell, self.ops.title):
            if self.T == 1:
                new = self.cell.step(start, inputs, params, self.F)
                return tuple(self._full(s) if isinstance(s, float) else s for s in new)
            states = first_guess(self.cell, params, inputs, self.library)
            for _ in range(self.iterations):
                states = iterate(self.cell, params, inputs, start, states, self.library, self.T)
            return states

    # What the solver needs (newton.Library), on (1, H, T, w).

    def _delay(self, x: Value, k: int, fill: float) -> Value:
        if not isinstance(x, Value):
            x = self._full(x)
        kept = self._steps(x.var, 0, self.T - k)
        pad = [0, 0, 0, 0, k, 0, 0, 0]
        return Value(self.ops, self.ops.pad(kept, pad, fill))

    def _after(self, start: Value, x: Value) -> Value:
        return Value(self.ops, self.ops.concat([start.var, self._steps(x.var, 0, self.T - 1)], 2))

    def _full(self, number: float) -> Value:
        H, w = self.args.num_heads, self.args.hidden_size // self.args.num_heads
        values = np.full((1, H, self.T, w), number, self.form.recurrence_dtype)
        return Value(self.ops, self.ops.constant(values))

    def _steps(self, x: Any, begin: int, count: int) -> Any:
        _, heads, _, width = self.ops.shape(x)
        return self.ops.slice(x, [0, 0, begin, 0], [1, heads, count, width])

    def _write(self, new: Mapping[str, list[Any]]) -> list[Any]:
        """Give the new states back: into the program's own, or as the list of outputs."""
        outputs = []
        for name, shape in state_shapes(self.args).items():
            x = self.ops.concat(new[name], 0)
            if padding := shape[2] - self.args.hidden_size:
                x = self.ops.pad(x, [0, 0, 0, 0, 0, padding], 0)
            if self.form.graph_state:
                self.ops.write_state(name, self.inputs[name], x)
            else:
                outputs.append(self.ops.named(x, f"{name}_out"))
        return outputs

    def _mlp(self, x: Any, path: str) -> Any:
        up = self._linear(x, f"{path}.up_proj")
        if self.args.mlp == "swiglu":
            y = self.ops.mul(self.ops.silu(self._linear(x, f"{path}.gate_proj")), up)
        else:
            y = self.ops.gelu(up, exact=True)
        return self._linear(y, f"{path}.down_proj")

    def _norm(self, x: Any, path: str, centred: bool | None = None) -> Any:
        """RMSNorm or LayerNorm."""
        if centred is None:
            centred = self.args.norm == "layer"
        scaled = self._scaled_norm if self.form.activations == np.float16 else self._plain_norm
        x = self.ops.mul(scaled(x, centred), self._numbers(f"{path}.weight"))
        return self.ops.add(x, self._numbers(f"{path}.bias")) if f"{path}.bias" in self.weights else x

    def _plain_norm(self, x: Any, centred: bool) -> Any:
        ops = self.ops
        if centred:
            x = ops.sub(x, ops.mean(x))
        square = ops.add(ops.mean(ops.mul(x, x)), np.float32(self.args.norm_eps))
        return ops.mul(x, ops.rsqrt(square))

    def _scaled_norm(self, x: Any, centred: bool) -> Any:
        """For float16: the length taken of the row divided by its largest number.

        The squares of numbers above 255 overflow there, and eps is below the normal numbers. With
        X = (x, a, b) where a^2 + b^2 = D eps, and Y = X / max |X|, whose part for x is y:
        x / sqrt(mean(x^2) + eps) = y sqrt(D) / ||Y||.
        """
        ops = self.ops
        steps, width = ops.shape(x)[1:]
        pair = _two_near(max(self.args.norm_eps, SMALLEST_ROOT**2) * width / 2, np.add)
        y = ops.concat([x, ops.constant(np.tile(np.array(pair), (1, steps, 1)))], 2)
        y = ops.divide(y, ops.largest(ops.abs(y)))
        inside = ops.slice(y, [0, 0, 0], [1, steps, width])
        if centred:
            inside = ops.sub(inside, ops.mean(inside))
            y = ops.concat([inside, ops.slice(y, [0, 0, width], [1, steps, 2])], 2)
        size = ops.length(y)
        root = np.float16(width**0.5)
        if root.astype(np.float64) ** 2 == width:
            return ops.mul(inside, ops.divide(root, size))
        first, second = _two_near(width**0.5, np.multiply)
        return ops.mul(inside, ops.mul(ops.divide(first, size), second))

    def _linear(self, x: Any, path: str) -> Any:
        bias = self._numbers(f"{path}.bias") if f"{path}.bias" in self.weights else None
        return self.ops.linear(x, self._matrix(f"{path}.weight"), bias)

    def _matrix(self, name: str) -> Any:
        if name not in self.emitted:
            self.emitted[name] = self.ops.matrix(self.weights[name])
        return self.emitted[name]

    def _numbers(self, name: str) -> Any:
        return self.weights[name].values().astype(self.form.activations)


def _two_near(value: float, how: Any) -> tuple[Any, Any]:
    """Two float16 numbers, near the root of `value`, that give what no float16 number is, to 5e-6.

    With np.multiply that is `value`, their product; with np.add 2 `value`, the sum of their squares.
    """
    root = np.float16(value**0.5)
    near = (root.view(np.uint16) + np.arange(-512, 513)).astype(np.uint16).view(np.float16)
    wide = near.astype(np.float64)
    made = how.outer(wide, wide) if how is np.multiply else how.outer(wide**2, wide**2) / 2
    i, j = np.unravel_index(np.abs(made - value).argmin(), made.shape)
    return near[i], near[j]
