"""Plain English, and the calls of functions that it asks for: examples to learn from, and to measure with.

    python -m examples.pocket.calls --split train -n 10

shows some. phrasings.txt has what people say, fillers.py what stands in the braces, topics.py what messages
are about that want no function, this file the ways in which people write differently: cases, misspelt words,
politeness, missing punctuation. To teach a function of your own, add it to phrasings.txt and functions.json,
and its arguments to `FILLERS`.

call_traces.py writes an example as the tokens that a model learns, call_cases.py measures how often one is
right.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .fillers import FILLERS, FOLDER, RELATIVE_DAYS, conversion, sections
from .topics import topic

DECLINE = "decline"
DECLINED = (
    "I can do sums, timers, alarms, reminders, lists, dates and units. "
    "Try: set a timer for 5 minutes, or: what is 12345 + 67890?"
)
DECLINES = 0.3  # of all examples
SCHEMAS = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))
ARGUMENTS: dict[str, list[str]] = {
    function["name"]: list(function["parameters"].get("properties", {})) for function in SCHEMAS
}
# Of each function, the arguments that it cannot do without.
REQUIRED: dict[str, set[str]] = {
    function["name"]: set(function["parameters"].get("required", [])) for function in SCHEMAS
}
# In braces, and the argument that it is.
ALIASES = {"in": "time", "weekday": "day", "about": "text"}
HELD_EVERY = 6  # one phrasing in so many is kept from training


@dataclass
class Example:
    """A message and the call that it asks for.

    Attributes:
        message: what the user writes.
        function: its name, None where no function is wanted.
        arguments: of the call, in the order of its signature; each is a piece of the message.
        spans: where in the message each argument begins and ends.
        plain: the arguments in the plainest form that means the same: "300 seconds", "2027-03-03".
    """

    message: str
    function: str | None = None
    arguments: dict[str, str] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)

    @property
    def call(self) -> dict[str, Any] | None:
        """The call as JSON has it."""
        return self.function and {"name": self.function, "arguments": self.arguments}  # type: ignore[return-value]


def examples(
    split: str = "train", seed: int = 0, declines: float = DECLINES, plain: float = 0
) -> Iterator[Example]:
    """Examples without end, the same ones for the same seed.

    Args:
        split: "train", or "held" for the phrasings that are kept from training.
        seed: of the choice.
        declines: the share of messages that want no function.
        plain: the share of examples that take a phrasing of plain.txt.
    """
    rng = random.Random(f"{split} {seed}")
    lines = phrasings(split)
    functions = [name for name in lines if name != DECLINE]
    weights = [1 + len(ARGUMENTS[function]) for function in functions]
    while True:
        function = DECLINE if rng.random() < declines else rng.choices(functions, weights)[0]
        taken = sections("plain.txt") if plain and rng.random() < plain else lines
        yield make(function, rng.choice(taken[function]), rng)


def make(function: str, phrasing: str, rng: random.Random) -> Example:
    """One message of a phrasing."""
    pieces: list[tuple[str, str | None]] = []  # text, and the argument that it is
    plain: dict[str, str] = {}
    fillers = FILLERS | conversion(rng)
    phrasing = re.sub(r"\(([^()]*\|[^()]*)\)", lambda m: rng.choice(m[1].split("|")), phrasing)
    phrasing = " ".join(phrasing.split())
    for part in re.split(r"(\{\w+\})", phrasing.rstrip(".?") or phrasing):
        kind = part[1:-1]
        if not part.startswith("{"):
            pieces.append((part, None))
        elif function == DECLINE:
            pieces.append((topic(kind, rng), None))
        else:
            name = ALIASES.get(kind, kind)
            text, plain[name] = (fillers.get(f"{function} {kind}") or fillers[kind])(rng)
            if kind == "day" and text not in RELATIVE_DAYS:
                before = pieces[-1][0] if pieces else ""
                if not before.endswith("for ") and rng.random() < 0.7:
                    pieces.append(("on ", None))
            pieces.append((text, name))
    pieces = _as_people_write(pieces, phrasing[-1:], function, rng)
    message, spans = "", {}
    for text, argument in pieces:
        if argument is not None:
            spans[argument] = (len(message), len(message) + len(text))
        message += text
    if function == DECLINE:
        return Example(message)
    order = [name for name in ARGUMENTS[function] if name in spans]
    spans = {name: spans[name] for name in order}
    arguments = {name: message[slice(*span)] for name, span in spans.items()}
    return Example(message, function, arguments, spans, {name: plain[name] for name in order})


@cache
def phrasings(split: str) -> dict[str, list[str]]:
    """The phrasings of each function in phrasings.txt, for "train" or "held"."""
    if split not in ("train", "held"):
        raise ValueError(f"there is no split {split!r}; there are train and held")
    every = sections("phrasings.txt")
    return {
        name: [
            line for at, line in enumerate(lines) if (at % HELD_EVERY == HELD_EVERY - 1) == (split == "held")
        ]
        for name, lines in every.items()
    }


# How people write.


def _as_people_write(
    pieces: list[tuple[str, str | None]], mark: str, function: str, rng: random.Random
) -> list[tuple[str, str | None]]:
    pieces = [(text, argument) for text, argument in pieces if text]
    if function != DECLINE or rng.random() < 0.4:
        before, after = _politeness(mark, rng)
        pieces = [(before, None), *pieces, (after, None)]
    if mark in (".", "?") and rng.random() < 0.4:
        pieces.append(
            (rng.choice(("?", "??")) if mark == "?" and rng.random() < 0.95 else rng.choice(".!"), None)
        )
    misspelt = rng.random() < 0.25
    if misspelt:
        at = rng.randrange(len(pieces))
        if pieces[at][1] in (None, "text", "items"):
            pieces[at] = _misspelt(pieces[at][0], rng), pieces[at][1]
    kind = rng.random()
    if kind < 0.03:
        return [(text.upper(), argument) for text, argument in pieces]
    if kind < 0.06:
        return [(text.title() if argument is None else text, argument) for text, argument in pieces]
    pieces = [(text, argument) for text, argument in pieces if text]
    if kind < 0.5 and pieces:
        pieces[0] = (pieces[0][0][:1].upper() + pieces[0][0][1:], pieces[0][1])
    if kind > 0.97:
        pieces[-1] = (pieces[-1][0] + " ", pieces[-1][1]) if pieces[-1][1] is None else pieces[-1]
    return [(text.replace(" i ", " I "), argument) for text, argument in pieces] if kind < 0.3 else pieces


def _politeness(mark: str, rng: random.Random) -> tuple[str, str]:
    before = after = ""
    if mark == ".":
        if rng.random() < 0.35:
            before = rng.choice(
                (
                    "please ",
                    "can you ",
                    "could you ",
                    "can you please ",
                    "would you ",
                    "pls ",
                    "i want you to ",
                )
            )
        elif rng.random() < 0.15:
            after = rng.choice(
                (" please", ", please", " for me", " pls", " now", " thanks", ", thank you", " thx")
            )
    if rng.random() < 0.12:
        before = (
            rng.choice(("hey, ", "hey ", "ok, ", "hi, ", "hello, ", "so ", "um ", "ok ", "oh and ")) + before
        )
    return before, after


def _misspelt(text: str, rng: random.Random) -> str:
    """One letter of a word of four letters or more left out, doubled, swapped or replaced."""
    words = [match.span() for match in re.finditer(r"[a-z]{4,}", text)]
    if not words:
        return text
    start, end = rng.choice(words)
    at = rng.randrange(start, end - 1)
    kind = rng.randrange(4)
    a, b = text[at], text[at + 1]
    wrong = ["", a + a, b + a, rng.choice("abcdefghijklmnopqrstuvwxyz")][kind]
    return text[:at] + wrong + text[at + (2 if kind == 2 else 1) :]


def main() -> None:
    parser = argparse.ArgumentParser(description="Show examples of messages and the calls that they ask for.")
    parser.add_argument("--split", choices=("train", "held"), default="train")
    parser.add_argument("-n", type=int, default=10, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for example, _ in zip(examples(options.split, options.seed), range(options.n), strict=False):
        call = "-" if example.call is None else json.dumps(example.call, ensure_ascii=False)
        print(f"{example.message}\n    {call}")


if __name__ == "__main__":
    main()
