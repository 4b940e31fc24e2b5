"""`chat` as a person has it, on the screen of a terminal emulator."""

import os
import shutil
import stat

import pytest

from mlx_pararnn.files.hub import BUNDLED
from tests.support.demo import DEMO
from tests.support.terminal import Terminal

PROMPT = r"^> *\s*\Z"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def open_chat(home, *arguments, model=DEMO, **more):
    terminal = Terminal("chat", model, *arguments, XDG_STATE_HOME=str(home), **more)
    terminal.wait_for(PROMPT)
    return terminal


def leave(terminal):
    terminal.wait_for(PROMPT)  # before it, the terminal itself would take Ctrl-D
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_pasted_lines_are_one_message_and_a_history(home):
    """Blank lines too; in the history file, which is the user's alone, until there is to be none."""
    terminal = open_chat(home, "-m", "3")
    terminal.paste("/first\n\nthird\n")
    terminal.wait_for("third")
    terminal.type("\r")
    terminal.wait_for(r"third\n[\s\S]*\n> *\s*\Z")
    terminal.type("/stats\r")
    said = terminal.wait_for(r"(\d+) tokens so far.*1 to /undo")
    assert int(said[1]) == len("/first\n\nthird") + 3
    leave(terminal)
    file = home / "mlx-pararnn" / "chat_history"
    assert "+/first\n+\n+third\n" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    terminal = open_chat(home, "--no-history")
    terminal.type("\x1b[A/sta\t\r")  # there is no earlier line; Tab completes a command
    terminal.wait_for("0 tokens so far")
    leave(terminal)
    assert "/stats" in file.read_text()
    assert file.read_text().count("+/stats") == 1


@pytest.mark.large
def test_several_lines_by_quotes_and_by_alt_enter(home):
    terminal = open_chat(home, "-m", "1")
    terminal.type('"""one\r\rtwo"""\r')
    terminal.wait_for(r'two"""\n[\s\S]*\n> *\s*\Z')
    terminal.type("three\x1b\rfour\r")
    terminal.wait_for(r"four\n[\s\S]*\n> *\s*\Z")
    terminal.type("/stats\r")
    assert int(terminal.wait_for(r"(\d+) tokens so far")[1]) == len("one\n\ntwo") + len("three\nfour") + 2
    leave(terminal)


@pytest.mark.large
def test_ctrl_c_stops_an_answer_drops_a_line_and_says_how_to_leave(home):
    terminal = open_chat(home, "-m", "100000", "--temp", "1.0", "--seed", "0", columns=60)
    terminal.type("def main(\r")
    terminal.wait_for(r"def main\(\n\s*\S")
    terminal.type("\x03")
    terminal.wait_for(r"\(stopped\)\n> *\s*\Z")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.type("\x03")
    terminal.wait_for(r"half a line\n> *\s*\Z")
    terminal.type("\x03")
    terminal.wait_for(r"Ctrl-D or /exit leaves\.\n> *\s*\Z")
    terminal.type("/stas\x1b[Dt\r")  # cursor left, insert
    assert int(terminal.wait_for(r"(\d+) tokens so far")[1]) > len("def main(")
    terminal.type("/exit\r")
    assert terminal.exit_code() == 0


@pytest.mark.large
def test_saving_asks_before_it_overwrites_and_undo_survives(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = open_chat(home, "-m", "2")
    for message in ("one", "two"):
        terminal.type(f"{message}\r")
        terminal.wait_for(rf"{message}\n[\s\S]*\n> *\s*\Z")
    for answer, said in (
        ("", r"Saved to talk\.safetensors"),
        ("n", "Not saved"),
        ("y", r"Saved to talk\.saf"),
    ):
        terminal.type("/save talk\r")
        if answer:
            terminal.wait_for(r"talk\.safetensors exists\. Overwrite it\? \[y/N\] *$")
            terminal.type(f"{answer}\r")
        terminal.wait_for(rf"{said}.*\n> *\s*\Z")
        terminal.type("\x0c")  # clears the screen
    leave(terminal)

    terminal = open_chat(home, "-m", "2", "--load", "talk")
    assert "Going on after 10 tokens." in terminal.text
    terminal.type("/load t\t\r")
    terminal.wait_for(r"talk\.safetensors\n")
    for taken in ("two", "one"):
        terminal.type("/undo\r")
        terminal.wait_for(f"Taken back: {taken}")
    leave(terminal)


@pytest.mark.large
def test_words_for_the_program_get_a_hint(home):
    terminal = open_chat(home)
    for line, said in (
        ("exit", r"/exit or Ctrl-D leaves\."),
        ("Help", r"> Help\n/help lists the commands\."),
        ("/?", "/system TEXT another system prompt"),
        ("/set temp 0.7", r"temp 0\.7, top-p 1, "),
        ("/set temp warm", "temp cannot be warm"),
        ("/stats", "0 tokens so far"),
    ):
        terminal.wait_for(PROMPT)
        terminal.type(f"{line}\r")
        terminal.wait_for(said)
    leave(terminal)


@pytest.mark.large
def test_an_answer_is_markdown_unless_plain_text_is_wanted(home, tmp_path):
    """The model repeats what it is told, which its template does for it."""
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (tmp_path / "says.py").write_text(
        "import mlx_pararnn.chat.session as session\n"
        "from mlx_lm.generate import GenerationResponse\n"
        "def stream(model, tokenizer, tokens, **more):\n"
        "    text = 'A **bold** word.\\n\\n* one\\n* two'\n"
        "    for i, c in enumerate(text):\n"
        "        end = 'stop' if i == len(text) - 1 else None\n"
        "        yield GenerationResponse(c, 1, None, False, 1, 1.0, i, 1.0, 1.0, end)\n"
        "session.stream_generate = stream\n"
    )
    for plain, seen in (
        ((), r"^A bold word\.\n\n • one\n • two\n> *\s*\Z"),
        (("--plain",), r"^A \*\*bold\*\* word\.\n\n\* one\n"),
    ):
        terminal = open_chat(home, "--import", "says", *plain, PYTHONPATH=pythonpath(tmp_path), model=folder)
        terminal.type("x\r")
        terminal.wait_for(seen)
        leave(terminal)


def pythonpath(folder):
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.large
def test_a_timer_rings_while_a_message_is_typed(home):
    terminal = open_chat(home, model=BUNDLED)
    terminal.type("set a timer for 2 seconds\r")
    terminal.wait_for(r"Timer set for 2 seconds\.")
    terminal.wait_for(PROMPT)
    terminal.type("show")
    terminal.wait_for(r"The timer is over\.\n> *show")
    terminal.type(" my timers\r")
    terminal.wait_for(r"You have no timers\.\s+> *\s*\Z")
    leave(terminal)
