"""Decoding on a CPU in one call: threads, sanitizers, vector units, compilers; where it cannot be built."""

import os
import platform
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.cache import held_arrays
from mlx_pararnn.compute import cpu, cpu_build, cpu_cores, cpu_token, layer_ops, texts
from tests.support.fresh_cache import fresh_cache
from tests.support.msl.instances import DTYPES
from tests.support.random_models import (
    TOKENS,
    by_token,
    cell_of,
    distance,
    exact,
    make,
    numbers,
)
from tests.support.token_replay import recorded, replay_text, replayed

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", ["gru", "ml-pararnn", "plain", "babylm", "tiny"])
def test_threads(kind, monkeypatch, calls):
    """The same bits however many there are, again and again."""
    made = make(kind, hidden_size=8 if kind == "tiny" else 200)
    monkeypatch.setattr(cpu_token, "_MANY", 0)

    def run(threads):
        monkeypatch.setattr(cpu_cores, "threads", lambda: threads)
        cache = made.make_cache(2)
        return [by_token(made, TOKENS, cache), *held_arrays(cache)]

    wanted = run(1)
    for threads in (2, 3, 7):
        for _ in range(12 if threads < 7 else 4):
            assert all(mx.array_equal(a, b) for a, b in zip(run(threads), wanted, strict=True))
    assert all(calls)


def test_how_many_threads(monkeypatch):
    asked = []
    together = cpu_token.Token

    def token(*fields):
        asked.append(fields[-1])
        return together(*fields)

    monkeypatch.setattr(cpu_token, "Token", token)
    monkeypatch.setattr(cpu_cores, "threads", lambda: 2)
    for size in (64, 256):
        by_token(make(hidden_size=size, intermediate_size=size), TOKENS[:, :1])
    assert asked == [1, 2]


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "flag"), [("memory", "-fsanitize=address,undefined"), ("races", "-fsanitize=thread")]
)
def test_sanitizers(name, flag, monkeypatch, tmp_path):
    program = tmp_path / "main"
    (tmp_path / "main.cpp").write_text(replay_text(make("gru"), "float32"))
    command = [
        cpu_build.compiler(),
        "-std=c++17",
        "-O0",
        "-g0",
        flag,
        "-pthread",
        "-o",
        program,
        tmp_path / "main.cpp",
    ]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"this compiler has no {flag}")
    arguments, wanted = [], []
    for n, sizes in enumerate(
        ({}, {"mixer": "plain", "num_heads": 4}, {"hidden_size": 8, "intermediate_size": 5})
    ):
        made = make("gru", **sizes)
        arguments += [tmp_path / f"in{n}", tmp_path / f"out{n}"]
        many = {"times": 20, "threads": 3} if name == "races" else {"threads": 2}
        wanted.append((made, recorded(made, TOKENS, monkeypatch, arguments[-2], **many)))
    # without randomized addresses: some kernels place them where the sanitizer keeps its own
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    variables = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*still, program, *arguments], capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    for n, (made, numbers_) in enumerate(wanted):
        np.testing.assert_allclose(replayed(made, tmp_path / f"out{n}"), numbers_, rtol=1e-4, atol=1e-5)


@pytest.mark.toolchain
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", [["-march=x86-64"], ["-march=x86-64-v3"]], ids=["4 lanes", "8 lanes"])
def test_other_vector_units(flags, monkeypatch, tmp_path, calls):
    if flags[0] == "-march=x86-64-v3" and "avx2" not in cpu_build._machine():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(
        cpu_build, "_flags", lambda: ["-std=c++17", "-O0", *flags, "-shared", "-fPIC", "-pthread"]
    )
    with nothing_built(monkeypatch, tmp_path):
        for kind, dtype in [("gru", "float32"), ("ml-pararnn", "float32"), ("tiny", "float16")]:
            made = make(kind, DTYPES[dtype])
            step = 1e-5 if dtype == "float32" else 2.0**-9
            assert distance(numbers(by_token(made, TOKENS)), exact(made, TOKENS)[0]) < step
    assert all(calls)


