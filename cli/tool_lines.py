"""What a terminal shows of the tools that a model uses, on stderr: one dim line a turn, or all of it."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.pocket.events import (
    Call,
    CommandGiven,
    Event,
    Finish,
    Observation,
    Result,
    Text,
    Thought,
)

if TYPE_CHECKING:
    from rich.status import Status

PATIENCE = 1.0  # seconds before it is shown how far a turn has got
WIDEST = 60  # characters of arguments or of a result in the dim line
ShowTools = Annotated[
    bool,
    typer.Option(
        "--show-tools", help="Show everything that a model with tools thinks, reads and calls, on stderr."
    ),
]


def check_shows_tools(show_tools: bool, uses_tools: bool) -> None:
    """Refuse --show-tools where there is nothing to show."""
    if show_tools and not uses_tools:
        raise PararnnError("this model uses no tools; leave out --show-tools")


class ToolLines:
    """Shows the events of one turn after another; the answer itself is not its business.

    Args:
        unfold: show each event on a line of its own. Else a terminal gets one dim line before the answer, and
            anything that is no terminal gets nothing.
    """

    def __init__(self, unfold: bool) -> None:
        self._unfold = unfold
        self._status: Status | None = None
        self._begin()

    def show(self, event: Event) -> None:
        """Take notice of an event; it is called before a piece of the answer is printed."""
        if self._unfold:
            self._show_all(event)
        elif on_terminal():
            self._fold(event)
        if isinstance(event, Finish):
            self._begin()

    def __enter__(self) -> "ToolLines":
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._begin()

    def _begin(self) -> None:
        if self._status is not None:
            self._status.stop()
        self._status, self._start = None, time.monotonic()
        self._calls: list[str] = []
        self._commands, self._written, self._thought = 0, False, ""

    def _fold(self, event: Event) -> None:
        self._progress(event)
        if isinstance(event, CommandGiven):
            self._commands += 1
        elif isinstance(event, Call):
            self._calls.append(f"{printable(event.name)} {short(event.arguments)}")
        elif isinstance(event, Result):
            self._calls[-1] += f" → {short(event.text)}"
        elif isinstance(event, Text | Finish) and not self._written:
            self._written = True
            pointers = [f"{self._commands:,} steps"] if self._commands else []
            if parts := [*self._calls, *pointers]:
                typer.secho(" · ".join(parts), dim=True, err=True)

    def _progress(self, event: Event) -> None:
        """How far a turn has got, once it has taken a second and until it answers."""
        if self._written or isinstance(event, Text | Finish):
            if self._status is not None:
                self._status.stop()
            self._status = None
        elif self._status is not None:
            self._status.update(f"{event.tokens:,} tokens", spinner_style="dim")
        elif time.monotonic() - self._start > PATIENCE:
            from rich.console import Console  # a tenth of a second, which short turns do without

            self._status = Console(stderr=True).status(f"{event.tokens:,} tokens", spinner_style="dim")
            self._status.start()

    def _show_all(self, event: Event) -> None:
        if isinstance(event, Thought):
            self._thought += event.text
            return
        if self._thought:
            self._line("thinks", self._thought)
            self._thought = ""
        match event:
            case CommandGiven(command=command):
                self._line(command.action, f"pointer {command.pointer}")
            case Observation(name=name):
                self._line("sees", name)
            case Call(name=name, arguments=arguments):
                self._line("calls", f"{name} {arguments}")
            case Result(text=text, failed=failed):
                self._line("fails" if failed else "result", text)
            case Finish(reason=reason, tokens=tokens, made=made, seconds=seconds):
                self._line("ends", f"{reason}; {tokens:,} tokens, {made:,} of them made; {seconds:.2f} s")

    def _line(self, kind: str, text: str) -> None:
        typer.secho(f"{kind:>8}  {printable(text)}", dim=True, err=True)


def on_terminal() -> bool:
    """Whether somebody sees stderr."""
    return sys.stderr.isatty()


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short(text: str) -> str:
    """The beginning of a text, on one line."""
    line = printable(text)
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 1]}…"


def why_it_ended(reason: str | None) -> str | None:
    """A sentence for a turn that a limit has ended."""
    return {
        "length": "the answer has reached its limit (--max-tokens)",
        "steps": "stopped: too many steps without an end",
        "time": "stopped: it took too long",
    }.get(reason or "")


def say_why(reason: str | None) -> None:
    """That sentence, on stderr, if there is one."""
    if sentence := why_it_ended(reason):
        print(f"({sentence})", file=sys.stderr)
