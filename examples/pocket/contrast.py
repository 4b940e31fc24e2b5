"""What carries a task to any length: several recurrences and a Transformer, with pointers and without.

    python -m examples.pocket.contrast -o FOLDER

Each model has about the same number of parameters and learns one of TASKS at sizes of at most LEARNED
digits (gates, of a logic graph): "with pointers" the whole trace, "without" the answer alone, ten times as
many steps since it is a tenth as long or less. Measured is the share of new messages that are answered
exactly at greater sizes. A run that was stopped goes on from its last checkpoints, and results that are
there are not made again: FOLDER/results.jsonl. `--table` only prints them.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mamba2
from mlx_lm.models.cache import KVCache

from mlx_pararnn.compute.layer_ops import cross_entropy
from mlx_pararnn.model import Model, ModelArgs
from mlx_pararnn.training.batches import Batch
from mlx_pararnn.training.run import remember_long
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Trainer

from .batches import Turn, encode, protocol
from .data import Sample, logic, number, pair, sign_between
from .evaluate import check_traces
from .traces import Trace, solve
from .train import ARGS

LEARNED = 5  # digits or gates at most, in training
SIZES = (5, 10, 50, 200, 1000)
ALONE = 10  # times as many steps without pointers
COUNTS = {5: 100, 10: 100, 50: 50, 200: 20, 1000: 4}
KINDS = ("gru", "lstm", "linear", "mamba2", "transformer")
WIDTH, VOCABULARY = 128, ARGS.vocab_size
SETTINGS = Settings(
    steps=800,
    batch_size=16,
    states="reset",
    learning_rate=3e-3,
    final_rate=0.02,
    warmup=100,
    beta2=0.98,
    weight_decay=0.01,
    report_every=100,
    eval_every=0,
    save_every=200,
)


class Transformer(llama.Model):  # type: ignore[misc]
    """MLX-LM's llama, making a cache for rows as the other models do."""

    def make_cache(self, rows: int = 1) -> list[KVCache]:
        return [KVCache() for _ in self.layers]


