"""The recurrence's gradient, in ops and on the CPU backend: its numbers, and where each may run."""

import os
import shutil
import subprocess
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Cell, get_cell, register_cell
from mlx_pararnn.compute import adjoint, cpu, cpu_adjoint, cpu_build, texts
from mlx_pararnn.compute.recurrence import recurrence
from tests.support import oracle
from tests.support.broken_text import broken, built_with
from tests.support.fresh_cache import fresh_cache
from tests.support.golden import DATA
from tests.support.gradients import Slopes, masks
from tests.support.msl.instances import DTYPES
from tests.support.problems import loss_of, problem

CELLS = ("gru", "lstm", "slstm", "nlru")
# T, D, B, heads, every: one step; a tile and its neighbours; T prime; D no multiple of any vector
SHAPES = [
    (1, 1, 1, 1, 0),
    (2, 6, 2, 3, 1),
    (63, 9, 2, 3, 7),
    (64, 40, 1, 2, 0),
    (65, 67, 1, 1, 64),
    (131, 130, 2, 2, 5),
    (192, 17, 3, 1, 64),
]

pytestmark = pytest.mark.usefixtures("cpu_backend")


def shown(name, shape, backend):
    """Each shape by one cell; of the others, which each cost a library, the one with the most slots."""
    if name == "slstm":
        return [name] if (shape[0], backend) == (63, "cpu") else []
    return [shape, backend] if name == "gru" else []


@pytest.mark.sampled("large", by=shown)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "ops"])
def test_against_the_oracle(name, shape, backend):
    T, D, B, heads, every = shape
    p = Slopes(name, T, D, B, heads, every=every)
    p.check(p.differentiated(backend))
    p.check(p.called(backend))


@pytest.mark.sampled("large")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kind", masks(1, 3))
@pytest.mark.parametrize("backend", ["cpu", "ops"])
def test_padding(name, kind, backend):
    p = Slopes(name, 131, 37, 2, mask=masks(2, 131)[kind], every=9)
    p.check(p.differentiated(backend))


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(name, dtype):
    p = Slopes(name, 70, 41, 2, dtype=dtype)
    p.check(p.differentiated("cpu"))


@pytest.mark.sampled("large")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("tile", [1, 4, 7])
def test_other_tiles(name, tile):
    for T in (1, tile, tile + 1, 3 * tile - 1, 3 * tile):
        p = Slopes(name, T, 5, 2, every=2)
        params, u, state, mask = p.arrays()
        arrays = params, u, state, mask, mx.array(p.boundaries(tile)), *p.slopes()
        p.check(p.laid_out(cpu_adjoint.solve(p.cell, *arrays, 2, tile)))


