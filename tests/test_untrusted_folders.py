"""Python in a model folder is never run and nothing asks whether it may: every command, and the library."""

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.app import app
from tests.support.demo import DEMO
from tests.support.image_models import image_model, write_image_model
from tests.support.serving import request, running

EVIL = """\
open({ran!r}, "w")
from transformers import PreTrainedTokenizerFast as T, PretrainedConfig as C
"""


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def make_folder(tmp_path, kind="a file here"):
    """A sound model folder that names Python of its own, wherever transformers looks for it."""
    return make_evil(shutil.copytree(DEMO, tmp_path / "model"), kind)


def make_evil(folder, kind="a file here"):
    (folder / "evil.py").write_text(EVIL.format(ran=str(folder.parent / "ran")))
    name = "someone/else--evil.T" if kind == "another repository" else "evil.T"
    names = {"AutoTokenizer": [None, name], "AutoProcessor": name, "AutoConfig": "evil.C"}
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", **names}, model_file="evil.py")
    tokenizer_class = None if kind == "no tokenizer class" else "EvilTokenizer"
    auto_map = [name, name] if kind == "a list" else names
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer_class)
    return folder


def edit(file, **fields):
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def run(folder, *command, stdin="y\ny\ny\n"):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder.parent,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_nothing_asked_or_run(result, folder):
    assert not (folder.parent / "ran").exists()
    assert "[y/N]" not in result.stdout + result.stderr


@pytest.mark.parametrize("kind", ["a file here", "another repository", "a list", "no tokenizer class"])
def test_a_leftover_auto_map_of_any_kind_is_passed_over(tmp_path, kind, monkeypatch):
    folder = make_folder(tmp_path, kind)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    _, tokenizer = mlx_pararnn.load(folder)
    assert tokenizer.decode(tokenizer.encode("größer")) == "größer"
    assert not (tmp_path / "ran").exists()


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "model", "-p", "def main(", "-m", "2"),
        ("chat", "model", "-m", "2"),
        ("verify", "model"),
        ("inspect", "model"),
        ("bench", "model", "--only", "decode", "-c", "0", "-g", "1", "-n", "1"),
        ("convert", "model", "-o", "out", "--to", "torch"),
        ("add-tokenizer", "model", "bytes", "--force"),
        ("train", "data.txt", "-o", "out", "--init", "model", "--steps", "1", "--length", "8"),
        ("draw", "a", "-o", "picture.png", "--model", "model", "--steps", "1"),
    ],
    ids=lambda command: command[0],
)
def test_a_leftover_auto_map_is_passed_over(folder, command):
    """The tokenizer's files suffice."""
    if command[0] == "draw":
        shutil.copytree(
            write_image_model(image_model(), folder.parent / "images"), folder, dirs_exist_ok=True
        )
        make_evil(folder)
    (folder.parent / "data.txt").write_text("a text\n" * 200)
    result = run(folder, "-m", "mlx_pararnn.cli.app", *command)
    assert result.returncode == 0, result.stderr
    assert_nothing_asked_or_run(result, folder)


@pytest.mark.large
def test_a_leftover_auto_map_is_passed_over_by_the_server(folder):
    with running(folder) as server:
        status, _, said = request(server, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert status == 200, said
        assert "[y/N]" not in server.said
    assert not (folder.parent / "ran").exists()


def test_a_tokenizer_that_is_python_is_refused(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    result = CliRunner().invoke(app, ["generate", str(folder), "-p", "x"], input="y\ny\ny\n")
    assert result.exit_code == 1
    assert "is Python code (auto_map in tokenizer_config.json), which is never run" in result.stderr
    assert_nothing_asked_or_run(result, folder)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("command", ["generate", "benchmark", "fuse"])
def test_mlx_lms_commands_neither_ask_nor_run_it_without_their_flag(tmp_path, command):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.T"]},
        tokenizer_class="EvilTokenizer",
    )
    more = ("--prompt", "x") if command == "generate" else ()
    result = run(folder, "-m", "mlx_pararnn.cli.app", "lm", command, "--model", "model", *more)
    assert result.returncode != 0
    assert_nothing_asked_or_run(result, folder)


@pytest.mark.large
def test_mlx_lms_flag_still_works(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.T"]},
        tokenizer_class="EvilTokenizer",
    )
    command = ("lm", "generate", "--model", "model", "--prompt", "x", "-m", "1", "--trust-remote-code")
    run(folder, "-m", "mlx_pararnn.cli.app", *command)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"])
def test_chat_templates_cannot_reach_python(tmp_path, template):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    model, tokenizer = mlx_pararnn.load(folder)
    with pytest.raises(Exception, match="unsafe"):
        list(Chat(model, tokenizer).respond("x", max_tokens=1))
