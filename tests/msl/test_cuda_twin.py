"""The CUDA text of every kernel, executed by the harness with CUDA's built-ins by shim.

What it shows: that metal/cuda_compat.h means what Metal's names mean, and the kernels' numbers, barriers and
races in that text. Not: NVRTC, registers, CUDA's own rounding.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from ..support.msl import harness
from ..support.msl.adjoint_kernel import adjoint
from ..support.msl.build import CompileError
from ..support.msl.cuda import COMPAT
from ..support.msl.harness import KernelError, run
from ..support.msl.instances import instance
from ..support.msl.layer_kernels import conv, decode
from .battery import Case, newton_cases, sequential_cases
from .sample import Sample

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=harness.missing())

COMPAT_TEXT = COMPAT.read_text()
ALL = 1000  # iterations: more than there are chunks


def small(cell: str, dtype: str = "float32") -> list:
    """Each kernel once, with more than one simdgroup, tile or group of channels, as it has them."""
    newton, rich, rows = newton_cases(cell)
    straight = sequential_cases(cell)[1]
    gradient = adjoint(cell, 1, 150, 9, 1, dtype, "wide", masked=True, every=3, memory=2.0)
    return [newton, rich, rows, straight, gradient, decode(cell, 2, 1060, 2, dtype)]


def objection(case, compat: str = COMPAT_TEXT, check: bool = True) -> str:
    """What is wrong with one kernel's twin, or ""."""
    options = {"cuda": compat, "check": check}
    try:
        if isinstance(case, Case) and case.tiling:
            for iterations in (1, 2):
                got = case.run(lambda launch: launch, iterations, tol=0.0, **options)
                if difference := case.compare(got, iterations):
                    return f"after {iterations} iterations {difference}"
        return case.compare(case.run(lambda launch: launch, **options), None)
    except (CompileError, KernelError) as error:
        return str(error)


@pytest.mark.sampled("harness", by=lambda cell: ["one"])
@pytest.mark.parametrize("cell", ["nlru", "gru", "lstm", "slstm"])
def test_newtons_twin(cell):
    """After 1 and 2 iterations and at convergence, with all options in 16 bits too."""
    plain, rich, _ = newton_cases(cell)
    assert objection(rich if cell == "nlru" else plain) == ""


@pytest.mark.harness
@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm", "nlru"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_twin(cell, dtype):
    cases = [*small(cell, dtype)[3:], conv(2, 37, 70, 4, dtype)]
    if dtype == "bfloat16":
        cases += newton_cases(cell)[1:]
    assert [objection(case) for case in cases] == [""] * len(cases)


@dataclass(frozen=True)
class Mutant:
    name: str
    old: str
    new: str
    kernel: str  # what sees it

    def __str__(self):
        return self.name


MUTANTS = [
    Mutant("any as all", "return __any_sync(", "return __all_sync(", "uneven"),
    Mutant("a sum of half a warp", "distance = 16", "distance = 8", "decode"),
    Mutant("a sum that leaves out neighbours", "distance > 0", "distance > 1", "decode"),
    Mutant("fast exp", "return expf(x)", "return __expf(x)", "decode"),
    Mutant("a barrier of the warp alone", "{ __syncthreads(); }", "{ __syncwarp(); }", "newton"),
    Mutant("no barrier", "{ __syncthreads(); }", "{}", "decode"),
    Mutant("lanes of a warp of 16", "thread_index() & 31u", "thread_index() & 15u", "decode"),
    Mutant("warps of 64", "thread_index() >> 5", "thread_index() >> 6", "newton"),
    Mutant("min as max", "return fminf(x, y)", "return fmaxf(x, y)", "functions"),
    Mutant(
        "threads count y first",
        "threadIdx.x + blockDim.x * (threadIdx.y",
        "threadIdx.x + blockDim.x * (1 - threadIdx.y",
        "functions",
    ),
    Mutant("infinity is finite", "return x - x == 0.0f", "return x == x", "functions"),
    Mutant(
        "a shuffle the other way",
        "__shfl_up_sync(0xffffffffu, v, distance)",
        "__shfl_down_sync(0xffffffffu, v, distance)",
        "functions",
    ),
    Mutant("all as any", "return __all_sync(", "return __any_sync(", "functions"),
]


def uneven() -> Case:
    """In each simdgroup one channel that forgets at once, so that it settles first, among slow ones."""
    case = newton_cases("gru")[0]
    case.u, update = case.u.copy(), case.made.cell.gates.index("z")
    for head, column in ((0, 0), (1, 19)):
        case.u[:, head, :, update, column] = 40.0
        case.values[:, :, update, 20 * head + column] = 40.0
    return case


CASES = {
    "newton": lambda: newton_cases("gru")[0],
    "uneven": uneven,
    "decode": lambda: decode("gru", 2, 1060, 2),
}


