"""How often the pocket model is right: `python -m examples.pocket.evaluate MODEL`.

For each task and length, new messages are made, with a seed that training does not use. Greedy decoding gives
a whole trace exactly where each of its tokens is the likeliest after those before it, so one pass over the
trace tells whether the model would write it. The kind of message at its beginning may be another one than the
trace has, as long as the model goes on rightly from there: the answer is the same. `--decode` lets the tool
loop run instead, and compares the answers.

`--calls N` measures plain English instead, N messages of each kind, all through the tool loop: phrasings that
were kept from training, messages written by hand, messages that want no function, and sums with signs. What
the model does wrong is shown.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_pararnn
from mlx_pararnn.model import Model
from mlx_pararnn.pocket.answers import answer, stream_answer
from mlx_pararnn.pocket.events import Call
from mlx_pararnn.pocket.loop import Limits
from mlx_pararnn.pocket.misread import instead
from mlx_pararnn.pocket.protocol import find_protocol
from mlx_pararnn.pocket.standard import calculate

from .batches import Turn, encode
from .call_cases import decline_rate, handwritten, held_out, measure, out_of_scope
from .data import TASKS, ask, polite
from .fillers import signs
from .traces import solve

DIGITS = (5, 10, 50, 200, 1000)
COUNTS = {5: 200, 10: 200, 50: 100, 200: 40, 1000: 10}
PIECE = 1024  # tokens read at once


def samples(task: str, digits: int, count: int, seed: int = 10**6) -> list[tuple[str, str]]:
    """So many messages of a task with their answers."""
    rng = random.Random(f"{task} {digits} {seed}")
    return [TASKS[task](rng, digits) for _ in range(count)]


def check_traces(model: Model, turns: list[Turn]) -> list[int | None]:
    """Of each turn, the place of the first token that the model would not write; None if there is none.

    Turns are read together, as rows of a batch, no further than to where each has gone wrong.
    """
    rows = _padded([tokens for tokens, _ in turns])
    learned = _padded([own for _, own in turns]).astype(bool)
    found: list[int | None] = [None] * len(turns)
    for begin, best in _likeliest(model, rows):
        end = begin + best.shape[1]
        wrong = learned[:, begin:end] & (best != rows[:, begin:end])
        for row in np.flatnonzero(wrong.any(axis=1)):
            if found[row] is None:
                found[row] = begin + int(wrong[row].argmax())
        if None not in found:
            break
    return found


def with_own_kinds(model: Model, turns: list[Turn]) -> list[Turn]:
    """The same turns, but for the kinds of messages: those that the model itself notes first."""
    kinds = [own.index(True) for _, own in turns]
    rows = _padded([tokens[: at + 1] for (tokens, _), at in zip(turns, kinds, strict=True)])
    best = np.concatenate([rows[:, :1], *(piece for _, piece in _likeliest(model, rows))], axis=1)
    return [
        ([*tokens[:at], int(best[row, at]), *tokens[at + 1 :]], own)
        for row, ((tokens, own), at) in enumerate(zip(turns, kinds, strict=True))
    ]


def _padded(rows: list[list[int]] | list[list[bool]]) -> np.ndarray:
    made = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, values in zip(made, rows, strict=True):
        row[: len(values)] = values
    return made


def _likeliest(model: Model, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Of rows of tokens the likeliest token after those before it, a piece at a time: its place, and it."""
    cache, longest = model.make_cache(len(rows)), rows.shape[1]
    for begin in range(0, longest - 1, PIECE):
        end = min(begin + PIECE, longest - 1)
        best = mx.argmax(model(mx.array(rows[:, begin:end]), cache=cache), axis=-1)
        mx.eval([best, [layer.state for layer in cache]])
        yield begin + 1, np.array(best)


