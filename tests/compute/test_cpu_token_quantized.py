"""Decoding on a CPU in one call, with weights of few bits."""

import os
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_pararnn import load_model
from mlx_pararnn.cache import held_arrays
from mlx_pararnn.compute import cpu, cpu_build, cpu_cores, cpu_token, texts
from mlx_pararnn.files.quantization_formats import BITS, GROUP_SIZES
from tests.support.golden import golden_of
from tests.support.msl.instances import DTYPES
from tests.support.processor import has_vnni
from tests.support.random_models import (
    TOKENS,
    by_token,
    distance,
    exact,
    make,
    numbers,
    quantize,
)
from tests.support.token_replay import recorded, replay_text, replayed

pytestmark = pytest.mark.usefixtures("cpu_backend")
WIDE = {"hidden_size": 256, "intermediate_size": 192}  # so that every head has whole groups
only_with_vnni = pytest.mark.skipif(not has_vnni(), reason="this processor has no AVX-512 VNNI")


@pytest.fixture(autouse=True)
def quick_to_compile(monkeypatch):
    flags = [flag for flag in cpu_build._flags() if flag != "-O3"]
    monkeypatch.setattr(cpu_build, "_flags", lambda: ["-O1", *flags])
    cpu_token._packed.cache_clear()
    yield
    cpu_token._packed.cache_clear()


@pytest.mark.sampled("large", by=lambda: ["one"])  # a library a cell and format is built
@pytest.mark.parametrize(
    ("kind", "bits", "group"),
    [
        *((kind, 4, 64) for kind in ("gru", "lstm, 4 heads", "slstm, layer norm", "ml-pararnn", "babylm")),
        *(("gru", bits, group) for bits, group in ((2, 64), (3, 32), (8, 128))),
    ],
)
def test_numbers_in_float32(kind, bits, group, calls):
    made = make(kind, **(WIDE | {"intermediate_size": 192 if group < 128 else 128}))
    twin = quantize(made, group, bits)
    cache, other = made.make_cache(2), made.make_cache(2)
    given, (wanted, states) = by_token(made, TOKENS, cache), exact(twin, TOKENS)
    assert calls == [True] * 5
    assert distance(numbers(given), wanted) < 2e-5
    for c, state in zip(cache, states, strict=True):
        assert distance(numbers(c[0]), state) < 2e-5
    in_ops = by_token(made, TOKENS, other, backend="ops")
    assert (given.dtype, given.shape) == (in_ops.dtype, in_ops.shape)
    assert distance(numbers(given), numbers(in_ops)) < 2e-5