@pytest.mark.toolchain
@pytest.mark.parametrize("cxx", ["g++", "clang++", "clang++-19"])
def test_compilers_have_nothing_to_say(cxx, tmp_path):
    if not shutil.which(cxx):
        pytest.skip(f"no {cxx}")
    (tmp_path / "text.cpp").write_text(texts.cpu_token_text(cell_of(make())))
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fsyntax-only",
        "-march=native",
    ]
    done = subprocess.run([cxx, *flags, tmp_path / "text.cpp"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class nothing_built(fresh_cache):
    def __enter__(self):
        self.forget()

    def __exit__(self, *_):
        self.forget()

    def forget(self):
        super().__enter__()
        ours = cpu._elementwise, layer_ops._elementwise_works, cpu_token._library, cpu_token._works
        for cached in ours:
            cached.cache_clear()


def test_no_compiler_means_ops_and_one_warning(monkeypatch, tmp_path, calls):
    made = make()
    wanted = by_token(made, TOKENS, backend="ops")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with nothing_built(monkeypatch, tmp_path):
        with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler; install one") as warned:
            given = by_token(made, TOKENS)
        assert len(warned) == 1
    assert not any(calls)
    assert mx.array_equal(given, wanted)


@pytest.mark.large
@pytest.mark.parametrize("fault", ["its text", "its numbers"])
def test_only_this_cannot_be_built(fault, monkeypatch, tmp_path, calls):
    made = make()
    wanted = by_token(made, TOKENS, backend="ops")
    text = texts.cpu_token_text

    def faulty(*formed):
        if fault == "its text":
            return text(*formed) + "not C++;"
        return text(*formed).replace(
            "store(input + b * D + i, silu(y), n);", "store(input + b * D + i, y, n);"
        )

    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-pthread"]
    with nothing_built(monkeypatch, tmp_path), monkeypatch.context() as inside:
        inside.setattr(cpu_token, "cpu_token_text", faulty)
        inside.setattr(cpu_build, "_flags", lambda: flags)
        said = "rejects decode-gru" if fault == "its text" else "gives other numbers than plain MLX ops"
        with pytest.warns(RuntimeWarning, match=said) as warned:
            given = by_token(made, TOKENS)
        assert len(warned) == 1
    assert not any(calls)
    assert distance(numbers(given), numbers(wanted)) < 1e-5


@pytest.mark.large
def test_the_trial_is_of_the_dtype_that_is_used(monkeypatch, tmp_path, calls):
    """A compiler that makes a mistake in one dtype's library alone."""
    texts_of = cpu_token.for_dtype
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-pthread"]
    right, wrong = "store(input + b * D + i, silu(y), n);", "store(input + b * D + i, y, n);"
    with nothing_built(monkeypatch, tmp_path), monkeypatch.context() as inside:
        inside.setattr(
            cpu_token,
            "for_dtype",
            lambda text, dtype: texts_of(text.replace(right, wrong) if dtype == "float16" else text, dtype),
        )
        inside.setattr(cpu_build, "_flags", lambda: flags)
        for dtype in ("float32", "float16", "bfloat16"):
            made = make("gru", DTYPES[dtype])
            calls.clear()
            if dtype == "float16":
                with pytest.warns(RuntimeWarning, match="float16: it gives other numbers than plain MLX ops"):
                    by_token(made, TOKENS)
                assert not any(calls)
            else:
                by_token(made, TOKENS)
                assert all(calls)


def test_the_trial_leaves_random_numbers_alone():
    made = make()

    def drawn():
        mx.random.seed(7)
        by_token(made, TOKENS)
        return mx.random.uniform(shape=(4,))

    by_token(made, TOKENS)
    without = drawn()
    cpu_token._works.cache_clear()
    assert mx.array_equal(drawn(), without)
