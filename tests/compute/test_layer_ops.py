"""What runs around the recurrence, in plain ops; what a token and a prompt cost in primitives; what must not
grow. The kernels themselves: tests/msl/test_layer_kernels.py, and on a GPU tests/compute/test_metal.py."""

import io
import random
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Cell, Model, ModelArgs, get_cell, register_cell
from mlx_pararnn.compute import gpu, layer_ops
from mlx_pararnn.compute.recurrence import choice_for
from tests.support.launches import COUNTS
from tests.support.memory import active_memory

SIZES = {"hidden_size": 64, "vocab_size": 50, "intermediate_size": 96}
KINDS = {
    "gru": {"cell": "gru"},
    "lstm": {"cell": "lstm", "num_heads": 4},
    "ml-pararnn": {"cell": "gru", "residual_scale": True, "mlp_residual": False},
    "plain": {"cell": "gru", "mixer": "plain"},
    "plain, several heads and biases": {"cell": "lstm", "mixer": "plain", "num_heads": 4, "mlp_bias": True},
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def inputs_of(shapes, dtype=mx.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("K", [1, 2, 4, 7])
@pytest.mark.parametrize("T", [1, 2, 30])
def test_conv_silu(T, K):
    x, window, weight, bias = inputs_of([(2, T, 12), (2, K - 1, 12), (12, K), (12,)])
    y, new_window = layer_ops.conv_silu(x, window, weight, bias)
    both = np.concatenate([window, x], axis=1).astype(np.float64)
    wanted = np.array(bias) + sum(np.array(weight)[:, k] * both[:, k : k + T] for k in range(K))
    np.testing.assert_allclose(y, wanted * sigmoid(wanted), atol=2e-6)
    np.testing.assert_array_equal(new_window, both[:, T:].astype(np.float32))


def test_a_prompts_window_does_not_hold_on_to_the_prompt():
    x, window, weight, bias = inputs_of([(1, 5000, 64), (1, 3, 64), (64, 4), (64,)])
    mx.eval(x, window, weight, bias)
    before = active_memory()
    new_window = layer_ops.conv_silu(x, window, weight, bias)[1]
    mx.eval(new_window)
    assert active_memory() - before < 10000


def test_gated_norm_and_swiglu():
    hidden, gate, weight = inputs_of([(2, 5, 12), (2, 5, 12), (12,)])
    y = layer_ops.gated_norm(hidden, gate, weight, 1e-2)
    h, g = np.array(hidden, np.float64), np.array(gate, np.float64)
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-2) * np.array(weight)
    np.testing.assert_allclose(y, normed * g * sigmoid(g), atol=2e-6)
    np.testing.assert_allclose(layer_ops.swiglu(gate, hidden), g * sigmoid(g) * h, atol=2e-6)


@pytest.mark.compiled
@pytest.mark.large
@pytest.mark.parametrize("function", ["conv_silu", "gated_norm", "swiglu"])
def test_ops_differentiate_compile_and_vectorize(function):
    shapes = {
        "conv_silu": [(2, 9, 6), (2, 3, 6), (6, 4), (6,)],
        "gated_norm": [(2, 9, 6), (2, 9, 6), (6,)],
        "swiglu": [(2, 9, 6), (2, 9, 6)],
    }
    arrays = inputs_of(shapes[function])

    def call(*arrays):
        extra = (1e-2,) if function == "gated_norm" else ()
        y = getattr(layer_ops, function)(*arrays, *extra)
        return (y[0].sum() + (y[1] ** 2).sum()) if isinstance(y, tuple) else (y**2).sum()

    every = list(range(len(arrays)))
    gradients = mx.grad(call, argnums=every)(*arrays)
    compiled = mx.compile(mx.grad(call, argnums=every))(*arrays)
    for n, (array, gradient, again) in enumerate(zip(arrays, gradients, compiled, strict=True)):
        np.testing.assert_allclose(gradient, again, atol=1e-4, rtol=1e-4)
        direction = inputs_of([array.shape], seed=n + 1)[0]
        steps = [[*arrays[:n], array + h * direction, *arrays[n + 1 :]] for h in (1e-2, -1e-2)]
        slope = (call(*steps[0]) - call(*steps[1])) / 2e-2
        assert abs(slope - (gradient * direction).sum()).item() < 2e-2 * max(1, abs(slope.item()))
    stacked = [mx.stack([a, 2 * a]) for a in arrays]
    np.testing.assert_allclose(
        mx.vmap(call)(*stacked), mx.stack([call(*a) for a in zip(*stacked, strict=True)]), rtol=1e-5
    )


# What a recorded graph is made of. Views move no number and launch nothing: their outputs share the input's
# memory. (Reshape, Flatten and Unflatten copy where strides forbid a view; here none do.)
VIEWS = {
    *("Reshape", "Flatten", "Unflatten", "Squeeze", "ExpandDims", "Transpose", "Split", "Slice", "Broadcast"),
    *("StopGradient", "CustomTransforms"),
}
PRODUCTS = {"Matmul", "AddMM"}


@pytest.fixture
def recorded_as_on_a_mac(monkeypatch):
    """MLX records kernels without a GPU (and cannot evaluate them). RMSNorm, one primitive there and unrolled
    here, has a stand-in."""
    monkeypatch.setattr(gpu, "available_backend", lambda: "metal")
    for trial in (
        "recurrence.kernel_works",
        *(f"layer_ops.{kernel}_works" for kernel in ("conv", "decode", "norm")),
    ):
        monkeypatch.setattr(f"mlx_pararnn.compute.{trial}", lambda *_: True)
    norm = mx.fast.metal_kernel(
        name="norm", input_names=["x"], output_names=["y"], source="y[0] = x[thread_position_in_grid.x];"
    )

    def rms_norm(x, weight, eps):
        shapes = {"output_shapes": [x.shape], "output_dtypes": [x.dtype]}
        return norm(inputs=[x], grid=(1, 1, 1), threadgroup=(1, 1, 1), **shapes)[0]

    monkeypatch.setattr(mx.fast, "rms_norm", rms_norm)


def primitives(layers, T, **kind):
    """The primitives of a call on T tokens, read on from a state, by name."""
    model = Model(ModelArgs(num_hidden_layers=layers, **SIZES, **kind))
    cache = model.make_cache()
    slots = len(get_cell(kind["cell"]).slots)
    for one in cache:
        one[0] = mx.zeros((1, slots, SIZES["hidden_size"]))
        if kind.get("mixer") != "plain":
            one[1] = mx.zeros((1, 3, SIZES["hidden_size"]))
    tokens = mx.zeros((1, T), mx.int32)
    mx.eval(model.parameters(), [one.cache for one in cache], tokens)
    graph = io.StringIO()

    def record(x):
        logits = model(tokens, cache=cache)
        mx.export_to_dot(graph, logits, *[a for one in cache for a in one.cache if a is not None])
        return x

    # A kernel is only recorded while something is traced; the tokens are not, so that what mx.compile fuses
    # stays one primitive, as it is when the model is called.
    mx.export_function(lambda _: None, record, mx.array(0))
    return Counter(re.findall(r'label ="([^"]*)", shape=rectangle', graph.getvalue()))


def of_a_layer(T, **kind):
    """(matrix products, other computing primitives) of one layer."""
    layer = primitives(3, T, **kind) - primitives(2, T, **kind)
    products = sum(layer[name] for name in PRODUCTS)
    return products, sum(n for name, n in layer.items() if name not in VIEWS | PRODUCTS)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_on_a_gpu_in_primitives(kind, recorded_as_on_a_mac):
    """At most 5 beside the matrix products for a token."""
    products, token, prompt, _ = COUNTS[kind]
    assert of_a_layer(1, **KINDS[kind]) == (products, token)
    assert token <= 5
    assert of_a_layer(200, **KINDS[kind]) == (products, prompt)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_plain_ops_in_primitives(kind, monkeypatch):
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    products, _, _, ops = COUNTS[kind]
    # mx.compile keeps its first trace for good, and one that is made while a graph is recorded fuses more.
    Model(ModelArgs(num_hidden_layers=1, **SIZES, **KINDS[kind]))(mx.zeros((1, 1), mx.int32))
    assert of_a_layer(1, **KINDS[kind]) == (products, ops)


@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_conversations_build_few_libraries(cell, monkeypatch, recorded_as_on_a_mac):
    """No free number is compiled in: 100 random conversations, which remember states, make at most 12."""
    built, intervals = set(), set()

    def run(launch, arrays, backend):
        intervals.update(arrays["every"].tolist() if "every" in launch.input_names else [])
        assert backend == "metal"
        small = tuple(
            arrays[name].size < 8 for name in launch.input_names
        )  # in constant memory: another text
        dtypes = tuple(arrays[name].dtype for name in launch.input_names)
        built.add((launch.name, small, dtypes))
        shapes = zip(launch.output_names, launch.output_shapes, launch.output_dtypes, strict=True)
        return {name: mx.zeros(shape, dtype) for name, shape, dtype in shapes}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: x)
    model = Model(ModelArgs(cell=cell, num_hidden_layers=1, **SIZES))
    draw = random.Random(0)
    for _ in range(100):
        model.recent_steps = draw.choice((0, 0, 0, 4))
        model.snapshot_spacing = draw.choice((0, draw.randint(1, 150)))
        cache = model.make_cache()
        for _ in range(draw.randint(1, 4)):
            model(mx.zeros((1, draw.choice((1, draw.randint(2, 300)))), mx.int32), cache=cache)
    assert len(intervals) > 12  # of which each once was a library
    assert len(built) <= 12


