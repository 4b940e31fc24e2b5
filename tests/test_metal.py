"""On a GPU: every instantiation of the kernels against the oracle, and MLX's transformations.

The problems are those of tests/msl/test_numbers.py; here they run on the card and not in the harness.
"""

import mlx.core as mx
import numpy as np
import pytest
from conftest import cell_cases
from msl.instances import DTYPES
from msl.test_numbers import Problem, assert_close
from test_cells import allowed, read
from test_recurrence import loss_of, problem

from mlx_pararnn import kernels
from mlx_pararnn.recurrence import recurrence

BACKEND = kernels.available_backend()

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(BACKEND is None, reason="needs a GPU that MLX can use"),
]

CELLS = ("gru", "lstm", "slstm", "nlru")


class OnGpu(Problem):
    def _run(self, launch, extra, **_):
        u = mx.array(np.ascontiguousarray(self.u.swapaxes(0, 1)))
        if self.dtype == "bfloat16":
            u = u.view(mx.bfloat16)
        arrays = {"u": u.swapaxes(0, 1), "params": mx.array(self.params), "initial": mx.array(self.initial)}
        arrays |= {name: mx.array(array) for name, array in extra.items()}
        if self.masked:
            arrays["mask"] = mx.array(self.mask)
        out = kernels.run(launch, arrays, BACKEND)
        return {n: np.array(a.astype(mx.float32) if n == "hidden" else a) for n, a in out.items()}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("every", [0, 7])
@pytest.mark.parametrize("tiling", kernels.SHAPES)
def test_every_instantiation(name, dtype, masked, every, tiling):
    for T, D, B, heads in ((1, 1, 1, 1), (33, 9, 3, 3), (700, 40, 2, 2)):
        p = OnGpu(name, T, D, B, heads, dtype, state=True, masked=masked)
        hidden, states = p.oracle()
        newton = [p.newton(tiling=tiling, every=every, info=info) for info in (False, True)]
        for out in (*newton, p.sequential(every=every)):
            tolerance = 1e-3 if name == "slstm" else 2e-5
            assert_close(out["hidden"], hidden, dtype, tolerance)
            assert_close(out["last"], states[:, -1], tolerance=tolerance)
            if every:
                assert_close(out["states"], states[:, every - 1 :: every], tolerance=tolerance)


@pytest.mark.parametrize("name", ["gru", "lstm", "nlru"])
@pytest.mark.parametrize("tiling", kernels.SHAPES)
@pytest.mark.parametrize("iterations", [1, 2])
def test_iterates(name, tiling, iterations):
    channels, chunk, groups = kernels.SHAPES[tiling]
    tile = groups * 32 // channels * chunk
    p = OnGpu(name, tile + 75, 5, scale=3.0, memory=2.5, state=True)
    exact = p.iterate(tile, chunk, iterations)
    noise = np.abs(p.iterate(tile, chunk, iterations, np.float32) - exact).max()
    out = p.newton(tol=0.0, max_iters=iterations, tiling=tiling)
    tolerance = max(1e-5 * max(1, np.abs(exact).max()), 16 * noise)
    assert np.abs(out["hidden"] - exact).max() <= tolerance


@pytest.mark.parametrize("case", cell_cases(), ids=lambda c: c["name"])
@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_golden_cells(case, method):
    """Every activation, against PyTorch's own numbers."""
    cell, params, u, golden = read(case)
    hidden, _ = recurrence(cell, params, u, method=method, backend=BACKEND)
    assert np.abs(np.array(hidden) - golden["y_seq"]).max() <= 4 * allowed(golden)


@pytest.mark.parametrize("name", CELLS)
def test_long_and_wide(name):
    p = OnGpu(name, T=4096, D=1030)
    hidden, _ = p.oracle()
    for tiling in kernels.SHAPES:
        assert_close(p.newton(tiling=tiling)["hidden"], hidden, tolerance=1e-3 if name == "slstm" else 2e-5)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_gradients_and_compile(name):
    cell, params, u, state = problem(name, T=60, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    loss, ops = loss_of(cell, {"backend": BACKEND}), loss_of(cell, {"backend": "ops"})
    wanted = mx.grad(ops, argnums=(0, 1, 2))(*arrays)
    for gradients in (mx.grad(loss, argnums=(0, 1, 2)), mx.compile(mx.grad(loss, argnums=(0, 1, 2)))):
        for a, b in zip(gradients(*arrays), wanted, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-3, atol=2e-4)
