"""What the pocket model learns from: turns in rows, the state carried from batch to batch."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_pararnn.pocket.protocol import Protocol, find_protocol, tokenizer_files
from mlx_pararnn.training.trainer import Batch

from .call_traces import trace
from .calls import Example, examples
from .data import TASKS
from .traces import Trace, solve

# A turn: the token ids, and which of them the model makes itself.
Turn = tuple[list[int], list[bool]]

DECLINED = (
    "I add, subtract and compare numbers of any length, multiply by one digit, reverse and sort. "
    "Try: 12345 + 67890, or: sort 3 1 2"
)
# How often each task comes: a trace of sorting has four times the tokens of the others.
SHARES = {
    "addition": 4,
    "subtraction": 5,
    "multiplication": 6,
    "comparison": 5,
    "reversal": 2,
    "sorting": 1,
}


def protocol() -> Protocol:
    """The token ids of the pocket model's tokenizer."""
    found = find_protocol(Tokenizer.from_str(tokenizer_files()["tokenizer.json"]))
    assert found is not None
    return found


def encode(trace: Any, ids: Protocol) -> Turn:
    """A trace, whose tokens are bytes (one character each) and names of special tokens, as ids."""
    special = {command.name: token for command, token in ids.command_ids.items()}
    special |= {f"<|{m}|>": getattr(ids, m) for m in ("user", "end", "answer", "call", "result", "edge")}
    return [special[t] if len(t) > 1 else ids.byte_ids[ord(t)] for t in trace.tokens], trace.learned


def number_turns(seed: int, longest: int) -> Iterator[Turn]:
    """Turns with numbers of 1 to `longest` digits, without end."""
    rng, ids = random.Random(seed), protocol()
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        (name,) = rng.choices(names, shares)
        solved = solve(TASKS[name](rng, rng.randint(1, longest))[0])
        assert isinstance(solved, Trace)
        yield encode(solved, ids)


def other_turns(seed: int) -> Iterator[Turn]:
    """Turns with messages that are no task of the pointer memory, without end; all are declined."""
    ids = protocol()
    for example in examples("train", seed):
        yield encode(trace(Example(example.message), answer=DECLINED), ids)


def mixed(
    sources: Sequence[Callable[[int], Iterator[Turn]]], shares: Sequence[float], seed: int
) -> Iterator[Turn]:
    """Turns of several sources, each started with the seed, in the given shares."""
    rng, streams = random.Random(seed), [source(seed) for source in sources]
    while True:
        yield next(rng.choices(streams, shares)[0])


def batches(turns: Callable[[int], Iterator[Turn]], rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Batches of `rows` endless rows, each with turns of its own, `length` tokens of it in each batch.

    Args:
        turns: from a seed to turns.
        rows, length, seed: row b has the turns of seed * 1000 + b.
    """
    streams = [_tokens(turns(seed * 1000 + row)) for row in range(rows)]
    ends = [next(stream) for stream in streams]
    fresh = True
    while True:
        rows_now = [
            [end, *(next(stream) for _ in range(length))] for end, stream in zip(ends, streams, strict=True)
        ]
        pairs = np.array(rows_now)  # (B, T + 1, 2)
        yield Batch(pairs[..., 0], pairs[:, 1:, 1].astype(bool), fresh)
        ends, fresh = [row[-1] for row in rows_now], False


def _tokens(turns: Iterator[Turn]) -> Iterator[tuple[int, bool]]:
    for tokens, learned in turns:
        yield from zip(tokens, learned, strict=True)
