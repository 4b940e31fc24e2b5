"""How often a model makes the right call: messages with their calls, and the measures.

A model is here a function from a message to the call that it makes, None if it makes none. Of the messages
written by hand about one in 25 is so short ("what time is it?") that the generator can make it too.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .calls import examples
from .fillers import FOLDER

Model = Callable[[str], dict[str, Any] | None]


@dataclass
class Case:
    """A message, and the calls that are right for it: several where a careful person could choose any."""

    message: str
    calls: list[dict[str, Any]]


def handwritten() -> list[Case]:
    """Messages written by hand, with their calls."""
    return [Case(**json.loads(line)) for line in _lines("handwritten.jsonl")]


def out_of_scope() -> list[str]:
    """Messages written by hand that want no function."""
    return [json.loads(line)["message"] for line in _lines("out_of_scope.jsonl")]


def held_out(n: int, seed: int = 0) -> list[Case]:
    """Messages of phrasings that are kept from training, all of which want a function."""
    found = examples("held", seed, declines=0)
    return [Case(example.message, [example.call or {}]) for example, _ in zip(found, range(n), strict=False)]


def measure(model: Model, cases: Iterable[Case]) -> dict[str, float]:
    """Of some cases, the share with exactly the right call, with the right function, and without a call."""
    found = [(case, model(case.message)) for case in cases]
    if not found:
        raise ValueError("there are no cases to measure with")
    return {
        "exact": sum(call in case.calls for case, call in found) / len(found),
        "function": sum(
            call is not None and call.get("name") in {right["name"] for right in case.calls}
            for case, call in found
        )
        / len(found),
        "declined": sum(call is None for _, call in found) / len(found),
    }


def decline_rate(model: Model, messages: Iterable[str]) -> float:
    """The share of messages for which no function is called."""
    calls = [model(message) for message in messages]
    if not calls:
        raise ValueError("there are no messages to measure with")
    return sum(call is None for call in calls) / len(calls)


def _lines(file: str) -> list[str]:
    return (FOLDER / file).read_text(encoding="utf-8").splitlines()
