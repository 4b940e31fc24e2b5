"""The CPU backend's libraries as they are built: once, by whichever compiler, or not at all."""

import logging
import os
import re
import subprocess
import sys
import threading
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import PararnnError, get_cell, register_cell
from mlx_pararnn.cli.app import show_messages
from mlx_pararnn.compute import choice, cpu, cpu_build, gpu, texts
from mlx_pararnn.compute.recurrence import recurrence
from mlx_pararnn.tools import doctor
from tests.support.fresh_cache import fresh_cache
from tests.support.problems import problem

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.large
def test_who_sits_before_a_terminal_is_told_of_the_wait(monkeypatch, tmp_path, capsys):
    cell, params, u, _ = problem("nlru", T=5)
    logger = logging.getLogger("mlx_pararnn")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show_messages()
    for told in ("compiling recurrence-nlru-float32 for this CPU, once\n", ""):
        with fresh_cache(monkeypatch, tmp_path):
            recurrence(cell, mx.array(params), mx.array(u), backend="cpu")
        assert capsys.readouterr().err == told


@pytest.mark.large
def test_a_library_is_built_once_and_kept(monkeypatch, tmp_path):
    cell, params, u, _ = problem("nlru", T=5)
    arrays = mx.array(params), mx.array(u)
    with fresh_cache(monkeypatch, tmp_path):
        wanted = recurrence(cell, *arrays, backend="cpu")[0]
    (library,) = (tmp_path / "mlx-pararnn").iterdir()
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: pytest.fail("built again") if "-o" in a[0] else run(*a, **k)
    )
    with fresh_cache(monkeypatch, tmp_path):
        assert mx.array_equal(recurrence(cell, *arrays, backend="cpu")[0], wanted)
    monkeypatch.undo()
    library.unlink()  # it is still mapped: another file takes its name
    library.write_bytes(b"damaged")
    with fresh_cache(monkeypatch, tmp_path):
        assert mx.array_equal(recurrence(cell, *arrays, backend="cpu")[0], wanted)


run = subprocess.run


@pytest.mark.large
def test_other_flags_are_another_library(monkeypatch, tmp_path):
    cell, params, u, _ = problem("nlru", T=5)
    for flags in (["-O0"], ["-O1"]):
        monkeypatch.setattr(
            cpu_build, "_flags", lambda f=flags: ["-std=c++17", *f, "-shared", "-fPIC", "-pthread"]
        )
        with fresh_cache(monkeypatch, tmp_path):
            recurrence(cell, mx.array(params), mx.array(u), backend="cpu")
    assert len([*(tmp_path / "mlx-pararnn").iterdir()]) == 2


SOLVE = """
import mlx_pararnn, mlx.core as mx
from mlx_pararnn.compute.recurrence import recurrence
mx.set_default_device(mx.cpu)
cell = mlx_pararnn.get_cell("nlru")
u = mx.ones((1, 1, 4, 2, 8))
print(recurrence(cell, mx.zeros((1, 8)), u, backend="cpu")[0].sum().item())
"""


