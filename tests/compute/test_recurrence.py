"""`recurrence`: methods, masks, states, iterates, guarantees, transformations, bad arguments."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Cell, PararnnError, get_cell, register_cell
from mlx_pararnn.compute.newton import linear_scan
from mlx_pararnn.compute.recurrence import recurrence
from tests.support import oracle
from tests.support.problems import loss_of, problem, solve

CELLS = ("gru", "lstm", "slstm", "nlru")


def merged(u):
    """(B, heads, T, gates, W) -> the oracle's (B, T, gates, D), float64."""
    B, heads, T, gates, width = u.shape
    return u.astype(np.float64).transpose(0, 2, 3, 1, 4).reshape(B, T, gates, heads * width)


def expected(cell, params, u, state=None, mask=None):
    """hidden (B, T, D) and all states (B, T, slots, D), float64."""
    state = None if state is None else state.astype(np.float64)
    states = oracle.sequential(cell, params.astype(np.float64), merged(u), state, mask)
    hidden = states[cell.output_slot]
    if mask is not None:
        hidden = np.where(mask[..., None], hidden, 0)
    return hidden, np.stack(states, axis=2)


METHODS = [{"method": "sequential"}, {"method": "newton"}, {"method": "newton", "chunk": 7}]


@pytest.mark.sampled("large")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", METHODS, ids=["sequential", "newton", "newton-7"])
@pytest.mark.parametrize(("T", "heads"), [(1, 1), (2, 3), (15, 2), (16, 1), (33, 3), (130, 2)])
def test_against_the_oracle(name, options, T, heads):
    cell, params, u, state = problem(name, T=T, heads=heads, state=True)
    hidden, last, every_fifth = solve(cell, params, u, state, return_states=5, **options)
    y, states = expected(cell, params, u, state)
    np.testing.assert_allclose(hidden, y, atol=3e-6, rtol=3e-6)
    np.testing.assert_allclose(last, states[:, -1], atol=3e-6, rtol=3e-6)
    assert every_fifth.shape == (2, T // 5, len(cell.slots), 6)
    np.testing.assert_allclose(every_fifth, states[:, 4::5], atol=3e-6, rtol=3e-6)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", METHODS, ids=["sequential", "newton", "newton-7"])
def test_masked_steps_pass_the_state_through(name, options):
    cell, params, u, state = problem(name, T=20, state=True)
    mask = np.ones((2, 20), bool)
    mask[0, :6] = False  # left padding
    mask[1, 13:] = False  # right padding
    hidden, last = solve(cell, params, u, state, mask=mx.array(mask), **options)
    y, states = expected(cell, params, u, state, mask)
    np.testing.assert_allclose(hidden, y, atol=3e-6, rtol=3e-6)
    np.testing.assert_allclose(last, states[:, -1], atol=3e-6, rtol=3e-6)
    assert not hidden[~mask].any()
    for row in range(2):
        alone, state_alone = solve(
            cell, params, u[row : row + 1, :, mask[row]], state[row : row + 1], **options
        )
        np.testing.assert_allclose(hidden[row, mask[row]], alone[0], atol=3e-6, rtol=3e-6)
        np.testing.assert_allclose(last[row], state_alone[0], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("iterations", [1, 2])
def test_iterates_on_chunk_boundaries(name, chunk, iterations):
    """After exactly 1 and 2 iterations: at convergence Newton has repaired wrong Jacobians and scans."""
    cell, params, u, _ = problem(name, T=75, scale=4.0, memory=4.0)
    hidden, _ = solve(cell, params, u, method="newton", chunk=chunk, tol=0.0, max_iters=iterations)
    exact, rounded = (
        oracle.chunked_iterates(cell, params.astype(kind), merged(u).astype(kind), chunk, iterations)[
            cell.output_slot
        ]
        for kind in (np.float64, np.float32)
    )
    tolerance = max(2e-6 * max(1, np.abs(exact).max()), 4 * np.abs(exact - rounded).max())
    sequential, _ = expected(cell, params, u)
    assert np.abs(exact - sequential).max() > 4 * tolerance, "converged: the test would see nothing"
    np.testing.assert_allclose(hidden, exact, atol=tolerance, rtol=0)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.compiled
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("scale", [4.0, 8.0, 16.0])
def test_newton_ends_with_the_sequential_answer_whatever_the_weights(name, scale):
    """Weights for which whole-sequence Newton overflows: the result is the sequential one, bit for bit."""
    cell, params, u, _ = problem(name, T=400, scale=scale)
    hidden, last, info = solve(cell, params, u, method="newton", return_info=True, tol=0.0)
    sequential, sequential_last = solve(cell, params, u, method="sequential", backend="ops")
    assert info.iterations <= 24
    assert (hidden == sequential).all()
    assert (last == sequential_last).all()
    assert float(info.residual) == 0


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="a Mac's compiler fuses by itself")
def test_the_same_where_the_compiler_fuses_multiply_and_add(tmp_path):
    """As compilers do on arm64: two compilations of one formula then round differently."""
    real = shutil.which("g++")
    if real is None or (platform.machine() == "x86_64" and " fma " not in Path("/proc/cpuinfo").read_text()):
        pytest.skip("needs g++ and a processor with fused multiply-add")
    flags = "-mfma " if platform.machine() == "x86_64" else ""
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {real} {flags}-ffp-contract=fast "$@"\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    test = f"{__file__}::test_newton_ends_with_the_sequential_answer_whatever_the_weights"
    command = [sys.executable, "-m", "pytest", "-q", "--all", "-p", "no:cacheprovider", test]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "12 passed" in result.stdout


def test_whole_sequence_newton_does_overflow_where_chunks_do_not():
    cell, params, u, _ = problem("gru", T=256, D=64, scale=8.0)
    hidden, _ = solve(cell, params, u, method="newton", chunk=1, tol=0.0, max_iters=3)
    y, _ = expected(cell, params, u)
    assert not np.abs(hidden - y).max() < 1  # NaN or far off
    hidden, _, info = solve(cell, params, u, method="newton", return_info=True)
    assert np.abs(hidden - y).max() < 1e-5 or info.iterations == 15


def test_few_iterations_suffice_on_ordinary_weights():
    cell, params, u, _ = problem("lstm", T=256, scale=0.3)
    _, _, info = solve(cell, params, u, method="newton", return_info=True)
    assert 1 <= info.iterations <= 3
    assert float(info.residual) < 1e-6
    _, _, info = solve(cell, params, u, method="sequential", return_info=True)
    assert info.iterations == 0


@pytest.mark.parametrize("options", METHODS, ids=["sequential", "newton", "newton-7"])
def test_nan_and_infinity_stay_in_their_channel(options):
    cell, params, u, _ = problem("gru", T=100)
    clean, _ = solve(cell, params, u, **options)
    u[0, 0, 10, 0, 1] = np.nan
    u[0, 0, 20, 2, 3] = np.inf
    params[0, 5] = np.nan
    hidden, _ = solve(cell, params, u, **options)
    assert np.isnan(hidden[0, 10:, 1]).all()
    assert np.isnan(hidden[:, 1:, 5]).all()
    np.testing.assert_array_equal(hidden[..., [0, 2, 4]], clean[..., [0, 2, 4]])
    np.testing.assert_array_equal(hidden[1][:, [1, 3]], clean[1][:, [1, 3]])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    cell, params, u, _ = problem("lstm", T=64)
    low = mx.array(u).astype(dtype)
    hidden, last = recurrence(cell, mx.array(params), low)
    assert hidden.dtype == dtype
    assert last.dtype == mx.float32
    full, full_last = recurrence(cell, mx.array(params), low.astype(mx.float32))
    assert mx.array_equal(last, full_last)
    assert mx.array_equal(hidden, full.astype(dtype))


def test_linear_scan():
    rng = np.random.default_rng(0)
    for slots, n in [(1, 1), (1, 7), (2, 16), (4, 33)]:
        P = rng.normal(size=(slots, slots, 2, n, 3)).astype(np.float32) * 0.5
        r = rng.normal(size=(slots, 2, n, 3)).astype(np.float32)
        x = np.array(linear_scan(mx.array(P), mx.array(r)))
        y = np.zeros((slots, 2, 3))
        for c in range(n):
            y = np.einsum("ijbw,jbw->ibw", P[..., c, :].astype(np.float64), y) + r[..., c, :]
            np.testing.assert_allclose(x[..., c, :], y, atol=2e-5)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", METHODS, ids=["sequential", "newton", "newton-7"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_match_finite_differences(name, options, masked):
    cell, params, u, state = problem(name, T=18, D=4, heads=2, state=True)
    mask = np.ones((2, 18), bool)
    mask[0, :3] = mask[1, 12:] = False
    mask = mx.array(mask) if masked else None
    arrays = [mx.array(a) for a in (params, u, state)]
    loss = loss_of(cell, options, mask, return_states=4)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(*arrays)

    def exact(arrays):  # the same loss through the float64 oracle
        p, v, s = arrays
        hidden, states = expected(cell, p, v, s, None if mask is None else np.array(mask))
        weights = np.cos(np.arange(hidden.size).reshape(hidden.shape))
        return (hidden * weights).sum() + (states[:, -1] ** 2).sum() + (states[:, 3::4] ** 3).sum()

    rng = np.random.default_rng(3)
    base = [a.astype(np.float64) for a in (params, u, state)]
    for which, gradient in enumerate(gradients):
        gradient = np.array(gradient)
        assert np.abs(gradient).max() > 1e-3
        for _ in range(6):
            index = tuple(rng.integers(0, n) for n in gradient.shape)
            sides = []
            for sign in (1, -1):
                moved = [a.copy() for a in base]
                moved[which][index] += sign * 1e-5
                sides.append(exact(moved))
            difference = (sides[0] - sides[1]) / 2e-5
            assert gradient[index] == pytest.approx(difference, rel=2e-3, abs=2e-4), (which, index)


@pytest.mark.compiled
@pytest.mark.large
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("method", ["auto", "sequential", "newton"])
def test_under_compile(name, method):
    cell, params, u, state = problem(name, T=33, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    loss = loss_of(cell, {"method": method}, return_states=8)
    compiled = mx.compile(mx.value_and_grad(loss, argnums=(0, 1, 2)))
    value, gradients = compiled(*arrays)
    plain, plain_gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(gradients, plain_gradients, strict=True):
        assert mx.abs(b).max() > 0
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-4)


@pytest.mark.compiled
@pytest.mark.large
@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_twice_in_one_compiled_function(method):
    """MLX merges equal subgraphs; a split among them, as iterating over an array makes, breaks it."""
    cell, params, u, state = problem("lstm", T=33, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]

    def twice(*arrays):
        hidden, last = recurrence(cell, *arrays, method=method)
        return hidden.sum() + recurrence(cell, *arrays, method=method)[1].sum() + last.sum()

    assert mx.compile(twice)(*arrays).item() == pytest.approx(twice(*arrays).item(), rel=1e-5)


def test_under_vmap():
    cell, params, u, _ = problem("gru", T=12)
    stack = mx.stack([mx.array(u), mx.array(u) * 0.5])
    mapped = mx.vmap(lambda v: recurrence(cell, mx.array(params), v)[0])(stack)
    for i in range(2):
        np.testing.assert_allclose(np.array(mapped[i]), solve(cell, params, np.array(stack[i]))[0], atol=1e-6)


def test_a_cell_of_ones_own():
    """The example of the documentation: registered, prefilled by Newton, decoded, differentiated."""

    @register_cell
    class MinimalGRU(Cell):
        name = "minimal_gru_here"
        gates = ("z", "n")
        slots = ("h",)
        output = "h"
        params = ("a_z",)

        def step(self, state, u, params, F):
            (h,) = state
            z = F.sigmoid(params["a_z"] * h + u["z"])
            return (z * F.tanh(u["n"]) + (1 - z) * h,)

    cell, params, u, _ = problem("minimal_gru_here", T=50)
    y, states = expected(cell, params, u)
    for options in METHODS:
        hidden, last = solve(cell, params, u, **options)
        np.testing.assert_allclose(hidden, y, atol=3e-6, rtol=3e-6)
    state = None
    for t in range(50):
        hidden, state = recurrence(cell, mx.array(params), mx.array(u[:, :, t : t + 1]), state)
    np.testing.assert_allclose(np.array(state), states[:, -1], atol=3e-6, rtol=3e-6)
    assert mx.abs(mx.grad(loss_of(cell, {}))(mx.array(params), mx.array(u), mx.array(last))).min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"u": mx.zeros((2, 1, 5, 2, 6))},
            "u has shape (2, 1, 5, 2, 6); cell 'gru' needs (batch, heads, T, 3",
        ),
        ({"u": mx.zeros((2, 1, 0, 3, 6))}, "none of them 0"),
        ({"params": mx.zeros((3, 5))}, "params has shape (3, 5)"),
        ({"state": mx.zeros((2, 6))}, "state has shape (2, 6); with this u, cell 'gru' needs (2, 1, 6)"),
        ({"mask": mx.ones((2, 4), mx.bool_)}, "mask has shape (2, 4)"),
        ({"bias": mx.zeros(18)}, "bias has shape (18,); with this u, cell 'gru' needs (1, 18)"),
        ({"method": "picard"}, "unknown method 'picard'"),
        ({"backend": "vulkan"}, "unknown backend 'vulkan'"),
        ({"chunk": 0}, "chunk and max_iters must be at least 1"),
        ({"max_iters": 0}, "chunk and max_iters must be at least 1"),
        ({"max_iters": 2**31}, "max_iters is 2147483648; it must be below 2**31"),
        ({"return_states": -1}, "return_states is -1"),
        ({"return_states": 2**31}, "return_states is 2147483648; it must be 0 or a number of steps below"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"params": mx.zeros((3, 6)), "u": mx.zeros((2, 1, 5, 3, 6)), **change}
    with pytest.raises(PararnnError) as error:
        recurrence(get_cell("gru"), **arguments)
    assert message in str(error.value)