@pytest.mark.sampled("harness", by=lambda mutant: [mutant.kernel] if mutant.kernel == "decode" else [])
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_of_the_compatibility_header_is_seen(mutant):
    assert COMPAT_TEXT.count(mutant.old) == 1
    compat = COMPAT_TEXT.replace(mutant.old, mutant.new)
    if mutant.kernel == "functions":
        assert functions_differ(compat)
    else:
        assert objection(CASES[mutant.kernel](), compat)


# Every function of the header, on values that tell them apart; threads in three dimensions.
VALUES = """
  const uint index = simdgroup_index_in_threadgroup * 32u + thread_index_in_simdgroup;
  const float v = x[index];
  const float w = x[63u - index];
  const bool near = v > -1.0f && v < 1.0f;
  uint k = index;
  y[k] = metal::precise::exp(v); k += 64u;
  y[k] = metal::precise::exp2(v); k += 64u;
  y[k] = metal::precise::log(metal::fabs(v)); k += 64u;
  y[k] = metal::precise::tanh(v); k += 64u;
  y[k] = metal::precise::sin(v); k += 64u;
  y[k] = metal::precise::cos(v); k += 64u;
  y[k] = metal::precise::sqrt(v); k += 64u;
  y[k] = metal::precise::pow(v, 3.0f); k += 64u;
  y[k] = metal::fma(v, w, 1.0f); k += 64u;
  y[k] = metal::isnan(v + w) ? 0.0f : metal::min(v, w); k += 64u;
  y[k] = metal::isnan(v + w) ? 0.0f : metal::max(v, w); k += 64u;
  y[k] = metal::select(v, w, near); k += 64u;
  y[k] = metal::isnan(v) ? 1.0f : metal::isinf(v) ? 2.0f : 3.0f; k += 64u;
  y[k] = metal::isfinite(v) ? 1.0f : 0.0f; k += 64u;
  y[k] = simd_shuffle_up(v, 3); k += 64u;
  y[k] = simd_shuffle_down(v, 5); k += 64u;
  y[k] = simd_shuffle_xor(v, 9); k += 64u;
  y[k] = simd_shuffle(v, ushort(31u - thread_index_in_simdgroup)); k += 64u;
  y[k] = simd_broadcast(v, 7); k += 64u;
  y[k] = (simd_any(near) ? 1.0f : 0.0f) + (simd_all(near) ? 2.0f : 0.0f); k += 64u;
  y[k] = simd_sum(near ? v : 0.0f); k += 64u;
  y[k] = float(thread_position_in_threadgroup.x + 10u * thread_position_in_threadgroup.y +
               100u * thread_position_in_grid.z + 1000u * threads_per_threadgroup.x); k += 64u;
  y[k] = float(thread_index_in_threadgroup);
"""
ROWS = 23


def functions(compat: str | None) -> np.ndarray:
    x = np.concatenate([np.linspace(-0.9, 0.9, 32), np.geomspace(1e-3, 80, 32)]).astype(np.float32)
    x[[33, 34, 35]] = np.inf, -np.inf, np.nan
    call = Sample(
        VALUES,
        output_shapes=((ROWS * 64,),),
        grid=(16, 2, 2),
        threadgroup=(16, 2, 2),
        output_dtypes=(mx.float32,),
    )
    return run(call, {"x": x}, cuda=compat)["y"].reshape(ROWS, 64)


def functions_differ(compat: str) -> bool:
    return not np.allclose(functions(compat), functions(None), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_compatibility_headers_functions_are_metals():
    assert not functions_differ(COMPAT_TEXT)


def test_the_twin_does_not_fuse_what_it_must_not():
    """As the Metal text: Newton's answer is the sequential one, bit for bit, where the compiler fuses."""
    newton = newton_cases("gru")[0]
    straight = sequential_cases("gru")[0]
    assert newton.made.cell == straight.made.cell
    shape = newton.made.u_shape
    other = Case(instance("gru", "float32", None, shape=(shape[0], shape[1], shape[2], shape[4])), None)
    got = newton.run(lambda launch: launch, ALL, tol=0.0, check=False, math="fused", cuda=COMPAT_TEXT)
    want = other.run(lambda launch: launch, check=False, math="fused", cuda=COMPAT_TEXT)
    for name in ("hidden", "last"):
        np.testing.assert_array_equal(got[name], want[name])


def test_threads_that_the_text_is_not_compiled_for_are_refused():
    """As by Metal, for a text that ends with max_total_threads_per_threadgroup."""
    call = decode("gru", 2, 1060, 2)
    larger = replace(call.launch, threadgroup=(1024, 1, 1), grid=(1024, 2, 1))
    with pytest.raises(KernelError, match="1024 threads; the text is compiled for 512"):
        run(larger, call.given, dtypes=call.dtypes)