def evaluate(
    model: Model, tokenizer: Any, task: str, digits: int, count: int, decode: bool
) -> dict[str, Any]:
    """The share of messages that are answered exactly, and for those that are not, the first wrong tokens."""
    begin, asked = time.perf_counter(), samples(task, digits, count)
    faults = []
    if decode:
        limits = Limits(steps=10**6, seconds=10**6, answer=10**5)
        options: dict[str, Any] = {"limits": limits, "functions": ()}  # and so without rules
        wrong = [m for m, right in asked if answer(model, tokenizer, m, **options) != right]
        faults = [message[:80] for message in wrong]
    else:
        ids = find_protocol(tokenizer)
        traces = [solve(message) for message, _ in asked]
        rows = max(1, 200_000 // max(len(trace.tokens) for trace in traces))
        for first in range(0, count, rows):
            part = traces[first : first + rows]
            turns = with_own_kinds(model, [encode(trace, ids) for trace in part])
            places = check_traces(model, turns)
            for trace, place in zip(part, places, strict=True):
                if place is not None:
                    faults.append(
                        f"{' '.join(trace.tokens[max(0, place - 8) : place])} -> {trace.tokens[place]}"
                    )
    return {
        "task": task,
        "digits": digits,
        "count": count,
        "exact": 1 - len(faults) / count,
        "decoded": decode,
        "faults": faults[:5],
        "seconds": time.perf_counter() - begin,
    }


def call_made(model: Model, tokenizer: Any, message: str) -> dict[str, Any] | None:
    """The call that the model makes first for a message; None if it makes none, or one that is refused."""
    for event in stream_answer(model, tokenizer, message):
        if isinstance(event, Call):
            if instead(message, event.name, event.arguments):
                return None
            return {"name": event.name, "arguments": json.loads(event.arguments)}
    return None


def evaluate_calls(model: Model, tokenizer: Any, count: int) -> dict[str, dict[str, float]]:
    """The measures of `call_cases`, of at most `count` messages of each kind, spread over all of them."""
    found: dict[str, dict[str, Any] | None] = {}

    def made(message: str) -> dict[str, Any] | None:
        found[message] = call_made(model, tokenizer, message)
        return found[message]

    results = {}
    for kind, cases in (
        ("held-out phrasings", held_out(count)),
        ("written by hand", spread(handwritten(), count)),
    ):
        results[kind] = measure(made, cases)
        for case in cases:
            if found[case.message] not in case.calls:
                print(f"{kind}: {case.message!r} -> {found[case.message]}", flush=True)
    messages = spread(out_of_scope(), count)
    results["out of scope"] = {"declined": decline_rate(made, messages)}
    for message in messages:
        if found[message]:
            print(f"out of scope: {message!r} -> {found[message]}", flush=True)
    rng, right = random.Random("sums"), 0
    for _ in range(count):
        text, plain = signs(rng)
        message = polite(rng, ask(rng, text))
        said = answer(model, tokenizer, message)
        right += calculate(plain) in said
        if calculate(plain) not in said:
            print(f"sums: {message!r} -> {said!r}, not {calculate(plain)}", flush=True)
    return {**results, "sums of all forms": {"answered right": right / count}}


def spread(items: list[Any], count: int) -> list[Any]:
    """At most so many of a list, at equal distances."""
    return [items[len(items) * at // count] for at in range(count)] if count < len(items) else items


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: a row a task, a column a length."""
    lengths = sorted({result["digits"] for result in results})
    by_place = {(result["task"], result["digits"]): result for result in results}
    lines = [
        "| task | " + " | ".join(f"{n} digits" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for task in dict.fromkeys(result["task"] for result in results):
        cells = [by_place.get((task, n)) for n in lengths]
        shown = [
            "" if cell is None else f"{round(cell['exact'] * cell['count'])} of {cell['count']}"
            for cell in cells
        ]
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--digits", nargs="*", type=int, default=DIGITS)
    parser.add_argument("--count", type=int, help="messages a task and length")
    parser.add_argument("--decode", action="store_true", help="free decoding by the tool loop")
    parser.add_argument("--calls", type=int, help="plain English instead, so many messages of each kind")
    given = parser.parse_args()
    model, tokenizer = mlx_pararnn.load(given.model)
    if given.calls:
        for kind, result in evaluate_calls(model, tokenizer, given.calls).items():
            print(json.dumps({"kind": kind, **result}))
        sys.exit()
    results = []
    for task in given.tasks:
        for digits in given.digits:
            count = given.count or COUNTS.get(digits, 10)
            results.append(evaluate(model, tokenizer, task, digits, count, given.decode))
            print(json.dumps(results[-1]), flush=True)
    print(table(results))