class Leaky(Cell):
    """A user's cell without Metal text."""

    name = "leaky_for_decoding"
    gates = ("a", "n")
    slots = ("h",)
    output = "h"
    params = ("w",)

    def step(self, state, u, params, F):
        (h,) = state
        a = F.sigmoid(u["a"])
        return (a * h + (1 - a) * F.tanh(u["n"] + params["w"] * h),)


@pytest.mark.parametrize(("cell", "kernel"), [("gru", True), ("leaky_for_decoding", False)])
def test_a_cell_without_metal_text_runs_in_ops(cell, kernel, recorded_as_on_a_mac):
    register_cell(Leaky)
    found = primitives(1, 1, cell=cell, mixer="plain", norm="layer")
    assert ("CustomKernel" in found) == kernel


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["", "ops"])  # "": what this machine takes
def test_decoding_does_not_synchronise_and_does_not_grow(backend, kind, monkeypatch):
    """A token is only recorded, whatever came before it, and whoever wants it evaluates it. Where a CPU does
    it in one call, that waits once, for what it reads.
    """
    monkeypatch.setenv("MLX_PARARNN_BACKEND", backend)
    model = Model(ModelArgs(num_hidden_layers=2, **SIZES, **KINDS[kind]))
    cache = model.make_cache()
    model(mx.array([[1]]), cache=cache)  # the first tries the backend
    logits = model(mx.array([[1, 2, 3]]), cache=cache)
    # Of shapes that are new MLX is asked whether it traces them.
    logits = model(mx.argmax(logits[:, -1:], axis=-1), cache=cache)
    mx.eval(logits, [one.cache for one in cache])
    size = sum(one.nbytes for one in cache)
    where = choice_for(get_cell(KINDS[kind]["cell"]), mx.float32, lambda: [], rows=1, tokens=1, width=64)
    waits = ["eval"] if where.one_call else []
    active, evaluated = None, []

    for step in range(80):
        evaluated.clear()
        with monkeypatch.context() as inside:
            for name in ("eval", "async_eval"):
                evaluate = getattr(mx, name)
                inside.setattr(mx, name, lambda *a, n=name, e=evaluate: evaluated.append(n) or e(*a))
            token = mx.argmax(logits[:, -1], axis=-1)
            logits = model(token[:, None], cache=cache)
        assert evaluated == waits
        mx.eval(logits, [one.cache for one in cache])
        assert sum(one.nbytes for one in cache) == size
        if step == 10:
            active = active_memory()
    assert active_memory() < active + 2000  # no array a token: the smallest has 256 bytes


@pytest.mark.compiled
@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_compiles(kind, monkeypatch):
    """Inside mx.compile MLX itself refuses every evaluation, .item() and the like included."""
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    model = Model(ModelArgs(num_hidden_layers=2, **SIZES, **KINDS[kind]))
    cache, twin = model.make_cache(), model.make_cache()
    model(mx.array([[1, 2, 3]]), cache=cache)
    model(mx.array([[1, 2, 3]]), cache=twin)

    @mx.compile
    def step(token, states):
        for one, arrays in zip(cache, states, strict=True):
            one.cache = list(arrays)
        return model(token, cache=cache), [one.cache for one in cache]

    token, states = mx.array([[4]]), [one.cache for one in cache]
    for _ in range(3):
        logits, states = step(token, states)
        np.testing.assert_allclose(logits, model(token, cache=twin), atol=1e-5)
