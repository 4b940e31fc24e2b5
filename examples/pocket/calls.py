"""Plain English, and the calls of functions that it asks for: examples to learn from, and to measure with.

    python -m examples.pocket.calls --split train -n 10

shows some. phrasings.txt has what people say, fillers.py what stands in the braces, topics.py what messages
are about that want no function, this file the ways in which people write differently: cases, misspelt words,
politeness, missing punctuation. `teach` adds functions of your own, as `train --functions` does.

call_traces.py writes an example as the tokens that a model learns, call_cases.py measures how often one is
right.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fillers import FILLERS, FOLDER, RELATIVE_DAYS, Filler, conversion, sections
from .topics import topic

DECLINE = "decline"
DECLINED = (
    "I can do sums, timers, alarms, reminders, lists, dates and units. "
    "Try: set a timer for 5 minutes, or: what is 12345 + 67890?"
)
DECLINES = 0.4  # of all examples
TAUGHT = 0.6  # of those that want a function, where some have been added
SCHEMAS = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))
ARGUMENTS: dict[str, list[str]] = {
    function["name"]: list(function["parameters"].get("properties", {})) for function in SCHEMAS
}
# Of each function, the arguments that it cannot do without.
REQUIRED: dict[str, set[str]] = {
    function["name"]: set(function["parameters"].get("required", [])) for function in SCHEMAS
}
WHOLE_NUMBERS: set[tuple[str, str]] = set()  # of these functions these arguments, the others are texts
MOST_ARGUMENTS = 3  # each has a pointer of its own (call_traces.POINTERS)
ADDED: dict[str, list[str]] = {}  # functions that `teach` has added, and what people say for them
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
        if self.function is None:
            return None
        arguments = {
            name: int(text) if (self.function, name) in WHOLE_NUMBERS else text
            for name, text in self.arguments.items()
        }
        return {"name": self.function, "arguments": arguments}


def teach(functions: Path, phrasings: Path) -> None:
    """Let examples be of these functions too.

    Of messages that want no function those are left out that have the last word of such a function's name.

    Args:
        functions: JSON as in functions.json, or as `Functions.schemas` gives it: a list of functions whose
            arguments are texts and whole numbers.
        phrasings: as phrasings.txt; under the name of an argument stands what its braces may hold. Where
            nothing does, a whole number is any from its minimum to its maximum.

    Raises:
        ValueError: there are no phrasings of a function, nothing or the wrong things for its braces, or more
            arguments than are taught; the sentence says which.
    """
    said = sections(phrasings.resolve())
    for schema in json.loads(functions.read_text(encoding="utf-8")):
        try:
            function = schema.get("function", schema)
            name, parameters = function["name"], function["parameters"]
        except (AttributeError, LookupError, TypeError):
            raise ValueError(f"{functions} is no list of functions with name and parameters") from None
        arguments = parameters.get("properties", {})
        required = {*parameters.get("required", [])}
        if len(arguments) > MOST_ARGUMENTS:
            raise ValueError(
                f"{name} has {len(arguments)} arguments; {MOST_ARGUMENTS} are the most that are taught"
            )
        if not said.get(name):
            raise ValueError(f"{phrasings} has no phrasings of {name}; write some under [{name}]")
        for phrasing in said[name]:
            for missing in sorted(required - {*re.findall(r"\{(\w+)\}", phrasing)}):
                raise ValueError(f"{phrasings}: {phrasing!r} has no {{{missing}}}, which {name} needs")
        for other in {*re.findall(r"\{(\w+)\}", " ".join(said[name]))} - {*arguments}:
            raise ValueError(f"{phrasings} has {{{other}}} under [{name}], which has no such argument")
        for argument, wanted in arguments.items():
            if wanted.get("type") not in ("string", "integer"):
                raise ValueError(
                    f"{name}: {argument} is neither a text nor a whole number, which is all that is taught"
                )
            if wanted["type"] == "integer":
                WHOLE_NUMBERS.add((name, argument))
            if filler := _filler(f"{name}: {argument}", wanted, said.get(argument, [])):
                FILLERS[f"{name} {argument}"] = filler
            elif argument not in FILLERS:
                raise ValueError(f"{phrasings} has nothing for {{{argument}}}; write some under [{argument}]")
        ARGUMENTS[name] = list(arguments)
        REQUIRED[name] = required
        ADDED[name] = said[name]


def _filler(where: str, wanted: dict[str, Any], texts: list[str]) -> Filler | None:
    """What fills an argument's braces: one of the texts, else a whole number; None where there is neither."""
    if wanted["type"] == "string":
        return _one_of(texts) if texts else None
    if not all(text.isdecimal() for text in texts):
        raise ValueError(f"{where} is a whole number, and what may fill its braces is more than such numbers")
    least = wanted.get("minimum", 0)
    numbers = range(least, wanted.get("maximum", least + 100) + 1)
    if not numbers:
        raise ValueError(f"{where} has no whole number between its minimum and its maximum")
    return _one_of(texts or [str(number) for number in numbers])


def _one_of(texts: list[str]) -> Filler:
    def filler(rng: random.Random) -> tuple[str, str]:
        text = rng.choice(texts)
        return text, text

    return filler


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
    lines, added = phrasings(split), {name.split("_")[-1] for name in ADDED}
    functions = [name for name in lines if name != DECLINE and name not in ADDED]
    weights = [1 + len(ARGUMENTS[function]) for function in functions]
    while True:
        function = DECLINE if rng.random() < declines else rng.choices(functions, weights)[0]
        if ADDED and function != DECLINE and rng.random() < TAUGHT:
            function = rng.choice(list(ADDED))
        taken = sections("plain.txt") if plain and rng.random() < plain and function not in ADDED else lines
        example = make(function, rng.choice(taken[function]), rng)
        if function != DECLINE or not added & {*re.findall(r"\w+", example.message.lower())}:
            yield example


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


def phrasings(split: str) -> dict[str, list[str]]:
    """The phrasings of each function, for "train" or "held"."""
    if split not in ("train", "held"):
        raise ValueError(f"there is no split {split!r}; there are train and held")
    every = sections("phrasings.txt") | ADDED
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
