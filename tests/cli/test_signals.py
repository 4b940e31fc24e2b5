"""A signal ends every command at any moment; `generate` and `chat` in time, whatever native code does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from safetensors.numpy import load_file

from mlx_pararnn.cli.app import COMMANDS
from mlx_pararnn.convert.coreai.aimodel_check import verify_package as verify_aimodel
from mlx_pararnn.loading import load_model
from tests.support.demo import DEMO
from tests.support.golden import golden_file
from tests.support.image_models import image_model, write_image_model
from tests.support.serving import folder_of
from tests.support.terminal import Terminal
from tests.support.training_runs import SMALL, TEXT, small_model

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
    else:
        process.stdin.close()
    assert process.stdout.readline() == "hangs\n"
    time.sleep(0.5)  # it says so just before it does
    return process


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


@pytest.mark.large
def test_a_text_without_an_end_is_read_until_ctrl_c(tmp_path):
    """As zeros never end; a terminal sees how many tokens it were so far."""
    folder = folder_of(tmp_path / "small", small_model(num_hidden_layers=1, hidden_size=2, num_heads=1))
    terminal = Terminal("generate", folder, "-f", os.devnull.replace("null", "zero"), columns=120)
    terminal.wait_for(r"reading the prompt: \d+,\d{3},\d{3} tokens so far")
    terminal.type("\x03")
    assert terminal.exit_code(seconds=10) == 130
    assert terminal.text.split() == ["interrupted"]


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_the_middle_of_a_text(number, tmp_path):
    folder = folder_of(tmp_path / "small", small_model(num_hidden_layers=1, hidden_size=2, num_heads=1))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*COMMAND, "generate", folder], **streams) as process:
        process.stdin.write(b"x" * 300_000)  # which no pipe holds
        process.stdin.flush()
        process.send_signal(number)
        assert process.wait(timeout=5) == 128 + number
        assert process.stdout.read() == b""
        assert process.stderr.read() == (b"interrupted\n" if number == signal.SIGINT else b"")


# The command line as it starts, from where Python itself is up.
HANDLED = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):  # whatever the caller of the tests ignores
    signal.signal(number, signal.SIG_DFL)
"""
READY = f"""{HANDLED}
os.write(1, b"ready\\n")
from mlx_pararnn.__main__ import main
main()
"""
CHECKPOINT = golden_file("lm/paragru_s64/state_dict.pt")
EVERY_COMMAND = {
    "convert": ["convert", CHECKPOINT, "-o", "out", "--tokenizer", "bytes"],
    "convert -q": ["convert", CHECKPOINT, "-o", "out", "-q", "--q-group-size", "32", "--tokenizer", "bytes"],
    "convert --to coreml": ["convert", CHECKPOINT, "-o", "out", "--to", "coreml", "--tokenizer", "bytes"],
    "convert --to coreai": ["convert", CHECKPOINT, "-o", "out", "--to", "coreai", "--tokenizer", "bytes"],
    "convert --to torch": ["convert", DEMO, "-o", "out", "--to", "torch"],
    "add-tokenizer": ["add-tokenizer", "model", "bytes"],
    "generate": ["generate", DEMO, "-p", "x", "-m", "300"],
    "draw": ["draw", "a", "-o", "picture.png", "--model", "images"],
    "chat": ["chat", DEMO, "-m", "300"],
    "serve": ["serve", DEMO, "--port", "0"],
    "train": ["train", "data.txt", "-o", "out", "--config", "train.yaml"],
    "verify": ["verify", DEMO],
    "inspect": ["inspect", DEMO],
    "bench": ["bench", DEMO],
    "lm generate": ["lm", "generate", "--model", DEMO, "--prompt", "x", "-m", "300"],
    "doctor": ["doctor"],
    "cache": ["cache"],
}
LONGEST = 6.0  # seconds in which commands without an end are sent their signal


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("templates")
    (folder / "data.txt").write_text(TEXT)
    settings = {"steps": 100_000, "batch_size": 2, "length": 32, "save_every": 2, "model": SMALL}
    (folder / "train.yaml").write_text(json.dumps(settings))  # JSON is YAML too
    write_image_model(image_model(), folder / "images")
    shutil.copytree(DEMO, folder / "model")
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    return folder


