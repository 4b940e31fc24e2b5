"""The functions of a package, built operation by operation from the weights.

Shapes: T tokens, D channels (hidden_size), H heads, w = D / H. Activations are (1, T, D); inside a layer's
recurrence (1, H, T, w), as the block-diagonal input projection gives them. Time never stands on the innermost
axis, so the solver's shifts in time move whole rows.
"""

from collections.abc import Mapping
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types

from mlx_pararnn.cells import Cell, get_cell
from mlx_pararnn.model_config import ModelArgs

from .constants import Stored
from .form import Form, state_dtypes, state_shapes
from .unrolled_newton import Library, State, explained, first_guess, iterate
from .values import Value, ValueFunctions

# The fields of config.json that a program is built by; of any other no program knows what it means.
EXPORTED = {
    "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "cell", "num_heads",
    "mixer", "conv_kernel", "norm", "norm_eps", "mlp", "mlp_bias", "mlp_residual", "residual_scale",
    "max_position_embeddings", "tie_word_embeddings", "activations",
}  # fmt: skip
SMALLEST_ROOT = 1e-4  # of a norm's eps: a normal number of float16 (they begin at 6.1e-5)


def build_function(
    args: ModelArgs, weights: Mapping[str, Stored], form: Form, tokens: int, iterations: int
) -> Any:
    """A MIL function that reads `tokens` tokens; more than one by so many Newton `iterations`.

    Raises:
        PararnnError: the cell's step uses what a Core ML program cannot do.
    """
    inputs = {"tokens": mb.placeholder((1, tokens), types.int32)}
    if args.max_position_embeddings is not None:
        inputs["position"] = mb.placeholder((1,), types.int32)
    for name, shape in state_shapes(args).items():
        if form.graph_state:
            inputs[name] = mb.state_tensor_placeholder(shape, types.fp16)
        else:
            inputs[name] = mb.placeholder(shape, types.numpy_type_to_builtin_type(state_dtypes(form)[name]))
    with Function(inputs, ct.target.iOS18) as function:
        outputs = _Builder(args, weights, form, function.inputs, iterations).outputs()
        function.set_outputs(outputs)
    return function