@pytest.mark.parametrize("name", CELLS)
def test_the_oracle_by_finite_differences(name):
    p = Slopes(name, 12, 3, 2, every=5, mask=masks(2, 12)["left"])

    def loss(params, u, state):
        states = np.stack(oracle.sequential(p.cell, params, u, state, p.mask), axis=2)
        hidden = np.where(p.mask[..., None], states[:, :, p.cell.output_slot], 0)
        total = (hidden * p.d_hidden).sum() + (states[:, -1] * p.d_last).sum()
        return total + (states[:, 4::5] * p.d_states).sum()

    base = [a.astype(np.float64) for a in (p.params, p.exact_u, p.initial)]
    for which, gradient in enumerate(p.exact()):
        for index in np.ndindex(gradient.shape):
            sides = []
            for sign in (1, -1):
                moved = [a.copy() for a in base]
                moved[which][index] += sign * 1e-6
                sides.append(loss(*moved))
            difference = (sides[0] - sides[1]) / 2e-6
            assert gradient[index] == pytest.approx(difference, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backend", ["cpu", "ops"])
def test_golden(name, backend):
    """What pararnn-torch's autograd gave in float64 (tests/support/record_gradients.py)."""
    recorded = mx.load(str(DATA / "gradients.safetensors"))
    params, u, slope, hidden, d_u, d_params = (
        recorded[f"{name}.{key}"] for key in ("params", "u", "slope", "hidden", "d_u", "d_params")
    )

    def solve(params, u):
        return [recurrence(get_cell(name), params, u[:, None], backend=backend)[0]]

    (given,), gradients = mx.vjp(solve, [params, u], [slope])
    np.testing.assert_allclose(np.array(given), np.array(hidden), atol=3e-6)
    for a, b in zip(gradients, (d_params, d_u), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-5, atol=5e-6)


def test_neither_threads_nor_rows_change_a_bit(monkeypatch):
    """A sequence alone and in a batch; weights' gradients are the sequences' own, added in their order."""
    monkeypatch.setattr(cpu, "_LARGE", 0)
    p = Slopes("gru", 150, 211, 3)
    params, u, state, _ = p.arrays()
    given = mx.array(p.boundaries(64)), *p.slopes()

    def solve(rows, threads):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        arrays = params, *(a[rows] for a in (u, state)), None, *(a[rows] for a in given)
        return cpu_adjoint.solve(p.cell, *arrays, None, 0, 64)

    whole = solve(slice(None), 1)
    for threads in (2, 3, 7):
        again = solve(slice(None), threads)
        assert all(mx.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    total = mx.zeros(params.shape)
    for row in range(3):
        d_params, d_u, d_state = solve(slice(row, row + 1), 2)
        assert mx.array_equal(d_u[0], whole[1][row])
        assert mx.array_equal(d_state[0], whole[2][row])
        total = total + d_params
    assert mx.array_equal(total, whole[0])


def test_the_gradient_lies_as_its_input_does():
    p = Slopes("gru", 20, 24, 2, heads=3)
    params, u, state, _ = p.arrays()
    arrays = params, u, state, None, mx.zeros((2, 0, 1, 24)), *p.slopes()
    d_u = cpu_adjoint.solve(p.cell, *arrays, None, 0, 64)[1]
    assert cpu.view(d_u).strides == cpu.view(u).strides
    p.check(p.laid_out(cpu_adjoint.solve(p.cell, *arrays, None, 0, 64)))
    wide = mx.concatenate([u, u], axis=-1)[..., :8]
    sparse = mx.repeat(u, 2, axis=-1)[..., ::2]
    for view in (wide, sparse, mx.contiguous(u)):
        p.check(p.laid_out(cpu_adjoint.solve(p.cell, params, view, *arrays[2:], None, 0, 64)))


@pytest.fixture
def launches(monkeypatch):
    """How often the CPU's adjoint was called."""
    made = []
    solve = cpu_adjoint.solve
    monkeypatch.setattr(cpu_adjoint, "solve", lambda cell, *a: made.append(cell.name) or solve(cell, *a))
    return made


@pytest.mark.large
@pytest.mark.compiled
def test_where_it_runs_and_where_ops_do(launches):
    """Wherever MLX allows evaluation it is the kernel, else ops; every input has its gradient."""
    cell, params, u, state = problem("gru", T=140, D=20, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    loss, every = loss_of(cell, {}), (0, 1, 2)
    wanted = mx.grad(loss_of(cell, {"backend": "ops"}), argnums=every)(*arrays)
    recurrence(cell, *arrays)
    adjoint._agrees(cell, "cpu", cpu_adjoint.solve)
    launches.clear()

    def after_a_checkpoint(*arrays):
        return mx.checkpoint(loss)(*arrays)

    def in_the_middle(params, u, state):
        return loss(params * 1, mx.tanh(u) + (u - mx.tanh(u)), state + 0)

    eager = {
        "grad": mx.grad(loss, argnums=every),
        "value_and_grad": lambda *a: mx.value_and_grad(loss, argnums=every)(*a)[1],
        "one at a time": lambda *a: [mx.grad(loss, argnums=k)(*a) for k in every],
        "checkpoint": mx.grad(after_a_checkpoint, argnums=every),
        "inside a graph": mx.grad(in_the_middle, argnums=every),
        "grad of compile": mx.grad(mx.compile(loss), argnums=every),
        "vjp": lambda *a: mx.vjp(loss, [*a], [mx.array(1.0)])[1],
    }
    deferred = {
        "compile": mx.compile(mx.grad(loss, argnums=every)),
        "vmap": lambda *a: [
            g[0] for g in mx.vmap(mx.grad(loss, argnums=every))(*(mx.stack([x, x]) for x in a))
        ],
    }
    for name, function in (eager | deferred).items():
        given = function(*arrays)
        assert bool(launches) == (name in eager), name
        for a, b in zip(given, wanted, strict=True):
            assert mx.abs(b).min().item() > 0
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=2e-5, err_msg=name)
        launches.clear()


def test_slopes_that_are_mapped(launches):
    """mx.vmap over the slopes of one run: the states are known, the slopes are not."""
    cell, params, u, _ = problem("gru", T=70, D=6, B=1)
    arrays = [mx.array(params), mx.array(u)]
    slopes = mx.random.normal((3, 1, 70, 6))

    def pulled(slope):
        return mx.vjp(lambda *a: [recurrence(cell, *a)[0]], arrays, [slope])[1]

    mapped = mx.vmap(pulled)(slopes)
    for k in range(3):
        for a, b in zip(mapped, pulled(slopes[k]), strict=True):
            np.testing.assert_allclose(np.array(a[k]), np.array(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [0, 3, 64])
def test_second_derivatives(every):
    """Second derivatives, through two boundaries of tiles."""
    cell, params, u, state = problem("lstm", T=140, D=4, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    rng = np.random.default_rng(0)
    directions = [mx.array(rng.normal(size=a.shape).astype(np.float32)) for a in arrays]

    def derivatives(backend):
        gradient = mx.grad(loss_of(cell, {"backend": backend}, return_states=every), argnums=(0, 1, 2))

        def slope(*arrays):
            return sum((g * d).sum() for g, d in zip(gradient(*arrays), directions, strict=True))

        return mx.grad(slope, argnums=(0, 1, 2))(*arrays)

    for given, wanted in zip(derivatives("cpu"), derivatives("ops"), strict=True):
        assert mx.abs(wanted).max().item() > 0
        scale = mx.abs(wanted).max().item()
        np.testing.assert_allclose(np.array(given) / scale, np.array(wanted) / scale, atol=2e-5)


def test_states_are_kept_at_boundaries_alone(monkeypatch):
    """Under mx.grad the forward keeps every 64th state, without it none, and it is not run again."""
    kept = []
    solve = cpu.solve
    monkeypatch.setattr(cpu, "solve", lambda *a: kept.append(a[-1]) or solve(*a))
    cell, params, u, _ = problem("gru", T=140, D=20)
    arrays = mx.array(params), mx.array(u)
    recurrence(cell, *arrays)
    kept.clear()
    recurrence(cell, *arrays)
    assert kept == [0]
    mx.eval(mx.grad(lambda *a: recurrence(cell, *a)[0].sum(), argnums=(0, 1))(*arrays))
    assert kept == [0, 64]
    mx.eval(mx.grad(lambda *a: recurrence(cell, *a, return_states=9)[2].sum(), argnums=(0, 1))(*arrays))
    assert kept == [0, 64, 9, 64]


def test_what_is_not_finite_stays_in_its_channel_and_padding_reaches_nothing():
    p = Slopes("lstm", 70, 40, 1)
    clean = p.differentiated("cpu")
    p.u[0, 0, 5, :, 3], p.u[0, 0, 67, 0, 18] = np.nan, np.inf
    d_params, d_u, d_state = p.differentiated("cpu")
    others = np.delete(np.arange(40), [3, 18])
    assert np.isnan(d_params[:, 3]).any()
    for given, wanted in zip((d_params, d_u, d_state), clean, strict=True):
        np.testing.assert_array_equal(given[..., others], wanted[..., others])
    p.mask = np.ones((1, 70), bool)
    p.mask[0, [5, 67]] = False
    gradients = p.differentiated("cpu")
    assert all(np.isfinite(g).all() for g in gradients)
    assert not gradients[1][0, [5, 67]].any()


def small_numbers(array):
    return array * np.float32(3e-38)


def test_the_smallest_numbers_are_elsewhere_what_they_were():
    """What the gradient computes below float32's smallest normal number is 0, nobody else's in its thread."""
    small = np.full(16, 2e-38, np.float32)
    p = Slopes("slstm", 70, 40, 1)
    p.differentiated("cpu")
    assert (small * np.float32(0.25)).all()
    if cpu_build.platform.machine() == "x86_64":
        p.low_d_hidden, p.d_last = small_numbers(p.low_d_hidden), small_numbers(p.d_last)
        numbers = np.abs(p.differentiated("cpu")[1])
        assert numbers.any()
        assert not ((numbers > 0) & (numbers < np.finfo(np.float32).tiny)).any()


OWN = """
namespace pararnn {
struct Bent {
  static float value(float x) { return choose(x > 0.0f, x, 0.5f * metal::precise::tanh(x)); }
  static float slope(float x, float y) { return choose(x > 0.0f, 1.0f, 0.5f - 2.0f * y * y); }
};
inline float softened(float x) { return x / (1.0f + metal::fabs(x)); }
struct Bending {
  enum { SLOTS = 2, GATES = 2, PARAMS = 2, OUTPUT = 1 };
  template <typename S>
  static void step(thread S* state, const thread float* u, const thread float* w) {
    const float speed = 0.5f / (1.0f + metal::precise::exp(-u[0])) + u[0] / 8.0f;
    const S next = apply<Bent>(w[0] * state[1] + softened(u[1]));
    state[0] = speed * next + (1.0f - speed) * state[0];
    state[1] = choose(u[1] >= -0.2f, w[1], -w[0]) * apply<Tanh>(state[0]);
  }
};
}
"""


@pytest.fixture
def bending():
    @register_cell
    class Bending(Cell):
        name = "bending"
        gates = ("speed", "x")
        slots = ("c", "h")
        output = "h"
        params = ("a", "b")
        msl = OWN

        def step(self, state, u, params, F):
            c, h = state
            speed = 0.5 * F.sigmoid(u["speed"]) + u["speed"] / 8
            x = u["x"]
            inner = params["a"] * h + x / (1 + F.where(x > 0, x, -x))
            bent = F.where(inner > 0, inner, 0.5 * F.tanh(inner))
            c = speed * bent + (1 - speed) * c
            return c, F.where(x >= -0.2, params["b"], -params["a"]) * F.tanh(c)

    return get_cell("bending")


@pytest.mark.large
def test_a_cell_of_ones_own(bending, launches, monkeypatch, tmp_path):
    """With an activation, a helper, divisions and comparisons of its own, of floats that are inputs."""
    p = Slopes("bending", 70, 21, 2, every=4)
    with fresh_cache(monkeypatch, tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients = p.differentiated("cpu")
    assert launches == ["bending"] * 2  # the trial, and this
    p.check(gradients)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("fault", ["text without derivative", "other numbers"])
def test_what_fails_means_ops_for_the_gradient_alone(fault, bending, monkeypatch, tmp_path):
    if fault == "other numbers":
        broken(monkeypatch, "cpu_adjoint.cpp", "sum[i][p] + d_w[p]", "sum[i][p] - d_w[p]")
        said = "gradient of 'bending', float32: it gives other numbers than plain MLX ops"
    else:
        one = "x / (1.0f + metal::fabs(x))", "x / (one + metal::fabs(x))"
        body = OWN.replace(*one).replace("softened(float x) {", "softened(float x) { const float one = 1.0f;")
        monkeypatch.setattr(type(bending), "msl", body)
        said = "rejects adjoint-bending"
    p = Slopes("bending", 70, 21, 2)
    with fresh_cache(monkeypatch, tmp_path):
        with pytest.warns(RuntimeWarning, match=said) as warned:
            gradients = [p.differentiated(None) for _ in range(2)]
        assert len(warned) == 1
        for given in gradients:
            p.check(given)
        built = [path.name.split("-")[0] for path in (tmp_path / "mlx-pararnn").iterdir()]
        assert "recurrence" in built


# In C++ alone: all shapes on one and on three threads, the same bits; what the compilers' sanitizers look at.
MAIN = """
#include <cstdio>
#include <cstdlib>
uint32_t state = 1;
float some() { return float((state = state * 1664525u + 1013904223u) >> 8) / float(1 << 23) - 1.0f; }
std::vector<float> many(int64_t count) {
  std::vector<float> x(count);
  for (auto& one : x) one = some();
  return x;
}
int main() {
  using namespace pararnn;
  const int64_t shapes[][6] = {{1, 1, 1, 1, 0, 4}, {2, 3, 13, 7, 5, 4}, {3, 1, 9, WIDTH + 3, 2, 3},
                               {1, 2, 8, WIDTH, 1, 8}};
  for (const auto& shape : shapes) {
    const int64_t B = shape[0], heads = shape[1], T = shape[2], W = shape[3];
    const int64_t every = shape[4], tile = shape[5];
    const int64_t D = heads * W, row = GATES * W;
    const auto u = many(B * T * GATES * D), params = many(PARAMS * D), initial = many(B * SLOTS * D);
    const auto boundaries = many(B * (T / tile) * SLOTS * D), d_hidden = many(B * T * D);
    const auto d_last = many(B * SLOTS * D), d_states = many(every ? B * (T / every) * SLOTS * D : 0);
    std::vector<uint8_t> mask(B * T);
    for (auto& one : mask) one = some() < 0.5f;
    std::vector<float> first;
    for (const int threads : {1, 3}) {
      std::vector<float> d_u(u.size()), d_params(params.size()), d_initial(initial.size());
      std::vector<float> sums(B * PARAMS * D);
      const Adjoint call{u.data(), params.data(), initial.data(), B > 1 ? mask.data() : nullptr,
                         boundaries.data(), d_hidden.data(), d_last.data(), every ? d_states.data() : nullptr,
                         d_u.data(), d_params.data(), d_initial.data(), sums.data(),
                         {T * row, B * T * row, row, W}, {T * row, B * T * row, row, W}, {T * D, D},
                         B, heads, T, W, every, tile, threads};
      pararnn_adjoint_float32(&call);
      std::vector<float> all(d_u);
      all.insert(all.end(), d_params.begin(), d_params.end());
      all.insert(all.end(), d_initial.begin(), d_initial.end());
      if (threads == 1) first = all;
      if (memcmp(first.data(), all.data(), 4 * all.size())) return 1;
      for (const float x : all) {
        if (!(x == x)) return 2;
      }
    }
  }
  return 0;
}
"""


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["gru", "slstm"])
@pytest.mark.parametrize("flag", ["-fsanitize=address,undefined", "-fsanitize=thread"])
def test_sanitizers(name, flag, tmp_path):
    program, source = tmp_path / "main", tmp_path / "main.cpp"
    source.write_text(texts.cpu_adjoint_text(get_cell(name)) + MAIN)
    command = [cpu_build.compiler(), "-std=c++17", "-O0", "-g0", flag, "-pthread", "-o", program, source]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"this compiler has no {flag}")
    # without randomized addresses: some kernels place them where the sanitizer keeps its own
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    variables = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*still, program], capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.toolchain
@pytest.mark.parametrize("flags", [["-march=x86-64"], ["-march=x86-64-v3"]], ids=["4 lanes", "8 lanes"])
@pytest.mark.parametrize("name", CELLS)
def test_other_vector_units(name, flags, monkeypatch, tmp_path):
    if cpu_build.platform.machine() != "x86_64" or (
        flags[0] == "-march=x86-64-v3" and "avx2" not in cpu_build._machine()
    ):
        pytest.skip("this CPU has no such vectors")
    built_with(["-O1", *flags], monkeypatch)
    with fresh_cache(monkeypatch, tmp_path):
        p = Slopes(name, 66, 41, 2, every=5)
        p.check(p.called("cpu"))
        p = Slopes(name, 66, 41, 2, dtype="float16")
        params = p.called("cpu")[0]
        p.low_d_hidden, p.d_last = p.low_d_hidden / np.float16(2**15), p.d_last / 2**15
        # float16's smallest numbers are read as they are, where float32 is computed without such
        np.testing.assert_allclose(p.called("cpu")[0] * 2**15, params, atol=1e-2 * np.abs(params).max())


@pytest.mark.toolchain
@pytest.mark.parametrize("cxx", ["g++", "clang++", "clang++-19"])
def test_compilers(cxx, monkeypatch, tmp_path):
    if not shutil.which(cxx):
        pytest.skip(f"no {cxx}")
    monkeypatch.setenv("CXX", cxx)
    with fresh_cache(monkeypatch, tmp_path):
        for dtype in DTYPES:
            p = Slopes("lstm", 66, 41, 2, dtype=dtype)
            p.check(p.called("cpu"))
    cpu_build.compiler.cache_clear()


CPP, TANGENTS, INPUTS, DUAL = "cpu_adjoint.cpp", "cpu_tangents.h", "dual_inputs.h", "dual.h"
MUTANTS = {
    "a boundary too late": ("lstm", CPP, "from / call.tile - 1)", "from / call.tile)"),
    "states not run on": ("gru", CPP, "state[k] = after[k].v;", "{}"),
    "states not run on, of a large cell": ("slstm", CPP, "Cell::step(state, u, w);", ""),
    "the state after the step": ("slstm", CPP, "kept[k] = state[k];\n", "{}\n"),
    "a number of the Jacobian": ("gru", CPP, "if (!after[k].d[i].zero) kept", "if (i > 0) kept"),
    "the Jacobian of nothing": ("gru", CPP, "after[k].d[i].v = kept[k * INPUTS + i];", "{}"),
    "padding steps": ("lstm", CPP, "if (call.mask && !call.mask[b * call.T + t]) continue;\n", ""),
    "slope of padding": ("lstm", CPP, "d_x[g] = 0.0f;", "d_x[g] = 1.0f;"),
    "hidden is another slot": ("lstm", CPP, "lambda[i][Cell::OUTPUT] + load", "lambda[i][0] + load"),
    "no slope of states": ("lstm", CPP, "if (call.d_states &&", "if (false &&"),
    "states a step early": ("lstm", CPP, "(t + 1) % call.every", "t % call.every"),
    "lambda starts anew": ("lstm", CPP, "(to < call.T ? call.d_initial : call.d_last)", "(call.d_last)"),
    "sums of the last tile": ("lstm", CPP, "sum[i][p] + load(all, lanes(i)) :", "sum[i][p] :"),
    "sums of the first sequence": ("lstm", CPP, "b < call.B; ++b) sum", "b < 1; ++b) sum"),
    "one slot of lambda": ("lstm", CPP, "k < SLOTS; ++k) sum", "k < 1; ++k) sum"),
    "seeds of the wrong input": ("lstm", CPP, "seeded(w[i], SLOTS + GATES + i)", "seeded(w[i], SLOTS + i)"),
    "a step forgotten": ("lstm", CPP, "t >= from; --t", "t > from; --t"),
    "difference of nothing": ("slstm", TANGENTS, "return -b.v;", "return b.v;"),
    "sum with nothing": ("bending", TANGENTS, "if (a.zero) return b;", "if (a.zero) return a;"),
    "chosen is nothing": ("bending", TANGENTS, "a.zero && b.zero", "a.zero || b.zero"),
    "tangents of a quotient": ("slstm", TANGENTS, "a.v * (1.0f / b)", "a.v * b"),
    "quotient": ("bending", INPUTS, "chain(b, value, -value / b.v)", "chain(b, value, value / b.v)"),
    "sign": ("bending", INPUTS, "chain(a, -a.v, -1.0f)", "chain(a, -a.v, 1.0f)"),
    "a tie": ("slstm", DUAL, "choose(a.v < b.v, 0.0f, 0.5f)", "choose(a.v < b.v, 0.5f, 0.5f)"),
}


def objections(name, library, monkeypatch):
    monkeypatch.setattr(cpu_adjoint, "load", lambda cell, dtype: library)
    for T, D, B, every, kind in ((7, 5, 2, 3, "holes"), (9, 70, 1, 0, "none"), (7, 3, 2, 2, "left")):
        p = Slopes(name, T, D, B, every=every, mask=masks(B, T)[kind])
        arrays = *p.arrays(), mx.array(p.boundaries(3)), *p.slopes()
        given = cpu_adjoint.solve(p.cell, *(arrays if every else (*arrays, None)), every, 3)
        try:
            p.check(p.laid_out(given))
        except AssertionError:
            yield (T, D, B, every, kind)


@pytest.mark.sampled("toolchain", by=lambda mutant: ["one"])
@pytest.mark.parametrize("mutant", ["unchanged", *MUTANTS])
def test_mutants(mutant, bending, monkeypatch, tmp_path):
    """The checks check: each broken text is seen, the real one passes."""
    built_with(["-O0"], monkeypatch)
    cell = "lstm"
    if mutant != "unchanged":
        cell, *change = MUTANTS[mutant]
        broken(monkeypatch, *change)
    with fresh_cache(monkeypatch, tmp_path):
        library = cpu_adjoint.load.__wrapped__(get_cell(cell), "float32")
    seen = list(objections(cell, library, monkeypatch))
    assert bool(seen) == (mutant != "unchanged"), seen
