"""Every check of the harness sees the fault it is for, in every lane order, and correct kernels pass."""

import mlx.core as mx
import numpy as np
import pytest

from ..support.msl.build import CompileError
from ..support.msl.harness import KernelError, missing, run
from .sample import Sample

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ORDERS = [0, 1, 2, 3]
X = np.arange(64, dtype=np.float32)

START = """
  const uint i = thread_position_in_grid.x;
  const uint lane = thread_index_in_simdgroup;
  const uint group = simdgroup_index_in_threadgroup;
  const uint last = threads_per_threadgroup.x - 1u;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
REVERSE = "threadgroup float s[64]; s[i] = x[i]; {} y[i] = s[last - i];"
# neighbours: pairs of lanes of one simdgroup exchange their values
PAIRS = "threadgroup float s[64]; s[i] = x[i]; {} y[i] = s[i ^ 1u];"
TWICE = (
    "threadgroup float s[64]; for (int k = 0; k < 2; ++k) "
    "{{ s[i] = x[i] + float(k); {0} y[i] = s[last - i]; {1} }}"
)


def launch(body: str, **fields) -> Sample:
    return Sample(START + body, **fields)


def groups_of(size: int, count: int) -> dict:
    return {"grid": (size * count, 1, 1), "threadgroup": (size, 1, 1)}


FAULTS = {
    "no barrier": (REVERSE.format(""), "race|before anything was written"),
    "barrier without flags": (
        REVERSE.format("threadgroup_barrier(mem_flags::mem_none);"),
        "race",
    ),
    "barrier for the other memory": (
        REVERSE.format("threadgroup_barrier(mem_flags::mem_device);"),
        "race",
    ),
    "barrier of a simdgroup only": (
        REVERSE.format("simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "race|before anything was written",
    ),
    "no barrier within a simdgroup": (PAIRS.format(""), "race|before anything was written"),
    "a shuffle is no fence": (
        PAIRS.format("float z = simd_shuffle_xor(x[i], 1); if (z < 0.0f) return;"),
        "race",
    ),
    "no barrier before the next round": (TWICE.format(BARRIER, ""), "race"),
    "all write one place": (f"threadgroup float s[1]; s[0] = x[i]; {BARRIER} y[i] = s[0];", "race"),
    "simdgroups write one place": (
        f"threadgroup float s[1]; if (lane == 0u) s[0] = x[i]; {BARRIER} y[i] = s[0];",
        "race",
    ),
    "barrier for some lanes": (f"if (lane < 16u) {BARRIER} y[i] = x[i];", "divergence"),
    "barrier for some simdgroups": (f"if (group == 0u) {BARRIER} y[i] = x[i];", "divergence"),
    "two different barriers": (
        f"if (group == 0u) {{ {BARRIER}\n }} else {{ {BARRIER} }} y[i] = x[i];",
        "divergence",
    ),
    "barrier flags by lane": (
        "threadgroup_barrier(lane == 0u ? mem_flags::mem_device : mem_flags::mem_threadgroup); y[i] = x[i];",
        "mem_flags",
    ),
    "simd operation for some lanes": ("y[i] = lane < 16u ? simd_sum(x[i]) : 0.0f;", "divergence"),
    "different simd operations": (
        "y[i] = lane < 16u ? simd_sum(x[i]) : simd_max(x[i]);",
        "divergence",
    ),
    "shuffle by a distance of the lane": (
        "y[i] = simd_shuffle_up(x[i], ushort(lane));",
        "differs between lanes",
    ),
    "shuffle from lane 32": (
        "y[i] = simd_shuffle(x[i], ushort(lane + 1u));",
        "lane 32, which does not exist",
    ),
    "return before a barrier": (f"y[i] = x[i]; if (i == 63u) return; {BARRIER}", "divergence"),
    "return before a simd operation": (
        "y[i] = x[i]; if (lane == 31u) return; y[i] = simd_sum(x[i]);",
        "divergence",
    ),
    "read past the end": ("y[i] = x[i + 1u];", "out of bounds: read.*`x`"),
    "read before the start": ("y[i] = x[int(i) - 1];", "out of bounds: read.*`x`"),
    "read far away": ("y[i] = x[i + 100000000u];", "out of bounds|signal"),
    "write past the end": ("y[i + 1u] = x[i];", "out of bounds: write.*`y`"),
    "write before the start": ("y[int(i) - 1] = x[i];", "out of bounds: write.*`y`"),
    "wide read over the end": (
        "y[i] = float(((const device uint64_t*)(x + i))[0]);",
        "out of bounds",
    ),
    "threadgroup index too large": (
        f"threadgroup float s[63]; s[i] = x[i]; {BARRIER} y[i] = s[i];",
        "bounds",
    ),
    "threadgroup pointer too far": (
        f"threadgroup float s[63]; threadgroup float* p = s; p[i] = x[i]; {BARRIER} y[i] = x[i];",
        "out of bounds in threadgroup memory",
    ),
    "thread array index too large": (
        "float a[4]; for (int k = 0; k < 4; ++k) a[k] = x[i]; y[i] = a[i & 7u];",
        "index out of an array's bounds",
    ),
    "threadgroup memory not initialised": (
        f"threadgroup float s[64]; if (i > 0u) s[i] = x[i]; {BARRIER} y[i] = s[i];",
        "before anything was written",
    ),
    "output read first": ("y[i] += x[i];", "before anything was written"),
    "an element stays unwritten": ("if (i != 5u) y[i] = x[i];", "1 elements stay unwritten, the first is 5"),
    "threads write one output element": ("y[i] = x[i]; y[i & 62u] = x[i];", "race: `y`"),
    "output handed on without a device barrier": (
        f"y[i] = x[i]; {BARRIER} float z = y[last - i]; {BARRIER} y[i] = z;",
        "race: `y`",
    ),
    "an input is written": ("((device float*)x)[i] = 0.0f; y[i] = x[i];", "input `x` is written"),
    "over 32 KB": ("threadgroup float s[8193]; s[i] = x[i]; y[i] = s[i];", "over the limit"),
    "over 32 KB in two arrays": (
        "threadgroup float s[8000]; threadgroup float t[200]; s[i] = x[i]; t[i] = s[i]; y[i] = t[i];",
        "over the limit",
    ),
    "integer overflow": ("int a = 2000000000 + int(x[1]) * 1000000000; y[i] = float(a);", "integer overflow"),
    "32-bit offsets": ("int a = int(i) * 65536 * 65536; y[i] = x[i] + float(a);", "integer overflow"),
    "division by zero": ("y[i] = float(1 / int(x[0]));", "division by zero"),
    "NaN to an integer": ("y[i] = float(int(x[0] / x[0]));", "converted to an integer"),
    "a hang": ("int k = 0; while (x[0] == 0.0f) { k ^= 1; } y[i] = float(k);", "did not end"),
    "a hang with a barrier": (
        f"while (true) {{ {BARRIER} if (x[1] == 2.0f) break; }} y[i] = x[i];",
        "did not end",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault):
    body, message = FAULTS[fault]
    for order in ORDERS:
        with pytest.raises(KernelError, match=message):
            run(launch(body), {"x": X}, order=order, seconds=0.3)


def test_race_between_threadgroups_is_seen():
    body = "y[i] = x[i]; y[threads_per_grid.x] = x[i];"
    for order in ORDERS:
        with pytest.raises(KernelError, match="more than one threadgroup"):
            run(launch(body, **groups_of(1, 64), output_shapes=((65,),)), {"x": X}, order=order)


def test_reading_what_another_threadgroup_wrote_is_seen():
    # the reader may run first: then nothing is written there yet
    body = "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); if (i == 63u) y[63] = y[0];"
    for order in ORDERS:
        with pytest.raises(KernelError, match=r"another threadgroup|before anything"):
            run(launch(body, **groups_of(32, 2)), {"x": X}, order=order)


def test_read_outside_a_strided_view_is_seen():
    base = np.arange(256, dtype=np.float32).reshape(16, 16)
    view = base[4:12, 4:12]
    good = "y[i] = x[(i / 8u) * uint(x_strides[0]) + (i % 8u) * uint(x_strides[1])];"
    got = run(launch(good, contiguous=False), {"x": view})["y"]
    np.testing.assert_array_equal(got.reshape(8, 8), view)
    with pytest.raises(KernelError, match="out of bounds: read"):
        run(launch(good.replace("] = x[", "] = x[16u + "), contiguous=False), {"x": view})
    # a copy is made where MLX makes one, and then the strides are the copy's
    np.testing.assert_array_equal(run(launch(good), {"x": view})["y"].reshape(8, 8), view)


COMPILE_FAULTS = {
    "mixed min": "y[i] = float(min(i, 3));",
    "mixed max": "y[i] = max(x[i], 0);",
    "float to bfloat16": "bfloat16_t b; b = x[i]; y[i] = float(b);",
    "float to half": "float16_t h = x[i]; y[i] = float(h);",
    "float store to bfloat16": "((device bfloat16_t*)y)[i] = x[i];",
    "assignment to an input": "x[i] = 1.0f; y[i] = x[i];",
    "unknown attribute": "y[i] = float(thread_index_in_warp);",
    "C++ library": "y[i] = std::max(x[i], 0.0f);",
}


@pytest.mark.parametrize("fault", COMPILE_FAULTS)
def test_fault_does_not_compile(fault):
    with pytest.raises(CompileError, match="error"):
        run(launch(COMPILE_FAULTS[fault]), {"x": X})


def test_grid_must_be_whole_threadgroups():
    for sizes in ({"grid": (65, 1, 1)}, groups_of(2048, 1), {"grid": (0, 1, 1)}):
        with pytest.raises(KernelError, match=r"multiple|threads"):
            run(launch("y[i] = x[i];", **sizes), {"x": X})


R = X[::-1]
CONTROLS = {
    "barrier": (REVERSE.format(BARRIER), R),
    "barrier of both kinds": (
        REVERSE.format("threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"),
        R,
    ),
    "barrier of the simdgroup, for the simdgroup": (
        PAIRS.format("simdgroup_barrier(mem_flags::mem_threadgroup);"),
        X.reshape(-1, 2)[:, ::-1].ravel(),
    ),
    "two rounds": (TWICE.format(BARRIER, BARRIER), R + 1),
    "double buffer, one barrier a round": (
        "threadgroup float s[2][64]; float v = x[i]; for (int k = 0; k < 5; ++k) "
        f"{{ s[k & 1][i] = v; {BARRIER} v = s[k & 1][last - i] + 1.0f; }} y[i] = v;",
        R + 5,
    ),
    "all read one place": (
        f"threadgroup float s[1]; if (i == 0u) s[0] = x[7]; {BARRIER} y[i] = s[0];",
        np.full(64, 7),
    ),
    "barriers in a loop of one length": (
        f"for (uint k = 0u; k < uint(x[3]); ++k) {{ {BARRIER} }} y[i] = x[i];",
        X,
    ),
    "threads return at different times, nothing follows": (
        "y[i] = x[i]; if (i > 9u) return; y[i] = 1.0f;",
        None,
    ),
    "exactly 32 KB": ("threadgroup float s[8192]; s[i] = x[i]; y[i] = s[i];", X),
    "mixed element sizes": (
        "threadgroup uchar a[64]; threadgroup ushort b[64]; threadgroup uint64_t c[64]; "
        f"a[i] = uchar(i); b[i] = ushort(i); c[i] = i; {BARRIER} "
        "y[i] = float(a[last - i]) + float(b[last - i]) + float(c[last - i]);",
        3 * R,
    ),
    "output handed on with a device barrier": (
        "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); float z = y[last - i]; "
        "threadgroup_barrier(mem_flags::mem_device); y[i] = z;",
        R,
    ),
    "thread arrays": ("float a[4]; for (int k = 0; k < 4; ++k) a[k] = x[i]; y[i] = a[i & 3u];", X),
    "helper with a threadgroup pointer": (
        f"threadgroup float s[64]; put(s, i, x[i]); {BARRIER} y[i] = s[i];",
        X,
    ),
}
HELPER = "inline void put(threadgroup float* p, uint i, float v) { p[i] = v; }\n"


@pytest.mark.parametrize("control", CONTROLS)
def test_no_false_alarm(control):
    body, expected = CONTROLS[control]
    for order in ORDERS:
        got = run(launch(body, header=HELPER), {"x": X}, order=order)["y"]
        if expected is not None:
            np.testing.assert_array_equal(got, expected)


def test_no_false_alarm_over_many_threadgroups():
    x = np.arange(1024, dtype=np.float32)
    body = (
        f"threadgroup float s[64]; const uint k = thread_index_in_threadgroup; s[k] = x[i]; {BARRIER} "
        "y[i] = s[last - k];"
    )
    for order in ORDERS:
        got = run(launch(body, **groups_of(64, 16), output_shapes=((1024,),)), {"x": x}, order=order)["y"]
        np.testing.assert_array_equal(got.reshape(16, 64), x.reshape(16, 64)[:, ::-1])


def test_threadgroup_memory_does_not_outlive_its_threadgroup():
    body = f"threadgroup float s[64]; if (group_of == 0u) s[i & 63u] = x[i]; {BARRIER} y[i] = s[i & 63u];"
    body = "const uint group_of = threadgroup_position_in_grid.x;" + body
    for order in ORDERS:
        with pytest.raises(KernelError, match="before anything was written"):
            run(
                launch(body, **groups_of(64, 2), output_shapes=((128,),)),
                {"x": np.ones(128, np.float32)},
                order=order,
            )


SIMD = {
    "simd_sum(x[i])": lambda v: np.full(32, v.sum()),
    "simd_max(x[i])": lambda v: np.full(32, v.max()),
    "simd_min(x[i])": lambda v: np.full(32, v.min()),
    "simd_prefix_inclusive_sum(x[i])": np.cumsum,
    "simd_prefix_exclusive_sum(x[i])": lambda v: np.cumsum(v) - v,
    "simd_shuffle_up(x[i], 3)": lambda v: np.concatenate([v[:3], v[:-3]]),
    "simd_shuffle_down(x[i], 5)": lambda v: np.concatenate([v[5:], v[-5:]]),
    "simd_shuffle_xor(x[i], 6)": lambda v: v[np.arange(32) ^ 6],
    "simd_shuffle(x[i], ushort(31u - lane))": lambda v: v[::-1],
    "simd_broadcast(x[i], 9)": lambda v: np.full(32, v[9]),
    "float(simd_any(x[i] == 3.0f))": lambda v: np.full(32, (v == 3).any()),
    "float(simd_all(x[i] < 32.0f))": lambda v: np.full(32, (v < 32).all()),
    "float(simd_or(1 << (int(x[i]) & 7)))": lambda v: np.full(32, 255),
}


@pytest.mark.parametrize("expression", SIMD)
def test_simd_operations(expression):
    want = np.concatenate([SIMD[expression](half) for half in np.split(X, 2)])
    for order in ORDERS:
        # twice: a fast lane must not overwrite what a slow one has yet to read
        body = f"float first = {expression}; y[i] = {expression}; if (first != y[i]) y[i] = -1.0f;"
        np.testing.assert_array_equal(run(launch(body), {"x": X}, order=order)["y"], want)


def test_attributes_and_threadgroups_in_three_dimensions():
    body = """
  const uint3 p = thread_position_in_grid;
  const uint3 n = threads_per_grid;
  y[(p.z * n.y + p.y) * n.x + p.x] =
      float(p.x + 10u * p.y + 100u * p.z) + x[0] * float(simdgroups_per_threadgroup);
