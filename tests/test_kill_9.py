"""kill -9 at 50 random moments of everything that is written: it is absent, or complete and loads."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.large


def killed(what: str, folder: Path) -> list[str]:
    """What tests.support.killed_writing prints."""
    command = [sys.executable, "-m", "tests.support.killed_writing", what, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("form", ["as it is", "quantized"])
def test_a_conversion(form, tmp_path):
    assert killed(form, tmp_path) == ["50 [False, True]", "['out']"]


@pytest.mark.parametrize(
    ("what", "times", "needed"),
    [("coreml", 50, "coremltools"), ("whole coreml", 8, "coremltools"), ("coreai", 50, "coreai")],
)
def test_an_export(what, times, needed, tmp_path):
    pytest.importorskip(needed)
    moments, left = killed(what, tmp_path)[-2:]
    assert moments.startswith(f"{times} [")
    assert "True" in moments  # eight kills may all come before it is there
    assert left == "['out']"


def test_a_training_run_resumes_to_the_same_bits(tmp_path):
    moments, left = killed("training", tmp_path)
    assert moments.startswith("50 ")
    assert "(True, False)" in moments  # killed in the middle
    assert left == "['out']"


def test_a_saved_conversation(tmp_path):
    assert killed("conversations", tmp_path) == ["50 [False, True]", "['talk.safetensors']"]


def test_states_of_the_server(tmp_path):
    moments, left = killed("states", tmp_path)
    assert moments == "50 [False, True]"
    assert left == "12"
