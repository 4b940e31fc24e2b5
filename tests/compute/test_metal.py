"""On a GPU: every instantiation of the kernels against the oracle, and MLX's transformations.

The problems are those of tests/msl (test_numbers.py, test_layer_kernels.py), on the card and not in
the harness. Tolerances are 2e-5 where the harness has 3e-6: a GPU rounds exp and tanh otherwise. None of
these multiplies matrices, whose sums the virtual GPU of a hosted runner with macOS 26 is reported to round
otherwise than a Mac's own.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import get_cell
from mlx_pararnn.compute import gpu, layer_ops
from mlx_pararnn.compute.recurrence import recurrence
from tests.support.golden import allowed, cell_cases, read
from tests.support.msl.adjoint_kernel import adjoint, all_adjoints
from tests.support.msl.instances import CELLS, DTYPES
from tests.support.msl.layer_kernels import all_calls, conv, decode
from tests.support.msl.problem import Problem, assert_close
from tests.support.problems import loss_of, problem

BACKEND = gpu.available_backend()

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(BACKEND is None, reason="needs a GPU that MLX can use"),
]


class OnGpu(Problem):
    def _run(self, launch, extra, **_):
        u, bias = mx.array(np.ascontiguousarray(self.u.swapaxes(0, 1))), mx.array(self.bias)
        if self.dtype == "bfloat16":
            u, bias = u.view(mx.bfloat16), bias.view(mx.bfloat16)
        arrays = {"u": u.swapaxes(0, 1), "bias": bias}
        arrays |= {"params": mx.array(self.params), "initial": mx.array(self.initial)}
        arrays |= {name: mx.array(array) for name, array in extra.items()}
        if self.masked:
            arrays["mask"] = mx.array(self.mask)
        out = gpu.run(launch, arrays, BACKEND)
        return {n: np.array(a.astype(mx.float32) if n == "hidden" else a) for n, a in out.items()}


ROWS = [(kernel, row) for kernel in ("recurrence", "sequential") for row in gpu.options(kernel)]


@pytest.mark.sampled("large")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "row"), ROWS, ids=str)
def test_every_instantiation(name, dtype, kernel, row):
    masked, every = row["masked"], row["every"]
    options = {key: value for key, value in row.items() if key != "masked"}
    for T, D, B, heads in ((1, 1, 1, 1), (33, 9, 3, 3), (700, 40, 2, 2)):
        p = OnGpu(name, T, D, B, heads, dtype, state=True, masked=masked, bias=0.2)
        hidden, states = p.oracle()
        out = p.newton(**options) if kernel == "recurrence" else p.sequential(**options)
        tolerance = 1e-3 if name == "slstm" else 2e-5
        assert_close(out["hidden"], hidden, dtype, tolerance)
        assert_close(out["last"], states[:, -1], tolerance=tolerance)
        if every:
            assert_close(out["states"], states[:, every - 1 :: every], tolerance=tolerance)


@pytest.mark.sampled("large")
@pytest.mark.parametrize("name", ["gru", "lstm", "nlru"])
@pytest.mark.parametrize("tiling", gpu.SHAPES)
@pytest.mark.parametrize("iterations", [1, 2])
def test_iterates(name, tiling, iterations):
    channels, chunk, groups = gpu.SHAPES[tiling]
    tile = groups * 32 // channels * chunk
    p = OnGpu(name, tile + 75, 5, scale=3.0, memory=2.5, state=True)
    exact = p.iterate(tile, chunk, iterations)
    noise = np.abs(p.iterate(tile, chunk, iterations, np.float32) - exact).max()
    out = p.newton(tol=0.0, max_iters=iterations, tiling=tiling)
    tolerance = max(1e-5 * max(1, np.abs(exact).max()), 16 * noise)
    assert np.abs(out["hidden"] - exact).max() <= tolerance


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("scale", [4.0, 16.0])
def test_weights_that_overflow_newton_on_the_whole_sequence(name, scale):
    """To the bit, as in tests/msl: the compiler may round the plain step no other way than the dual one."""
    p = OnGpu(name, T=400, D=40, scale=scale)
    straight = p.sequential()
    for tiling in gpu.SHAPES:
        newton = p.newton(tol=0.0, tiling=tiling)
        for output in ("hidden", "last"):
            np.testing.assert_array_equal(newton[output], straight[output])


@pytest.mark.sampled("large", by=lambda case, method: [case["kind"], method])
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
    for tiling in gpu.SHAPES:
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


LARGE = [conv(3, 1000, 2050), conv(2, 1, 4096, dtype="bfloat16"), decode("gru", 8, 1024, 4)]
LARGE += [decode("lstm", 3, 4096, 4, "float16"), decode("slstm", 1, 5000, gated=False)]

LARGE += [adjoint("gru", 3, 1000, 1030), adjoint("lstm", 1, 700, 40, 2, shape="narrow", memory=2.0)]


@pytest.mark.sampled("large")
@pytest.mark.parametrize("call", [*all_calls(), *all_adjoints(), *LARGE], ids=str)
def test_convolution_decoding_and_the_gradient(call):
    arrays = {
        n: mx.array(a).view(mx.bfloat16) if call.dtypes[n] == "bfloat16" else mx.array(a)
        for n, a in call.given.items()
    }
    out = gpu.run(call.launch, arrays, BACKEND)
    got = {n: np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for n, a in out.items()}
    assert call.compare(got, tolerance=2e-5) == ""


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("T", [1, 50])
def test_around_the_recurrence_with_views_gradients_and_compile(name, T):
    """As the model calls them: halves of a projection, heads outermost; the kernels are in use."""
    assert layer_ops.conv_works(BACKEND)
    assert layer_ops.decode_works(get_cell(name), BACKEND)
    cell, B, D, heads = get_cell(name), 2, 48, 2
    gates = len(cell.gates)

    def loss(backend):
        def total(both, window, weight, bias, u, u_bias, params, state):
            x, gate = mx.split(both, 2, axis=-1)
            y, new_window = layer_ops.conv_silu(x, window, weight, bias, backend=backend)
            z, last = layer_ops.decode(
                cell, params, u.swapaxes(0, 1), u_bias, state, gate[:, :1], bias, 1e-6, backend=backend
            )
            return (y**2).sum() + (new_window**3).sum() + (z**2).sum() + (last**2).sum()

        return total

    shapes = [(B, T, 2 * D), (B, 3, D), (D, 4), (D,), (heads, B, 1, gates, D // heads)]
    shapes += [(heads, gates * D // heads), (len(cell.params), D), (B, len(cell.slots), D)]
    rng = np.random.default_rng(0)
    arrays = [mx.array(rng.uniform(0.1, 0.7, shape).astype(np.float32)) for shape in shapes]
    every = list(range(len(arrays)))
    wanted, slopes = mx.value_and_grad(loss("ops"), argnums=every)(*arrays)
    function = mx.value_and_grad(loss(BACKEND), argnums=every)
    for run in (function, mx.compile(function)):
        value, gradients = run(*arrays)
        np.testing.assert_allclose(value, wanted, rtol=1e-4)
        for a, b in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-3, atol=2e-4)
