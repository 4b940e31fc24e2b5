"""What holds for every command: its streams, paths, interrupts, and errors that are nobody's."""

import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.cli.app import app
from tests.support.golden import golden_file

COMMAND = [sys.executable, "-m", "mlx_pararnn"]


@pytest.fixture
def checkpoint():
    return golden_file("lm/paragru_s64/state_dict.pt")


@pytest.mark.large
@pytest.mark.parametrize("closed", ["2>&-", "<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, checkpoint, tmp_path):
    text = f'exec "$@" {closed}'
    arguments = ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--tokenizer", "none"]
    done = subprocess.run(["sh", "-c", text, "sh", *COMMAND, *arguments], check=False)
    assert done.returncode == 0
    assert (tmp_path / "out/config.json").exists()
    if closed == "<&-":  # a file that a library opens gets no number of a stream
        arguments = [str(tmp_path / "out"), "--json"]
        done = subprocess.run(["sh", "-c", text, "sh", *COMMAND, "verify", *arguments], check=False)
        assert done.returncode == 0


def test_a_tilde_is_the_home_folder_in_every_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    run = CliRunner().invoke
    arguments = ["convert", "~/model.pt", "--output=~/out", "--config=~/config.json", "--tokenizer", "none"]
    assert run(app, arguments).exit_code == 0
    assert '"eos_token_id": 3' in (tmp_path / "out/config.json").read_text()
    assert run(app, ["inspect", "~/out"]).exit_code == 0
    assert run(app, ["verify", "~/out", "--against=~/model.pt"]).exit_code == 0
    assert "owner/name" not in run(app, ["generate", "~/out", "-p", "a"]).stderr
    assert run(app, ["convert", "~/model.pt", "-o", "~/x", "--tokenizer", "~/none"]).stderr.startswith(
        f"error: {tmp_path}/none: no such folder"
    )


INTERRUPTED = """
import os, signal, sys
wanted = sys.argv.pop(1)
def hook(event, arguments):
    global wanted
    if event == "import" and arguments[0] == wanted:
        wanted = None
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
from mlx_pararnn.__main__ import main
main()
"""


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "imported", ["typer", "mlx_pararnn.cli.report", "mlx_pararnn.convert.to_mlx", "numpy"]
)
def test_ctrl_c_while_something_is_imported(imported, checkpoint, tmp_path):
    arguments = ["convert", checkpoint, "-o", tmp_path / "out", "--tokenizer", "none"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, imported, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) in ((-signal.SIGINT, ""), (130, "interrupted\n"))
    assert not (tmp_path / "out").exists()


def test_a_panic_of_a_rust_library_is_one_sentence(monkeypatch, checkpoint, tmp_path):
    class PanicException(BaseException):
        """As pyo3_runtime's."""

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("mlx_pararnn.convert.to_mlx.convert_to_mlx", panic)
    arguments = ["convert", str(checkpoint), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: a library failed on this input: index out of bounds\n",
    )
    with pytest.raises(PanicException):
        CliRunner().invoke(app, [*arguments, "--debug"])


def test_version():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mlx-pararnn {mlx_pararnn.__version__}\n"
    assert mlx_pararnn.__version__[0].isdigit()