class _Builder:
    """Adds the model's operations to the function that is open."""

    def __init__(
        self,
        args: ModelArgs,
        weights: Mapping[str, Stored],
        form: Form,
        inputs: Mapping[str, Any],
        iterations: int,
    ) -> None:
        self.args, self.weights, self.form, self.inputs = args, weights, form, inputs
        self.iterations = iterations
        self.T: int = inputs["tokens"].shape[1]
        self.cell: Cell = get_cell(args.cell, args.activations)
        self.F = ValueFunctions(form.recurrence_dtype)
        self.library = Library(self.F, self._delay, self._after, self._full)
        self.emitted: dict[str, Any] = {}

    def outputs(self) -> list[Any]:
        states = {
            name: mb.read_state(input=self.inputs[name]) if self.form.graph_state else self.inputs[name]
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
            x = mb.slice_by_size(x=x, begin=[0, self.T - 1, 0], size=[1, 1, self.args.hidden_size])
        x = self._norm(x, "model.norm")
        head = "model.embed_tokens" if self.args.tie_word_embeddings else "lm_head"
        if self.form.argmax:
            logits = mb.linear(x=x, weight=self._matrix(f"{head}.weight"))
            return [mb.reduce_argmax(x=logits, axis=-1, keep_dims=False, name="token"), *written]
        return [mb.linear(x=x, weight=self._matrix(f"{head}.weight"), name="logits"), *written]

    def _embedding(self) -> Any:
        x = self._gather("model.embed_tokens.weight", self.inputs["tokens"])
        if "position" in self.inputs:
            positions = mb.add(x=self.inputs["position"], y=np.arange(self.T, dtype=np.int32))
            x = mb.add(x=x, y=self._gather("model.embed_positions.weight", positions))
        return x

    def _gather(self, name: str, indices: Any) -> Any:
        return mb.gather(x=self._matrix(name), indices=indices, axis=0, validate_indices=False)

    def _layer(self, x: Any, i: int, states: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        path = f"model.layers.{i}"
        mixed, after = self._mixer(self._norm(x, f"{path}.norm"), i, states)
        if self.args.residual_scale:
            x = mb.mul(x=x, y=self._vector(f"{path}.residual_scale"))
        x = mb.add(x=mixed, y=x)
        y = self._mlp(self._norm(x, f"{path}.mlp_norm"), f"{path}.mlp")
        return (mb.add(x=x, y=y) if self.args.mlp_residual else y), after

    def _mixer(self, x: Any, i: int, states: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        path = f"model.layers.{i}.mixer"
        if self.args.mixer == "plain":
            hidden, rows = self._recurrence(x, i, states["cell_state"])
            return hidden, {"cell_state": rows}
        x, gate = mb.split(x=self._linear(x, f"{path}.in_proj"), num_splits=2, axis=-1)
        x, window = self._conv(x, i, states.get("conv"))
        hidden, rows = self._recurrence(x, i, states["cell_state"])
        y = mb.mul(x=self._norm(hidden, f"{path}.norm", centred=False), y=_silu(gate))
        after = {"cell_state": rows} | ({} if window is None else {"conv": window})
        return self._linear(y, f"{path}.out_proj"), after

    def _conv(self, x: Any, i: int, states: Any) -> tuple[Any, Any]:
        """Causal convolution and SiLU; its new window (1, K - 1, D), None for a kernel of 1."""
        path, D, K = f"model.layers.{i}.mixer.conv1d", self.args.hidden_size, self.args.conv_kernel
        taps = self._numbers(f"{path}.weight")  # (D, K, 1)
        bias = self._vector(f"{path}.bias")
        window = None
        if states is not None:
            past = mb.slice_by_size(x=states, begin=[i, 0, 0], size=[1, K - 1, D])
            x = mb.concat(values=[past, x], axis=1)
            window = mb.slice_by_size(x=x, begin=[0, self.T, 0], size=[1, K - 1, D])
        if self.T == 1:
            x = mb.mul(x=x, y=np.ascontiguousarray(taps[..., 0].T)[None])
            x = mb.add(x=mb.reduce_sum(x=x, axes=[1], keep_dims=True), y=bias)
        else:
            x = mb.transpose(x=x, perm=[0, 2, 1])
            x = mb.conv(x=x, weight=taps.transpose(0, 2, 1).copy(), bias=bias, groups=D, pad_type="valid")
            x = mb.transpose(x=x, perm=[0, 2, 1])
        return _silu(x), window

    def _recurrence(self, x: Any, i: int, states: Any) -> tuple[Any, Any]:
        """hidden (1, T, D) and the last state (1, slots, D)."""
        cell, H, T, D = self.cell, self.args.num_heads, self.T, self.args.hidden_size
        w, dtype = D // H, self.form.recurrence_dtype
        u = self._input_projection(x, f"model.layers.{i}.mixer.cell")
        gates = mb.split(x=u, num_splits=len(cell.gates), axis=-1) if len(cell.gates) > 1 else [u]
        inputs = {g: Value(_cast(gate, dtype)) for g, gate in zip(cell.gates, gates, strict=True)}
        rows = self._numbers(f"model.layers.{i}.mixer.cell.recurrent_weight").astype(dtype)
        params = {
            name: Value(mb.const(val=row.reshape(1, H, 1, w)))
            for name, row in zip(cell.params, rows, strict=True)
        }
        start = tuple(
            mb.reshape(x=mb.slice_by_size(x=states, begin=[i, slot, 0], size=[1, 1, D]), shape=[1, H, 1, w])
            for slot in range(len(cell.slots))
        )
        initial = self._initial_state(i)
        if initial is not None:
            start = tuple(mb.add(x=s, y=known) for s, known in zip(start, initial, strict=True))
        solved = self._solve(params, inputs, tuple(map(Value, start)))
        hidden = solved[cell.output_slot].var
        hidden = mb.reshape(x=mb.transpose(x=hidden, perm=[0, 2, 1, 3]), shape=[1, T, D])
        last = [s.var if T == 1 else self._steps(s.var, T - 1, 1) for s in solved]
        if initial is not None:
            last = [mb.sub(x=s, y=known) for s, known in zip(last, initial, strict=True)]
        last = [mb.reshape(x=s, shape=[1, 1, D]) for s in last]
        return _cast(hidden, np.float16), mb.concat(values=last, axis=1) if len(last) > 1 else last[0]

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
        x = mb.transpose(x=mb.reshape(x=x, shape=[1, T, H, D // H]), perm=[0, 2, 1, 3])
        return mb.add(x=mb.matmul(x=x, y=weight, transpose_y=True), y=bias.reshape(1, H, 1, -1))

    def _solve(self, params: dict[str, Value], inputs: dict[str, Value], start: State) -> State:
        with explained(self.cell):
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
        return Value(mb.pad(x=kept, pad=pad, mode="constant", constant_val=x.dtype.type(fill)))

    def _after(self, start: Value, x: Value) -> Value:
        return Value(mb.concat(values=[start.var, self._steps(x.var, 0, self.T - 1)], axis=2))

    def _full(self, number: float) -> Value:
        H, w = self.args.num_heads, self.args.hidden_size // self.args.num_heads
        return Value(mb.const(val=np.full((1, H, self.T, w), number, self.form.recurrence_dtype)))

    def _steps(self, x: Any, begin: int, count: int) -> Any:
        return mb.slice_by_size(x=x, begin=[0, 0, begin, 0], size=[1, x.shape[1], count, x.shape[3]])

    def _write(self, new: Mapping[str, list[Any]]) -> list[Any]:
        """Give the new states back: into Core ML's states, or as the list of outputs."""
        outputs = []
        for name, shape in state_shapes(self.args).items():
            rows = new[name]
            padding = shape[2] - self.args.hidden_size
            # an output's name belongs to the last operation
            names = [{}, {"name": f"{name}_out"}] if padding else [{"name": f"{name}_out"}, {}]
            x = mb.concat(values=rows, axis=0, **names[0])
            if padding:
                zero = np.dtype(state_dtypes(self.form)[name]).type(0)
                pad = [0, 0, 0, 0, 0, padding]
                x = mb.pad(x=x, pad=pad, mode="constant", constant_val=zero, **names[1])
            if self.form.graph_state:
                mb.coreml_update_state(state=self.inputs[name], value=x)
            else:
                outputs.append(x)
        return outputs

    def _mlp(self, x: Any, path: str) -> Any:
        up = self._linear(x, f"{path}.up_proj")
        if self.args.mlp == "swiglu":
            y = mb.mul(x=_silu(self._linear(x, f"{path}.gate_proj")), y=up)
        else:
            y = mb.gelu(x=up, mode="EXACT")
        return self._linear(y, f"{path}.down_proj")

    def _norm(self, x: Any, path: str, centred: bool | None = None) -> Any:
        """RMSNorm or LayerNorm, its mean square taken of the row divided by its largest number m.

        In float16 the squares of numbers above 255 overflow, and eps is below the normal numbers. With
        eps = a b, m = max(|x|, a, b), y = x / m:
        x / sqrt(mean(x^2) + eps) = x * (1 / sqrt(mean(y^2) + (a / m)(b / m)) / m), a factor of at most 1e4.
        """
        if centred is None:
            centred = self.args.norm == "layer"
        a, b = _factors(self.args.norm_eps)
        m = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=max(a, b))
        y = mb.real_div(x=x, y=m)
        if centred:
            mean = mb.reduce_mean(x=y, axes=[-1], keep_dims=True)
            x, y = mb.sub(x=x, y=mb.mul(x=mean, y=m)), mb.sub(x=y, y=mean)
        square = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[-1], keep_dims=True)
        small = mb.mul(x=mb.real_div(x=a, y=m), y=mb.real_div(x=b, y=m))
        square = mb.add(x=square, y=small)
        factor = mb.real_div(x=mb.rsqrt(x=square, epsilon=np.float16(0)), y=m)
        x = mb.mul(x=x, y=factor)
        x = mb.mul(x=x, y=self._vector(f"{path}.weight"))
        return mb.add(x=x, y=self._vector(f"{path}.bias")) if f"{path}.bias" in self.weights else x

    def _linear(self, x: Any, path: str) -> Any:
        weight = self._matrix(f"{path}.weight")
        if f"{path}.bias" in self.weights:
            return mb.linear(x=x, weight=weight, bias=self._numbers(f"{path}.bias"))
        return mb.linear(x=x, weight=weight)

    def _matrix(self, name: str) -> Any:
        if name not in self.emitted:
            self.emitted[name] = self.weights[name].emit()
        return self.emitted[name]

    def _numbers(self, name: str) -> Any:
        return self.weights[name].values().astype(np.float16)

    def _vector(self, name: str) -> Any:
        return self._numbers(name)


def _factors(eps: float) -> tuple[Any, Any]:
    """Two float16 numbers near sqrt(eps) whose product is eps to about 1e-5, which no float16 number is."""
    root = np.float16(max(eps**0.5, SMALLEST_ROOT))
    near = (root.view(np.uint16) + np.arange(-64, 65)).astype(np.uint16).view(np.float16)
    products = near[:, None].astype(np.float64) * near
    i, j = np.unravel_index(np.abs(products - max(eps, SMALLEST_ROOT**2)).argmin(), products.shape)
    return near[i], near[j]


def _silu(x: Any) -> Any:
    return mb.silu(x=x)


def _cast(x: Any, dtype: Any) -> Any:
    wanted = types.numpy_type_to_builtin_type(np.dtype(dtype))
    return x if x.dtype == wanted else mb.cast(x=x, dtype=types.builtin_to_string(wanted))
