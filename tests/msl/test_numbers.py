"""Every kernel and cell, executed by the harness, against the NumPy oracle in float64.

Whatever Newton's final answer hides is looked for at exactly 1 and 2 iterations; there the oracle takes the
same tiles and chunks as the kernel.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mlx_pararnn import get_cell
from mlx_pararnn.compute.gpu import SHAPES, newton_launch, sequential_launch
from tests.support.golden import DATA, cell_cases, shown

from ..support.msl import harness, problem
from ..support.msl.build import CLANG, NO_CONTRACTION, clang
from ..support.msl.instances import DTYPES
from ..support.msl.problem import assert_close

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=str(harness.missing()))

Problem = partial(problem.Problem, bias=0.2)

CELLS = ("gru", "lstm", "slstm", "nlru")
TIMES = (1, 2, 31, 32, 33, 127, 128, 129, 1000, 4096)
WIDTHS = (1, 9, 33, 256)
BATCHES = (1, 3)
TILINGS = tuple(SHAPES)


GRID = [(T, D, B) for T in TIMES for D in WIDTHS for B in BATCHES]


@pytest.mark.sampled("harness", by=lambda name, T: [name, T] if T in (1, 31, 1000) else [])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("T", "D", "B"), GRID)
def test_against_the_oracle(name, T, D, B):
    """Sizes crossed in full; dtype, state, mask and tiling take turns. Small grids run with all checks."""
    turn = GRID.index((T, D, B)) + CELLS.index(name)
    dtype = tuple(DTYPES)[turn % 3]
    heads = 3 if D in (9, 33) else 1
    p = Problem(name, T, D, B, heads, dtype, state=turn % 2 == 1, masked=turn % 4 >= 2, seed=turn)
    tiling = TILINGS[turn // 3 % 3]
    every = (0, 1, 7)[turn // 9 % 3]
    hidden, states = p.oracle()
    # sLSTM's exponentials amplify rounding: allowed is four times what float32 in NumPy is off by.
    tolerance = 3e-6
    if name == "slstm":
        gap = np.abs(p.oracle(np.float32)[1] - states) / np.maximum(1, np.abs(states))
        tolerance = max(tolerance, 4 * gap.max())
    check = T * D * B <= 5000
    newton = p.newton(tiling=tiling, every=every, check=check, order=turn % 3)
    sequential = p.sequential(every=every, check=check, order=turn % 3)
    for out in (newton, sequential):
        assert_close(out["hidden"], hidden, dtype, tolerance)
        assert_close(out["last"], states[:, -1], tolerance=tolerance)
        if every:
            assert_close(out["states"], states[:, every - 1 :: every], tolerance=tolerance)
    channels, _, groups = SHAPES[tiling]
    assert newton["iterations_made"].max() <= groups * 32 // channels - 1
    assert newton["gap"].max() <= max(1e-6, tolerance) * max(1, np.abs(states).max())


@pytest.mark.sampled("harness", by=lambda iterations: [iterations])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_iterates(name, iterations, masked):
    # sLSTM's iterates grow with the number of chunks until float32 blurs them: its shortest tile alone.
    for tiling in TILINGS[:1] if name == "slstm" else TILINGS:
        channels, chunk, groups = SHAPES[tiling]
        tile = groups * 32 // channels * chunk
        # Slow to forget and far from converged, yet not so far that float32 itself blurs the iterate.
        scale, memory = {"slstm": (0.5, 0.0), "nlru": (3.0, 2.5)}.get(name, (4.0, 4.0))
        p = Problem(name, tile + 75, 5, scale=scale, memory=memory, state=True, masked=masked)
        out = p.newton(tol=0.0, max_iters=iterations, tiling=tiling)
        exact = p.iterate(tile, chunk, iterations)
        noise = np.abs(p.iterate(tile, chunk, iterations, np.float32) - exact).max()
        tolerance = max(2e-6 * max(1, np.abs(exact).max()), 4 * noise)
        assert np.abs(p.oracle()[0] - exact).max() > 4 * tolerance, "converged: nothing would be seen"
        assert np.abs(out["hidden"] - exact).max() <= tolerance
        assert out["iterations_made"].max() == iterations


@pytest.mark.sampled("harness", by=lambda case: shown(case))
@pytest.mark.parametrize("case", cell_cases(), ids=lambda c: c["name"])
def test_golden_cells(case):
    """PyTorch's own numbers, every activation."""
    import mlx.core as mx

    from tests.support.golden import allowed, read

    cell, params, u, golden = read(case)
    u, params = np.array(u), np.array(params)
    initial = np.zeros((u.shape[0], len(cell.slots), params.shape[1]), np.float32)
    bias = np.zeros((u.shape[1], u.shape[3] * u.shape[4]), np.float32)
    inputs = {"u": u, "bias": bias, "params": params, "initial": initial}
    extra = {"tol": np.array([1e-6], np.float32), "max_iters": np.array([1000], np.int32)}
    newton = harness.run(newton_launch(cell, u.shape, mx.float32, tiling="wide"), {**inputs, **extra})
    straight = harness.run(sequential_launch(cell, u.shape, mx.float32), inputs)
    for out in (newton, straight):
        assert np.abs(out["hidden"] - golden["y_seq"]).max() <= allowed(golden)


