"""The bundled completion model, as its users have it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

import mlx_pararnn
from examples.completion import data, try_it
from mlx_pararnn.files.hub import COMPLETION

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("prefix", "next_one"),
    [
        ("import numpy as n", "p"),
        ("import os\n\n\ndef read(path):\n    with open(path) as f:\n        retu", "rn"),
        ("class Reader:\n    def __init__(self, path):\n        self.path = ", "path"),
        ("for name, value in values.ite", "ms()"),
    ],
)
def test_the_bundled_model_completes_python(prefix, next_one):
    assert mlx_pararnn.complete(prefix) == next_one


def test_a_suggestion_does_not_end_within_an_indentation():
    """Which is "   " and " return" to the model: three spaces alone would be seen by nobody, and wrong."""
    text = (ROOT / "mlx_pararnn" / "errors.py").read_text(encoding="utf-8")
    for place in [place for place, character in enumerate(text) if character in "\n "]:
        suggested = mlx_pararnn.complete(text[: place + 1], max_lines=3, min_probability=0.1)
        assert suggested == suggested.rstrip()


def test_its_card_and_its_notice():
    """The size that it is said to have, and every package that was learned from or measured with."""
    model, _ = mlx_pararnn.load(COMPLETION)
    card = (COMPLETION / "README.md").read_text(encoding="utf-8")
    state = sum(array.nbytes for layer in cache_of(model) for array in layer.cache)
    assert f"{state:,} bytes" in card
    notice = (COMPLETION / "NOTICE").read_text(encoding="utf-8").lower().replace("_", "-")
    for line in (data.TRAIN + data.HELD_OUT).split():
        if "==" in line:
            assert "{} {}, by ".format(*line.split("==")) in notice
    assert sum(file.stat().st_size for file in COMPLETION.iterdir()) < 4_000_000


def cache_of(model):
    cache = model.make_cache()
    mx.eval(model(mx.array([[1]]), cache=cache))
    return cache


@pytest.fixture
def editor(tmp_path):
    """The example's, in a terminal that waits for text; what it prints goes to `editor.kept`."""
    if sys.platform == "win32":
        pytest.skip("needs a pseudo-terminal")
    pytest.importorskip("pyte")
    from tests.support.terminal import Terminal

    kept = tmp_path / "kept.py"
    terminal = Terminal(module="examples.completion.try_it", output=kept, PYTHONPATH=str(ROOT))
    terminal.kept = kept
    terminal.wait_for("^Ctrl-D ends and prints the text again")
    terminal.wait_for("Tab takes it")
    return terminal


def test_python_is_completed_in_a_terminal(editor):
    """A file gets the text alone, each byte as it was typed, also what is not UTF-8."""
    editor.type("import numpy as n")
    editor.wait_for("import numpy as np")
    editor.type("\t\r")
    os.write(editor.fd, b"x = '\xe4\xc3\xa4'")
    editor.wait_for("x = '.*ä'")
    editor.type("\x04")
    assert editor.exit_code() == 0
    assert editor.kept.read_bytes() == b"import numpy as np\nx = '\xe4\xc3\xa4'\n"


def test_the_editor_indents_and_ctrl_c_ends_it(editor):
    editor.type("if x:\ry = 12345\rz")
    editor.wait_for("    y = 12345\n    z")
    editor.type("\x03")
    assert editor.exit_code() == 1
    assert "interrupted" in editor.text
    assert "Traceback" not in editor.text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage"),
        (["a", "b"], 2, "unrecognized arguments: b"),
        ([], 1, "error: this is an editor and needs a terminal"),
    ],
)
def test_the_editor_says_what_is_wrong(arguments, code, said):
    command = [sys.executable, "-m", "examples.completion.try_it", *arguments]
    done = subprocess.run(command, input="", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_editor_says_which_model_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["try_it", str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert str(try_it.main()).startswith(f"error: no config.json in {tmp_path}")


@pytest.mark.parametrize("prefix", [None, 5, b"def "])
def test_what_is_no_text_is_refused(prefix):
    with pytest.raises(mlx_pararnn.PararnnError, match="a text to complete is a str"):
        mlx_pararnn.complete(prefix)
