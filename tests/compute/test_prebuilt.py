"""Libraries that a platform wheel brings: which are taken, and a wheel that computes where no compiler is."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlx_pararnn import get_cell
from mlx_pararnn.cells.activations import ACTIVATIONS
from mlx_pararnn.compute import cpu, cpu_adjoint, cpu_build, cpu_gradients, cpu_token, prebuilt, texts
from mlx_pararnn.compute.gpu import CELLS
from tests.support.random_models import TOKENS, make
from tests.support.token_replay import recorded, replay_text, replayed

ROOT = Path(__file__).parents[2]
HERE = prebuilt.PROCESSORS.get((sys.platform, platform.machine()), ())
pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="builds for Linux"),
]

TEXT = """
#if defined(__AVX512F__)
extern "C" int answer() { return 4; }
#elif defined(__AVX2__)
extern "C" int answer() { return 3; }
#else
extern "C" int answer() { return 2; }
#endif
"""


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("platform_wheel", ROOT / ".ci" / "platform_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def brought(monkeypatch, tmp_path):
    """A folder as a wheel brings it, empty; no compiler is found, and the cache is empty too."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield folder
    monkeypatch.undo()
    forget()


def forget():
    for cached in (prebuilt.processors, cpu_build.compiler):
        cached.cache_clear()


def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_build.compiler.cache_clear()


@pytest.mark.parametrize("level", [2, 3, 4] if platform.machine() == "x86_64" else [1])
def test_the_best_that_this_processor_is(level, tool, brought, monkeypatch, tmp_path):
    names = {"-march=x86-64-v2": 2, "-march=x86-64-v3": 3, "-march=x86-64-v4": 4}
    for processor in HERE:
        tool.compiled("tiny", TEXT, prebuilt.flags(processor), brought, "g++")
    monkeypatch.setattr(prebuilt, "processors", lambda: [p for p in HERE if names.get(p, 0) <= level])
    without_compiler(monkeypatch, tmp_path)
    if platform.machine() == "x86_64":  # the names say what is inside, whatever this machine could run
        found = prebuilt.find(TEXT)
        key = prebuilt.key_of(TEXT, *prebuilt.flags(f"-march=x86-64-v{level}"))
        assert f"-{key}-" in found.name
        if level == 2:
            assert cpu_build.build(TEXT, "tiny").answer() == 2
    else:
        assert cpu_build.build(TEXT, "tiny").answer() == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("cpu_name", "level"), [("qemu64", 1), ("Nehalem", 2), ("SandyBridge", 2), ("Haswell", 3)]
)
def test_levels_by_cpuid(cpu_name, level, tmp_path):
    if not shutil.which("qemu-x86_64"):
        pytest.skip("no qemu-x86_64 (apt install qemu-user)")
    source, program = tmp_path / "level.cpp", tmp_path / "level"
    source.write_text(prebuilt.level_text() + "int main() { return x86_64_level(); }\n")
    subprocess.run(["g++", prebuilt.ANY_X86_64, "-static", "-o", program, source], check=True)
    assert subprocess.run(["qemu-x86_64", "-cpu", cpu_name, program]).returncode == level


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_this_processors_level(tool, brought):
    assert prebuilt.processors() == ()  # nothing here can tell
    tool.compiled("level", prebuilt.level_text(), prebuilt.flags(prebuilt.ANY_X86_64), brought, "g++")
    prebuilt.processors.cache_clear()
    features = re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text())[1].split()
    needed = {"avx512vl": 4, "avx2": 3, "sse4_2": 2}
    level = max(number for feature, number in needed.items() if feature in features)
    assert prebuilt.processors() == HERE[4 - level :]


@pytest.mark.parametrize("fault", ["none", "other text", "other flags", "damaged", "cut short", "CXX"])
def test_what_is_taken_is_what_was_compiled_from_this_text(fault, tool, brought, monkeypatch, tmp_path):
    monkeypatch.setattr(prebuilt, "processors", lambda: HERE[-1:])
    flags = prebuilt.flags(HERE[-1]) + (["-DOTHER"] if fault == "other flags" else [])
    path = tool.compiled("tiny", TEXT + " " * (fault == "other text"), flags, brought, "g++")
    whole = path.read_bytes()
    if fault == "damaged":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif fault == "cut short":
        path.write_bytes(whole[:-1])
    elif fault == "CXX":  # who names a compiler wants what it makes
        monkeypatch.setenv("CXX", "g++")
        assert cpu_build.build(TEXT, "tiny").answer() in (2, 3, 4)
        assert len([*(tmp_path / "cache" / "mlx-pararnn").glob("tiny-*.so")]) == 1
        monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    without_compiler(monkeypatch, tmp_path)
    if fault in ("none", "CXX"):
        assert cpu_build.is_prebuilt(TEXT)
        assert cpu_build.build(TEXT, "tiny").answer() == 2
    else:
        assert not cpu_build.is_prebuilt(TEXT)
        with pytest.raises(cpu_build.NoCompilerError):
            cpu_build.build(TEXT, "tiny")


