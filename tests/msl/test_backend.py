"""recurrence() by way of the kernels, as on a Mac, with the harness in the GPU's place."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_pararnn
from mlx_pararnn import PararnnError, get_cell
from mlx_pararnn.compute import choice, gpu, layer_ops
from mlx_pararnn.compute.recurrence import recurrence
from tests.support.demo import DEMO
from tests.support.problems import loss_of, problem, solve

from ..support.msl import harness

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=str(harness.missing()))


def test_kernels_are_tried_once_and_then_used(mac):
    cell, params, u, _ = problem("lstm", T=30)
    solve(cell, params, u)
    solve(cell, params, u)
    assert len(mac) == 1 + 2


FAULTS = {
    "does not compile": RuntimeError("Unable to build metal library"),
    # what MLX says of a pipeline whose threads do not fit the GPU's registers
    "is refused": ValueError("Thread group size (512) is greater than the maximum allowed 448"),
    "wrong numbers": 1.0,
    "slightly wrong numbers": 1e-3,
}


def breaking(monkeypatch, fault, kernels):
    """A GPU on which kernels for which `kernels(launch)` is true have a fault of FAULTS."""
    working = gpu.run

    def run(launch, arrays, backend):
        if not kernels(launch):
            return working(launch, arrays, backend)
        if isinstance(FAULTS[fault], Exception):
            raise FAULTS[fault]
        outputs = working(launch, arrays, backend)
        return {n: a + FAULTS[fault] if a.dtype == mx.float32 else a for n, a in outputs.items()}

    monkeypatch.setattr(gpu, "run", run)


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_do_not_work_here_are_not_used(mac, monkeypatch, fault):
    breaking(monkeypatch, fault, lambda launch: True)
    cell, params, u, _ = problem("gru", T=30)
    with pytest.warns(RuntimeWarning, match="the metal backend does not work here"):
        hidden, _ = solve(cell, params, u)
    np.testing.assert_allclose(hidden, solve(cell, params, u, backend="ops")[0], atol=2e-6)


def kinds_of(names):
    return [name.split("_")[1] for name in names]


def test_a_kernel_that_does_not_work_here_takes_no_other_with_it(mac, monkeypatch):
    """With one text of Newton's refused: Newton's others, and in its place the sequential one."""
    cell, params, u, _ = problem("gru", T=30)
    mask = mx.arange(30)[None] < mx.array([[30], [21]])
    masked = gpu.newton_launch(cell, u.shape, mx.float32, masked=True).name
    breaking(monkeypatch, "is refused", lambda launch: launch.name == masked)
    solve(cell, params, u)
    assert kinds_of(mac) == ["recurrence"] * 2
    with pytest.warns(RuntimeWarning, match="recurrence of 'gru', newton float32 narrow masked.*448"):
        hidden, _ = solve(cell, params, u, mask=mask)
    assert kinds_of(mac[2:]) == ["sequential"] * 2
    np.testing.assert_allclose(hidden, solve(cell, params, u, mask=mask, backend="ops")[0], atol=2e-6)
    solve(cell, params, u)
    assert kinds_of(mac[4:]) == ["recurrence"]


def test_what_the_caller_asks_for_is_not_replaced(mac, monkeypatch):
    breaking(monkeypatch, "is refused", lambda launch: True)
    cell, params, u, _ = problem("gru", T=30)
    with pytest.raises(ValueError, match="maximum allowed"):
        solve(cell, params, u, backend="metal")


CALLS = {
    "newton": {},
    "sequential": {"method": "sequential"},
    "masked": {"mask": mx.arange(30)[None] < mx.array([[30], [21]])},
    "states": {"return_states": 7},
    "info": {"return_info": True},
    "all, in 16 bits": {
        "dtype": mx.bfloat16,
        "mask": mx.ones((2, 30), mx.bool_),
        "return_states": 4,
        "return_info": True,
    },
    "many channels": {"D": 530},
}


@pytest.mark.sampled("harness", by=lambda call: [call] if call.startswith("all") else [])
@pytest.mark.parametrize("call", CALLS)
def test_the_trial_is_of_the_kernel_that_is_launched(mac, call):
    options = dict(CALLS[call])
    dtype, D = options.pop("dtype", mx.float32), options.pop("D", 6)
    cell, params, u, _ = problem("lstm", T=30, D=D)
    recurrence(cell, mx.array(params), mx.array(u).astype(dtype), **options)
    assert len(mac) == 2
    assert mac[0] == mac[1]  # a name is that of a text, with its sizes, dtypes, flags and threads
    assert works_as_tried("the recurrence of 'lstm'")


def works_as_tried(what):
    return any(what in tried and not reason for tried, reason in choice.TRIALS.items())


@pytest.mark.parametrize(("D", "dtype"), [(40, mx.float16), (1060, mx.float32)], ids=str)
def test_the_trial_is_of_the_kernels_of_a_token_that_are_launched(mac, D, dtype):
    B, cell = 1, get_cell("gru")
    wave = lambda *shape: mx.sin(mx.arange(math.prod(shape))).reshape(shape).astype(dtype)  # noqa: E731
    layer_ops.conv_silu(wave(B, 1, D), wave(B, 2, D), wave(D, 3), wave(D), backend="metal")
    assert kinds_of(mac) == ["conv"] * 3
    assert len(set(mac)) == 1
    u, gate = wave(B, 1, 1, 3, D), wave(B, 1, D)
    layer_ops.decode(cell, wave(3, D), u, wave(1, 3 * D), wave(B, 1, D), gate, wave(D), 1e-6, backend="metal")
    assert kinds_of(mac[3:]) == ["decode"] * 2
    assert len(set(mac[3:])) == 1
    for n, bias in enumerate((None, wave(D))):
        layer_ops.sum_and_norm(u[:, 0, :, 0], gate, None, wave(D), bias, 1e-6, backend="metal")
        assert kinds_of(mac[5 + 2 * n :]) == ["norm"] * 2
        assert len(set(mac[5 + 2 * n :])) == 1


@pytest.mark.parametrize("options", [{}, {"return_states": 7, "masked": True}], ids=str)
def test_the_trial_is_of_the_kernel_of_the_gradient_that_is_launched(mac, options):
    cell, params, u, state = problem("gru", T=30, state=True)
    mask = mx.arange(30)[None] < mx.array([[30], [21]]) if options else None
    arrays = [mx.array(params), mx.array(u).astype(mx.float16), mx.array(state)]
    mx.eval(mx.grad(loss_of(cell, {}, mask, options.get("return_states", 0)), argnums=(0, 1, 2))(*arrays))
    adjoints = [name for name in mac if "adjoint" in name]
    assert len(adjoints) == 2
    assert len(set(adjoints)) == 1


def test_a_text_that_is_not_the_classs_is_refused():
    """SLOTS, GATES, PARAMS and OUTPUT of the Metal text are held against the Python class."""
    cell = get_cell("gru")
    launch = gpu.sequential_launch(cell, (1, 1, 4, 3, 32), mx.float32)
    wrong = replace(launch, header=launch.header.replace("SLOTS = 1", "SLOTS = 2"))
    arrays = {
        "u": np.zeros((1, 1, 4, 3, 32), np.float32),
        "bias": np.zeros((1, 96), np.float32),
        "params": np.zeros((3, 32), np.float32),
        "initial": np.zeros((1, 1, 32), np.float32),
    }
    with pytest.raises(Exception, match="not the Python class"):
        harness.run(wrong, arrays)


def test_names_tell_texts_apart():
    """MLX's CUDA side keeps compiled kernels by name."""
    gru, relu = get_cell("gru"), get_cell("gru", {"state": "relu"})
    names = {
        gpu.newton_launch(cell, (1, 1, 9, 3, 32), mx.float32, masked=masked, every=every).name
        for cell in (gru, relu)
        for masked in (False, True)
        for every in (0, 1, 2)
    }
    assert len(names) == 8  # every n-th state is an argument: 1 and 2 are one text


