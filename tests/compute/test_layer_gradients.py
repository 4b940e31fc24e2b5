"""Gradients of what runs around the recurrence and of the loss, on the CPU backend: metal/cpu_gradients.cpp.

The oracle differentiates NumPy's float64 forward by complex steps, which lose no digit: no formula of the
library's is written down again.
"""

import os
import platform
import shutil
import subprocess
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_pararnn import PararnnError
from mlx_pararnn.compute import cpu, cpu_build, cpu_gradients, layer_ops, texts
from tests.support.gradient_replay import Recorder, replay_text, replayed
from tests.support.layer_functions import EPS, FUNCTIONS, SIZES, as_list, given_by, inputs_of, slopes_of
from tests.support.msl.instances import DTYPES
from tests.support.random_models import distance, make, numbers

pytestmark = pytest.mark.usefixtures("cpu_backend")
ARM = "aarch64-linux-gnu-g++"


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """The CPU backend takes small arrays too."""
    monkeypatch.setattr(cpu, "_LARGE", 0)


def along(name, arrays, slopes, n, direction):
    """The exact derivative of sum(slopes * outputs) as input n moves along a direction."""
    moved = [numbers(a).astype(np.complex128) for a in arrays]
    moved[n] += 1e-200j * direction
    outputs = as_list(FUNCTIONS[name][1](*moved))
    return sum((numbers(s) * y.imag).sum() for s, y in zip(slopes, outputs, strict=True)) / 1e-200


