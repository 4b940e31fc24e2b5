"""The CPU backend: its numbers, on every cell, dtype and number of threads."""

import ctypes
import platform
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import PararnnError, get_cell, load_model, register_cell
from mlx_pararnn.cells.activations import ACTIVATIONS, Functions
from mlx_pararnn.compute import cpu, cpu_build, cpu_token, layer_ops, texts
from mlx_pararnn.compute.choice import evaluation
from mlx_pararnn.compute.recurrence import recurrence
from tests.support.fresh_cache import fresh_cache
from tests.support.golden import allowed, cell_cases, read
from tests.support.msl.instances import DTYPES
from tests.support.msl.problem import Problem, assert_close
from tests.support.problems import loss_of, problem

CELLS = ("gru", "lstm", "slstm", "nlru")

pytestmark = pytest.mark.usefixtures("cpu_backend")


def close(given, exact, single, dtype="float32"):
    """Equal, where the case's own gap is float32's: `single` is the oracle in float32."""
    gap = 4 * np.abs(single - exact).max()
    assert_close(given, exact, dtype, tolerance=max(2e-6, gap))


class OnHost(Problem):
    def solve(self, every=0):
        u = mx.array(np.ascontiguousarray(self.u.swapaxes(0, 1)))
        if self.dtype == "bfloat16":
            u = u.view(mx.bfloat16)
        mask = mx.array(self.mask) if self.masked else None
        arrays = mx.array(self.params), u.swapaxes(0, 1), mx.array(self.initial)
        out = recurrence(self.cell, *arrays, mask=mask, return_states=every, backend="cpu")
        assert out[0].dtype == DTYPES[self.dtype]
        return [np.array(a.astype(mx.float32)) for a in out]


SHOWN = {"gru": ("float32", False), "lstm": ("float16", True)}  # others build libraries of their own


@pytest.mark.sampled(
    "large", by=lambda name, dtype, masked: [name] if (dtype, masked) == SHOWN.get(name) else []
)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_numbers(name, dtype, masked):
    for T, D, B, heads in (
        (1, 1, 1, 1),
        (33, 9, 3, 3),
        (70, 40, 2, 2),
        (129, 256, 3, 1),
        (150, 211, 2, 1),
        (1000, 83, 1, 1),
    ):
        p = OnHost(name, T, D, B, heads, dtype, state=True, masked=masked)
        exact, states = p.oracle()
        single, single_states = p.oracle(np.float32)
        hidden, last, every = p.solve(every=7)
        close(hidden, exact, single, dtype)
        close(last, states[:, -1], single_states[:, -1])
        if T >= 7:
            close(every, states[:, 6::7], single_states[:, 6::7])


@pytest.mark.sampled("large", by=lambda case: [case["kind"]])
@pytest.mark.parametrize("case", cell_cases(), ids=lambda c: c["name"])
def test_golden_cells(case):
    """Every activation, against PyTorch's own numbers."""
    cell, params, u, golden = read(case)
    hidden, _ = recurrence(cell, params, u, backend="cpu")
    assert np.all(np.abs(np.array(hidden) - golden["y_seq"]) <= allowed(golden))


