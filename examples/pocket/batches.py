"""What the pocket model learns from: turns in rows, the state carried from batch to batch."""

import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import numpy as np
from tokenizers import Tokenizer

from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.protocol import Protocol, find_protocol, tokenizer_files
from mlx_pararnn.training.batches import Batch

from .call_traces import SCANNED, kind, trace
from .calls import ADDED, Example, examples
from .data import TASKS, ask, polite
from .fillers import signs
from .traces import NUMBERS, Trace, kind_of, note_kind, solve

# A turn: the token ids, and which of them the model makes itself.
Turn = tuple[list[int], list[bool]]

LONGEST = 10  # digits of a number
LONGEST_REVERSED = (30, 30, 30, 100)  # digits or letters
MOST_GATES = 6  # of a logic graph
LONGEST_MESSAGE = 150  # digits or letters, of which only the kind of message is learned
# So often the kind of message is noted wrongly, as a model may, and the trace goes on from there.
MISTAKEN = 0.12
PLAIN = 0.4  # the share of the plainest phrasings
RESTART = 64
# The shares of number_turns, long_message_turns, calculation_turns, english_turns and kind_turns.
MIXTURE = (0.35, 0.05, 0.13, 0.45, 0.5)
# How often each task comes: a trace of sorting has four times the tokens of a reversal's.
SHARES = {
    "addition": 4,
    "subtraction": 10,
    "multiplication": 5,
    "comparison": 7,
    "reversal": 4,
    "sorting": 3,
    "logic": 3,
}


def protocol() -> Protocol:
    """The token ids of the pocket model's tokenizer."""
    found = find_protocol(Tokenizer.from_str(tokenizer_files()["tokenizer.json"]))
    assert found is not None
    return found


def encode(trace: Trace, ids: Protocol) -> Turn:
    """A trace, whose tokens are bytes (one character each) and names of special tokens, as ids."""
    special = {command.name: token for command, token in ids.command_ids.items()}
    special |= {f"<|{m}|>": getattr(ids, m) for m in ("user", "end", "answer", "call", "result", "edge")}
    return [special[t] if len(t) > 1 else ids.byte_ids[ord(t)] for t in trace.tokens], trace.learned


def turns(seed: int, looking: bool = True, plain: float = PLAIN) -> Iterator[Turn]:
    """Turns of all kinds in the shares of MIXTURE, without end.

    Args:
        seed: of the choice.
        looking: for `call_traces.trace`; False gives shorter traces to begin with.
        plain: for `calls.examples`.
    """
    rng = random.Random(seed)
    streams = [
        *(number_turns(seed), long_message_turns(seed)),
        *(calculation_turns(seed, looking), english_turns(seed, looking, plain)),
        kind_turns(seed, plain),
    ]
    while True:
        (stream,) = rng.choices(streams, MIXTURE)
        yield next(stream)


def number_turns(seed: int) -> Iterator[Turn]:
    """Tasks for the pointers: numbers of 1 to LONGEST digits, graphs of 1 to MOST_GATES gates."""
    rng, ids = random.Random(seed), protocol()
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        (name,) = rng.choices(names, shares)
        longest = {"reversal": rng.choice(LONGEST_REVERSED), "logic": MOST_GATES}.get(name, LONGEST)
        yield _solved(TASKS[name](rng, rng.randint(1, longest))[0], rng, ids)


def long_message_turns(seed: int) -> Iterator[Turn]:
    """The beginnings of such tasks with longer numbers, to where the kind of message has been noted."""
    rng, ids = random.Random(seed), protocol()
    while True:
        digits = round(LONGEST * (LONGEST_MESSAGE / LONGEST) ** rng.random())
        name = rng.choice(list(TASKS))
        message, _ = TASKS[name](rng, digits // 6 + 1 if name == "logic" else digits)  # 6 characters a gate
        beginning = Trace(message)
        note_kind(beginning, kind_of(message))
        yield encode(beginning, ids)


def calculation_turns(seed: int, looking: bool = True) -> Iterator[Turn]:
    """Sums asked for as those of the pointers are, and of any other form: these are for the calculator."""
    ids, rng = protocol(), random.Random(seed)
    while True:
        text, _ = signs(rng)
        message = polite(rng, ask(rng, text))
        at = message.lower().index(text)
        text = message[at : at + len(text)]
        example = Example(message, "calculate", {"expression": text}, {"expression": (at, at + len(text))})
        yield _turn(example, rng, ids, looking)


def english_turns(seed: int, looking: bool = True, plain: float = PLAIN) -> Iterator[Turn]:
    """Turns with plain English: calls, and what is declined. Sums among it are for the pointers, as any."""
    ids, rng = protocol(), random.Random(seed)
    for example in examples("train", seed, plain=plain):
        yield _turn(example, rng, ids, looking)


def kind_turns(seed: int, plain: float = PLAIN) -> Iterator[Turn]:
    """The beginnings of such turns, to where the kind of message has been noted: a tenth of their tokens."""
    ids = protocol()
    for example in examples("train", seed + 500_009, plain=plain):
        beginning = Trace(example.message)
        note_kind(beginning, NUMBERS if solve(example.message) else kind(example))
        yield encode(beginning, ids)


def _turn(example: Example, rng: random.Random, ids: Protocol, looking: bool) -> Turn:
    """For the pointers, where it is a task of theirs, else a call or declined."""
    if solve(example.message):
        return _solved(example.message, rng, ids)
    scanned = example.function in (None, "calculate")
    mistaken = NUMBERS if scanned and rng.random() < MISTAKEN else ""
    return encode(trace(example, _result(example, rng), mistaken=mistaken, looking=looking), ids)


def _solved(message: str, rng: random.Random, ids: Protocol) -> Turn:
    solved = solve(message, rng.choice(SCANNED) if rng.random() < MISTAKEN else "")
    assert solved is not None
    return encode(solved, ids)


def _result(example: Example, rng: random.Random) -> str:
    """What the function says at some time of day and year."""
    if example.function is None:
        return ""
    if example.function in ADDED:
        return "That is done."  # what it says is read and not learned
    now = datetime(2024, 1, 1) + timedelta(minutes=rng.randrange(10**6))
    try:
        return str(getattr(Assistant(lambda: now), example.function)(**example.arguments))
    except ValueError as error:
        return f"error: {error}"


def batches(turns: Callable[[int], Iterator[Turn]], rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Batches of `rows` endless rows, each with turns of its own, `length` tokens of it in each batch.

    Every RESTART batches all rows begin a turn anew, from the initial state: as a first turn does.

    Args:
        turns: from a seed to turns.
        rows, length, seed: row b has the turns of seed * 1000 + b.
    """
    sources = [turns(seed * 1000 + row) for row in range(rows)]
    while True:
        streams = [_tokens(source) for source in sources]
        ends = [next(stream) for stream in streams]
        for number in range(RESTART):
            rows_now = [
                [end, *(next(stream) for _ in range(length))]
                for end, stream in zip(ends, streams, strict=True)
            ]
            pairs = np.array(rows_now)  # (B, T + 1, 2)
            yield Batch(pairs[..., 0], pairs[:, 1:, 1].astype(bool), number == 0)
            ends = [row[-1] for row in rows_now]


def _tokens(turns: Iterator[Turn]) -> Iterator[tuple[int, bool]]:
    for tokens, learned in turns:
        yield from zip(tokens, learned, strict=True)