@pytest.mark.sampled(
    "large", by=lambda name, size: [name, size] if name != "cross_entropy" or size[0] == 3 else []
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_float64(name, size, dtype):
    """Every number of every gradient: the derivative along it, from float64."""
    arrays = inputs_of(name, size, DTYPES[dtype])
    slopes = slopes_of(name, arrays)
    gradients = given_by(name, arrays, slopes)
    draw = np.random.default_rng(3)
    # of an output's own rounding to the dtype; float32's own, of sums of up to 200 numbers
    step = {"float32": 2.0**-21, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for n, (array, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        assert gradient.dtype == array.dtype
        assert gradient.shape == array.shape
        places = [*np.ndindex(*array.shape)]
        if len(places) > 400:
            places = [places[i] for i in draw.choice(len(places), 200, replace=False)]
        wanted = []
        for place in places:
            unit = np.zeros(array.shape)
            unit[place] = 1
            wanted.append(along(name, arrays, slopes, n, unit))
        found = np.array([numbers(gradient)[place] for place in places])
        assert np.abs(wanted).max() > 0 or array.shape[-1] == 1
        np.testing.assert_allclose(found, wanted, rtol=step, atol=4 * step * max(1, np.abs(wanted).max()))
        direction = draw.normal(size=array.shape)  # all numbers at once
        exact = along(name, arrays, slopes, n, direction)
        scale = np.abs(numbers(gradient) * direction).sum() + 1
        assert abs((numbers(gradient) * direction).sum() - exact) < 4 * step * scale


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads(name, monkeypatch):
    """The same bits however many there are."""
    arrays = inputs_of(name, (3, 150, 130))
    slopes, found = slopes_of(name, arrays), []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(cpu, "threads", lambda threads=threads: threads)
        found.append(given_by(name, arrays, slopes))
    for others in found[1:]:
        assert all(mx.array_equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_views_are_read_where_they_lie():
    """Halves of a projection, backwards, repeated rows; the slope of a sum, which is one number repeated."""
    both = mx.array(np.random.default_rng(0).normal(size=(2, 9, 40)).astype(np.float32))
    weight, taps, window = mx.arange(20) / 10, both[0, :4, :20].T, both[:, :3, 20:]
    x, gate = mx.split(both, 2, axis=-1)
    repeated = mx.broadcast_to(both[:1, :1, :20], (2, 9, 20))
    for a in (x, both[:, ::-1, 20:], both[..., 39:19:-1], repeated):

        def loss(backend, a=a):
            def of(a, gate, weight, taps, window):
                y, new = layer_ops.conv_silu(a, window, taps, weight, backend=backend)
                z = layer_ops.gated_norm(a, gate, weight, EPS, backend=backend)
                n = layer_ops.rms_norm(a, weight, EPS, backend=backend)
                s = layer_ops.swiglu(a, gate, backend=backend)
                return y.sum() + z.sum() + s.sum() + n.sum() + new.sum() + z.swapaxes(0, 1).sum()

            return mx.grad(of, argnums=(0, 1, 2, 3, 4))(a, gate, weight, taps, window)

        for given, wanted in zip(loss("cpu"), loss("ops"), strict=True):
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)


def test_cross_entropy_at_the_edges():
    """Large logits, minus infinity, one logit, one row; numbers as MLX's own."""
    rng = np.random.default_rng(0)
    for N, V in ((1, 1), (1, 16), (7, 300), (40, 33)):
        logits = mx.array((1000 * rng.normal(size=(N, V))).astype(np.float32))
        if V > 2:
            logits[:, 1] = -mx.inf
        targets = mx.array(rng.integers(0, V, N) // 2 * 2)
        given = layer_ops.cross_entropy(logits, targets, backend="cpu")
        wanted = nn.losses.cross_entropy(logits, targets)
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6)

        def mean(logits, targets=targets, **how):
            return layer_ops.cross_entropy(logits, targets, **how).mean()

        slope = mx.grad(mean)(logits, backend="cpu")
        wanted = mx.grad(lambda x, t=targets: nn.losses.cross_entropy(x, t).mean())(logits)
        np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-7)


def test_cross_entropy_refuses():
    logits = mx.zeros((2, 3, 5))
    with pytest.raises(PararnnError, match=r"targets have shape \(6,\); with logits .* it must be \(2, 3\)"):
        layer_ops.cross_entropy(logits, mx.zeros(6, mx.int32))
    for wrong in (5, -1):
        targets = mx.array([[0, 1, 2], [3, wrong, 4]])
        with pytest.raises(PararnnError, match=f"target {wrong} is no place among 5 logits"):
            layer_ops.cross_entropy(logits, targets, backend="cpu")


@pytest.mark.compiled
def test_cross_entropy_chooses(monkeypatch):
    """The CPU backend where it may evaluate, else ops: the same numbers."""
    made = []
    function = cpu_gradients.cross_entropy_gradient
    layer_ops._gradients_work(mx.float32)
    monkeypatch.setattr(cpu_gradients, "cross_entropy_gradient", lambda *a: made.append(1) or function(*a))
    logits, targets = inputs_of("cross_entropy", (2, 9, 37))[0], mx.arange(18).reshape(2, 9)
    gradient = mx.grad(lambda x: (layer_ops.cross_entropy(x, targets) * mx.arange(9)).sum())
    given = gradient(logits)
    assert made.pop()
    compiled = mx.compile(gradient)(logits)
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    in_ops = gradient(logits)
    assert not made
    np.testing.assert_allclose(given, in_ops, atol=1e-6)
    np.testing.assert_allclose(compiled, in_ops, atol=1e-6)


@pytest.mark.large
@pytest.mark.compiled
def test_a_slope_that_is_traced_goes_through_ops():
    """The inputs are known, and the output is computed at once; the slope is mx.compile's."""
    arrays = inputs_of("gated_norm", (2, 5, 37))
    (slope,) = slopes_of("gated_norm", arrays)
    compiled = mx.compile(lambda slope: given_by("gated_norm", arrays, [slope]))(slope)
    for a, b in zip(compiled, given_by("gated_norm", arrays, [slope]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name):
    arrays = inputs_of(name, (2, 5, 8))
    slopes, directions = slopes_of(name, arrays), inputs_of(name, (2, 5, 8), seed=4)

    def second(backend):
        def slope(*arrays):
            gradients = given_by(name, [*arrays], slopes, backend)
            return sum((g**2 * d).sum() for g, d in zip(gradients, directions, strict=True))

        return mx.grad(slope, argnums=[*range(len(arrays))])(*arrays)

    for given, wanted in zip(second("cpu"), second("ops"), strict=True):
        assert mx.abs(wanted).max().item() > 0
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


def test_what_gives_other_numbers_is_not_used(monkeypatch):
    function = cpu_gradients.rms_norm_gradient
    monkeypatch.setattr(cpu_gradients, "rms_norm_gradient", lambda *a: [1.01 * g for g in function(*a)])
    arrays = inputs_of("rms_norm", (2, 5, 37))
    slopes = slopes_of("rms_norm", arrays)
    layer_ops._gradients_work.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match="gradients of elementwise work, float32: it gives other numbers"
        ):
            given = given_by("rms_norm", arrays, slopes)
    finally:
        layer_ops._gradients_work.cache_clear()
    for a, b in zip(given, given_by("rms_norm", arrays, slopes, "ops"), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("kind", ["gru", "plain lstm", "ml-pararnn"])
def test_a_training_step_of_a_model(kind, monkeypatch):
    """All weights have a gradient, that of plain ops; the last layer's norms and gates are the CPU's too."""
    model = make(kind)
    tokens = mx.array(np.random.default_rng(1).integers(0, 37, (2, 30)))
    layer_ops._gradients_work(mx.float32)
    made = []
    for name in ("swiglu_gradient", "rms_norm_gradient", "gated_norm_gradient", "conv_silu_gradient"):
        function = getattr(cpu_gradients, name)
        monkeypatch.setattr(cpu_gradients, name, lambda *a, n=name, f=function: made.append(n) or f(*a))

    def loss(model):
        return layer_ops.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    given = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    layers = len(model.layers)
    gated = layers if kind != "plain lstm" else 0
    wanted = {"swiglu": layers, "rms_norm": 2 * layers + 1, "gated_norm": gated, "conv_silu": gated}
    assert {name: made.count(f"{name}_gradient") for name in wanted} == wanted
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    in_ops = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    for name, gradient in given.items():
        assert np.abs(numbers(gradient)).max() > 0, name
        assert distance(numbers(gradient), numbers(in_ops[name])) < 1e-4, name


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "flag"), [("memory", "-fsanitize=address,undefined"), ("races", "-fsanitize=thread")]
)
def test_sanitizers(name, flag, monkeypatch, tmp_path):
    (tmp_path / "main.cpp").write_text(replay_text())
    program = tmp_path / "main"
    flags = ["-std=c++17", "-O0", "-g0", flag, "-pthread", "-o", program, tmp_path / "main.cpp"]
    if subprocess.run([cpu_build.compiler(), *flags], capture_output=True).returncode:
        pytest.skip(f"this compiler has no {flag}")
    calls = record_all(monkeypatch, tmp_path)
    arguments = [part for file, _ in calls for part in (file, file.with_suffix(".out"))]
    # without randomized addresses: some kernels place them where the sanitizer keeps its own
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    variables = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*still, program, *arguments], capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert_replayed(calls)


