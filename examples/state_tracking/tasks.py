"""The tasks: sequences of inputs, and after each input what a model should know by then."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from mlx_pararnn.training.batches import Batch

INPUTS = 9  # the most inputs of a task
FIRST_ANSWER = INPUTS + 1  # ids: the inputs, a question mark, then the answers
QUESTION = INPUTS
VOCABULARY = FIRST_ANSWER + 8


class Task(NamedTuple):
    """Inputs are numbers from 0 to `inputs` - 1; `answers` is from them (N, T) to the answers (N, T)."""

    inputs: int
    answers: Callable[[np.ndarray], np.ndarray]


def parity(x: np.ndarray) -> np.ndarray:
    """Whether the number of ones is odd."""
    return np.cumsum(x, axis=1) % 2


def modular_sum(x: np.ndarray) -> np.ndarray:
    """The sum modulo 5."""
    return np.cumsum(x, axis=1) % 5


def swaps(x: np.ndarray) -> np.ndarray:
    """Which of the 6 arrangements three cups are in after swaps of two of them (the group S3)."""
    places = ((1, 0, 2), (2, 1, 0), (0, 2, 1))
    order = list(permutations(range(3)))
    after = np.array([[order.index(tuple(was[k] for k in swap)) for swap in places] for was in order])
    known, now = np.empty_like(x), np.zeros(len(x), x.dtype)
    for t in range(x.shape[1]):
        now = known[:, t] = after[now, x[:, t]]
    return known


def recall(x: np.ndarray) -> np.ndarray:
    """The last number from 1 to 8; the zeros between are noise. Before the first it is 1."""
    at = np.maximum.accumulate(np.where(x > 0, np.arange(x.shape[1]), -1), axis=1)
    return np.where(at < 0, 0, np.take_along_axis(x, np.maximum(at, 0), axis=1) - 1)


TASKS = {
    "parity": Task(2, parity),
    "modular sum": Task(5, modular_sum),
    "swaps of three cups": Task(3, swaps),
    "recall": Task(9, recall),
}


def sequences(task: Task, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Token ids (count, 2 * length): inputs and the answers after them in turn."""
    x = rng.integers(0, task.inputs, (count, length))
    if task.answers is recall:  # mostly noise
        x *= rng.random(x.shape) < 0.1
    tokens = np.empty((count, 2 * length), np.int32)
    tokens[:, 0::2], tokens[:, 1::2] = x, task.answers(x) + FIRST_ANSWER
    return tokens


def batches(task: Task, rows: int, lengths: Sequence[int], growing: int, seed: int) -> Iterator[Batch]:
    """Batches without end, of the shortest length at first; after `growing` batches of any of the lengths."""
    rng, number = np.random.default_rng(seed), 0
    while True:
        known = 1 + min(len(lengths) - 1, number * len(lengths) // growing)
        tokens = sequences(task, rng, rows, lengths[rng.integers(known)])
        mask = np.zeros((rows, tokens.shape[1] - 1), bool)
        mask[:, 0::2] = True
        yield Batch(tokens, mask)
        number += 1
