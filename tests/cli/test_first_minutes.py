"""README's first commands, typed in its order on a terminal by someone who has read nothing else."""

import re
import shlex
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.terminal import Terminal

README = Path(__file__).parents[2] / "README.md"
PROMPT = r"^> *\s*\Z"


def commands():
    """The block's lines without their comments, as arguments of `mlx-pararnn`."""
    [block] = re.findall(r"The first minutes.*?```sh\n(.*?)```", README.read_text(), re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.mark.large
def test_a_sum_a_saved_talk_a_checkpoint_and_a_page(tmp_path, monkeypatch, capsys):
    """What each took is printed (pytest -s), and never judged: a machine may be busy."""
    chat, chat_on, convert, serve = commands()
    (tmp_path / "tests").symlink_to(README.parent / "tests")
    monkeypatch.chdir(tmp_path)
    took, begin = {}, time.monotonic()

    def took_so_long(name):
        nonlocal begin
        took[name], begin = time.monotonic() - begin, time.monotonic()

    terminal = Terminal("generate", "-p", f"{7**236} + {3**418}")
    assert terminal.exit_code() == 0
    assert str(7**236 + 3**418) in terminal.text.replace("\n", "")
    took_so_long("a sum of 200 digits")

    terminal = Terminal(*chat, XDG_STATE_HOME=str(tmp_path))
    assert terminal.wait_for(r"^Try: (.+)$")
    terminal.wait_for(PROMPT)
    terminal.type("add milk to my shopping list\r")
    terminal.wait_for(r"Added milk to your shopping list\.\s+> *\s*\Z")
    terminal.type("/save errands\r")
    terminal.wait_for(r"^Saved to errands\.safetensors")
    terminal.type("/exit\r")
    assert terminal.exit_code() == 0
    assert (tmp_path / "errands.safetensors").stat().st_size < 100_000
    terminal = Terminal(*chat_on, XDG_STATE_HOME=str(tmp_path))
    terminal.wait_for(r"Going on after \d+ tokens\.")
    terminal.wait_for(PROMPT)
    terminal.type("show my shopping list\r")
    terminal.wait_for(r"Shopping list: milk\.\s+> *\s*\Z")
    terminal.type("/exit\r")
    assert terminal.exit_code() == 0
    took_so_long("a saved talk")

    terminal = Terminal(*convert)
    assert terminal.exit_code() == 0
    assert (tmp_path / "my-model/model.safetensors").exists()
    took_so_long("a converted checkpoint")

    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > {shlex.quote(str(tmp_path / "opened"))}\n')
    (tmp_path / "browser").chmod(0o755)
    # Another port, where someone else's server may stand on that of README.
    terminal = Terminal(*serve, "--port", "0", BROWSER=str(tmp_path / "browser"))
    url = terminal.wait_for(r"http://127\.0\.0\.1:\d+")[0]
    with urllib.request.urlopen(url) as answer:
        assert b"<title>mlx-pararnn</title>" in answer.read()
    while not (tmp_path / "opened").exists():
        time.sleep(0.05)
    assert (tmp_path / "opened").read_text().startswith(url)
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    took_so_long("a page")
    with capsys.disabled():
        print("\n" + "; ".join(f"{name} {seconds:.1f} s" for name, seconds in took.items()))