def make_model(kind: str, seed: int) -> nn.Module:
    """A new model of one of KINDS. "linear" is the NLRU with its recurrent weights held at 0."""
    mx.random.seed(seed)
    if kind == "transformer":
        return Transformer(llama.ModelArgs("llama", WIDTH, 2, 256, 4, 1e-5, VOCABULARY))
    if kind == "mamba2":
        sizes = {"num_heads": 8, "head_dim": 32, "state_size": 32, "n_groups": 1, "conv_kernel": 4}
        more = {"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "time_step_rank": 8}
        return mamba2.Model(
            mamba2.ModelArgs(
                model_type="mamba2",
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=256,
                num_hidden_layers=3,
                tie_word_embeddings=True,
                time_step_limit=(0.0, float("inf")),
                **sizes,
                **more,
            )
        )
    cell = "nlru" if kind == "linear" else kind
    model = Model(
        ModelArgs(
            cell=cell,
            mixer="gated_conv",
            hidden_size=WIDTH,
            num_hidden_layers=2,
            intermediate_size=256,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
        )
    )
    remember_long(model, 100)
    if kind == "linear":
        for layer in model.model.layers:
            recurrent = layer.mixer.cell
            recurrent.recurrent_weight = mx.zeros_like(recurrent.recurrent_weight)
            recurrent.freeze(keys=["recurrent_weight"], recurse=False)
    return model


def addition(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    return f"{a} + {b}", str(int(a) + int(b))


def subtraction(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    return f"{a} - {b}", str(int(a) - int(b))


def multiplication(rng: random.Random, digits: int) -> Sample:
    """By one digit."""
    a, b = number(rng, digits), number(rng, 1)
    return f"{a} * {b}", str(int(a) * int(b))


def comparison(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    return f"compare {a} and {b}", f"{a} {sign_between(a, b)} {b}"


def reversal(rng: random.Random, digits: int) -> Sample:
    a = number(rng, digits)
    return f"reverse {a}", a[::-1]


def sorting(rng: random.Random, digits: int) -> Sample:
    items = list(number(rng, digits))
    return f"sort {' '.join(items)}", " ".join(sorted(items))


# Each in one wording: what is compared is not how many are understood.
TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    task.__name__: task
    for task in (addition, subtraction, multiplication, comparison, reversal, sorting, logic)
}


def turn(rng: random.Random, task: str, size: int, pointers: bool) -> Turn:
    """A message of a task, and what a model writes for it."""
    message, answer = TASKS[task](rng, size)
    if not pointers:
        trace = Trace(message)
        trace.answer(answer)
        trace.end()
        return encode(trace, protocol())
    solved = solve(message)
    assert solved is not None
    return encode(solved, protocol())


class Turns:
    """Endless batches of a task, a message a row, each batch from its number."""

    def __init__(self, rows: int, task: str, pointers: bool, seed: int) -> None:
        self.rows, self.task, self.pointers, self.seed = rows, task, pointers, seed

    def starting_at(self, batch: int) -> Iterator[Batch]:
        while True:
            rng = random.Random(f"{self.seed}/{batch}")
            turns = [turn(rng, self.task, rng.randint(1, LEARNED), self.pointers) for _ in range(self.rows)]
            longest = max(len(tokens) for tokens, _ in turns)
            rows, mask = np.zeros((self.rows, longest), int), np.zeros((self.rows, longest), bool)
            for at, (tokens, learned) in enumerate(turns):
                rows[at, : len(tokens)], mask[at, : len(tokens)] = tokens, learned
            yield Batch(rows, mask[:, 1:])
            batch += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)


def answer_losses(model: Any, arrays: dict[str, mx.array], _: Any) -> tuple[mx.array, list[Any]]:
    """Of what a model writes itself."""
    tokens = arrays["tokens"]
    return (cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * arrays["mask"]).sum(), []


def train(
    kind: str, task: str, pointers: bool, seed: int, folder: Path | None, settings: Settings = SETTINGS
) -> Any:
    """A trained model; a run in `folder` goes on."""
    model = make_model(kind, seed)
    data = Turns(settings.batch_size, task, pointers, seed)
    about = {"kind": kind, "task": task, "pointers": pointers}
    report = lambda line: print(json.dumps({**about, **line}), flush=True)  # noqa: E731
    trainer = Trainer(
        model, data, replace(settings, seed=seed), folder=folder, report=report, losses=answer_losses
    )
    trainer.resume()
    trainer.run()
    return model


def measure(model: Any, task: str, pointers: bool, size: int, count: int) -> float:
    """The share of new messages that are answered exactly."""
    rng, right = random.Random(f"contrast {size}"), 0
    turns = [turn(rng, task, size, pointers) for _ in range(count)]
    rows = max(1, 100_000 // max(len(tokens) for tokens, _ in turns))
    for first in range(0, count, rows):
        right += check_traces(model, turns[first : first + rows]).count(None)
    return right / count


def parameters(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


def table(results: list[dict[str, Any]]) -> str:
    """Shares of exact answers as Markdown, the mean over the seeds and, where they differ, the lowest."""
    lines = [
        "| task | recurrence | pointers | seeds | " + " | ".join(f"{n:,}" for n in SIZES) + " |",
        "|---" * (len(SIZES) + 4) + "|",
    ]
    order = {"task": list(TASKS), "kind": KINDS, "pointers": (True, False)}
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = tuple(values.index(result[name]) for name, values in order.items())
        groups.setdefault(key, []).append(result)
    for _, found in sorted(groups.items()):
        cells = []
        for n in SIZES:
            shares = [result["exact"][str(n)] for result in found]
            mean, least = sum(shares) / len(shares), min(shares)
            cells.append(f"{mean:.0%}" if mean == least else f"{mean:.0%} (lowest {least:.0%})")
        about = found[0]["task"], found[0]["kind"], "yes" if found[0]["pointers"] else "no"
        lines.append(f"| {' | '.join(about)} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="with pointers")
    parser.add_argument("--pointers", choices=["yes", "no", "both"], default="both")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    results = [json.loads(line) for line in lines]
    key = ("kind", "task", "pointers", "seed", "steps")
    there = {tuple(result[name] for name in key) for result in results}
    wanted = [
        (kind, task, pointers, seed, given.steps if pointers else ALONE * given.steps)
        for seed in given.seeds
        for task in given.tasks
        for pointers in (True, False)
        for kind in given.kinds
        if given.pointers in ("both", "yes" if pointers else "no")
    ]
    for run in () if given.table else wanted:
        if run in there:
            continue
        kind, task, pointers, seed, steps = run
        folder = given.out / f"{task}-{kind}-{'pointers' if pointers else 'alone'}-{seed}-{steps}"
        model = train(kind, task, pointers, seed, folder, replace(SETTINGS, steps=steps))
        exact = {str(n): measure(model, task, pointers, n, COUNTS[n]) for n in SIZES}
        results.append({**dict(zip(key, run, strict=True)), "parameters": parameters(model), "exact": exact})
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
