"""The kernel of the gradient: text, language, numbers against the oracle in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.cells import get_cell
from mlx_pararnn.compute import gpu

from ..support.msl import cuda
from ..support.msl.adjoint_kernel import adjoint, adjoint_cases, all_adjoints
from ..support.msl.build import CLANG, clang
from ..support.msl.harness import missing
from ..support.msl.instances import CELLS, DTYPES
from ..support.msl.wrap import wrap
from . import language
from .lint import lint
from .mlx_text import assert_same

needs_harness = pytest.mark.skipif(bool(missing()), reason=missing())
needs_nvcc = pytest.mark.skipif(not cuda.nvcc(), reason="no nvcc")
calls = pytest.mark.parametrize("call", list(all_adjoints()), ids=str)


@pytest.mark.sampled("harness")
@calls
def test_text(call, tmp_path, capfd):
    assert_same(call.launch, call.inputs, tmp_path, capfd)


@pytest.mark.sampled("harness")
@calls
def test_language(call):
    wrapped = wrap(call.launch, call.inputs)
    assert lint(wrapped, call.launch.header) == []
    if language.clang():
        assert language.address_spaces(call.launch, wrapped) == []


@pytest.mark.toolchain
@needs_nvcc
@pytest.mark.parametrize("cell", CELLS)
def test_cuda_twin_compiles_and_spills_nothing(cell):
    """128 registers are what a thread of an M1 has. (nvcc is not Apple's compiler: a stand-in.)"""
    plain = adjoint(cell, 2, 400, 64)
    assert cuda.spilled(cuda.cuda_twin(plain.launch, plain.inputs), 128) == 0
    for call in adjoint_cases(cell)[1:]:
        assert cuda.compile_ptx(cuda.cuda_twin(call.launch, call.inputs)) == []


TIMES = (1, 15, 16, 17, 127, 128, 129, 700)
SIZES = [(T, D, heads) for T in TIMES for D, heads in ((1, 1), (31, 1), (33, 3), (64, 4))]


@needs_harness
@pytest.mark.sampled("harness", by=lambda cell: [cell])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("T", "D", "heads"), SIZES)
def test_against_the_oracle(cell, T, D, heads):
    """Sizes crossed in full; dtype, shape, mask, states and lane order take turns."""
    turn = SIZES.index((T, D, heads)) + [*CELLS].index(cell)
    call = adjoint(
        cell,
        (1, 3)[turn % 2],
        T,
        D,
        heads,
        tuple(DTYPES)[turn % 3],
        tuple(gpu.ADJOINT_SHAPES)[turn // 3 % 4],
        masked=turn // 2 % 2 == 1,
        every=(0, 1, 7)[turn // 5 % 3] if T > 7 else 0,
        memory=(0.0, 2.5)[turn // 7 % 2],
        seed=turn,
    )
    assert call.compare(call.run(order=turn % 3, check=T < 200)) == ""


@needs_harness
@pytest.mark.sampled("harness", by=lambda math: [math])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("math", ["metal", "fused", "expressions"])
def test_other_rounding(cell, math):
    """exp and tanh off by the ulps that Metal's tables allow, multiply-add fused, no denormals."""
    if math in CLANG and not clang():
        pytest.skip("no clang of at least 19")
    call = adjoint(cell, 2, 200, 40, masked=True)
    assert call.compare(call.run(math=math, check=False), tolerance=3e-5) == ""


@needs_harness
@pytest.mark.sampled("harness", by=lambda place: [place])
@pytest.mark.parametrize("place", ["c", "state"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "elu", "softplus", "leaky_relu"])
def test_other_activations(place, activation):
    call = adjoint("lstm", 2, 40, 33, activations={place: activation})
    assert call.compare(call.run()) == ""


@needs_harness
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_sums_do_not_depend_on_the_order_of_threads(cell):
    call = adjoint(cell, 2, 300, 40)
    one, other = call.run(order=0, check=False), call.run(order=5, check=False)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


@needs_harness
@pytest.mark.parametrize("shape", gpu.ADJOINT_SHAPES)
def test_a_spoiled_channel_spoils_no_other(shape):
    call = adjoint("lstm", 2, 300, 40, shape=shape)
    clean = call.run(check=False)
    call.given["u"] = call.given["u"].copy()
    call.given["u"][0, 0, 50, :, 3] = np.nan
    got = call.run(check=False)
    assert np.isnan(got["d_u"][0, 0, :51, :, 3]).all()
    for name, array in got.items():
        spoiled = np.zeros(array.shape, bool)
        channel = slice(3, None, 40)  # in d_bias, of each gate
        spoiled[(0, ..., channel) if name != "d_u" else (0, 0, ..., channel)] = True
        np.testing.assert_array_equal(array[~spoiled], clean[name][~spoiled])


@needs_harness
def test_offsets_beyond_32_bits():
    """Inputs whose rows, heads or steps stand 2^30 numbers apart: three are more than an int counts."""
    far = np.zeros(2 * 2**30 + 4096, np.float16)  # only the pages that are touched take memory
    for name, axis, (B, heads, T) in (
        ("u", 0, (3, 1, 2)),
        ("u", 1, (1, 3, 2)),
        ("u", 2, (1, 1, 3)),
        ("d_hidden", 0, (3, 1, 2)),
        ("d_hidden", 1, (1, 1, 3)),
    ):
        call = adjoint("gru", B, T, 4 * heads, heads, "float16")
        array = call.given[name]
        strides = [n // 2 for n in np.empty(array.shape, np.float16).strides]
        strides[axis] = 2**30
        view = np.lib.stride_tricks.as_strided(far, array.shape, tuple(2 * n for n in strides))
        view[...] = array
        call.given[name] = view
        assert call.compare(call.run()) == ""


def test_cells_of_many_slots_go_straight_back():
    """Where the Jacobians of all chunks do not fit threadgroup memory."""
    cell = get_cell("slstm")
    assert gpu.adjoint_launch(cell, (1, 1, 99, 4, 2048), mx.float32).threadgroup == (256, 1, 1)
    many = type("Many", (type(cell),), {"slots": tuple("abcdef"), "output": "a", "msl": "struct Many {};"})()
    assert gpu.adjoint_launch(many, (1, 1, 99, 4, 2048), mx.float32).threadgroup == (32, 1, 1)