def test_comparisons_and_powers_in_a_step():
    """Ordinary operators work on the dual numbers too, which Newton and gradients run a step on."""

    @register_cell
    class Leaky(Cell):
        name = "leaky_here"
        gates = ("x", "g")
        slots = ("h",)
        output = "h"
        params = ("a", "b")

        def step(self, state, u, params, F):
            (h,) = state
            g = F.sigmoid(u["g"])
            squashed = h / (1 + h**2)
            return (g * F.where(h > 0, params["a"] * squashed, params["b"] * h) + (1 - g) * F.tanh(u["x"]),)

    cell, params, u, _ = problem("leaky_here", T=40)
    y, _ = expected(cell, params, u)
    hidden, _ = solve(cell, params, u, method="newton")
    np.testing.assert_allclose(hidden, y, atol=3e-6)
    duals = oracle.step_and_jacobian(
        cell, params.astype(np.float64), np.moveaxis(merged(u)[0], 1, 0), (y[0],)
    )
    bumped = oracle.step_and_jacobian(
        cell, params.astype(np.float64), np.moveaxis(merged(u)[0], 1, 0), (y[0] + 1e-7,)
    )
    np.testing.assert_allclose(duals[1][0][0], (bumped[0][0] - duals[0][0]) / 1e-7, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "ops"])
