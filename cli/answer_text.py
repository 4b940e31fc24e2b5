"""How the pieces of an answer are written: as they come, with whole words on a line, or as Markdown."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.segment import Segment

# Called with a piece of the text, and whether it is the last.
Write: TypeAlias = Callable[[str, bool], None]

REDRAWN = 0.08  # seconds between two pictures of an unfinished paragraph
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def answer_writer(markup: bool, plain: bool) -> AbstractContextManager[Write]:
    """A writer to stdout for one answer.

    Args:
        markup: the text is likely to be Markdown.
        plain: the text is wanted as it comes.
    """
    if not sys.stdout.isatty():
        return _as_it_is(lambda text: text)
    if plain:
        return _as_it_is(harmless)
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return _markdown() if markup and not dumb else _wrapped()


def harmless(text: str) -> str:
    """A text without the characters that would move a terminal's cursor or change its colours."""
    return text.translate(CONTROL)


def _put(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _as_it_is(changed: Callable[[str], str]) -> Iterator[Write]:
    yield lambda text, last: _put(changed(text))
    _put("\n")


@contextmanager
def _wrapped() -> Iterator[Write]:
    words = WordWrap(_put, lambda: shutil.get_terminal_size().columns)

    def write(text: str, last: bool) -> None:
        words.add(harmless(text))

    yield write
    words.finish()
    _put("\n")


class WordWrap:
    """Breaks lines between words; a word is written once it is known whether it fits.

    Args:
        put: takes the text with its line breaks.
        width: gives the columns of a line.
    """

    def __init__(self, put: Callable[[str], None], width: Callable[[], int]) -> None:
        self._put, self._width = put, width
        self._column = 0
        self._word = ""

    def add(self, text: str) -> None:
        """Take a piece of text."""
        from rich.cells import cell_len

        for character in text:
            if character == "\n":
                self.finish()
                self._put("\n")
                self._column = 0
            elif character.isspace():
                self.finish()
                self._space(character)
            elif cell_len(character) == 2 or cell_len(self._word) >= self._width():
                self.finish()  # between wide characters any place will do
                self._word = character
                self.finish()
            else:
                self._word += character

    def finish(self) -> None:
        """Write what was held back."""
        if not self._word:
            return
        from rich.cells import cell_len

        size, width = cell_len(self._word), self._width()
        if self._column and self._column + size > width:
            self._put("\n")
            self._column = 0
        self._put(self._word)
        self._column = (self._column + size) % width if self._column + size > width else self._column + size
        self._word = ""

    def _space(self, character: str) -> None:
        size = 8 - self._column % 8 if character == "\t" else 1
        if self._column + size < self._width():  # else the line ends here
            self._put(character)
            self._column += size
        else:
            self._column = self._width()


@contextmanager
def _markdown() -> Iterator[Write]:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
    text = MarkdownText(console, live)
    live.start()
    try:
        yield text.add
        text.finish()
    finally:
        live.stop()


class MarkdownText:
    """Markdown that is being written: complete paragraphs, and below them a picture of the unfinished one.

    Args:
        console: takes the complete ones.
        live: shows the last one, of which no more than fits the screen.
    """

    def __init__(self, console: "Console", live: "Live") -> None:
        self._console, self._live = console, live
        self._parser = _parser()
        self._text = ""
        self._printed = False
        self._drawn = 0.0
        self._finished = False

    def add(self, text: str, last: bool) -> None:
        """Take a piece of text."""
        if self._finished:
            return
        self._text += harmless(text)
        if last:
            self.finish()
            return
        tokens = self._parser.parse(self._text)
        starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
        if len(starts) > 1:
            lines = self._text.split("\n")
            self._print("\n".join(lines[: starts[-1]]))
            self._text = "\n".join(lines[starts[-1] :])
        if time.monotonic() - self._drawn > REDRAWN:
            self._live.update(self._picture(), refresh=True)
            self._drawn = time.monotonic()

    def finish(self) -> None:
        """Print what has not been printed; the text is complete."""
        if not self._finished:
            self._finished = True
            self._live.update("", refresh=True)
            self._live.stop()
            self._print(self._text)

    def _print(self, text: str) -> None:
        from rich.segment import SegmentLines

        if text.strip():
            self._console.print(SegmentLines(self._lines(text), new_lines=True), end="")
            self._printed = True

    def _picture(self) -> "RenderableType":
        """The last lines of the unfinished paragraph."""
        from rich.segment import SegmentLines

        room = max(self._console.height - 1, 1)
        return SegmentLines(self._lines(self._text)[-room:], new_lines=True)

    def _lines(self, text: str) -> "list[list[Segment]]":
        """A paragraph's lines, after one empty line where others stand above it."""
        lines = self._console.render_lines(self._rendered(text), pad=False)
        while lines and not "".join(segment.text for segment in lines[0]).strip():
            lines.pop(0)
        return [[], *lines] if self._printed else lines

    def _rendered(self, text: str) -> "RenderableType":
        from rich.markdown import Markdown

        document = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        document.parsed = [_with_line_breaks(token) for token in self._parser.parse(text)]
        return document


def _parser() -> "MarkdownIt":
    """As rich has it, but that HTML is text: rich leaves it out."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")


def _with_line_breaks(token: "Token") -> "Token":
    """A line break in a paragraph stays one: verses and addresses are written so."""
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token