"""
    sample = Sample(body, grid=(4, 6, 2), threadgroup=(2, 3, 2), output_shapes=((2, 6, 4),))
    z, y, x = np.indices((2, 6, 4))
    for order in ORDERS:
        got = run(sample, {"x": np.ones(1, np.float32)}, order=order)["y"]
        np.testing.assert_array_equal(got, x + 10 * y + 100 * z + 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_round_to_even(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=1000), [0.0, 1 + 2**-8, 1 + 2**-9, 1 + 3 * 2**-9, 1e-42, 7e4, 3.4e38]]
    )
    x = np.concatenate([x, [np.inf, -np.inf, np.nan]]).astype(np.float32)
    n = len(x)
    sample = launch(
        "y[i] = T(x[i]);",
        template=(("T", getattr(mx, dtype)),),
        output_dtypes=(getattr(mx, dtype),),
        output_shapes=((n,),),
        **groups_of(1, n),
    )
    got = mx.array(run(sample, {"x": x})["y"])
    got = np.array((got.view(mx.bfloat16) if dtype == "bfloat16" else got).astype(mx.float32))
    np.testing.assert_array_equal(got, np.array(mx.array(x).astype(getattr(mx, dtype)).astype(mx.float32)))


def test_math_modes():
    x = np.linspace(-100, 100, 1001).astype(np.float32)
    sample = launch("y[i] = tanh(x[i]);", output_shapes=((1001,),), **groups_of(1, 1001))
    exact, loose, fast = (run(sample, {"x": x}, math=m)["y"] for m in ("ieee", "metal", "fast"))
    np.testing.assert_allclose(exact, np.tanh(x), rtol=2e-7)
    assert 0 < np.max(np.abs(loose - exact)[np.abs(x) < 5]) < 1e-6
    assert np.isnan(fast).any()  # as Metal's fast tanh may be: the kernels must not use it