# golden's table of Newton errors: recurrent weights, and how far the input projection is spread and shifted.
HARD = {
    "default_init": (0.1, 1.0, 0.0),
    "trainedlike: A*5,b+N(0,.5)": (0.5, 1.0, 0.5),
    "harder: A~N(0,1),B*2,b+N(0,1)": (1.0, 2.0, 1.0),
    "harder: A~N(0,2),B*2,b+N(0,1)": (2.0, 2.0, 1.0),
}


def test_every_setting_of_newtons_table_is_known():
    table = json.loads((DATA / "newton_table.json").read_text())
    assert {row["setting"] for row in table} == set(HARD)


@pytest.mark.sampled("harness")
@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize("setting", HARD)
@pytest.mark.parametrize("T", [16, 256, 2048])
def test_the_hard_settings(name, setting, T):
    scale, spread, shift = HARD[setting]
    p = Problem(name, T, D=32, scale=scale)
    bias = shift * np.random.default_rng(1).normal(size=(p.u.shape[3], 32)).astype(np.float32)
    p.u[...] = spread * p.u + bias
    p.exact_u = spread * p.exact_u + bias
    hidden, _ = p.oracle()
    newton, straight = p.newton()["hidden"], p.sequential()["hidden"]
    size, gap = np.abs(hidden).max(), np.abs(straight - hidden).max()
    assert np.abs(newton - straight).max() <= 1e-5 * size
    assert np.abs(newton - hidden).max() <= max(3e-6 * size, 4 * gap)


OVERFLOWS = (4.0, 8.0, 16.0)  # spread of recurrent weights


def same(newton, straight):
    return all((newton[output] == straight[output]).all() for output in ("hidden", "last"))


