"""Keystrokes that completions save, beside an n-gram of as many bytes.

python -m examples.completion.evaluate runs/completion-8bit runs/python

Somebody types passages of held-out packages. Wherever the suggestion is what follows, Tab takes it: one
keystroke; wherever it is not, or there is none, a character is typed. The editor indents a new line as
`try_it` does; where that is too far, Backspace takes it back. How sure a suggestion has to be is
chosen on one half of the passages, for each by itself, and the other half is counted.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_pararnn import load
from mlx_pararnn.completion import Completer, Step

from .ngram import NGram
from .try_it import indented

CONTEXT, PASSAGE = 2000, 300  # characters before what is typed; characters typed
SURENESS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7]
LENGTH = 16  # tokens of a suggestion at most

Pieces = Sequence[tuple[str, float]]  # of a suggestion, and how probable each is after those before it


def read_texts(path: Path) -> list[str]:
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]


def passages(texts: list[str], count: int) -> list[tuple[str, int]]:
    """Texts, and where somebody begins to type after what stands there; one of a file."""
    chance = random.Random(0)
    long = [text for text in texts if len(text) > 2 * PASSAGE]
    chosen = []
    for text in chance.sample(long, min(count, len(long))):
        begin = chance.randrange(PASSAGE, len(text) - PASSAGE + 1)
        first = max(0, begin - CONTEXT)
        chosen.append((text[first:], begin - first))
    return chosen


def keystrokes(text: str, begin: int, suggest: Callable[[int], Pieces], sureness: float) -> int:
    """How many it takes to write a passage."""
    at, count = begin, 0
    while at < begin + PASSAGE:
        if at > begin and text[at - 1] == "\n" and (given := indented(text[: at - 1])):
            there = text[at : at + len(given)]
            fits = len(there) - len(there.lstrip(" \t"))
            at += fits
            count += fits < len(given) and text[at] != "\n"  # an empty line is none's to take back
        suggestion, probability = "", 1.0
        for piece, share in suggest(at):
            probability *= share
            if probability < sureness:
                break
            suggestion += piece
        taken = suggestion and text.startswith(suggestion, at)
        at += len(suggestion) if taken else 1
        count += 1
    return count


def suggests(completer: Completer) -> Callable[[str], Pieces]:
    def suggest(prefix: str) -> Pieces:
        return completer.complete(prefix, max_tokens=LENGTH, min_probability=SURENESS[0]).pieces

    return suggest


class NGramCompleter(Completer):
    """Completes by an n-gram instead of the model, by the same rules."""

    def __init__(self, ngram: NGram, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._ngram = ngram

    def _go_to(self, base: int, same: int) -> None:
        self._read = base

    def _after(self, path: tuple[int, ...]) -> Step:
        return Step([], self._ngram([*self.tokens[: self._read], *path]))


def saved(
    passages: list[tuple[str, int]], suggest: Callable[[str], Pieces], name: str
) -> tuple[float, float]:
    """The sureness that saves most in the even passages, and the share of keystrokes it saves in the odd."""
    counts = np.zeros((len(passages), len(SURENESS)))
    alone = np.array([keystrokes(text, begin, lambda at: (), 1) for text, begin in passages])
    for i, (text, begin) in enumerate(passages):
        at = cache(lambda end, text=text: suggest(text[:end]))
        counts[i] = [keystrokes(text, begin, at, sureness) for sureness in SURENESS]
        if sys.stderr.isatty():
            print(f"\r{name}: {i + 1} of {len(passages)} passages", end="", file=sys.stderr)
    best = int(counts[::2].sum(axis=0).argmin())
    return SURENESS[best], 1 - counts[1::2, best].sum() / alone[1::2].sum()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="the folder that examples.completion.data wrote")
    parser.add_argument("--passages", type=int, default=300)
    parser.add_argument(
        "--bytes", type=int, action="append", help="of an n-gram; as many as the model's weights take"
    )
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    parts = passages(read_texts(args.data / "held-out.jsonl"), args.passages)

    def show(name: str, suggest: Callable[[str], Pieces]) -> None:
        sureness, share = saved(parts, suggest, name)
        print(f"| {name} | {sureness:g} | {100 * share:.1f} % |", flush=True)

    print("| | sure from | keystrokes saved |\n|---|---|---|")
    show("model", suggests(Completer(model, tokenizer)))
    end = tokenizer.eos_token_id
    texts = read_texts(args.data / "train.jsonl")
    encoded = ([*tokenizer.encode(text, add_special_tokens=False), end] for text in texts)
    tokens = np.fromiter(chain.from_iterable(encoded), np.uint16)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    for size in args.bytes or [weights]:
        ngram = NGram(tokens, size, model.args.vocab_size)
        name = f"n-gram of {ngram.size / 1e6:.2f} MB, of sequences seen {ngram.least} times"
        show(name, suggests(NGramCompleter(ngram, model, tokenizer)))


if __name__ == "__main__":
    main()
