"""Nothing is sent anywhere: importing a module opens no connection, nor does a command on local files."""

import subprocess
import sys

import pytest

from tests.support.demo import DEMO
from tests.support.golden import golden_file

pytestmark = pytest.mark.large

# What Python's own sockets do is seen; a library's native code is not.
WATCHED = """
import socket, sys

def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        if event != "socket.connect" or arguments[0].family in (socket.AF_INET, socket.AF_INET6):
            raise SystemExit(f"{event} {arguments[1:]}")

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
COMMANDS = """
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
    import json

    model = str(DEMO)
    commands = [
        (
            [
                "convert",
                str(golden_file("lm/paragru_s64/state_dict.pt")),
                "-o",
                "out",
                "--tokenizer",
                "bytes",
            ],
            "",
        ),
        (["generate", model, "-p", "x", "-m", "2"], ""),
        (["generate", "-p", "2 + 3", "-m", "20"], ""),
        (["chat", model, "-m", "2"], "x\n/save talk\n"),
        (["inspect", model], ""),
        (["verify", model], ""),
        (["doctor"], ""),
        (["cache"], ""),
    ]
    done = watched(COMMANDS, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [arguments[0] for arguments, _ in commands]
