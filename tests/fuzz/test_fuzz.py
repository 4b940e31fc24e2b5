"""Changed inputs of every kind: a few of the readers', and with --all 1.5 seconds of each target."""

import contextlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import native
from tests.fuzz.__main__ import FOUND
from tests.fuzz.changes import changed
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]


def run(folder, *command):
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, env=variables
    )


@pytest.mark.parametrize(
    "name",
    ["pickle", "torch-file", "safetensors", "index", "distributed", "tool-calls", "pieces", "saved-prompts"],
)
def test_changed_inputs_are_read_or_refused(name, tmp_path):
    target = TARGETS[name](tmp_path)
    rng = random.Random(0)
    for data in target.seeds + [path.read_bytes() for path in FOUND.glob(f"{name}-*")]:
        target.run(data)
    for _ in range(50):
        target.run(changed(target.seeds, target.words, rng, target.inside))


def test_without_atheris_it_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['atheris'] = None; sys.argv = ['fuzz', 'config', '--atheris']\n"
        "from tests.fuzz.__main__ import main; main()"
    )
    done = run(tmp_path, "-c", program)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        '--atheris needs atheris (Python 3.11 to 3.13): pip install "mlx-pararnn[fuzz]"'
    ]


def test_what_was_found_belongs_to_a_target():
    kept = [path.name for path in FOUND.iterdir()]
    assert kept
    targets = [*TARGETS, *(f"cpu-{target}" for target in native.TEXTS)]
    assert all(name.startswith(tuple(f"{target}-" for target in targets)) for name in kept)


# Readers with a fault, and one that is as it should be; the limits are made small.
FAULTS = """
import os, subprocess, sys, types
from pathlib import Path
import tests.fuzz.__main__ as runner
from mlx_pararnn.errors import PararnnError

# Linux tells a program's first process the peak memory of what started it as its own.
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

def foreign(data): {}["x"]
def writes(data): open("elsewhere", "w")
def writes_by_descriptor(data): os.open("elsewhere", os.O_CREAT | os.O_WRONLY)
def runs(data):
    try:
        os.system("true")
    except Exception:
        pass
def starts(data): subprocess.run(["true"])
def deletes(data): os.remove("kept")
def deletes_elsewhere(data): os.remove("kept")
def hangs(data):
    while True: pass
def grows(data): b"x" * (200 << 20)
def sound(data):
    Path(FOLDER, "x").write_bytes(data)
    os.remove(Path(FOLDER, "x"))

def target(run):
    def make(folder):
        global FOLDER
        FOLDER = folder
        may = run in (deletes_elsewhere, sound)  # in its folder
        return types.SimpleNamespace(
            run=run, seeds=[b"x"], words=(), processes=False, inside=None, deletes=may
        )
    return make

faults = (
    foreign, writes, writes_by_descriptor, runs, starts, deletes, deletes_elsewhere, hangs, grows, sound
)
TARGETS = {fault.__name__: target(fault) for fault in faults}
sys.modules["tests.fuzz.targets"] = types.SimpleNamespace(TARGETS=TARGETS)
runner.SECONDS, runner.MEMORY = 0.2, 100 << 20
Path("kept").touch()
for name in TARGETS:
    print(name, *runner.fuzz(name, 1, 60))
"""
# The same by coverage, with a stand-in for atheris that tries one input.
BY_COVERAGE = (
    FAULTS[: FAULTS.index("for name in TARGETS")]
    + """
import contextlib
given = {}
def Setup(options, one, **others): given.update(options=options, one=one)
def Fuzz(): given["one"](b"x")
instrument_imports = lambda include: contextlib.nullcontext()
sys.modules["atheris"] = types.SimpleNamespace(Setup=Setup, Fuzz=Fuzz, instrument_imports=instrument_imports)
for name in ("foreign", "grows", "sound"):
    print(name, file=sys.stderr)
    runner._by_coverage(name, 1, 60, 0, None)
limit = next(int(option.partition("=")[2]) for option in given["options"] if "rss_limit" in option)
assert runner._peak() >> 20 < limit < (runner._peak() >> 20) + 201, (limit, runner._peak())
"""
)


def test_each_kind_of_fault_is_found(tmp_path):
    done = run(tmp_path, "-c", FAULTS)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert counts.pop("sound") == "1 0"
    assert set(counts.values()) == {"1 1"}, counts
    assert not (tmp_path / "elsewhere").exists()
    assert len(list(tmp_path.iterdir())) == len(counts) + 1  # each input is kept
    for said in (
        "KeyError",
        "os.remove",
        "elsewhere is opened for writing",
        "os.system",
        "kept is deleted",
        "too long",
        "1 GB of memory",
    ):
        assert said in done.stderr


def test_guided_by_coverage_the_same_limits_hold(tmp_path):
    done = run(tmp_path, "-c", BY_COVERAGE)
    assert done.returncode == 0, done.stderr
    said = re.split(r"^(?:foreign|grows|sound)$", done.stderr, flags=re.M)
    assert ["KeyError" in said[1], "1 GB of memory" in said[2], said[3].strip()] == [True, True, ""], said


@pytest.mark.large
def test_no_input_is_a_finding(tmp_path):
    done = run(tmp_path, "-m", "tests.fuzz", "all", "--seconds", "1.5", "--runs", "5000")
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(re.findall(r"^([a-z-]+): ([0-9,]+) runs", done.stdout, re.M))
    assert counts.keys() == TARGETS.keys()
    assert all(int(count.replace(",", "")) > 20 for count in counts.values()), counts


def native_run(tmp_path, target, text=None, lanes=8):
    if not native.compiler():
        pytest.skip("there is no Clang with a fuzzer's library")
    # the longest texts take minutes to optimize, and 300 runs seconds without
    level = "-O0" if target.startswith(("token", "gradients")) else "-O1"
    program = native.compiled(target, tmp_path, lanes, text, level)
    (tmp_path / "found").mkdir()
    with contextlib.chdir(tmp_path / "found"):
        return native.fuzz(program, target, 300, 60, 1, None), [*(tmp_path / "found").iterdir()]


@pytest.mark.large
@pytest.mark.toolchain
@pytest.mark.parametrize(
    "target", ["recurrence-gru", "adjoint-slstm", "elementwise", "gradients", "token-gru"]
)
def test_the_cpu_backends_own_text_has_no_finding(target, tmp_path):
    assert native_run(tmp_path, target) == (0, [])


@pytest.mark.large
@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("sound", "broken"),
    [
        ("const int left = count - i * LANES;", "const int left = LANES;"),  # beyond the arrays' ends
        ("t < to; ++t, u +=", "t < to - (call.threads > 1); ++t, u +="),  # a step left out by threads
    ],
)
def test_a_broken_text_is_found(sound, broken, tmp_path):
    text = native.TEXTS["recurrence-gru"]()
    assert sound in text
    status, kept = native_run(tmp_path, "recurrence-gru", text.replace(sound, broken))
    assert status
    assert len(kept) == 1
