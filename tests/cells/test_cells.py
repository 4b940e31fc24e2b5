"""Every cell against golden data from the PyTorch originals, and its Jacobian against finite differences."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import PararnnError, get_cell, register_cell
from mlx_pararnn.cells import Cell
from mlx_pararnn.cells.activations import ACTIVATIONS, Functions
from mlx_pararnn.cells.dual import Dual, DualFunctions
from mlx_pararnn.compute.recurrence import recurrence
from tests.support import oracle
from tests.support.golden import allowed, cell_cases, read

CASES = cell_cases()
GRU_CASES = [c for c in CASES if c["kind"].startswith("GRU")]
CELLS = ("gru", "lstm", "slstm", "nlru")


def exact_u(golden):
    """The input projection (B, T, gates, D) in float64."""
    x, weight, b = (golden[name].astype(np.float64) for name in ("x", "B", "b"))
    x = x.reshape(*x.shape[:2], weight.shape[0], -1)
    return np.einsum("bthi,higo->btgho", x, weight).reshape(*x.shape[:2], *b.shape) + b


@pytest.mark.sampled("large", by=lambda case, options: [case["kind"], str(options)])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "sequential"},
        {"method": "newton"},
        {"method": "newton", "chunk": 1},
        {"method": "newton", "chunk": 5},
    ],
    ids=["sequential", "newton", "newton-chunk1", "newton-chunk5"],
)
def test_golden_cells(case, options):
    cell, params, u, golden = read(case)
    hidden, last = recurrence(cell, params, u, **options)
    assert np.abs(np.array(hidden) - golden["y_seq"]).max() <= allowed(golden)
    states = golden["h_seq"][-1:] if golden["h_seq"].ndim == 2 else golden["h_seq"][:, -1]
    assert np.abs(np.array(last).reshape(states.shape) - states).max() <= allowed(golden)


@pytest.mark.sampled("large", by=lambda case: [case["kind"]])
@pytest.mark.parametrize("case", GRU_CASES, ids=lambda c: c["name"])
def test_gru_newton_iterates_are_apples(case):
    """chunk=1 with k iterations is Apple's scheme with k, within 3e-5 of the iterate's largest |y|."""
    cell, params, u, golden = read(case)
    for k in range(1, 5):
        y = golden[f"y_par_{k}"]
        hidden, _ = recurrence(cell, params, u, method="newton", chunk=1, tol=0.0, max_iters=k)
        assert np.abs(np.array(hidden) - y).max() <= 3e-5 * np.abs(y).max(), k


@pytest.mark.sampled("large", by=lambda case: [case["kind"]])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_newton_iterates_of_the_oracle(case):
    """The oracle gives Apple's iterates, the LSTM's by Apple's linearisation; the library gives the oracle's.

    Apple linearises the LSTM a little differently from its exact Jacobian, which is what the library uses.
    """
    cell, params, u, golden = read(case)
    weights = np.array(params, np.float64)
    apple = oracle.newton_iterates(cell, weights, exact_u(golden), 4, linearisation="apple")
    exact = oracle.newton_iterates(cell, weights, exact_u(golden), 4)
    for k in range(1, 5):
        y = golden[f"y_par_{k}"]
        assert np.abs(apple[k - 1] - y).max() <= 3e-5 * np.abs(y).max(), k
        hidden, _ = recurrence(cell, params, u, method="newton", chunk=1, tol=0.0, max_iters=k)
        assert np.abs(np.array(hidden) - exact[k - 1]).max() <= 3e-5 * np.abs(exact[k - 1]).max(), k


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_mlx_and_numpy_agree(activation):
    x = np.concatenate([np.linspace(-30, 30, 601), [-1e4, 1e4 if activation != "exp" else 80.0]])
    expected = getattr(Functions(np), activation)(x)
    y = np.array(getattr(Functions(mx), activation)(mx.array(x.astype(np.float32))))
    assert np.all(np.isfinite(y))
    assert np.abs((y - expected) / np.maximum(1, np.abs(expected))).max() < 3e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_match_finite_differences(activation):
    x = np.linspace(-4.03, 4.01, 97)
    F = Functions(np)
    f = getattr(F, activation)
    dual = getattr(DualFunctions(F), activation)(Dual(x, (np.ones_like(x),)))
    difference = (f(x + 1e-6) - f(x - 1e-6)) / 2e-6
    np.testing.assert_allclose(dual.value, f(x), rtol=1e-14)
    np.testing.assert_allclose(np.broadcast_to(dual.tangents[0], x.shape), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CELLS)
def test_jacobians_match_finite_differences(name):
    cell = get_cell(name)
    rng = np.random.default_rng(1)
    slots = len(cell.slots)
    state = rng.normal(size=(slots, 50))
    state[0 if name != "slstm" else 1] += 2  # sLSTM divides by n
    params, u = rng.normal(size=(len(cell.params), 50)), rng.normal(size=(len(cell.gates), 50))
    _, J = oracle.step_and_jacobian(cell, params, u, tuple(state))
    for j in range(slots):
        bump = np.zeros_like(state)
        bump[j] = 1e-6
        up, _ = oracle.step_and_jacobian(cell, params, u, tuple(state + bump))
        down, _ = oracle.step_and_jacobian(cell, params, u, tuple(state - bump))
        for i in range(slots):
            np.testing.assert_allclose(J[i][j], (up[i] - down[i]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_maximum_splits_the_derivative_at_a_tie():
    x = Dual(np.array([1.0, 2.0, 3.0]), (np.ones(3), np.zeros(3)))
    y = Dual(np.array([2.0, 2.0, 2.0]), (np.zeros(3), np.ones(3)))
    z = DualFunctions(Functions(np)).maximum(x, y)
    assert z.tangents[0].tolist() == [0.0, 0.5, 1.0]
    assert z.tangents[1].tolist() == [1.0, 0.5, 0.0]


def test_cells_with_the_same_activations_are_equal():
    assert get_cell("gru") == get_cell("gru", {"state": "tanh"})
    assert hash(get_cell("gru")) == hash(get_cell("gru", {"state": "tanh"}))
    assert get_cell("gru") != get_cell("gru", {"state": "relu"})
    assert get_cell("gru") != get_cell("nlru")


@pytest.mark.parametrize(
    ("name", "activations", "message"),
    [
        ("gur", None, "unknown cell 'gur' (known: gru, lstm"),
        ("gru", {"update": "swish"}, "unknown activation 'swish' for 'update'"),
        ("gru", {"forget": "tanh"}, "no activation called 'forget' (it has: update, reset, state)"),
        ("nlru", {"state": "tanh"}, "no activation called 'state' (it has: none)"),
    ],
)
def test_unknown_names_are_named(name, activations, message):
    with pytest.raises(PararnnError) as error:
        get_cell(name, activations)
    assert message in str(error.value)


def test_a_cell_class_must_be_complete():
    class Nameless(Cell):
        gates = slots = params = ("h",)
        output = "h"

    with pytest.raises(PararnnError, match="lacks the field 'name'"):
        register_cell(Nameless)

    class Outputless(Nameless):
        name, output = "outputless", "c"

    with pytest.raises(PararnnError, match="none of its slots"):
        register_cell(Outputless)

    class SecondGRU(Nameless):
        name = "gru"

    with pytest.raises(PararnnError, match="registered already"):
        register_cell(SecondGRU)


STEPS = {
    "if on an array": (lambda h, u, w: (h,) if u["a"] > 0 else (u["a"],), r"its step fails \(ValueError"),
    "a gate that is not there": (lambda h, u, w: (u["b"] * h,), r"its step fails \(KeyError: 'b'\)"),
    "too many slots": (lambda h, u, w: (h, h), "must return a tuple of 1 arrays"),
    "no tuple": (lambda h, u, w: w["w"] * h, "must return a tuple of 1 arrays"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_cannot_run_is_refused_when_it_is_registered(kind):
    formula, message = STEPS[kind]

    class Broken(Cell):
        name, gates, slots, output, params = "broken", ("a",), ("h",), "h", ("w",)

        def step(self, state, u, params, F):
            return formula(state[0], u, params)

    with pytest.raises(PararnnError, match=message):
        register_cell(Broken)
