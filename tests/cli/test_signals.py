"""A signal ends `generate` and `chat` in time, whatever native code does."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.demo import DEMO

COMMAND = [sys.executable, "-m", "mlx_pararnn"]

# Native code that never ends and keeps the interpreter, while a text is read or while the model computes.
HANGING = {
    "reading": """
import collections, itertools
import mlx_pararnn.chat.session, mlx_pararnn.generation
def hang(text):
    print("hangs", flush=True)
    collections.deque(itertools.repeat(0), 0)
mlx_pararnn.chat.session.check_text = mlx_pararnn.generation.check_text = hang
""",
    "computing": """
import collections, itertools
from mlx_pararnn import Model
call = Model.__call__
def hang(self, inputs, **kwargs):
    if 120 in inputs.tolist()[0]:  # x, which no model reads while it is loaded
        print("hangs", flush=True)
        collections.deque(itertools.repeat(0), 0)
    return call(self, inputs, **kwargs)
Model.__call__ = hang
""",
}


def hanging(where, folder, monkeypatch, *arguments):
    (folder / "hanging.py").write_text(HANGING[where])
    monkeypatch.chdir(folder)
    command = [*COMMAND, *arguments, "--import", "hanging"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if arguments[0] == "chat":
        process.stdin.write("x\n")
        process.stdin.flush()
    assert process.stdout.readline() == "hangs\n"
    time.sleep(0.5)  # it says so just before it does
    return process


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [["generate", DEMO, "-p", "x"], ["chat", DEMO]], ids=lambda c: c[0])
@pytest.mark.parametrize("where", HANGING)
def test_a_signal_ends_it(where, command, number, tmp_path, monkeypatch):
    process = hanging(where, tmp_path, monkeypatch, *command)
    process.send_signal(number)
    if (where, command[0], number) == ("computing", "chat", signal.SIGINT):
        with pytest.raises(subprocess.TimeoutExpired):  # an answer that takes long is waited for
            process.wait(timeout=5)
        process.send_signal(number)
    process.wait(timeout=5)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.large
@pytest.mark.parametrize("where", HANGING)
def test_a_second_one_ends_it_at_once(where, tmp_path, monkeypatch):
    process = hanging(where, tmp_path, monkeypatch, "chat", DEMO)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    process.wait(timeout=3)
    assert process.returncode == -signal.SIGKILL