@pytest.mark.sampled("large", by=lambda activation: [activation in ("tanh", "gelu")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_all_sizes(activation):
    """z = 1 (its input is large), so hidden is the activation of the input itself."""
    x = np.concatenate([np.linspace(-12, 12, 997), np.logspace(-8, 1.9, 101), -np.logspace(-8, 1.9, 101)])
    x = np.append(x, [0.0, 100.0, -100.0, 1e30, -1e30]).astype(np.float32)
    u = np.stack([np.full_like(x, 1e4), np.zeros_like(x), x])[None, None, None]
    cell = get_cell("gru", {"state": activation})
    params = mx.zeros((3, x.size))
    with np.errstate(over="ignore", invalid="ignore"):
        given = np.array(recurrence(cell, params, mx.array(u), backend="cpu")[0])[0, 0]
        wanted = getattr(Functions(np), activation)(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-7)


def test_what_is_not_finite_stays_in_its_channel():
    cell, params, u, _ = problem("lstm", T=20, D=40, B=1)
    clean = np.array(recurrence(cell, mx.array(params), mx.array(u), backend="cpu")[0])
    u[0, 0, 5, :, 3], u[0, 0, 7, 0, 18] = np.nan, np.inf
    hidden = np.array(recurrence(cell, mx.array(params), mx.array(u), backend="cpu")[0])
    assert np.isnan(hidden[0, 5:, 3]).all()
    others = np.delete(np.arange(40), [3, 18])
    np.testing.assert_array_equal(hidden[..., others], clean[..., others])


@pytest.mark.sampled("large", by=lambda name: [name] if name in ("gru", "lstm") else [])
@pytest.mark.parametrize("name", CELLS)
def test_rounding_depends_on_neither_batch_nor_length(name):
    """A row alone, a row in a batch, a prompt in pieces: the same bits."""
    cell, params, u, state = problem(name, T=150, D=211, B=3, heads=1, state=True)
    params, u, state = mx.array(params), mx.array(u), mx.array(state)
    hidden, last = recurrence(cell, params, u, state, backend="cpu")
    alone, last_alone = recurrence(cell, params, u[1:2], state[1:2], backend="cpu")
    assert mx.array_equal(alone, hidden[1:2])
    assert mx.array_equal(last_alone, last[1:2])
    first, between = recurrence(cell, params, u[:, :, :17], state, backend="cpu")
    second, end = recurrence(cell, params, u[:, :, 17:], between, backend="cpu")
    assert mx.array_equal(mx.concatenate([first, second], axis=1), hidden)
    assert mx.array_equal(end, last)


def test_many_threads(monkeypatch):
    cell, params, u, _ = problem("gru", T=300, D=1030, B=2)
    params, u = mx.array(params), mx.array(u)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = recurrence(cell, params, u, backend="cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    several = recurrence(cell, params, u, backend="cpu")
    assert all(mx.array_equal(a, b) for a, b in zip(one, several, strict=True))


def alone_and_in_pairs(name, monkeypatch, dtype=mx.float32):
    """The same problem on one thread, groups of channels in pairs, and on so many that each goes alone."""
    cell, params, u, state = problem(name, T=60, D=300, B=1, state=True)
    arrays = mx.array(params), mx.array(u).astype(dtype), mx.array(state)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pairs = recurrence(cell, *arrays, backend="cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    return zip(pairs, recurrence(cell, *arrays, backend="cpu"), strict=True)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CELLS)
def test_rounding_does_not_depend_on_threads(name, dtype, monkeypatch):
    assert all(mx.array_equal(a, b) for a, b in alone_and_in_pairs(name, monkeypatch, DTYPES[dtype]))


@pytest.mark.toolchain
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_a_prompt_gives_work_to_every_core(lanes, monkeypatch, tmp_path):
    """Counted, for any machine: the pieces that the channels of one sequence are done in."""
    flags = ["-std=c++17", "-O0", f"-DLANES={lanes}", "-shared", "-fPIC", "-pthread"]
    monkeypatch.setattr(cpu_build, "_flags", lambda: flags)
    begin, text = "  in_parallel(pieces, ", texts.cpu_recurrence_text

    def counting(cell):
        assert text(cell).count(begin) == 1
        counter = "#include <cstdint>\nint64_t counted = 0;\n"
        return counter + text(cell).replace(begin, f"  counted = pieces;\n{begin}")

    monkeypatch.setattr(cpu, "cpu_recurrence_text", counting)
    with fresh_cache(monkeypatch, tmp_path):
        counted = ctypes.c_int64.in_dll(cpu.load(get_cell("nlru"), "float32"), "counted")
        for D, B in ((1024, 1), (1030, 1), (1024, 3), (512, 1)):
            cell, params, u, _ = problem("nlru", T=40, D=D, B=B)
            for threads in (1, 2, 8, 9, 12, 16):
                monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
                recurrence(cell, mx.array(params), mx.array(u), backend="cpu")
                groups = -(-D // (4 * lanes)) * B  # none of them is cut
                assert min(groups, threads) <= counted.value <= 2 * threads


def test_views_are_read_where_they_lie():
    cell, params, u, _ = problem("gru", T=12, D=24, B=2, heads=2)
    wanted = recurrence(cell, mx.array(params), mx.array(u), backend="cpu")[0]
    backwards = mx.array(np.ascontiguousarray(u[..., ::-1]))[..., ::-1]  # the channels' stride is not 1
    wide = mx.array(np.pad(u, [(0, 0)] * 4 + [(0, 5)]))[..., :12]
    for view in (backwards, wide):
        assert mx.array_equal(recurrence(cell, mx.array(params), view, backend="cpu")[0], wanted)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_a_long_array_to_write_into_begins_with_a_line_of_the_cache(dtype):
    assert cpu.room((17_000, 65_536), dtype).shape == (
        17_000,
        65_536,
    )  # 2 GB and more, of which nothing is touched
    for shape in ((7, 401, 257), (1 << 20,)):
        room = cpu.room(shape, dtype)
        mx.eval(room)
        assert cpu.address(room) % 64 == 0
        assert (room.shape, room.dtype, cpu.view(room).flags.c_contiguous) == (shape, dtype, True)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_gradients(name):
    cell, params, u, state = problem(name, T=60, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    wanted = mx.grad(loss_of(cell, {"backend": "ops"}), argnums=(0, 1, 2))(*arrays)
    given = mx.grad(loss_of(cell, {"backend": "cpu"}), argnums=(0, 1, 2))(*arrays)
    for a, b in zip(given, wanted, strict=True):
        assert mx.abs(a).max().item() > 0
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_forward_and_second_derivatives(name):
    cell, params, u, state = problem(name, T=20, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    rng = np.random.default_rng(0)
    mask = mx.array(rng.random((u.shape[0], 20)) < 0.7)
    directions = [mx.array(rng.normal(size=a.shape).astype(np.float32)) for a in arrays]

    def derivatives(backend):
        def solve(*arrays):
            return [*recurrence(cell, *arrays, mask=mask, return_states=3, backend=backend)]

        def slope(*arrays):
            gradients = mx.grad(lambda *a: sum((x**3).sum() for x in solve(*a)), argnums=(0, 1, 2))(*arrays)
            return sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

        along_u = mx.jvp(lambda u: solve(arrays[0], u, arrays[2]), [arrays[1]], [directions[1]])[1]
        return [
            *mx.jvp(solve, arrays, directions)[1],
            *along_u,
            *mx.grad(slope, argnums=(0, 1, 2))(*arrays),
        ]

    for given, wanted in zip(derivatives("cpu"), derivatives("ops"), strict=True):
        assert mx.abs(wanted).max().item() > 0
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.compiled
def test_inside_a_transformation_ops_take_over():
    cell, params, u, _ = problem("gru", T=20)
    params, u = mx.array(params), mx.array(u)
    compiled = mx.compile(lambda p, u: recurrence(cell, p, u)[0])(params, u)
    np.testing.assert_allclose(np.array(compiled), np.array(recurrence(cell, params, u)[0]), atol=2e-6)
    with pytest.raises(PararnnError, match=r"not inside mx\.compile"):
        mx.compile(lambda p, u: recurrence(cell, p, u, backend="cpu")[0])(params, u)
    with pytest.raises(PararnnError, match="straight through time"):
        recurrence(cell, params, u, backend="cpu", method="newton")


@pytest.fixture
def however_small(monkeypatch):
    """The CPU backend takes the elementwise work of small arrays too."""
    monkeypatch.setattr(cpu, "_LARGE", 0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 37), (3, 40, 64), (1, 33, 1030)])
def test_elementwise(dtype, shape, however_small):
    B, T, D = shape
    rng = np.random.default_rng(0)
    both = mx.array(rng.normal(size=(B, T, 2 * D))).astype(dtype)
    x, gate = mx.split(both, 2, axis=-1)  # as the input projection leaves them
    weight = mx.array(rng.normal(size=D)).astype(dtype)
    exact = {
        n: np.array(a.astype(mx.float32), np.float64) for n, a in {"x": x, "g": gate, "w": weight}.items()
    }
    silu = exact["g"] / (1 + np.exp(-exact["g"]))
    name = {v: k for k, v in DTYPES.items()}[dtype]

    given = layer_ops.swiglu(gate, x, backend="cpu")
    assert given.dtype == dtype
    assert_close(given.astype(mx.float32), silu * exact["x"], name)

    norm = exact["x"] / np.sqrt((exact["x"] ** 2).mean(-1, keepdims=True) + 1e-3) * exact["w"]
    given = layer_ops.rms_norm(x, weight, 1e-3, backend="cpu")
    assert given.dtype == dtype
    assert_close(given.astype(mx.float32), norm, name)
    given = layer_ops.gated_norm(x, gate, weight, 1e-3, backend="cpu")
    assert_close(given.astype(mx.float32), norm * silu, name)

    for K in (2, 4, 7):
        window = mx.array(rng.normal(size=(B, K - 1, D))).astype(dtype)
        taps = mx.array(rng.normal(size=(D, K))).astype(dtype)
        y, new = layer_ops.conv_silu(x, window, taps, weight, backend="cpu")
        inputs = np.concatenate([np.array(window.astype(mx.float32), np.float64), exact["x"]], axis=1)
        k = np.array(taps.astype(mx.float32), np.float64)
        z = exact["w"] + sum(k[:, i] * inputs[:, i : i + T] for i in range(K))
        assert_close(y.astype(mx.float32), z / (1 + np.exp(-z)), name)
        np.testing.assert_array_equal(np.array(new.astype(mx.float32)), inputs[:, T:].astype(np.float32))


@pytest.mark.compiled
@pytest.mark.large
def test_elementwise_work_has_gradients_and_compiles(however_small):
    rng = np.random.default_rng(0)
    x, gate, window, taps, weight = (
        mx.array(rng.normal(size=shape).astype(np.float32))
        for shape in ((2, 9, 20), (2, 9, 20), (2, 3, 20), (20, 4), (20,))
    )

    def loss(asked):
        def of(x, gate, window, taps, weight):
            backend = asked if evaluation([x, gate, window, taps, weight]) else "ops"  # as choose() says
            y, new = layer_ops.conv_silu(x, window, taps, weight, backend=backend)
            y = layer_ops.rms_norm(y, weight, 1e-6, backend=backend)
            y = layer_ops.gated_norm(y, gate, weight, 1e-6, backend=backend)
            return (layer_ops.swiglu(y, x, backend=backend) ** 2).sum() + (new**2).sum()

        return mx.grad(of, argnums=(0, 1, 2, 3, 4))

    arrays = x, gate, window, taps, weight
    wanted = loss("ops")(*arrays)
    for given in (loss("cpu")(*arrays), mx.compile(loss("cpu"))(*arrays)):
        for a, b in zip(given, wanted, strict=True):
            assert mx.abs(a).max().item() > 0
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


@pytest.mark.large
def test_elementwise_work_has_forward_and_second_derivatives(however_small):
    rng = np.random.default_rng(0)
    x, gate, window, along = (mx.array(rng.normal(size=(2, T, 20)).astype(np.float32)) for T in (9, 9, 3, 9))
    taps, weight = mx.ones((20, 4)), mx.arange(20) / 10

    def derivatives(backend):
        def of(x):
            y, new = layer_ops.conv_silu(x, window, taps, weight, backend=backend)
            y = layer_ops.rms_norm(y, weight, 1e-6, backend=backend)
            y = layer_ops.gated_norm(y, gate, weight, 1e-6, backend=backend)
            return (layer_ops.swiglu(y, x, backend=backend) ** 2).sum() + (new**2).sum()

        return mx.jvp(of, [x], [along])[1][0], mx.grad(lambda x: (mx.grad(of)(x) * along).sum())(x)

    for given, wanted in zip(derivatives("cpu"), derivatives("ops"), strict=True):
        assert mx.abs(wanted).max().item() > 0
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_equally_far_apart(however_small):
    gate = mx.array(np.random.default_rng(0).normal(size=(2, 1, 3, 16)).astype(np.float32))
    repeated = mx.broadcast_to(gate[0, 0], gate.shape)  # stride 0 in front of an axis of length 1
    for up in (repeated, gate[:, :, ::-1], mx.concatenate([gate, gate], axis=2)[:, :, :3]):
        given = layer_ops.swiglu(gate, up, backend="cpu")
        assert mx.allclose(given, layer_ops.swiglu(gate, up), atol=1e-6)


def test_dtypes_that_differ_are_left_to_ops(however_small):
    hidden, weight = mx.ones((2, 3, 8), mx.bfloat16), mx.ones(8)
    given = layer_ops.gated_norm(hidden, hidden, weight, 1e-6, backend="cpu")
    assert given.dtype == layer_ops.gated_norm(hidden, hidden, weight, 1e-6).dtype


WIDEN_AND_NARROW = """
extern "C" void widen(const pararnn::Float16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) pararnn::store(to + i, pararnn::load(from + i, LANES), LANES);
}
extern "C" void narrow(const float* from, pararnn::Float16* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) pararnn::store(to + i, pararnn::load(from + i, LANES), LANES);
}
"""


def test_every_half(monkeypatch, tmp_path):
    """NumPy's conversions: all halves, and floats at, between and beside them."""
    with fresh_cache(monkeypatch, tmp_path):
        library = cpu_build.build(texts.metal_text("cpu.h") + WIDEN_AND_NARROW, "halves")

    def converted(function, numbers, dtype):
        to = np.empty(numbers.shape, dtype)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (numbers, to))
        getattr(library, function)(*pointers, ctypes.c_int64(numbers.size))
        return to

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    floats = converted("widen", halves, np.float32)
    np.testing.assert_array_equal(floats, halves.astype(np.float32))
    assert (np.signbit(floats) == np.signbit(halves)).all()
    with np.errstate(over="ignore", invalid="ignore"):
        middles = (floats + np.roll(floats, 1)) / 2
        numbers = np.concatenate([np.nextafter(middles, np.float32(x)) for x in (-np.inf, 0, np.inf)])
        numbers = np.concatenate([floats, middles, numbers, np.geomspace(1e-45, 3e38, 1 << 16)])
        numbers = numbers.astype(np.float32)
        wanted = numbers.astype(np.float16)
    given = converted("narrow", numbers, np.float16)
    np.testing.assert_array_equal(given, wanted)
    assert (np.signbit(given) == np.signbit(wanted)).all()


NO_THREADS = """
#include <cerrno>
extern "C" int pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) noexcept {
  return EAGAIN;
}
int main() {
  std::atomic<int> done{0};
  pararnn::in_parallel(100, 4, [&](int64_t) { ++done; });
  return done == 100 ? 0 : 1;
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="puts a function in place of Linux's own")
def test_where_no_more_threads_are_to_be_had(tmp_path):
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(texts.metal_text("cpu.h") + NO_THREADS)
    subprocess.run([cpu_build.compiler(), "-std=c++17", "-pthread", source, "-o", program], check=True)
    subprocess.run([program], check=True)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("source", ["trained/paragru/final.pt", "lm/paralstm_s96/state_dict.pt"])
def test_a_models_logits(source, converted, however_small):
    """All of the CPU backend in a model: the same as plain ops, prompt and tokens."""
    model, _ = load_model(converted(source))
    tokens = mx.array(np.random.default_rng(0).integers(0, model.args.vocab_size, (2, 70)))
    wanted = model(tokens, backend="ops")
    assert mx.allclose(model(tokens), wanted, atol=5e-5, rtol=0)
    cache = model.make_cache(2)
    pieces = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 2), (2, 40), (40, 41), (41, 70))]
    assert mx.allclose(mx.concatenate(pieces, axis=1), wanted, atol=5e-5, rtol=0)


@pytest.mark.toolchain
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", [["-march=x86-64"], ["-march=x86-64-v3"]], ids=["4 lanes", "8 lanes"])
@pytest.mark.parametrize("name", CELLS)
def test_other_vector_units(name, flags, monkeypatch, tmp_path):
    """Four lanes are what arm64 has; here they run on x86-64's oldest unit."""
    if flags[0] == "-march=x86-64-v3" and "avx2" not in cpu_build._machine():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(
        cpu_build, "_flags", lambda: ["-std=c++17", "-O1", *flags, "-shared", "-fPIC", "-pthread"]
    )
    with fresh_cache(monkeypatch, tmp_path):
        p = OnHost(name, 65, 41, 2, 1, "float32", state=True)
        close(p.solve()[0], p.oracle()[0], p.oracle(np.float32)[0])


@pytest.mark.toolchain
@pytest.mark.parametrize("cxx", ["g++", "clang++", "clang++-19"])
def test_compilers(cxx, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", cxx)
    cpu_build.compiler.cache_clear()
    found = cpu_build.compiler()
    cpu_build.compiler.cache_clear()
    if not found.endswith(cxx):
        pytest.skip(f"no {cxx}")
    with fresh_cache(monkeypatch, tmp_path):
        for dtype in DTYPES:
            p = OnHost("lstm", 33, 41, 2, 1, dtype, state=True)
            close(p.solve()[0], p.oracle()[0], p.oracle(np.float32)[0], dtype)
        assert all(mx.array_equal(a, b) for a, b in alone_and_in_pairs("lstm", monkeypatch))


def test_a_cell_without_msl_runs_in_ops():
    @register_cell
    class Leaky(type(get_cell("nlru"))):
        name = "host_test_leaky"
        msl = None

    cell = get_cell("host_test_leaky")
    u = mx.ones((1, 1, 4, 2, 8))
    hidden, _ = recurrence(cell, mx.zeros((1, 8)), u)
    assert mx.allclose(hidden, recurrence(get_cell("nlru"), mx.zeros((1, 8)), u)[0], atol=1e-6)
    with pytest.raises(PararnnError, match="brings no MSL"):
        recurrence(cell, mx.zeros((1, 8)), u, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_of_many_arrays(dtype):
    whole = mx.arange(24).reshape(4, 6).astype(DTYPES[dtype])
    dense = [whole, whole[2:], whole[1:2, 3:], mx.contiguous(whole.T), mx.zeros((1, 3, 1)), mx.zeros(())]
    strided = [whole.T, whole[:, 1:], whole[::2], mx.broadcast_to(whole[:1], (4, 6))]
    mx.eval(dense, strided)
    library = cpu_token._library(get_cell("gru"), "float32")
    found = cpu.dense_addresses(library, [*dense, *strided])
    assert found == [cpu.address(array) for array in dense] + [None] * len(strided)
    with pytest.raises(TypeError, match="bytes-like"):
        cpu.dense_addresses(library, [whole, object()])
