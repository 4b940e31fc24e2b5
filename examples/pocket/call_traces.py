"""Calls as a model with the pointer memory writes them, token by token."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .calls import DECLINED, Example

LOOK_AHEAD = 4


@dataclass
class Trace:
    """A turn: its tokens, and of each whether the model writes it itself.

    Tokens are bytes, as characters of the same number, and special tokens by their names.
    """

    tokens: list[str] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)

    def write(self, tokens: Iterable[str], learned: bool = True) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.learned.append(learned)


def trace(example: Example, result: str = "", answer: str = DECLINED) -> Trace:
    """The turn that an example teaches.

    Each argument is found and copied by a pointer of its own, which reads the message byte by byte. Where a
    byte of the argument is no letter and no digit, the pointer looks a few bytes ahead first: whether the
    argument ends there is then decided by what is near.

    Args:
        example: a message and its call.
        result: what the function gives, as the loop feeds it. The empty answer after it means this text.
        answer: what is said where no function is wanted.
    """
    turn = Trace()
    memory = ["<|user|>", *_bytes(example.message), "<|end|>"]
    turn.write(memory, learned=False)
    if example.function is None:
        turn.write(["<|answer|>", *_bytes(answer), "<|end|>"])
        return turn

    def write(tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        memory.extend(tokens)
        turn.write(tokens)

    def read(pointer: int, at: int) -> None:
        turn.write([f"<|right{pointer}|>", f"<|read{pointer}|>"])
        turn.write([memory[at]] if at < len(memory) else ["<|edge|>"], learned=False)

    turn.write(["<|call|>"])
    memory.append("<|call|>")
    write(f'{{"name":"{example.function}","arguments":{{')
    for pointer, (name, (start, end)) in enumerate(example.spans.items(), 1):
        write(("" if pointer == 1 else ",") + f'"{name}":"')
        first, last = (1 + len(_bytes(example.message[:at])) for at in (start, end))
        at = 0
        while at < last:
            at += 1
            read(pointer, at)
            if at < first:
                continue
            if not _is_word_byte(memory[at]):
                for ahead in range(1, LOOK_AHEAD + 1):
                    read(pointer, at + ahead)
                turn.write([f"<|left{pointer}|>"] * LOOK_AHEAD)
            if at < last:
                write(_escaped(memory[at]))
        write('"')
    write("}}")
    turn.write(["<|result|>"])
    turn.write([*_bytes(result), "<|end|>"], learned=False)
    turn.write(["<|answer|>", "<|end|>"])
    return turn


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


def _bytes(text: str) -> list[str]:
    return list(text.encode().decode("latin-1"))


def _is_word_byte(token: str) -> bool:
    return len(token) == 1 and (token >= "\x80" or token.isalnum() or token == "'")


def _escaped(byte: str) -> str:
    return json.dumps(byte)[1:-1] if byte < "\x80" else byte
