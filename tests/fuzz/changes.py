"""Changed inputs: bytes, JSON values, a pickle's instructions, and the header inside a container."""

import contextlib
import copy
import json
import pickletools
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

VALUES = [None, True, -1, 0, 1, 2, 2**31, 2**70, 1e308, 1e-308, float("nan"), "", "x", [], {}, [1], {"a": 1},
          [[[[]]]], "\ud800", "../x"]  # fmt: skip
# What takes the header out of a container, and puts a changed one back.
Inside = Callable[[bytes], tuple[bytes, Callable[[bytes], bytes]]]


def changed(
    seeds: list[bytes], words: tuple[bytes, ...], rng: random.Random, inside: Inside | None = None
) -> bytes:
    """One of the inputs with a few changes; with `inside`, most often only of the header in it."""
    seed = rng.choice(seeds)
    if inside is None or rng.random() < 0.3:
        return _changed(seed, seeds, words, rng)
    header, put_back = inside(seed)
    return put_back(_changed(header, [header], words, rng))


def _changed(content: bytes, seeds: list[bytes], words: tuple[bytes, ...], rng: random.Random) -> bytes:
    if content[:1] in (b"{", b"[") and rng.random() < 0.6:
        with contextlib.suppress(ValueError, RecursionError):  # a template begins so too
            return _changed_json(content, rng)
    if content[:1] == b"\x80" and words and rng.random() < 0.6:
        with contextlib.suppress(ValueError):  # instructions are changed already
            return _changed_instructions(content, words, rng)
    data = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        # Half of the changes fall into the first or last kilobyte, where headers and directories stand.
        near = rng.choice([0, max(0, len(data) - 1000)])
        at = (
            rng.randrange(len(data) + 1)
            if rng.random() < 0.5
            else near + rng.randrange(min(len(data), 1000) + 1)
        )
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice([1, 2, 4, 8, 100])]
        elif kind == 2 and words:
            data[at : at + rng.choice([0, 0, 1, 4])] = rng.choice(words)
        elif kind == 3:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + rng.choice([1, 4, 16, 64])]
        elif kind == 4:
            other = rng.choice(seeds)
            begin = rng.randrange(len(other) + 1)
            data[at:] = other[begin:] if rng.random() < 0.3 else other[begin : begin + 40] + data[at:]
        else:
            data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\1\0\0\0"])
    return bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data) + 1)])


def _changed_json(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        inside, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.2:
            del inside[key]
        elif kind < 0.4:
            elsewhere, other = rng.choice(places)
            inside[key] = copy.deepcopy(elsewhere[other])
        elif kind < 0.6 and isinstance(inside, dict):
            inside[rng.choice(["", "x", "\ud800", "__metadata__", str(key) * 50])] = inside.pop(key)
        elif kind < 0.7 and isinstance(inside[key], int):
            inside[key] += rng.choice([-1, 1])
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _changed_instructions(content: bytes, words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """A pickle with whole instructions taken out, put in, repeated and exchanged."""
    code = list(_instructions(content))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(code) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del code[at : at + rng.choice([1, 1, 2, 5, 50])]
        elif kind == 1:
            code[at : at + rng.randrange(2)] = [rng.choice(words)]
        elif kind == 2:
            begin = rng.randrange(len(code) + 1)
            code[at:at] = code[begin : begin + rng.choice([1, 3, 10, 50])]
        elif kind == 3 and code:
            other = rng.randrange(len(code))
            at = min(at, len(code) - 1)
            code[at], code[other] = code[other], code[at]
        elif code:
            one = bytearray(code[min(at, len(code) - 1)])
            if one:
                one[rng.randrange(len(one))] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            code[min(at, len(code) - 1)] = bytes(one)
    return b"".join(code)


@lru_cache(64)
def _instructions(content: bytes) -> tuple[bytes, ...]:
    begins = [begin for _, _, begin in pickletools.genops(content)]
    return tuple(content[begin:end] for begin, end in zip(begins, [*begins[1:], len(content)], strict=True))