def test_a_bias_is_added_at_every_step(backend):
    cell, params, u, state = problem("lstm", T=20, heads=2, state=True)
    bias = 0.3 * np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
    shifted = u + bias.reshape(2, 1, 3, 3)
    given = solve(cell, params, u, state, bias=mx.array(bias), backend=backend)
    for a, b in zip(given, solve(cell, params, shifted, state, backend=backend), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.compiled
@pytest.mark.large
def test_only_the_mask_is_traced():
    cell, params, u, _ = problem("gru", T=20)
    arrays, mask = (mx.array(params), mx.array(u)), mx.arange(20)[None] < mx.array([[15], [20]])
    for method in ("sequential", "newton"):

        def solve_masked(mask, method=method):
            return recurrence(cell, *arrays, mask=mask, method=method)[0]

        plain = solve_masked(mask)
        np.testing.assert_allclose(np.array(mx.compile(solve_masked)(mask)), np.array(plain), atol=1e-6)
        mapped = mx.vmap(solve_masked)(mx.stack([mask, mask]))
        np.testing.assert_allclose(np.array(mapped[1]), np.array(plain), atol=1e-6)


def test_what_stands_in_padding_reaches_no_gradient():
    cell, params, u, _ = problem("lstm", T=20)
    u[0, :, 12:] = np.nan
    mask = mx.arange(20)[None] < mx.array([[12], [20]])
    for method in ("sequential", "newton"):

        def loss(params, u, method=method):
            return recurrence(cell, params, u, mask=mask, method=method)[0].sum()

        gradients = mx.grad(loss, argnums=(0, 1))(mx.array(params), mx.array(u))
        assert all(mx.isfinite(g).all() for g in gradients)
        assert mx.abs(gradients[1][0, :, 12:]).max() == 0