def test_other_dtypes_are_cast(launched):
    cell, params, u, _ = problem("gru", T=20)
    whole = mx.round(mx.array(u) * 3)
    hidden, _ = recurrence(cell, mx.array(params), whole.astype(mx.int32), mask=mx.ones((2, 20), mx.int32))
    wanted, _ = recurrence(cell, mx.array(params), whole, backend="ops")
    assert mx.abs(hidden - wanted).max() < 3e-6


@pytest.mark.sampled("harness")
@pytest.mark.parametrize("name", ["gru", "lstm", "slstm", "nlru"])
@pytest.mark.parametrize("method", ["auto", "sequential", "newton"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_as_ops(launched, name, method, masked):
    cell, params, u, state = problem(name, T=70, heads=2, state=True)
    mask = None
    if masked:
        mask = mx.arange(70)[None] < mx.array([[70], [41]])
    kernel = solve(cell, params, u, state, mask=mask, method=method, return_states=9)
    ops = solve(cell, params, u, state, mask=mask, method="sequential", return_states=9, backend="ops")
    assert len(launched) == 1
    newton = method == "newton" or (method == "auto" and name != "slstm")
    assert ("recurrence" in launched[0]) == newton
    for a, b in zip(kernel, ops, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_low_precision(launched, dtype):
    cell, params, u, _ = problem("lstm", T=50)
    hidden, last = recurrence(cell, mx.array(params), mx.array(u).astype(dtype))
    reference, reference_last = recurrence(cell, mx.array(params), mx.array(u).astype(dtype), backend="ops")
    assert hidden.dtype == dtype
    assert mx.abs(hidden.astype(mx.float32) - reference.astype(mx.float32)).max() < 5e-3
    assert mx.abs(last - reference_last).max() < 3e-6
    assert launched


@pytest.mark.sampled("harness", by=lambda name: [name] if name != "lstm" else [])
@pytest.mark.parametrize("name", ["gru", "lstm", "slstm"])
def test_gradients(launched, name):
    cell, params, u, state = problem(name, T=40, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    mask = mx.arange(40)[None] < mx.array([[40], [31]])
    kernel = mx.grad(loss_of(cell, {}, mask, 7), argnums=(0, 1, 2))(*arrays)
    ops = mx.grad(loss_of(cell, {"backend": "ops"}, mask, 7), argnums=(0, 1, 2))(*arrays)
    forward = "sequential" if name == "slstm" else "recurrence"
    assert [kernel.split("_")[1] for kernel in launched] == [forward, forward, "adjoint"]
    for a, b in zip(kernel, ops, strict=True):
        assert mx.abs(b).max() > 1e-3
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_a_bias_and_its_gradient(launched, method):
    """The kernels add it, and sum its gradient; one of another dtype is added beforehand."""
    cell, params, u, state = problem("lstm", T=40, heads=2, state=True)
    bias = mx.array(0.3 * np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32))
    arrays = [*(mx.array(a) for a in (params, u, state)), bias]
    mask = mx.arange(40)[None] < mx.array([[40], [31]])

    def loss(backend, dtype=mx.float32):
        def of(params, u, state, bias):
            options = {"backend": backend, "bias": bias.astype(dtype), "method": method, "mask": mask}
            hidden, last = recurrence(cell, params, u, state, **options)
            return (hidden * mx.cos(mx.arange(hidden.size).reshape(hidden.shape))).sum() + (last**2).sum()

        return of

    for dtype in (mx.float32, mx.float16):
        given = mx.grad(loss(None, dtype), argnums=(0, 1, 2, 3))(*arrays)
        wanted = mx.grad(loss("ops", dtype), argnums=(0, 1, 2, 3))(*arrays)
        for a, b in zip(given, wanted, strict=True):
            assert mx.abs(b).max() > 1e-2
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-4)
    assert kinds_of(launched)[-1] == "adjoint"


def test_the_kernel_of_the_gradient_is_tried_once_and_then_used(mac):
    cell, params, u, state = problem("lstm", T=30, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    for _ in range(2):
        mx.eval(mx.grad(loss_of(cell, {}), argnums=(0, 1, 2))(*arrays))
    assert sum("adjoint" in name for name in mac) == 1 + 2


@pytest.mark.sampled("harness", by=lambda fault: ["one"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_gradient_that_does_not_work_here_is_not_used(mac, monkeypatch, fault):
    breaking(monkeypatch, fault, lambda launch: "adjoint" in launch.name)
    cell, params, u, state = problem("gru", T=30, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    with pytest.warns(RuntimeWarning, match="the metal backend does not work here .the gradient of 'gru'"):
        given = mx.grad(loss_of(cell, {}), argnums=(0, 1, 2))(*arrays)
    wanted = mx.grad(loss_of(cell, {"backend": "ops"}), argnums=(0, 1, 2))(*arrays)
    for a, b in zip(given, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("T", "heads", "every"), [(1, 1, 0), (5, 2, 7), (16, 2, 16), (40, 3, 3)])
def test_gradients_of_short_and_long(launched, T, heads, every):
    """Fewer steps than a chunk; fewer than `every`; boundaries that the call itself returned; heads."""
    cell, params, u, state = problem("gru", T=T, D=12, heads=heads, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    given = mx.grad(loss_of(cell, {}, None, every), argnums=(0, 1, 2))(*arrays)
    wanted = mx.grad(loss_of(cell, {"backend": "ops"}, None, every), argnums=(0, 1, 2))(*arrays)
    for a, b in zip(given, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)
    assert len(launched) == (2 if T <= 16 else 3)


@pytest.mark.sampled("harness", by=lambda: ["one"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_gradients_in_low_precision(launched, dtype):
    cell, params, u, state = problem("lstm", T=50, state=True)
    arrays = [mx.array(params), mx.array(u).astype(dtype), mx.array(state)]
    given = mx.grad(loss_of(cell, {}), argnums=(0, 1, 2))(*arrays)
    wanted = mx.grad(loss_of(cell, {"backend": "ops"}), argnums=(0, 1, 2))(*arrays)
    assert [a.dtype for a in given] == [mx.float32, dtype, mx.float32]
    for a, b in zip(given, wanted, strict=True):
        a, b = (np.array(array.astype(mx.float32)) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2)
    assert launched


def test_second_derivatives_go_through_ops(launched):
    cell, params, u, state = problem("gru", T=20, D=4, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]

    def slope(backend):
        first = mx.grad(loss_of(cell, {"backend": backend} if backend else {}), argnums=(0, 1, 2))
        return mx.grad(lambda *given: sum((d * d).sum() for d in first(*given)), argnums=(0, 1, 2))

    for a, b in zip(slope(None)(*arrays), slope("ops")(*arrays), strict=True):
        assert mx.abs(b).max() > 1e-3
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-4)


GRAPHS = {
    "as it is": (lambda call, _: call, ["recurrence"]),
    "mx.compile": (lambda call, _: mx.compile(call), ["recurrence"]),
    "mx.grad": (lambda _, loss: mx.grad(loss, argnums=(0, 1, 2)), ["recurrence", "recurrence", "adjoint"]),
    "mx.compile and mx.grad": (
        lambda _, loss: mx.compile(mx.grad(loss, argnums=(0, 1, 2))),
        ["recurrence", "recurrence", "adjoint"],
    ),
}


@pytest.mark.compiled
@pytest.mark.parametrize("graph", GRAPHS)
def test_recorded_by_mlx_itself(graph, monkeypatch, tmp_path):
    """By MLX's own kernel call and not the harness: MLX records it anywhere, while a function is exported."""
    made, shapes = [], []

    def run(launch, arrays, backend):
        made.append(launch.name.split("_")[1])
        return recorded(launch, arrays, backend)

    recorded = gpu.run
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "available_backend", lambda: "metal")
    for trial in ("recurrence.kernel_works", "adjoint._agrees"):
        monkeypatch.setattr(f"mlx_pararnn.compute.{trial}", lambda *_: True)
    cell, params, u, state = problem("lstm", T=60, state=True)
    mask = mx.arange(60)[None] < mx.array([[60], [41]])

    def call(*arrays):
        return list(recurrence(cell, *arrays, mask=mask, return_states=7))

    transform, kernels_of_it = GRAPHS[graph]
    function = transform(call, loss_of(cell, {}, mask, 7))

    def noted(*arrays):
        outputs = function(*arrays)
        shapes.extend(output.shape for output in outputs)
        return outputs

    arrays = [mx.array(a) for a in (params, u, state)]
    # An evaluation would have raised before; that MLX cannot store all of the graph does not matter.
    with pytest.raises(ValueError, match="Unable to serialize"):
        mx.export_function(str(tmp_path / "graph.mlxfn"), noted, *arrays)
    B, D = state.shape[0], state.shape[-1]
    assert made == kernels_of_it
    if "grad" in graph:
        assert shapes == [array.shape for array in arrays]
    else:
        assert shapes == [(B, 60, D), state.shape, (B, 60 // 7, *state.shape[1:])]


def test_info_and_batches(launched):
    cell, params, u, _ = problem("gru", T=200, D=40)
    *_, info = recurrence(cell, mx.array(params), mx.array(u), return_info=True)
    assert 1 <= info.iterations <= 4
    assert info.residual.item() < 1e-6
    *_, info = recurrence(cell, mx.array(params), mx.array(u), method="sequential", return_info=True)
    assert info.iterations == 0


@pytest.mark.harness
def test_a_model(launched):
    """Prefill and decoding of the demo, all layers through the kernels."""
    model, _ = mlx_pararnn.load_model(DEMO)
    tokens = mx.array([list(b"def main(self, other)"), list(b"import os, sys, time,")])
    cache, ops_cache = model.make_cache(2), model.make_cache(2)
    logits = model(tokens, cache=cache)
    assert [name.split("_")[1] for name in launched] == [
        "conv",
        "recurrence",
        "norm",
    ] * 3  # its MLP has no residual
    reference = model(tokens, cache=ops_cache, backend="ops")
    assert mx.abs(logits - reference).max() < 0.05  # float16 logits of up to 20
    after = model(mx.array([[1], [2]]), cache=cache)
    assert [name.split("_")[1] for name in launched[9:]] == ["conv", "decode", "norm"] * 3
    assert mx.abs(after - model(mx.array([[1], [2]]), cache=ops_cache, backend="ops")).max() < 0.05


def test_what_has_no_kernel_runs_in_ops(launched):
    cell, params, u, _ = problem("gru", T=30)
    solve(cell, params, u, chunk=1, method="newton")
    assert launched == []
    for options in ({"backend": "cuda"}, {"backend": "metal", "chunk": 1}):
        with pytest.raises(PararnnError, match="choose 'ops'"):
            solve(cell, params, u, **options)


def test_the_environment_variable(launched, monkeypatch):
    cell, params, u, _ = problem("gru", T=30)
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    solve(cell, params, u)
    assert launched == []
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "vulkan")
    with pytest.raises(PararnnError, match="unknown backend 'vulkan'"):
        solve(cell, params, u)


def test_without_a_gpu_it_is_refused():
    cell, params, u, _ = problem("gru", T=30)
    if gpu.available_backend() != "metal":
        with pytest.raises(PararnnError, match="backend 'metal' is not available"):
            solve(cell, params, u, backend="metal")


def test_tilings_by_size():
    cell = get_cell("gru")
    for D, channels in ((4096, 32), (1024, 32), (512, 16), (256, 8), (8, 8)):
        launch = gpu.newton_launch(cell, (1, 1, 100, 3, D), mx.float32)
        assert dict(launch.constants)["CW"] == channels