def test_a_checkout_brings_none():
    assert not prebuilt.FOLDER.exists()
    assert prebuilt.processors.__wrapped__() == ()
    assert not cpu_build.is_prebuilt(TEXT)


def test_all_that_built_in_cells_ask_for(monkeypatch):
    """No library is missing in the list by which wheels are made, and each is taken."""
    known, asked = dict(texts.built_in_texts()), []
    monkeypatch.setattr(cpu_build, "_check_layout", lambda *_: None)
    monkeypatch.setattr(cpu_build, "_prebuilt", lambda text: asked.append(text) or object())
    for name in CELLS:
        for load in (cpu.load, cpu_adjoint.load, cpu_token._library):
            for dtype in texts.CPU_TYPES:
                load.__wrapped__(get_cell(name), dtype)
    for dtype in texts.CPU_TYPES:
        cpu._elementwise.__wrapped__(dtype)
        cpu_gradients._library.__wrapped__(dtype)
    for formats in (((4, 64),), ((2, 32), (8, 128))):
        cpu_token._packed.__wrapped__(formats)
    assert {*asked} == {*known.values()}


@pytest.mark.usefixtures("brought")
def test_a_users_cell_is_compiled():
    """So is a built-in one with activations of the user's choice: a wheel has the usual ones."""
    known = {text for _, text in texts.built_in_texts()}
    place = next(iter(get_cell("gru").default_activations))
    other = next(name for name in ACTIVATIONS if name != get_cell("gru").activations[place])
    asked = [
        texts.for_dtype(texts.cpu_recurrence_text(cell), "float32")
        for cell in (get_cell("gru"), get_cell("gru", {place: other}))
    ]
    assert [text in known for text in asked] == [True, False]


