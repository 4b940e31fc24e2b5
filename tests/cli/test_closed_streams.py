"""stdin, stdout and stderr closed, each and all: every command does its work and says nothing wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from mlx_pararnn.cli import app
from tests.support.demo import DEMO
from tests.support.golden import golden_file
from tests.support.image_models import image_model, write_image_model
from tests.support.training_runs import SMALL, TEXT

CHECKPOINT = str(golden_file("lm/paragru_s64/state_dict.pt"))
MODEL = str(DEMO)
# What each does, and a file that it leaves.
COMMANDS = {
    "convert": (["convert", CHECKPOINT, "-o", "out", "--tokenizer", "bytes"], "out/model.safetensors"),
    "add-tokenizer": (["add-tokenizer", "model", "bytes"], "model/tokenizer.json"),
    "generate": (["generate", MODEL, "-p", "x", "-m", "2"], None),
    "generate from stdin": (["generate", MODEL, "-m", "2"], None),
    "draw": (["draw", "a", "-o", "picture.png", "--model", "images"], "picture.png"),
    "chat": (["chat", MODEL, "-m", "2"], None),
    "serve": (["serve", MODEL, "--port", "PORT"], None),
    "train": (["train", "data.txt", "-o", "out", "--config", "train.yaml"], "out/model.safetensors"),
    "verify": (["verify", MODEL], None),
    "inspect": (["inspect", MODEL], None),
    "bench": (["bench", MODEL, "--only", "decode", "-c", "32", "-g", "2", "-n", "1"], None),
    "lm": (["lm", "generate", "--model", MODEL, "--prompt", "x", "-m", "2"], None),
    "doctor": (["doctor"], None),
    "cache": (["cache"], None),
}
CLOSED = {"stdin": [0], "stdout": [1], "stderr": [2], "all": [0, 1, 2]}

# Each command in a process of its own, forked from one that has imported what they need: closed streams are
# None there, as Python starts with them.
FORKING = """
import json, os, signal, sys, time, urllib.request
import mlx_pararnn.chat.session, mlx_pararnn.training.run, mlx_pararnn.convert.to_mlx
import mlx_pararnn.chat.server, mlx_pararnn.tools.verification, mlx_pararnn.tools.benchmark
from mlx_pararnn.__main__ import main

def serving(port):
    for _ in range(1200):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
        except OSError:
            time.sleep(0.05)

codes = {}
for name, job in json.loads(sys.argv[1]).items():
    if not (child := os.fork()):
        os.chdir(job["folder"])
        for number, stream in enumerate(("stdin", "stdout", "stderr")):
            if number in job["closed"]:
                os.close(number)
                setattr(sys, stream, None)
            else:
                file = os.open(os.devnull if number == 0 else stream, os.O_RDWR | os.O_CREAT, 0o600)
                os.dup2(file, number)
                os.close(file)
        sys.argv = ["mlx-pararnn", *job["arguments"]]
        main()
        sys.exit(0)
    if job["port"]:
        assert serving(job["port"])
        os.kill(child, signal.SIGTERM)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def test_every_command_is_here():
    assert {arguments[0] for arguments, _ in COMMANDS.values()} == {*app.COMMANDS}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data.txt").write_text(TEXT)
    (folder / "train.yaml").write_text(
        json.dumps({"steps": 2, "batch_size": 2, "length": 32, "model": SMALL})  # JSON is YAML too
    )
    write_image_model(image_model(), folder / "images")
    shutil.copytree(DEMO, folder / "model")
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.large
@pytest.mark.parametrize("closed", CLOSED)
def test_every_command(closed, inputs, tmp_path):
    jobs = {}
    for name, (arguments, _) in COMMANDS.items():
        folder = shutil.copytree(inputs, tmp_path / name)
        port = free_port() if name == "serve" else None
        given = [str(port) if argument == "PORT" else argument for argument in arguments]
        jobs[name] = {
            "folder": str(folder),
            "arguments": given,
            "closed": CLOSED[closed],
            "port": port,
        }
    done = subprocess.run(
        [sys.executable, "-c", FORKING, json.dumps(jobs)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    codes = json.loads(done.stdout)
    said = {
        name: "".join((tmp_path / name / stream).read_text() for stream in ("stdout", "stderr")
                      if (tmp_path / name / stream).exists())
        for name in COMMANDS
    }  # fmt: skip
    # An empty prompt has nothing to go on from.
    assert codes == {name: int(name == "generate from stdin") for name in COMMANDS}, said
    for name, (_, file) in COMMANDS.items():
        assert "Traceback" not in said[name], said[name]
        assert "Exception ignored" not in said[name], said[name]
        assert file is None or (tmp_path / name / file).stat().st_size > 0
    if closed == "stdin":
        assert "the prompt is empty" in said["generate from stdin"]
        assert "Same numbers" in said["verify"]
