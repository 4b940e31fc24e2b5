"""Train small models to track a state, and measure them at greater lengths.

    python -m examples.state_tracking.train -o FOLDER

Each task is trained at lengths to 40 and measured at 40, 100, 400 and 2000: the share of sequences whose last
answer is right, and of all answers. "linear" is the NLRU with its recurrent weight held at 0: its state then
changes by sums of terms that do not depend on it. A run that was stopped goes on from its last checkpoint.
`--plot FILE` draws the shares over the length.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_pararnn.model import Model, ModelArgs
from mlx_pararnn.tools.plot import Panel, draw
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Trainer

from .tasks import FIRST_ANSWER, QUESTION, TASKS, VOCABULARY, batches, sequences

LENGTHS = (40, 100, 400, 2000)
TRAINED = (5, 10, 20, 40)
CELLS = {"gru": "gru", "nlru": "nlru", "linear": "nlru"}
MEASURED = 10**6  # the seed of the sequences that are measured with
RECURRENT = 3.0  # of initial recurrent weights: above 1 a unit can hold one of two values, or flip

SETTINGS = Settings(
    steps=1000,
    batch_size=32,
    length=2 * TRAINED[-1],
    states="reset",
    learning_rate=3e-3,
    final_rate=0.02,
    warmup=50,
    weight_decay=0.01,
    report_every=100,
    eval_every=0,
    save_every=500,
)


class AnswersHidden(nn.Module):
    """A model that is shown a question mark for each answer, so that it must keep the state itself."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def make_cache(self, rows: int) -> list[Any]:
        return self.model.make_cache(rows)

    def __call__(self, tokens: mx.array, cache: list[Any], **options: Any) -> mx.array:
        return self.model(mx.where(tokens >= FIRST_ANSWER, QUESTION, tokens), cache=cache, **options)


def make_model(kind: str, seed: int) -> AnswersHidden:
    """A model of two layers, its recurrent weights spread over both signs, or held at 0 for "linear"."""
    mx.random.seed(seed)
    model = Model(
        ModelArgs(
            cell=CELLS[kind],
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            vocab_size=VOCABULARY,
        )
    )
    for layer in model.model.layers:
        cell = layer.mixer.cell
        weight = cell.recurrent_weight
        if kind == "linear":
            cell.recurrent_weight = mx.zeros_like(weight)
            cell.freeze(keys=["recurrent_weight"], recurse=False)
        else:
            cell.recurrent_weight = mx.random.uniform(-RECURRENT, RECURRENT, weight.shape)
    return AnswersHidden(model)


def train(
    task: str,
    kind: str,
    folder: Path | None = None,
    settings: Settings = SETTINGS,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> AnswersHidden:
    """Train a model on a task, or go on with training where `folder` has checkpoints of it."""
    model = make_model(kind, settings.seed)
    growing = settings.steps // 2
    data = batches(TASKS[task], settings.batch_size, TRAINED, growing, settings.seed + 1)
    trainer = Trainer(model, data, settings, folder=folder, report=report)
    trainer.resume()
    trainer.run()
    return model


def measure(model: AnswersHidden, task: str, length: int, count: int = 100) -> dict[str, float]:
    """The share of new sequences whose last answer is right, and of all their answers."""
    tokens = sequences(TASKS[task], np.random.default_rng(MEASURED), count, length)
    cache, right = model.make_cache(count), []
    for begin in range(0, 2 * length, 400):  # an even number of tokens
        piece = tokens[:, begin : begin + 400]
        best = np.array(mx.argmax(model(mx.array(piece), cache=cache), axis=-1))
        right.append(best[:, 0::2] == piece[:, 1::2])
    answers = np.concatenate(right, axis=1)
    return {"last": float(answers[:, -1].mean()), "all": float(answers.mean())}


def table(results: list[dict[str, Any]]) -> str:
    """The shares of right last answers as Markdown."""
    lines = [
        "| task | recurrence | " + " | ".join(f"{n}" for n in LENGTHS) + " |",
        "|---" * (len(LENGTHS) + 2) + "|",
    ]
    for result in results:
        shares = " | ".join(f"{result['lengths'][n]['last']:.0%}" for n in LENGTHS)
        lines.append(f"| {result['task']} | {result['kind']} | {shares} |")
    return "\n".join(lines)


def panels(results: list[dict[str, Any]]) -> list[Panel]:
    """The same as a chart for each task, a line for each recurrence."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for result in results:
        points = [(float(n), 100 * result["lengths"][n]["last"]) for n in LENGTHS]
        charts.setdefault(result["task"], {})[result["kind"]] = points
    return [Panel(task, "inputs", "right last answers, %", lines) for task, lines in charts.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="*", choices=CELLS, default=list(CELLS))
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--plot", type=Path, help="a chart as .svg, .png or .pdf")
    given = parser.parse_args()
    settings = replace(SETTINGS, steps=given.steps, seed=given.seed)
    results = []
    for task in given.tasks:
        for kind in given.kinds:
            place = given.out / f"{task} {kind} {given.seed}".replace(" ", "-")
            model = train(task, kind, place, settings, lambda line: print(json.dumps(line), flush=True))
            shares = {length: measure(model, task, length) for length in LENGTHS}
            results.append({"task": task, "kind": kind, "lengths": shares})
            print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if given.plot:
        draw(panels(results), given.plot)