# The replay of a token's call (tests/support/token_replay.py) by a library that is loaded as Python loads it.
LOADED = """
#include <dlfcn.h>
int loaded(const pararnn::Token* token) {
  void* library = dlopen(getenv("LIBRARY"), RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\\n", dlerror());
  return reinterpret_cast<int (*)(const pararnn::Token*)>(dlsym(library, "decode_float32"))(token);
}
int replay(char** argv) {"""
ELSEWHERE = [
    ("-march=armv8-a", "aarch64-linux-gnu-g++", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
    ("-march=x86-64-v2", "x86_64-linux-gnu-g++", ["qemu-x86_64", "-cpu", "Nehalem"]),
    ("-march=x86-64-v3", "x86_64-linux-gnu-g++", ["qemu-x86_64", "-cpu", "Haswell"]),
]


@pytest.mark.toolchain
@pytest.mark.parametrize(("processor", "compiler", "emulator"), ELSEWHERE, ids=lambda value: str(value)[:17])
def test_a_token_on_the_oldest_processor_of_a_kind(
    processor, compiler, emulator, tool, monkeypatch, tmp_path
):
    """An instruction that it lacks would end the process: in the C++ library too, which is linked in."""
    if missing := [name for name in (compiler, emulator[0]) if not shutil.which(name)]:
        pytest.skip(f"no {' and no '.join(missing)} (apt install g++-aarch64-linux-gnu qemu-user)")
    made, program, source = make("gru"), tmp_path / "main", tmp_path / "main.cpp"
    text = dict(texts.built_in_texts())["decode-gru-float32"]
    library = tool.compiled("decode-gru-float32", text, prebuilt.flags(processor), tmp_path, compiler)
    assert tool.needed_glibc(library, compiler.replace("g++", "objdump")) <= (2, 36)
    replay = replay_text(made, "float32").replace("decode_float32(&token)", "loaded(&token)")
    source.write_text(replay.replace("int replay(char** argv) {", LOADED))
    subprocess.run([compiler, "-std=c++17", "-O0", "-pthread", "-o", program, source, "-ldl"], check=True)
    wanted = recorded(made, TOKENS, monkeypatch, tmp_path / "in", threads=2)
    variables = {**os.environ, "LIBRARY": str(library)}
    subprocess.run([*emulator, program, tmp_path / "in", tmp_path / "out"], check=True, env=variables)
    np.testing.assert_allclose(replayed(made, tmp_path / "out"), wanted, rtol=1e-5, atol=1e-5)


def pure_wheel(folder):
    """Of this tree; built from a copy, since setuptools leaves its own beside what it builds."""
    copy = folder / "tree"
    copy.mkdir()
    for name in ("mlx_pararnn", "convert", "cli", "metal"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    # Isolated: the setuptools of an older Python's environment does not read this pyproject.toml.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, copy]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.large
def test_an_installed_wheel_needs_no_compiler(tmp_path):
    pytest.importorskip("wheel")
    best = re.search(r"[\w-]+$", HERE[0] if len(HERE) == 1 else "x86-64-v2")[0]
    wheel = pure_wheel(tmp_path)
    command = [sys.executable, ROOT / ".ci" / "platform_wheel.py", wheel, tmp_path / "made"]
    only = f"level|^(packed|(elementwise|gradients|(recurrence|adjoint|decode)-gru)-float(16|32))-{best}"
    subprocess.run([*command, "--only", only], check=True, env={**os.environ, "PYTHONPATH": ""})
    (made,) = (tmp_path / "made").iterdir()
    tag = re.fullmatch(rf"mlx_pararnn-[\d.]+-py3-none-manylinux_2_(\d+)_{platform.machine()}\.whl", made.name)
    assert 17 <= int(tag[1]) <= int(platform.libc_ver()[1].split(".")[1])
    before, after = ({*zipfile.ZipFile(w).namelist()} for w in (wheel, made))
    assert before <= after
    assert all(re.fullmatch(r"mlx_pararnn/prebuilt/[\w.-]+\.so", name) for name in after - before)
    about = zipfile.ZipFile(made).read(next(name for name in after if name.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in about
    assert f"Tag: {made.stem.split('-', 2)[2]}\n" in about

    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", site, made], check=True)
    variables = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, ROOT / ".ci" / "without_compiler.py", "gru"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"recurrence-gru-float32-{best}-")
    variables |= {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "mlx_pararnn", "doctor"]
    report = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path).stdout
    assert f"present: came compiled, recurrence-gru-float32-{best}," in report


LOADER = """
#include <cstdio>
#include <dlfcn.h>
int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    if (!dlopen(names[i], RTLD_NOW)) return fprintf(stderr, "%s\\n", dlerror()), 1;
  }
}
"""


@pytest.mark.toolchain
@pytest.mark.large
def test_a_wheel_for_another_machine(tmp_path):
    """Its tag is that machine's, and there its libraries load, with every name that they ask for."""
    pytest.importorskip("wheel")
    tools, emulator = "aarch64-linux-gnu-", "qemu-aarch64"
    if missing := [name for name in (f"{tools}g++", emulator) if not shutil.which(name)]:
        pytest.skip(f"no {' and no '.join(missing)} (apt install g++-aarch64-linux-gnu qemu-user)")
    command = [sys.executable, ROOT / ".ci" / "platform_wheel.py", pure_wheel(tmp_path), tmp_path / "made"]
    command += ["--machine", "aarch64", "--tools", tools, "--only", "^(elementwise|recurrence-nlru)-float32"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
    (made,) = (tmp_path / "made").iterdir()
    assert re.fullmatch(r"mlx_pararnn-[\d.]+-py3-none-manylinux_2_\d+_aarch64\.whl", made.name)
    with zipfile.ZipFile(made) as whole:
        brought = [name for name in whole.namelist() if name.endswith(".so")]
        whole.extractall(tmp_path, brought)
    text = texts.for_dtype(texts.cpu_elementwise_text(), "float32")
    key = prebuilt.key_of(text, *prebuilt.flags("-march=armv8-a"))
    assert any(f"elementwise-float32-armv8-a-{key}-" in name for name in brought)
    assert len(brought) == 2
    program, source = tmp_path / "loader", tmp_path / "loader.cpp"
    source.write_text(LOADER)
    subprocess.run([f"{tools}g++", "-o", program, source, "-ldl"], check=True)
    prefix = [emulator, "-L", "/usr/aarch64-linux-gnu"]
    subprocess.run([*prefix, program, *(tmp_path / name for name in brought)], check=True)