@pytest.mark.large
def test_processes_and_threads_build_at_once(monkeypatch, tmp_path):
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", SOLVE], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    printed = {process.communicate()[0] for process in started}
    assert len(printed) == 1
    assert all(process.returncode == 0 for process in started)

    cell, params, u, _ = problem("gru", T=5)
    params, u = mx.array(params), mx.array(u)
    mx.eval(params, u)
    answers = []
    with fresh_cache(monkeypatch, tmp_path):
        threads = [
            threading.Thread(
                target=lambda: answers.append(cpu.solve(cell, params, u, mx.zeros((2, 1, 6)), None, 0))
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4
    names = sorted(path.name.split("-")[1] for path in (tmp_path / "mlx-pararnn").iterdir())
    assert names == ["gru", "nlru"]  # and nothing half-built beside them


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("fault", ["no compiler", "text rejected", "folder of others"])
def test_what_cannot_be_built_means_ops_and_one_warning(fault, monkeypatch, tmp_path):
    cell, params, u, _ = problem("gru", T=20)
    arrays = mx.array(params), mx.array(u)
    wanted = np.array(recurrence(cell, *arrays, backend="ops")[0])
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        said = "no C\\+\\+ compiler; install one"
    elif fault == "text rejected":
        monkeypatch.setattr(texts, "cpu_text", lambda text, *_: text + "not C++;")
        said = "rejects recurrence-gru"
    else:
        (tmp_path / "mlx-pararnn").mkdir()
        (tmp_path / "mlx-pararnn").chmod(0o777)
        said = "can be written by other users"
    with fresh_cache(monkeypatch, tmp_path):
        with pytest.warns(RuntimeWarning, match=said) as warned:
            hidden, again = (np.array(recurrence(cell, *arrays)[0]) for _ in range(2))
        assert len(warned) == 1
        np.testing.assert_allclose(hidden, wanted, atol=2e-6)
        np.testing.assert_array_equal(hidden, again)
        with pytest.raises(PararnnError, match=said):
            recurrence(cell, *arrays, backend="cpu")
        report = {finding.item: finding for finding in doctor.examine()}
        assert report["backend cpu"].value.startswith("cannot be built")
        assert re.search(said, report["backend cpu"].advice)


@pytest.mark.parametrize("ends", ["kill -INT $$", "kill -TERM $$", "exit 130"])
def test_a_compiler_that_is_interrupted_is_no_verdict(ends, monkeypatch, tmp_path):
    """Nothing is said and nothing remembered of it: at the next call it compiles."""
    cell, params, u, _ = problem("gru", T=5)
    arrays = mx.array(params), mx.array(u)
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{ends}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    trials = dict(choice.TRIALS)
    with fresh_cache(monkeypatch, tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                recurrence(cell, *arrays)
            with pytest.raises(KeyboardInterrupt):
                recurrence(cell, *arrays, backend="cpu")
        assert trials == choice.TRIALS
        assert not [*(tmp_path / "mlx-pararnn").iterdir()]


def test_that_there_is_no_compiler_is_said_once(monkeypatch, tmp_path):
    cell, params, u, _ = problem("nlru", T=5)
    arrays = mx.array(params), mx.array(u)
    path = os.environ["PATH"]
    monkeypatch.delenv("CXX", raising=False)

    def run_here():
        with fresh_cache(monkeypatch, tmp_path), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            mx.eval(recurrence(cell, *arrays)[0])
        return len(said)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert [run_here(), run_here()] == [1, 0]
    with fresh_cache(monkeypatch, tmp_path):
        report = {finding.item: finding for finding in doctor.examine()}
        assert "no C++ compiler; install one" in report["backend cpu"].advice
    monkeypatch.setenv("PATH", path)
    assert run_here() == 0  # it compiles
    for library in (tmp_path / "mlx-pararnn").glob("*.so"):
        library.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [run_here(), run_here()] == [1, 0]  # the compiler is gone again
    (tmp_path / "mlx-pararnn/no-compiler.txt").unlink()
    assert run_here() == 1


def test_a_cell_may_have_any_name(monkeypatch, tmp_path):
    """It becomes part of a file's name here, of a function's on a GPU."""

    @register_cell
    class Odd(type(get_cell("nlru"))):
        name = "../odd cell-2"
        msl = texts.metal_text("cells", "nlru.h").replace("NLRU", "Odd")

    cell, u = get_cell(Odd.name), mx.ones((1, 1, 4, 2, 8))
    wanted = recurrence(get_cell("nlru"), mx.zeros((1, 8)), u, backend="cpu")[0]
    with fresh_cache(monkeypatch, tmp_path):
        hidden = recurrence(cell, mx.zeros((1, 8)), u, backend="cpu")[0]
    assert mx.array_equal(hidden, wanted)
    assert [path.suffix for path in (tmp_path / "mlx-pararnn").iterdir()] == [".so"]
    assert gpu.sequential_launch(cell, u.shape, u.dtype).name.isidentifier()


@pytest.mark.parametrize(
    ("what", "named", "before"), [("MSL", "Fancy", "// a\u00b2\n"), ("class's name", "Gr\u00f6\u00dfe", "")]
)
def test_a_text_that_is_not_ascii_is_refused(what, named, before):
    msl = before + texts.metal_text("cells", "nlru.h").replace("NLRU", "Fancy")
    register_cell(type(named, (type(get_cell("nlru")),), {"name": "fancy", "msl": msl}))
    with pytest.raises(PararnnError, match=f"the {what} of cell 'fancy' has '.'; write it in ASCII"):
        recurrence(get_cell("fancy"), mx.zeros((1, 8)), mx.ones((1, 1, 4, 2, 8)), backend="cpu")
