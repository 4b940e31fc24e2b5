"""The two definitions of every cell, in Python and in Metal's language, against each other."""

import mlx.core as mx
import numpy as np
import oracle
import pytest

from mlx_pararnn import Cell, get_cell, register_cell
from mlx_pararnn.kernels import Launch, newton_launch

from . import harness
from .instances import ACTIVATIONS

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=str(harness.missing()))

D = 128
BODY = """
  const int d = int(thread_position_in_grid.x);
  constexpr int SLOTS = Cell::SLOTS;
  float w[Cell::PARAMS];
  for (int p = 0; p < Cell::PARAMS; ++p) w[p] = params[p * D + d];
  float x[Cell::GATES];
  for (int g = 0; g < Cell::GATES; ++g) x[g] = u[g * D + d];
  float plain[SLOTS];
  pararnn::Dual<SLOTS> dual[SLOTS];
  for (int s = 0; s < SLOTS; ++s) {
    plain[s] = state[s * D + d];
    dual[s] = pararnn::constant_dual<SLOTS>(plain[s]);
    dual[s].d[s] = 1.0f;
  }
  Cell::step(plain, x, w);
  Cell::step(dual, x, w);
  for (int s = 0; s < SLOTS; ++s) {
    values[s * D + d] = plain[s];
    dual_values[s * D + d] = dual[s].v;
    for (int j = 0; j < SLOTS; ++j) jacobian[(s * SLOTS + j) * D + d] = dual[s].d[j];
  }
"""


def both(cell, spread=1.0, seed=0):
    """(values, dual values, Jacobian) by the Metal text, and (values, Jacobian) by the Python text."""
    slots, gates, params = len(cell.slots), len(cell.gates), len(cell.params)
    rng = np.random.default_rng(seed)
    arrays = {
        "params": rng.normal(size=(params, D)),
        "u": 2 * rng.normal(size=(gates, D)),
        "state": rng.normal(size=(slots, D)),
    }
    if cell.name == "slstm":
        arrays["state"][1] = 1 + arrays["state"][1] ** 2
    arrays = {k: (spread * v).astype(np.float32) for k, v in arrays.items()}
    launch = Launch(
        name="step",
        input_names=("params", "u", "state"),
        output_names=("values", "dual_values", "jacobian"),
        source=BODY,
        header=newton_launch(cell, (1, 1, 1, gates, D), mx.float32).header,
        template=(("D", D),),
        grid=(D, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=((slots, D), (slots, D), (slots, slots, D)),
        output_dtypes=(mx.float32,) * 3,
    )
    out = harness.run(launch, arrays)
    exact = {k: v.astype(np.float64) for k, v in arrays.items()}
    values, jacobian = oracle.step_and_jacobian(cell, exact["params"], exact["u"], tuple(exact["state"]))
    return out, np.stack(values), np.array(jacobian)


def agree(cell, spread=1.0):
    out, values, jacobian = both(cell, spread)
    np.testing.assert_allclose(out["values"], values, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(out["dual_values"], values, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(out["jacobian"], jacobian, atol=4e-6, rtol=4e-6)
    assert np.abs(jacobian).max() > 0.1


@pytest.mark.parametrize("name", ["gru", "lstm", "slstm", "nlru"])
def test_cells(name):
    agree(get_cell(name))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    spread = 0.3 if activation == "exp" else 1.0  # exp of exp
    agree(get_cell("gru", {"state": activation}), spread)
    agree(get_cell("lstm", {"c": activation, "o": activation}), spread)


@register_cell
class MslMinimalGRU(Cell):
    """A user's own cell: metal/README.md's example."""

    name = "msl_minimal_gru"
    gates = ("z", "n")
    slots = ("h",)
    output = "h"
    params = ("a_z",)
    msl = """
namespace pararnn {
struct MslMinimalGRU {
  enum { SLOTS = 1, GATES = 2, PARAMS = 1, OUTPUT = 0 };
  template <typename S>
  static void step(thread S* state, const thread float* u, const thread float* w) {
    const S h = state[0];
    const S z = apply<Sigmoid>(w[0] * h + u[0]);
    state[0] = z * apply<Tanh>(u[1]) + (1.0f - z) * h;
  }
};
}
"""

    def step(self, state, u, params, F):
        (h,) = state
        z = F.sigmoid(params["a_z"] * h + u["z"])
        return (z * F.tanh(u["n"]) + (1 - z) * h,)


def test_a_cell_of_ones_own():
    agree(get_cell("msl_minimal_gru"))