@contextmanager
def begun(command, folder):
    """The command, which does not outlive this context."""
    process = subprocess.Popen(
        [sys.executable, "-c", READY, *map(str, EVERY_COMMAND[command])],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    with process:
        try:
            if command == "chat":
                with suppress(BrokenPipeError):
                    process.stdin.write("def main(\nimport os\n/save talk\n" * 20)
                    process.stdin.flush()
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def in_a_copy(templates, tmp_path, number):
    return shutil.copytree(templates, tmp_path / str(number))


def test_every_command_is_among_them():
    assert {line.split()[0] for line in EVERY_COMMAND} == COMMANDS.keys()


@pytest.mark.large
@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_a_signal_at_a_random_moment_of_every_command(command, templates, tmp_path):
    """It ends in time and without a traceback, and what it leaves is whole."""
    for word, module in (("coreml", "coremltools"), ("coreai", "coreai")):
        if word in command:
            pytest.importorskip(module)
    chance = random.Random(command)
    start = time.monotonic()
    folder = in_a_copy(templates, tmp_path, "whole")
    with begun(command, folder) as process:
        try:
            process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
    took = time.monotonic() - start
    if process.returncode == 0 and "-o" in EVERY_COMMAND[command] and command != "draw":
        load_out(command, folder / "out")
    for number, name in enumerate([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]):
        folder = in_a_copy(templates, tmp_path, number)
        with begun(command, folder) as process:
            time.sleep(chance.uniform(0, took))
            process.send_signal(name)
            sent = time.monotonic()
            said = process.communicate(timeout=60)[1]
        if (command, name) != ("chat", signal.SIGINT):  # which ends an answer, and the conversation goes on
            assert time.monotonic() - sent < 10, name  # 5 on a machine without other work
        ends = {0, -name, 128 + name}
        if command == "train":
            ends.add(130)
        assert process.returncode in ends, said
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        if (folder / "out").exists():
            load_out(command, folder / "out")
        if (folder / "picture.png").exists():
            assert (folder / "picture.png").stat().st_size > 0
        if process.returncode >= 0:
            assert not [path.name for path in folder.glob(".*")]


# What a program imports, and in which a signal comes while an object goes, where Python drops exceptions.
DROPPING = """
import os, signal
class Group:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
Group()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("command", ["serve", pytest.param("chat", marks=pytest.mark.large)])
def test_a_signal_whose_exception_is_dropped_ends_it(command, name, tmp_path, monkeypatch):
    (tmp_path / "dropping.py").write_text(DROPPING.format(name=name))
    monkeypatch.setitem(EVERY_COMMAND, command, [*EVERY_COMMAND[command], "--import", "dropping"])
    with begun(command, tmp_path) as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, name)
    assert said == ("interrupted\n" if name == "SIGINT" else "")


# The same while a native module comes: Python's own calls of its loader are watched.
LOADING = """
from mlx_pararnn.__main__ import main
from importlib.machinery import ExtensionFileLoader
load = ExtensionFileLoader.exec_module
def exec_module(self, module):
    if module.__name__ == "mlx.core":
        os.kill(os.getpid(), signal.{name})
    load(self, module)
ExtensionFileLoader.exec_module = exec_module
sys.argv = ["mlx-pararnn", "doctor"]
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_while_native_code_is_loaded_ends_it(name):
    program = HANDLED + LOADING.format(name=name)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-getattr(signal, name), "", "")


# What Ctrl-C in a terminal does: the compiler gets it too.
INTERRUPTED_COMPILER = """#!/bin/sh
kill -INT $PPID
{ends}
"""


@pytest.mark.parametrize("ends", ["kill -INT $$", pytest.param("exit 130", marks=pytest.mark.large)])
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["serve", "--port", "0"], 0, "Stopped.\n"),
        pytest.param(["generate", "-p", "1 + 2"], 130, "interrupted\n", marks=pytest.mark.large),
    ],
    ids=["in a thread", "in the main one"],
)
def test_ctrl_c_while_a_kernel_is_compiled_says_nothing_about_the_compiler(
    command, code, said, ends, tmp_path
):
    compiler = tmp_path / "c++"
    compiler.write_text(INTERRUPTED_COMPILER.format(ends=ends))
    compiler.chmod(0o700)
    cache = tmp_path / "cache"
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(cache)}
    program = HANDLED + "from mlx_pararnn.__main__ import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def load_out(command, out):
    if "coreml" in command:
        from coremltools.models.utils import load_spec

        described = load_spec(str(out / "model.mlpackage")).description.metadata.userDefined["pararnn"]
        assert json.loads(described) == json.loads((out / "pararnn.json").read_text())
    elif "coreai" in command:
        assert all(check.passed for check in verify_aimodel(out))
    elif "torch" in command:
        written, given = (load_file(folder / "model.safetensors") for folder in (out, DEMO))
        head = given["model.embed_tokens.weight"].size  # which is the embedding, and stands there twice
        assert sum(w.size for w in written.values()) == sum(w.size for w in given.values()) + head
        assert (out / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    elif command != "train" or (out / "model.safetensors").exists():
        load_model(out)
