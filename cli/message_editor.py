"""The messages of `chat`: typed or pasted in a terminal, or the lines of a pipe."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_pararnn.errors import PararnnError

from .options import MAX_TEXT_BYTES, as_text, from_rank_0
from .report import launched_rank
from .tool_lines import printable

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
LONGEST_KEPT = 10_000  # characters of a message that goes into the history file


def read_messages(
    choices: Callable[[str], Iterable[str] | None],
    keep_history: bool,
    due: Callable[[], list[str]] = list,
) -> Iterator[str]:
    """One message after another, until the end of standard input.

    A terminal gets line editing, history and completion; a message has several lines when they are pasted,
    between triple quotes, or after Alt-Enter. From a pipe every line is a message.

    Args:
        choices: what may follow a command, or the commands themselves for ""; None for names of files.
        keep_history: read and write the history file.
        due: asked twice a second, while a terminal waits for a message, for lines to show with a bell.
    """
    own: Iterator[str] = iter(())
    if launched_rank():
        pass  # the messages are rank 0's
    elif sys.stdin.isatty():
        own = _typed(choices, keep_history, due)
    else:
        own = _lines()
    while (message := from_rank_0(lambda: next(own, None))) is not None:
        yield message


def history_file() -> Path:
    """Where messages are kept for the next time."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "mlx-pararnn" / "chat_history"


def _lines() -> Iterator[str]:
    while line := sys.stdin.buffer.readline(MAX_TEXT_BYTES + 1):
        if len(line) > MAX_TEXT_BYTES:
            raise PararnnError(
                f"a line of standard input is longer than {MAX_TEXT_BYTES >> 20} MB, too much for one message"
            )
        yield as_text(line).rstrip("\r\n")


def _typed(
    choices: Callable[[str], Iterable[str] | None], keep_history: bool, due: Callable[[], list[str]]
) -> Iterator[str]:
    import asyncio

    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import run_in_terminal
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=_history(keep_history),
        completer=_completer(choices),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_suspend=True,
        # The answers alone go to a file. Without an output of our own a dumb terminal is known as one.
        output=None if sys.stdout.isatty() else create_output(sys.stderr),
    )

    async def tell() -> None:
        while True:
            if lines := due():
                text = "\n".join(map(printable, lines))
                await run_in_terminal(partial(print, "\a" + text, file=sys.stderr, flush=True))
            await asyncio.sleep(0.5)

    def begin() -> None:
        session.app.create_background_task(tell())

    while True:
        try:
            yield without_quotes(session.prompt(pre_run=begin))
        except EOFError:
            return
        except KeyboardInterrupt:  # the line is dropped
            if not session.default_buffer.text:
                print("Ctrl-D or /exit leaves.", file=sys.stderr)


def is_open(text: str) -> bool:
    """Whether a text begins with triple quotes that are not closed yet."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 6 and text.endswith(QUOTES))


def without_quotes(text: str) -> str:
    """A message without the triple quotes around it, and without new lines at its ends."""
    if text.strip().startswith(QUOTES) and not is_open(text):
        text = text.strip()[3:-3]
    return text.strip("\n")


def _keys() -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(keep: bool) -> "History":
    """The history file's; in memory where there is to be none or it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            if len(string) <= LONGEST_KEPT:
                with suppress(OSError):  # a full disk ends no conversation
                    super().store_string(string)

    file = history_file()
    try:
        if not keep:
            return InMemoryHistory()
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", opener=lambda name, flags: os.open(name, flags, 0o600)):
            return Kept(file)
    except OSError:
        return InMemoryHistory()


def _completer(choices: Callable[[str], Iterable[str] | None]) -> "Completer":
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            command, space, word = text.partition(" ")
            found = choices(command if space else "")
            if found is None:
                yield from paths.get_completions(Document(word), complete_event)
            else:
                typed = word if space else text
                yield from (Completion(c, -len(typed)) for c in found if c.startswith(typed))

    return Commands()