@pytest.mark.toolchain
@pytest.mark.skipif(not (shutil.which(ARM) and shutil.which("qemu-aarch64")), reason=f"no {ARM} or no QEMU")
def test_arm64(monkeypatch, tmp_path):
    (tmp_path / "main.cpp").write_text(replay_text())
    flags = ["-std=c++17", "-O2", "-pthread", "-static", "-o", tmp_path / "main", tmp_path / "main.cpp"]
    subprocess.run([ARM, *flags], check=True)
    calls = record_all(monkeypatch, tmp_path)
    arguments = [part for file, _ in calls for part in (file, file.with_suffix(".out"))]
    subprocess.run(["qemu-aarch64", tmp_path / "main", *arguments], check=True)
    assert_replayed(calls)


def record_all(monkeypatch, folder):
    """Every function on every dtype; sizes of several blocks, and of one."""
    for dtype in DTYPES.values():
        layer_ops._gradients_work(dtype)
    recorder = Recorder(folder)
    with monkeypatch.context() as inside:
        inside.setattr(cpu_gradients, "_call", recorder)
        for size in ((2, 70, 13), (1, 3, 40)):
            for name in FUNCTIONS:
                for dtype in DTYPES.values():
                    arrays = inputs_of(name, size, dtype)
                    given_by(name, arrays, slopes_of(name, arrays))
    assert len(recorder.calls) == 2 * 3 * (len(FUNCTIONS) + 1)
    return recorder.calls


def assert_replayed(calls):
    for file, outputs in calls:
        for given, wanted in zip(replayed(file.with_suffix(".out"), outputs), outputs, strict=True):
            step = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[wanted.dtype]
            np.testing.assert_allclose(numbers(given), numbers(wanted), rtol=step, atol=step)


@pytest.mark.toolchain
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", [["-march=x86-64"], ["-march=x86-64-v3"]], ids=["4 lanes", "8 lanes"])
def test_other_vector_units(flags, monkeypatch, tmp_path):
    if flags[0] == "-march=x86-64-v3" and "avx2" not in cpu_build._machine():
        pytest.skip("this CPU has no AVX2")
    own = {call: given_by(call, a := inputs_of(call, (2, 70, 37)), slopes_of(call, a)) for call in FUNCTIONS}
    monkeypatch.setattr(
        cpu_build, "_flags", lambda: ["-std=c++17", "-O1", *flags, "-shared", "-fPIC", "-pthread"]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (cpu_gradients._library, layer_ops._gradients_work):
        cached.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for call, wanted in own.items():
                arrays = inputs_of(call, (2, 70, 37))
                for a, b in zip(given_by(call, arrays, slopes_of(call, arrays)), wanted, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    finally:
        for cached in (cpu_gradients._library, layer_ops._gradients_work):
            cached.cache_clear()


@pytest.mark.toolchain
@pytest.mark.parametrize("cxx", ["g++", "clang++", "clang++-19"])
def test_compilers_have_nothing_to_say(cxx, tmp_path):
    if not shutil.which(cxx):
        pytest.skip(f"no {cxx}")
    (tmp_path / "text.cpp").write_text(texts.cpu_gradients_text())
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-march=native"]
    done = subprocess.run([cxx, *flags, tmp_path / "text.cpp"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
