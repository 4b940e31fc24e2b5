"""A package's functions, operation by operation from the weights: one text for Core ML and for Core AI.

Shapes: T tokens, D channels (hidden_size). Where they stand in an activation is for layouts.py to say.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_pararnn.cells import Cell, get_cell
from mlx_pararnn.model_config import ModelArgs

from .constants import Stored
from .form import Form, state_dtypes, state_shapes
from .layouts import LAYOUTS
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
    layers: range,
    iterations: int,
    ops: Operations,
    inputs: Mapping[str, Any],
) -> list[Any]:
    """Add layers of the model to the function that is open; its outputs, named.

    The first layer follows the embedding; any other takes the input `hidden`, an activation. The last one is
    followed by the head; after any other the output is `hidden_out`.

    Args:
        iterations: Newton iterations, where there is more than one token.
        ops: what the function is written in.
        inputs: name -> variable, of `input_shapes` or `hidden`, and of the states.

    Raises:
        PararnnError: the cell's step uses what a program cannot do.
    """
    return _Builder(args, weights, form, layers, iterations, ops, inputs).outputs()


class _Builder:
    """Adds the model's operations to the function that is open."""

    def __init__(
        self,
        args: ModelArgs,
        weights: Mapping[str, Stored],
        form: Form,
        layers: range,
        iterations: int,
        ops: Operations,
        inputs: Mapping[str, Any],
    ) -> None:
        self.args, self.weights, self.form, self.inputs = args, weights, form, inputs
        self.layers, self.iterations, self.ops = layers, iterations, ops
        is_first = "tokens" in inputs
        time = 1 if is_first else LAYOUTS[form.layout].time
        self.T: int = ops.shape(inputs["tokens" if is_first else "hidden"])[time]
        self.cell: Cell = get_cell(args.cell, args.activations)
        self.F = ValueFunctions(form.recurrence)
        self.library = Library(self.F, self._delay, self._after, self._full)
        self.layout = LAYOUTS[form.layout](ops, args, weights, form.activations, self.T)

    def outputs(self) -> list[Any]:
        before = {name: self._read(name) for name in state_shapes(self.args)}
        states = {name: self._as_layers_take_it(name, state) for name, state in before.items()}
        x = self.inputs["hidden"] if "hidden" in self.inputs else self._embedding()
        new: dict[str, list[Any]] = {name: [] for name in states}
        for i in self.layers:
            x, after = self._layer(x, i, states)
            for name, rows in after.items():
                new[name].append(rows)
        written = self._write(before, new)
        if self.layers.stop < self.args.num_hidden_layers:
            return [self.ops.named(x, "hidden_out"), *written]
        if self.T > 1:
            x = self._along(x, self.layout.time, self.T - 1, 1)
        x = self._norm(x, "model.norm")
        head = "model.embed_tokens" if self.args.tie_word_embeddings else "lm_head"
        logits = self.layout.logits(x, f"{head}.weight")
        if self.form.argmax:
            return [self.ops.named(self.ops.argmax(logits), "token"), *written]
        return [self.ops.named(logits, "logits"), *written]

    def _embedding(self) -> Any:
        x = self.layout.look_up("model.embed_tokens.weight", self.inputs["tokens"])
        if "position" in self.inputs:
            positions = self.ops.add(self.inputs["position"], np.arange(self.T, dtype=np.int32))
            x = self.ops.add(x, self.layout.look_up("model.embed_positions.weight", positions))
        return x

    def _layer(self, x: Any, i: int, states: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        path = f"model.layers.{i}"
        mixed, after = self._mixer(self._norm(x, f"{path}.norm"), i, states)
        if self.args.residual_scale:
            x = self.ops.mul(x, self._vector(f"{path}.residual_scale"))
        x = self.ops.add(mixed, x)
        y = self._mlp(self._norm(x, f"{path}.mlp_norm"), f"{path}.mlp")
        return (self.ops.add(x, y) if self.args.mlp_residual else y), after

    def _mixer(self, x: Any, i: int, states: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        path = f"model.layers.{i}.mixer"
        if self.args.mixer == "plain":
            hidden, rows = self._recurrence(x, i, states["cell_state"])
            return hidden, {"cell_state": rows}
        x, gate = self.ops.split(self.layout.linear(x, f"{path}.in_proj"), 2, self.layout.channels)
        x, window = self._conv(x, i, states.get("conv"))
        hidden, rows = self._recurrence(x, i, states["cell_state"])
        y = self.ops.mul(self._norm(hidden, f"{path}.norm", centred=False), self.ops.silu(gate))
        after = {"cell_state": rows} | ({} if window is None else {"conv": window})
        return self.layout.linear(y, f"{path}.out_proj"), after

    def _conv(self, x: Any, i: int, states: Any) -> tuple[Any, Any]:
        """Causal convolution and SiLU; its new window of K - 1 steps, None for a kernel of 1."""
        K, window = self.args.conv_kernel, None
        if states is not None:
            x = self.ops.concat([self.layout.state_rows(states, i, 0, K - 1), x], self.layout.time)
            window = self._along(x, self.layout.time, self.T, K - 1)
        return self.ops.silu(self.layout.convolve(x, f"model.layers.{i}.mixer.conv1d")), window

    def _recurrence(self, x: Any, i: int, states: Any) -> tuple[Any, Any]:
        """Hidden states of all steps, and the last state, a row a slot."""
        ops, layout, cell, T = self.ops, self.layout, self.cell, self.T
        path, dtype = f"model.layers.{i}.mixer.cell", self.form.recurrence
        gates = layout.gates(x, path, len(cell.gates))
        inputs = {g: Value(ops, ops.cast(gate, dtype)) for g, gate in zip(cell.gates, gates, strict=True)}
        rows = layout.numbers(f"{path}.recurrent_weight").astype(dtype)
        params = {
            name: Value(ops, ops.constant(row.reshape(layout.row_shape)))
            for name, row in zip(cell.params, rows, strict=True)
        }
        start = tuple(layout.inner(layout.state_rows(states, i, slot, 1)) for slot in range(len(cell.slots)))
        initial = self._initial_state(i)
        if initial is not None:
            start = tuple(ops.add(s, known) for s, known in zip(start, initial, strict=True))
        solved = self._solve(params, inputs, tuple(Value(ops, s) for s in start))
        hidden = layout.outer(solved[cell.output_slot].var, T)
        last = [s.var if T == 1 else self._along(s.var, layout.inner_time, T - 1, 1) for s in solved]
        if initial is not None:
            last = [ops.sub(s, known) for s, known in zip(last, initial, strict=True)]
        last = [layout.outer(s, 1) for s in last]
        hidden = ops.cast(hidden, self.form.activations)
        return hidden, ops.concat(last, layout.time) if len(last) > 1 else last[0]

    def _initial_state(self, i: int) -> list[Any] | None:
        """A learned state's slots, None without one.

        It is added to what is read and taken from what is kept, so that the zeros that an app and Core ML
        begin with stand for it.
        """
        name = f"model.layers.{i}.mixer.cell.initial_state"
        if name not in self.weights:
            return None
        rows = self.layout.numbers(name).astype(self.form.recurrence)
        return [row.reshape(self.layout.row_shape) for row in rows]

    def _solve(self, params: dict[str, Value], inputs: dict[str, Value], start: State) -> State:
        with explained(self.cell, self.ops.title):
            if self.T == 1:
                new = self.cell.step(start, inputs, params, self.F)
                return tuple(self._full(s) if isinstance(s, float) else s for s in new)
            states = first_guess(self.cell, params, inputs, self.library)
            for _ in range(self.iterations):
                states = iterate(self.cell, params, inputs, start, states, self.library, self.T)
            return states

    # What the solver needs (unrolled_newton.Library).

    def _delay(self, x: Value, k: int, fill: float) -> Value:
        if not isinstance(x, Value):
            x = self._full(x)
        kept, pad = self._steps(x.var, 0, self.T - k), [0] * 8
        pad[2 * self.layout.inner_time] = k
        return Value(self.ops, self.ops.pad(kept, pad, fill))

    def _after(self, start: Value, x: Value) -> Value:
        moved = [start.var, self._steps(x.var, 0, self.T - 1)]
        return Value(self.ops, self.ops.concat(moved, self.layout.inner_time))

    def _full(self, number: float) -> Value:
        values = np.full(self.layout.inner_shape, number, self.form.recurrence)
        return Value(self.ops, self.ops.constant(values))

    def _steps(self, x: Any, begin: int, count: int) -> Any:
        return self._along(x, self.layout.inner_time, begin, count)

    def _along(self, x: Any, axis: int, begin: int, count: int) -> Any:
        """`count` places of an axis from `begin`."""
        begins, size = [0] * len(self.ops.shape(x)), list(self.ops.shape(x))
        begins[axis], size[axis] = begin, count
        return self.ops.slice(x, begins, size)

    def _read(self, name: str) -> Any:
        state = self.inputs[name]
        return self.ops.read_state(state) if self.form.graph_state else state

    def _as_layers_take_it(self, name: str, state: Any) -> Any:
        state = self.layout.read(state)
        return self.ops.cast(state, self.form.recurrence) if name == "cell_state" else state

    def _write(self, before: Mapping[str, Any], new: Mapping[str, list[Any]]) -> list[Any]:
        """Give the states back, new of these layers: into the program's own, or as the list of outputs."""
        outputs, dtypes = [], state_dtypes(self.form)
        for name, shape in state_shapes(self.args).items():
            x = self.layout.kept(new[name], shape[2])
            x = self.ops.cast(x, dtypes[name])
            others = [range(self.layers.start), range(self.layers.stop, shape[0])]
            kept = [self._along(before[name], 0, rows.start, len(rows)) if rows else None for rows in others]
            rows = [part for part in (kept[0], x, kept[1]) if part is not None]
            x = self.ops.concat(rows, 0) if len(rows) > 1 else x
            if self.form.graph_state:
                self.ops.write_state(name, self.inputs[name], x)
            else:
                outputs.append(self.ops.named(x, f"{name}_out"))
        return outputs

    def _mlp(self, x: Any, path: str) -> Any:
        up = self.layout.linear(x, f"{path}.up_proj")
        if self.args.mlp == "swiglu":
            y = self.ops.mul(self.ops.silu(self.layout.linear(x, f"{path}.gate_proj")), up)
        else:
            y = self.ops.gelu(up, exact=True)
        return self.layout.linear(y, f"{path}.down_proj")

    def _norm(self, x: Any, path: str, centred: bool | None = None) -> Any:
        """RMSNorm or LayerNorm."""
        if centred is None:
            centred = self.args.norm == "layer"
        scaled = self._scaled_norm if self.form.activations == np.float16 else self._plain_norm
        x = self.ops.mul(scaled(x, centred), self._vector(f"{path}.weight"))
        return self.ops.add(x, self._vector(f"{path}.bias")) if f"{path}.bias" in self.weights else x

    def _plain_norm(self, x: Any, centred: bool) -> Any:
        ops, channels = self.ops, self.layout.channels
        if centred:
            x = ops.sub(x, ops.mean(x, channels))
        square = ops.add(ops.mean(ops.mul(x, x), channels), np.float32(self.args.norm_eps))
        return ops.mul(x, ops.rsqrt(square))

    def _scaled_norm(self, x: Any, centred: bool) -> Any:
        """For float16: the length taken of the row divided by its largest number.

        The squares of numbers above 255 overflow there, and eps is below the normal numbers. With
        X = (x, a, b) where a^2 + b^2 = D eps, and Y = X / max |X|, whose part for x is y:
        x / sqrt(mean(x^2) + eps) = y sqrt(D) / ||Y||.
        """
        ops, channels, shape = self.ops, self.layout.channels, list(self.ops.shape(x))
        width, shape[channels] = shape[channels], 2
        pair = _two_near(max(self.args.norm_eps, SMALLEST_ROOT**2) * width / 2, np.add)
        both = np.broadcast_to(self.layout.vector(np.array(pair)), shape).copy()
        y = ops.concat([x, ops.constant(both)], channels)
        y = ops.divide(y, ops.largest(ops.abs(y), channels))
        inside = self._along(y, channels, 0, width)
        if centred:
            inside = ops.sub(inside, ops.mean(inside, channels))
            y = ops.concat([inside, self._along(y, channels, width, 2)], channels)
        size = ops.length(y, channels)
        root = np.float16(width**0.5)
        if root.astype(np.float64) ** 2 == width:
            return ops.mul(inside, ops.divide(root, size))
        first, second = _two_near(width**0.5, np.multiply)
        return ops.mul(inside, ops.mul(ops.divide(first, size), second))

    def _vector(self, name: str) -> Any:
        return self.layout.vector(self.layout.numbers(name))


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