@pytest.mark.sampled("large", by=lambda dtype, kind: [dtype] if kind == "gru" else [])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["gru", "ml-pararnn", "lstm, 4 heads"])
def test_numbers_in_half_precision(dtype, kind, calls):
    """Nearer to exact than ops, or within a rounding of it."""
    made, step = make(kind, DTYPES[dtype], **WIDE), {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    twin = quantize(made, 64, 4)
    given, in_ops = by_token(made, TOKENS), by_token(made, TOKENS, backend="ops")
    wanted = exact(twin, TOKENS)[0]
    assert calls == [True] * 5
    assert given.dtype == in_ops.dtype == DTYPES[dtype]
    assert distance(numbers(given), wanted) <= max(step, distance(numbers(in_ops), wanted))


@pytest.mark.large
@pytest.mark.parametrize("bits", [4, 8])
def test_a_trained_model(bits, converted, calls):
    made, _ = load_model(converted("trained/paragru/final.pt", quantize=True, q_bits=bits))
    tokens = golden_of("trained/paragru")["heldout_input_ids"][:2, :20]
    given, wanted = by_token(made, tokens), by_token(made, tokens, backend="ops")
    assert calls == [True] * 20
    assert distance(numbers(given), numbers(wanted)) < 2e-5
    assert mx.array_equal(given.argmax(-1), wanted.argmax(-1))


@pytest.mark.large
def test_formats_that_differ(calls):
    """Of bits, of group sizes, and layers of which one is not quantized."""
    made = make("gru", **WIDE)
    quantize(made, 64, 4, only=lambda path: "layers.0.mlp" in path or path == "lm_head")
    quantize(made, 32, 8, only=lambda path: "layers.1" in path or "embed" in path)
    assert distance(numbers(by_token(made, TOKENS)), numbers(by_token(made, TOKENS, backend="ops"))) < 2e-5
    assert calls == [True] * 5


@pytest.mark.large
def test_models_of_several_formats_in_one_process(calls):
    """Each has a library of its own, and the linker may not take one's symbols for another's."""
    for bits, group in ((8, 32), (4, 64), (3, 128)):
        made = make("gru", **(WIDE | {"intermediate_size": 256}))
        quantize(made, group, bits)
        given, wanted = by_token(made, TOKENS), by_token(made, TOKENS, backend="ops")
        assert distance(numbers(given), numbers(wanted)) < 2e-5
        if tool := shutil.which("nm"):
            library = cpu_token._packed(((bits, group),))._name
            symbols = subprocess.run([tool, "-D", library], capture_output=True, text=True, check=True).stdout
            assert not [line for line in symbols.splitlines() if " u " in line]
    assert calls == [True] * 15


def test_rows_threads_and_layouts(monkeypatch, calls):
    """The same bits for a row of a batch as for the row alone, for any threads, wherever the arrays lie."""
    made = make("gru", mx.bfloat16, **WIDE)
    quantize(made, 64, 4)
    monkeypatch.setattr(cpu_token, "_MANY", 0)
    tokens = mx.random.randint(0, 37, (cpu.FEW_ROWS, 2), key=mx.random.key(0))

    def run(threads, rows):
        monkeypatch.setattr(cpu_cores, "threads", lambda: threads)
        cache = made.make_cache(rows.shape[0])
        return [by_token(made, rows, cache), *held_arrays(cache)]

    wanted = run(1, tokens)
    for threads in (2, 3, 7):
        assert all(mx.array_equal(a, b) for a, b in zip(run(threads, tokens), wanted, strict=True))
    for first, last in ((0, 1), (1, 6), (3, 7)):
        given = run(2, tokens[first:last])
        assert all(mx.array_equal(a, b[first:last]) for a, b in zip(given, wanted, strict=True))

    def strided(a):
        return mx.swapaxes(mx.contiguous(mx.swapaxes(a, 0, -1)), 0, -1)

    made.update(tree_unflatten([(path, strided(a)) for path, a in tree_flatten(made.parameters())]))
    assert all(mx.array_equal(a, b) for a, b in zip(run(1, tokens), wanted, strict=True))
    assert all(calls)


def test_what_is_not_finite_stays_in_its_row(calls):
    """The MLP is so wide that its first row stands in memory where the next layer's second one does."""
    made = make("gru", hidden_size=256, intermediate_size=640)
    quantize(made, 64, 4)
    x = mx.random.normal((2, 1, 256), key=mx.random.key(0))
    x[0] = mx.nan

    def run(rows):
        cache = made.make_cache(rows.shape[0])
        return made(mx.zeros(rows.shape[:2], mx.int32), cache=cache, input_embeddings=rows)

    together = run(x)
    assert mx.isnan(together[0]).all()
    assert mx.array_equal(together[1:], run(x[1:]))
    assert all(calls)


def test_weights_that_change_between_tokens_are_seen(calls):
    made, other = make(**WIDE), make(seed=1, **WIDE)
    quantize(made, 64, 4), quantize(other, 64, 4)
    cache, twin = made.make_cache(2), made.make_cache(2)
    others = dict(tree_flatten(other.parameters()))
    for t, path in enumerate(p for p, _ in tree_flatten(made.parameters()) if p.count(".") < 4 or ".1." in p):
        made.update(tree_unflatten([(path, others[path])]))
        token = TOKENS[:, t % 5 : t % 5 + 1]
        given, wanted = made(token, cache=cache), made(token, cache=twin, backend="ops")
        assert distance(numbers(given), numbers(wanted)) < 5e-5, path
    assert all(calls)


@pytest.mark.large
@pytest.mark.parametrize(
    ("bits", "right", "wrong"),
    [
        (5, "scale.v * dots[c]", "dots[c]"),
        (5, "(1u << BITS) - 1", "(1u << BITS) - 2"),
        pytest.param(8, "scale * load(steps", "load(steps", marks=only_with_vnni),
        pytest.param(8, "_mm512_set1_ps(256)", "_mm512_set1_ps(255)", marks=only_with_vnni),
        pytest.param(4, "_mm512_set1_epi8(15)", "_mm512_set1_epi8(14)", marks=only_with_vnni),
    ],
)
def test_products_that_are_wrong_here_are_not_used(bits, right, wrong, monkeypatch, calls):
    made, text = make("slstm, layer norm", hidden_size=64, intermediate_size=64), texts.cpu_packed_text
    quantize(made, 32, bits)
    wanted = by_token(made, TOKENS, backend="ops")
    assert text(((bits, 32),)).count(right) == 1
    monkeypatch.setattr(cpu_token, "cpu_packed_text", lambda of: text(of).replace(right, wrong))
    cpu_token._works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="it gives other numbers than plain MLX ops"):
            given = by_token(made, TOKENS)
    finally:
        cpu_token._works.cache_clear()
    assert not any(calls)
    assert mx.array_equal(given, wanted)


