"""Nothing is sent anywhere: importing a module opens no connection, nor does a command on local files."""

import json
import shutil
import subprocess
import sys

import pytest

from mlx_pararnn.cli.app import COMMANDS
from tests.support.demo import DEMO
from tests.support.golden import golden_file
from tests.support.image_models import image_model, write_image_model
from tests.support.serving import request, running
from tests.support.training_runs import SMALL, TEXT

pytestmark = pytest.mark.large

# What Python's own sockets do is seen; a library's native code is not.
WATCHED = """
import ipaddress, os, socket, sys

def is_address(host):
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False

def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        if event == "socket.getaddrinfo" and is_address(arguments[0]):
            return  # a number is no name, and asks nobody
        if event != "socket.connect" or arguments[0].family in (socket.AF_INET, socket.AF_INET6):
            os.write(2, f"{event} {arguments[1:]}".encode())
            os._exit(1)  # in whichever thread it is

sys.addaudithook(hook)
"""
IMPORTING = """
import importlib, pkgutil
import mlx_pararnn

names = [module.name for module in pkgutil.walk_packages(mlx_pararnn.__path__, "mlx_pararnn.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
RUNNING = """
import json
from typer.testing import CliRunner
from mlx_pararnn.cli.app import app

for arguments, given in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments, input=given)
    assert result.exit_code == 0, (arguments, result.exit_code, result.stderr, result.exception)
    print(arguments[0])
"""


def watched(code, *arguments, **options):
    command = [sys.executable, "-c", WATCHED + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_the_watch_sees_a_connection():
    done = watched("socket.create_connection(('127.0.0.1', 9))")
    assert (done.returncode, "socket." in done.stderr) == (1, True)
    done = watched("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')")
    assert (done.returncode, "socket." in done.stderr) == (1, True)


def test_no_module_opens_a_connection_as_it_is_imported():
    done = watched(IMPORTING)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_no_command_opens_one(tmp_path):
    model = str(DEMO)
    write_image_model(image_model(), tmp_path / "images")
    (tmp_path / "data.txt").write_text(TEXT)
    settings = {"steps": 2, "batch_size": 2, "length": 32, "model": SMALL}
    (tmp_path / "train.yaml").write_text(json.dumps(settings))  # JSON is YAML too
    shutil.copytree(DEMO, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    checkpoint = str(golden_file("lm/paragru_s64/state_dict.pt"))
    commands = [
        # First, as it imports all of transformers, which others begin without.
        (["lm", "generate", "--model", model, "--prompt", "x", "-m", "2"], ""),
        (["convert", checkpoint, "-o", "out", "--tokenizer", "bytes"], ""),
        (["add-tokenizer", "model", "bytes"], ""),
        (["generate", model, "-p", "x", "-m", "2"], ""),
        (["generate", "-p", "2 + 3", "-m", "20"], ""),
        (["draw", "a", "-o", "picture.png", "--model", "images"], ""),
        (["chat", model, "-m", "2"], "x\n/save talk\n"),
        (["train", "data.txt", "-o", "trained", "--config", "train.yaml"], ""),
        (["inspect", model], ""),
        (["verify", model], ""),
        (["bench", model, "--only", "decode", "-c", "0", "-g", "2", "-n", "1"], ""),
        (["doctor"], ""),
        (["cache"], ""),
    ]
    assert {arguments[0] for arguments, _ in commands} == COMMANDS.keys() - {"serve"}
    done = watched(RUNNING, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [arguments[0] for arguments, _ in commands]


def test_a_server_opens_none_as_it_answers(monkeypatch):
    serve = "sys.argv[0] = 'mlx-pararnn'\nfrom mlx_pararnn.__main__ import main\nmain()"
    monkeypatch.setattr("tests.support.serving.COMMAND", [sys.executable, "-c", WATCHED + serve, "serve"])
    said = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    with running(DEMO) as server:
        assert request(server, "GET", "/v1/models")[0] == 200
        assert request(server, "POST", "/v1/chat/completions", said)[0] == 200
        code, last = server.stop()
    assert (code, "socket." in last) == (0, False), last
