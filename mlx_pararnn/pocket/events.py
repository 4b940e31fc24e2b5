"""What happens in a turn of a model that uses tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line imports this file when it starts, and that one imports MLX
    from .protocol import Command

Reason = Literal["stop", "lost", "length", "steps", "time", "tool_calls"]


@dataclass(frozen=True)
class Event:
    """Something that has happened; `tokens` counts those of the turn so far, the message's included."""

    tokens: int


@dataclass(frozen=True)
class Thought(Event):
    """Text that the model has written for itself."""

    text: str


@dataclass(frozen=True)
class CommandGiven(Event):
    """A pointer command."""

    command: Command


@dataclass(frozen=True)
class Observation(Event):
    """What a read has shown: the token, and its name."""

    token: int
    name: str


@dataclass(frozen=True)
class Call(Event):
    """A function is to be called.

    Attributes:
        name, arguments: the arguments are JSON, as the model wrote it.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Result(Event):
    """What the model reads as a call's result, and whether it is an error."""

    text: str
    failed: bool


@dataclass(frozen=True)
class Text(Event):
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Finish(Event):
    """The turn is over; always the last event.

    Attributes:
        reason: "stop": the model has ended it; "lost": it has lost its way, and the answer says so;
            "length", "steps", "time": a limit of `Limits`; "tool_calls": the last call is not for this
            loop to run.
        made: how many of the tokens the model has made; the others were fed to it.
        calls: how many functions have run.
        seconds: how long it took.
    """

    reason: Reason
    made: int
    calls: int
    seconds: float