def test_an_embedding_that_is_float_though_it_has_scales_is_left_to_mlx(calls):
    """Set by hand, as a user might: it is not read as packed bits."""
    made = make(**WIDE)
    quantize(made, 64, 4)
    made.model.embed_tokens.weight = mx.ones((37, 256))
    with pytest.raises(ValueError, match="quantiz"):
        by_token(made, TOKENS)
    assert not any(calls)


def test_gradients_are_left_to_mlx(calls):
    made = make(**WIDE)
    quantize(made, 64, 4)

    def loss(weight, **options):
        kept, made.model.norm.weight = made.model.norm.weight, weight
        total = (made(TOKENS[:, :1], cache=made.make_cache(2), **options) ** 2).sum()
        made.model.norm.weight = kept
        return total

    weight = made.model.norm.weight
    given, wanted = mx.grad(loss)(weight), mx.grad(lambda w: loss(w, backend="ops"))(weight)
    assert distance(numbers(given), numbers(wanted)) < 1e-4
    assert not any(calls)


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "flag", "bits"),
    [
        ("memory", "-fsanitize=address,undefined", 3),
        ("memory", "-fsanitize=address,undefined", 4),
        ("races", "-fsanitize=thread", 4),
    ],
)
def test_sanitizers(name, flag, bits, monkeypatch, tmp_path):
    made, program = make("gru", hidden_size=96, intermediate_size=160), tmp_path / "main"
    quantize(made, 32, bits)
    (tmp_path / "main.cpp").write_text(replay_text(made, "float32"))
    options = ["-std=c++17", "-O0", "-g0", flag, "-pthread", "-o", program, tmp_path / "main.cpp"]
    if subprocess.run([cpu_build.compiler(), *options], capture_output=True).returncode:
        pytest.skip(f"this compiler has no {flag}")
    many = {"times": 10, "threads": 3} if name == "races" else {"threads": 2}
    wanted = recorded(made, TOKENS, monkeypatch, tmp_path / "in", **many)
    # without randomized addresses: some kernels place them where the sanitizer keeps its own
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*still, program, tmp_path / "in", tmp_path / "out"],
        **{"capture_output": True, "text": True, "env": {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}},
    )
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_allclose(replayed(made, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.toolchain
@pytest.mark.parametrize("cxx", ["g++", "clang++", "clang++-19"])
def test_compilers_have_nothing_to_say(cxx, tmp_path):
    if not shutil.which(cxx):
        pytest.skip(f"no {cxx}")
    formats = tuple((bits, group) for bits in BITS for group in GROUP_SIZES)
    (tmp_path / "text.cpp").write_text(texts.cpu_packed_text(formats))
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fsyntax-only"]
    for lanes in ("-march=native", "-DLANES=4"):
        command = [cxx, *flags, lanes, tmp_path / "text.cpp"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
