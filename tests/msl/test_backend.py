"""recurrence() by way of the kernels, as on a Mac, with the harness in the GPU's place."""

import mlx.core as mx
import numpy as np
import pytest
from test_recurrence import loss_of, problem, solve

import mlx_pararnn
from mlx_pararnn import PararnnError, get_cell, kernels
from mlx_pararnn.recurrence import recurrence

from . import harness

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=str(harness.missing()))


@pytest.fixture
def launched(monkeypatch):
    """Pretend to be a Mac; gives the names of the kernels that were launched."""
    names = []

    def run(launch, arrays, backend):
        assert backend == "metal"
        names.append(launch.name)
        dtypes = {n: "bfloat16" for n, a in arrays.items() if a.dtype == mx.bfloat16}
        given = {
            n: np.array(arrays[n].view(mx.uint16) if n in dtypes else arrays[n]) for n in launch.input_names
        }
        out = harness.run(launch, given, dtypes=dtypes, check=False)
        return {
            n: mx.array(a).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(a)
            for (n, a), dtype in zip(out.items(), launch.output_dtypes, strict=True)
        }

    monkeypatch.setattr(kernels, "available_backend", lambda: "metal")
    monkeypatch.setattr(kernels, "run", run)
    return names


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


@pytest.mark.parametrize("name", ["gru", "lstm", "slstm"])
def test_gradients(launched, name):
    cell, params, u, state = problem(name, T=40, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    mask = mx.arange(40)[None] < mx.array([[40], [31]])
    kernel = mx.grad(loss_of(cell, {}, mask, 7), argnums=(0, 1, 2))(*arrays)
    ops = mx.grad(loss_of(cell, {"backend": "ops"}, mask, 7), argnums=(0, 1, 2))(*arrays)
    assert len(launched) == 2
    for a, b in zip(kernel, ops, strict=True):
        assert mx.abs(b).max() > 1e-3
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-4)


def test_info_and_batches(launched):
    cell, params, u, _ = problem("gru", T=200, D=40)
    *_, info = recurrence(cell, mx.array(params), mx.array(u), return_info=True)
    assert 1 <= info.iterations <= 4
    assert info.residual.item() < 1e-6
    *_, info = recurrence(cell, mx.array(params), mx.array(u), method="sequential", return_info=True)
    assert info.iterations == 0


def test_a_model(launched):
    """Prefill and decoding of the demo, all layers through the kernels."""
    model, _ = mlx_pararnn.load_model()
    tokens = mx.array([list(b"def main(self, other)"), list(b"import os, sys, time,")])
    cache, ops_cache = model.make_cache(2), model.make_cache(2)
    logits = model(tokens, cache=cache)
    assert len(launched) == 3
    reference = model(tokens, cache=ops_cache, backend="ops")
    assert mx.abs(logits - reference).max() < 0.05  # float16 logits of up to 20
    after = model(mx.array([[1], [2]]), cache=cache)
    assert "sequential" in launched[-1]
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
    if kernels.available_backend() != "metal":
        with pytest.raises(PararnnError, match="backend 'metal' is not available"):
            solve(cell, params, u, backend="metal")


def test_tilings_by_size():
    cell = get_cell("gru")
    for D, channels in ((4096, 32), (1024, 32), (512, 16), (256, 8), (8, 8)):
        launch = kernels.newton_launch(cell, (1, 1, 100, 3, D), mx.float32)
        assert dict(launch.template)["CW"] == channels