@pytest.mark.sampled("harness", by=lambda: ["one"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("scale", OVERFLOWS)
def test_weights_that_overflow_newton_on_the_whole_sequence(name, scale):
    """The sequential kernel's answer, to the bit: after CHUNKS - 1 iterations every start is right."""
    p = Problem(name, T=400, D=12, scale=scale)
    straight = p.sequential()
    size = np.abs(straight["hidden"]).max()
    for tiling in TILINGS:
        newton = p.newton(tol=0.0, tiling=tiling)
        assert same(newton, straight)
        assert newton["gap"].max() == 0
        settled = p.newton(tiling=tiling, check=False)
        assert np.abs(settled["hidden"] - straight["hidden"]).max() <= 1e-5 * size


@pytest.mark.sampled("harness", by=lambda math: [math])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("math", ["metal", "fused", "expressions"])
def test_no_rounding_of_the_compilers_changes_that(name, math):
    if math in CLANG and not clang():
        pytest.skip("no clang of at least 19")
    for scale in OVERFLOWS:
        p = Problem(name, T=400, D=12, scale=scale)
        assert same(p.newton(tol=0.0, math=math, check=False), p.sequential(math=math, check=False))


def test_a_plain_step_in_float_would_not_do(monkeypatch):
    """Why the sequential step runs on Dual<0>: the same with a step on floats, contraction left on."""

    def changed(make):
        def launch(*args, **options):
            made = make(*args, **options)
            source, header = made.source, made.header.replace(NO_CONTRACTION, "")
            if "pararnn::Dual<0> state" in source:  # the sequential kernel's; Newton's are all with tangents
                source = source.replace("pararnn::Dual<0> state", "float state")
                source = source.replace("state[s].v", "state[s]").replace(
                    "[Cell::OUTPUT].v", "[Cell::OUTPUT]"
                )
            return replace(made, source=source, header=header)

        return launch

    monkeypatch.setattr(problem, "newton_launch", changed(newton_launch))
    monkeypatch.setattr(problem, "sequential_launch", changed(sequential_launch))
    p = Problem("gru", T=400, D=12, scale=16.0)
    assert same(p.newton(tol=0.0, check=False), p.sequential(check=False))
    assert not same(p.newton(tol=0.0, check=False, math="metal"), p.sequential(check=False, math="metal"))


GROWING = [("gru", 3.0, "wide", 6), ("gru", 8.0, "wide", 6), ("gru", 8.0, "narrow", 10)]
GROWING += [("lstm", 4.0, "narrow", 2), ("lstm", 6.0, "narrow", 8)]


@pytest.mark.sampled("harness", by=lambda name: [name])
@pytest.mark.parametrize(("name", "scale", "tiling", "seed"), GROWING)
def test_one_chaotic_channel_at_the_default_tolerance(name, scale, tiling, seed):
    """Settled to 1e-6 is not enough where a tile makes 1e6 of a difference: these were off by up to 1.4."""
    p = Problem(name, T=1100, D=1, scale=scale, seed=seed, bias=0.0)
    newton, straight = p.newton(tiling=tiling, check=False), p.sequential(check=False)
    assert np.abs(newton["hidden"] - straight["hidden"]).max() <= 1e-5


@pytest.mark.parametrize("name", CELLS)
def test_nan_and_infinity_stay_in_their_channel_and_never_hang(name):
    p = Problem(name, T=300, D=40)
    clean = p.newton()["hidden"]
    p.u[0, 0, 10, 0, 1] = np.nan
    p.u[0, 0, 20, 1, 3] = np.inf
    p.params[0, 35] = np.nan
    for out in (p.newton(), p.sequential()):
        others = [d for d in range(40) if d not in (1, 3, 35)]
        np.testing.assert_array_equal(out["hidden"][..., others], clean[..., others])
        assert np.isnan(out["hidden"][0, 10:, 1]).all()
        assert (out["hidden"][0, :10, 1] == clean[0, :10, 1]).all()


@pytest.mark.sampled("harness", by=lambda: ["one"])
@pytest.mark.parametrize("name", CELLS)
def test_rows_masks_states_and_gaps_together(name):
    """Rows of different masks and states, every slot's gap: what a row mixed up with another would break."""
    for tiling in TILINGS:
        p = Problem(name, T=150, D=40, B=3, heads=2, state=True, masked=True, scale=1.0)
        hidden, states = p.oracle()
        out = p.newton(tiling=tiling, every=4, check=True)
        assert_close(out["hidden"], hidden, tolerance=1e-5)
        assert_close(out["states"], states[:, 3::4], tolerance=2e-5)
        assert_close(out["last"], states[:, -1], tolerance=2e-5)


def test_the_gap_is_that_of_all_slots():
    p = Problem("lstm", T=128, D=32, scale=2.0, memory=3.0)
    out = p.newton(tol=0.0, max_iters=1, tiling="wide")
    starts_differ = p.newton(tol=0.0, max_iters=1, tiling="wide", every=16)["states"]
    exact = p.oracle()[1][:, 15::16]
    assert out["gap"].max() > 0.3 * np.abs(starts_differ - exact).max() / 8


def test_the_tolerance_is_relative_above_one():
    """States of thousands (a GRU with identity activation) settle by their size, not to 1e-4 absolute."""
    cell = get_cell("gru", {"state": "identity"})
    p = Problem("gru", T=128, D=32, scale=0.3, memory=2.0, bias=0.0)
    p.cell = cell
    p.u[:, :, :, 2] *= np.float32(1e5)
    p.exact_u[:, :, 2] *= 1e5
    assert np.abs(p.oracle()[0]).max() > 1e4
    tight = p.newton(tol=1e-4)["iterations_made"].max()
    assert tight < p.newton(tol=0.0)["iterations_made"].max()


def test_it_stops_as_soon_as_it_may():
    p = Problem("gru", T=128, D=32, scale=0.1)
    assert 1 <= p.newton(tol=1e-3)["iterations_made"].max() <= 2
    assert p.newton(tol=0.0, max_iters=5)["iterations_made"].max() <= 5


@pytest.mark.sampled("harness", by=lambda name: [name] if name in ("gru", "slstm") else [])
@pytest.mark.parametrize("name", CELLS)
def test_metals_own_rounding(name):
    """exp and tanh off by the ulps that Metal's tables allow, fused multiply-add, no denormals."""
    p = Problem(name, T=200, D=40, state=True, masked=True)
    hidden, states = p.oracle()
    for out in (p.newton(math="metal"), p.sequential(math="metal")):
        np.testing.assert_allclose(out["hidden"], hidden, atol=1e-5)
        np.testing.assert_allclose(out["last"], states[:, -1], atol=2e-5, rtol=2e-5)


def test_offsets_beyond_32_bits():
    """A u whose steps, rows or heads stand 2^30 numbers apart: three of them are more than an int counts."""
    far = np.zeros(2 * 2**30 + 4096, np.float16)  # only the pages that are touched take memory
    for axis in (0, 1, 2):
        shape = [1, 1, 1]
        shape[axis] = 3
        B, heads, T = shape
        p = Problem("gru", T, 4 * heads, B, heads, dtype="float16", state=True)
        strides = [0, 0, 0, 4, 1]
        strides[axis] = 2**30
        view = np.lib.stride_tricks.as_strided(far, p.u.shape, tuple(2 * n for n in strides))
        view[...] = p.u
        near, p.u = p.sequential(), view
        assert (p.sequential()["hidden"] == near["hidden"]).all()
        np.testing.assert_allclose(p.newton()["hidden"], near["hidden"], atol=1e-3)
