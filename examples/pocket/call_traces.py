"""Calls as a model with the pointer memory writes them, token by token."""

import json
from collections.abc import Iterable
from itertools import combinations
from string import ascii_letters
from typing import Any

from .calls import ARGUMENTS, DECLINED, REQUIRED, WHOLE_NUMBERS, Example
from .traces import END, Trace, as_bytes, note_kind, scan

CALL, RESULT = "<|call|>", "<|result|>"
LOOK_AHEAD = 4
DECLINE_KIND = "."


def kinds() -> dict[tuple[str, ...], str]:
    """The kinds of messages: a letter for each function and the arguments that it is given.

    What is given is then known wherever the kind is read again. A trained model knows these letters, so new
    functions come last: in functions.json, and by `calls.teach`. Those that want none have DECLINE_KIND.

    Raises:
        ValueError: there are more kinds than letters.
    """
    found = [
        (function, *given)
        for function, names in ARGUMENTS.items()
        for count in range(len(names) + 1)
        for given in combinations(names, count)
        if set(given) >= REQUIRED[function]
    ]
    if len(found) > len(ascii_letters):
        raise ValueError(
            f"functions can be called in {len(ascii_letters)} ways, these in {len(found)}; give them fewer "
            "arguments that may be left out"
        )
    return dict(zip(found, ascii_letters, strict=False))


# Kinds that a message with long numbers may be taken for: it is scanned for a task with numbers first.
SCANNED = (DECLINE_KIND, kinds()["calculate", "expression"])
# Of each argument, the pointer that copies it; pointer 2 is still at the beginning after a scan.
POINTERS = (2, 1, 4)


def kind(example: Example) -> str:
    """The kind of an example's message: a character."""
    return DECLINE_KIND if example.function is None else kinds()[example.function, *example.spans]


def trace(
    example: Example, result: str = "", answer: str = DECLINED, mistaken: str = "", looking: bool = True
) -> Trace:
    """The turn that an example teaches.

    Each argument is found and copied by a pointer of its own, which reads the message byte by byte; after
    each word pointer 3 reads the kind of message again. Before each word the pointer looks a few bytes ahead
    first: whether the argument begins or ends there is then decided by what is near.

    Args:
        example: a message and its call.
        result: what the function gives, as the loop feeds it. The empty answer after it means this text.
        answer: what is said where no function is wanted.
        mistaken: NUMBERS where a message of a kind that is scanned is taken for a task with numbers in error.
            After the scan the message has just been read again: then the model knows better.
        looking: whether the pointer looks ahead before the argument too, and not within it alone.
    """
    turn = Trace(example.message)
    note_kind(turn, kind(example), mistaken)
    if kind(example) in SCANNED:
        scan(turn)
        turn.read(3)
    if example.function is None:
        turn.answer(answer)
        turn.end()
        return turn
    turn.keep(CALL)
    turn.think(f'{{"name":"{example.function}","arguments":{{')
    for pointer, (name, span) in zip(POINTERS, example.spans.items(), strict=False):
        quote = "" if (example.function, name) in WHOLE_NUMBERS else '"'
        turn.think(("" if pointer == POINTERS[0] else ",") + f'"{name}":{quote}')
        start, end = (len(as_bytes(example.message[:at])) for at in span)
        _copy(turn, pointer, start, end, looking)
        turn.think(quote)
    turn.think("}}")
    turn.write(RESULT)
    for token in (*as_bytes(result), END):
        turn.observe(token)
    turn.answer()
    turn.end()
    return turn


def _copy(turn: Trace, pointer: int, start: int, end: int, looking: bool) -> None:
    """The bytes of the message from `start` to `end`, into the JSON of a call."""
    if looking:
        _look(turn, pointer)
    for at in range(end + 1):
        turn.right(pointer)
        byte = turn.read(pointer)
        if not _is_word_byte(byte):
            if looking or at >= start:
                _look(turn, pointer)
            else:
                turn.read(3)
        if start <= at < end:
            for token in _escaped(byte):
                turn.keep(token)


def _look(turn: Trace, pointer: int) -> None:
    """At the next bytes, and at the kind of message."""
    for _ in range(LOOK_AHEAD):
        turn.right(pointer)
        turn.read(pointer)
    turn.left(pointer, LOOK_AHEAD)
    turn.read(3)


def call_of(tokens: Iterable[str]) -> dict[str, Any] | None:
    """The call in a turn, without the commands and what they read; None if there is none or it is no JSON."""
    inside, skip, text = False, False, bytearray()
    for token in tokens:
        if skip:
            skip = False
        elif token in ("<|call|>", "<|result|>"):
            if inside:
                break
            inside = token == "<|call|>"
        elif len(token) > 1:
            skip = token.startswith("<|read")
        elif inside:
            text.append(ord(token))
    try:
        call = json.loads(text.decode())
    except ValueError:
        return None
    return call if isinstance(call, dict) else None


def _is_word_byte(token: str) -> bool:
    return len(token) == 1 and (token >= "\x80" or token.isalnum() or token == "'")


def _escaped(byte: str) -> str:
    return json.dumps(byte)[1:-1] if byte < "\x80" else byte
