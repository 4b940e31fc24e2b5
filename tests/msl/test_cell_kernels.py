"""The two definitions of every cell, in Python and in Metal's language, against each other."""

import importlib
import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Cell, get_cell, register_cell
from mlx_pararnn.compute.gpu import newton_launch, sequential_launch
from mlx_pararnn.compute.texts import cell_header
from tests.support import oracle

from ..support.msl import harness
from ..support.msl.adjoint_kernel import AdjointCall
from ..support.msl.instances import ACTIVATIONS
from ..support.msl.wrap import wrap
from . import language
from .lint import lint
from .sample import Sample

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=str(harness.missing()))

README = Path(__file__).parents[2] / "metal" / "README.md"
D = 128
BODY = """
  const int d = int(thread_position_in_grid.x);
  constexpr int SLOTS = Cell::SLOTS;
  float w[Cell::PARAMS];
  for (int p = 0; p < Cell::PARAMS; ++p) w[p] = params[p * D + d];
  float x[Cell::GATES];
  for (int g = 0; g < Cell::GATES; ++g) x[g] = u[g * D + d];
  pararnn::Dual<0> plain[SLOTS];
  pararnn::Dual<SLOTS> dual[SLOTS];
  for (int s = 0; s < SLOTS; ++s) {
    plain[s].v = state[s * D + d];
    dual[s] = pararnn::constant_dual<SLOTS>(plain[s].v);
    dual[s].d[s] = 1.0f;
  }
  Cell::step(plain, x, w);
  Cell::step(dual, x, w);
  for (int s = 0; s < SLOTS; ++s) {
    values[s * D + d] = plain[s].v;
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
    launch = Sample(
        name="step",
        input_names=("params", "u", "state"),
        output_names=("values", "dual_values", "jacobian"),
        source=BODY,
        header=cell_header(cell),
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


@pytest.mark.sampled("harness", by=lambda activation: [activation in ("tanh", "softplus")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    spread = 0.3 if activation == "exp" else 1.0  # exp of exp
    agree(get_cell("gru", {"state": activation}), spread)
    agree(get_cell("lstm", {"c": activation, "o": activation}), spread)


@register_cell
class MinimalGRU(Cell):
    """A user's own cell, with the text of metal/README.md's example."""

    name = "readmes_minimal_gru"
    gates = ("z", "n")
    slots = ("h",)
    output = "h"
    params = ("a_z",)
    msl = re.search(r"```cpp\n(.*?)```", README.read_text(), re.DOTALL)[1]

    def step(self, state, u, params, F):
        (h,) = state
        z = F.sigmoid(params["a_z"] * h + u["z"])
        return (z * F.tanh(u["n"]) + (1 - z) * h,)


def own_cells() -> list[str]:
    """README's cell, and those of the module that MLX_PARARNN_CELLS names as `module:cell,cell`."""
    module, _, names = os.environ.get("MLX_PARARNN_CELLS", "").partition(":")
    if module:
        importlib.import_module(module)
    return [MinimalGRU.name, *filter(None, names.split(","))]


@pytest.mark.parametrize("name", own_cells())
def test_a_cell_of_ones_own(name):
    cell = get_cell(name)
    agree(cell)
    shape = (2, 1, 150, len(cell.gates), 40)
    arrays = {
        "u": np.random.default_rng(0).normal(size=shape).astype(np.float32),
        "bias": np.random.default_rng(2).normal(size=(1, len(cell.gates) * 40)).astype(np.float32),
        "params": np.random.default_rng(1).normal(size=(len(cell.params), 40)).astype(np.float32),
        "initial": np.zeros((2, len(cell.slots), 40), np.float32),
        "tol": np.zeros(1, np.float32),
        "max_iters": np.full(1, 1000, np.int32),
    }
    answers = []
    for launch in (newton_launch(cell, shape, mx.float32), sequential_launch(cell, shape, mx.float32)):
        given = {name: arrays[name] for name in launch.input_names}
        wrapped = harness.text_of(launch, given)
        assert lint(wrapped, launch.header) == []
        if language.clang():
            assert language.address_spaces(launch, wrapped) == []
        answers.append(harness.run(launch, given))
    np.testing.assert_array_equal(answers[0]["hidden"], answers[1]["hidden"])
    gradient = AdjointCall(cell, 2, 150, 40)
    wrapped = wrap(gradient.launch, gradient.inputs)
    assert lint(wrapped, gradient.launch.header) == []
    if language.clang():
        assert language.address_spaces(gradient.launch, wrapped) == []
    assert gradient.compare(gradient.run()) == ""
