"""The state tracking example: its answers, what the model is shown, and a short run in two parts."""

from dataclasses import replace
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

from examples.state_tracking import tasks
from examples.state_tracking.tasks import FIRST_ANSWER, TASKS, batches, sequences
from examples.state_tracking.train import LENGTHS, SETTINGS, make_model, measure, panels, table, train


def by_hand(name, row):
    """The answer after all inputs of a row."""
    if name == "parity":
        return row.count(1) % 2
    if name == "modular sum":
        return sum(row) % 5
    if name == "recall":
        return next((value - 1 for value in reversed(row) if value), 0)
    cups = [0, 1, 2]
    for swap in row:
        a, b = ((0, 1), (0, 2), (1, 2))[swap]
        cups[a], cups[b] = cups[b], cups[a]
    return sorted(tasks.permutations(range(3))).index(tuple(cups))


@pytest.mark.parametrize("name", TASKS)
def test_answers(name):
    tokens = sequences(TASKS[name], np.random.default_rng(3), 20, 12)
    inputs, answers = tokens[:, 0::2], tokens[:, 1::2] - FIRST_ANSWER
    assert 0 <= inputs.min() <= inputs.max() < TASKS[name].inputs
    for row, answer in zip(inputs.tolist(), answers.tolist(), strict=True):
        assert answer == [by_hand(name, row[: t + 1]) for t in range(12)]


def test_batches_grow_and_only_answers_count():
    lengths = [batch.tokens.shape[1] // 2 for batch in islice(batches(TASKS["parity"], 2, (3, 6), 10, 0), 40)]
    assert set(lengths[:5]) == {3}
    assert set(lengths[5:]) == {3, 6}
    batch = next(batches(TASKS["recall"], 2, (3,), 1, 0))
    assert (batch.mask == (batch.tokens[:, 1:] >= FIRST_ANSWER)).all()


def test_the_model_is_not_shown_the_answers():
    model, tokens = make_model("gru", 0), sequences(TASKS["parity"], np.random.default_rng(0), 2, 5)
    other = tokens.copy()
    other[:, 1::2] = FIRST_ANSWER + 1 - (other[:, 1::2] - FIRST_ANSWER)
    outputs = [np.array(model(mx.array(t), cache=model.make_cache(2))) for t in (tokens, other)]
    np.testing.assert_array_equal(*outputs)


def test_a_short_run_is_taken_up_again_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.state_tracking.train.TRAINED", (3, 5))
    few = replace(SETTINGS, steps=2, batch_size=4, warmup=1, report_every=1, schedule="constant")
    lines = []
    train("parity", "linear", tmp_path, few, lines.append)
    model = train("parity", "linear", tmp_path, replace(few, steps=3), lines.append)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    for layer in model.model.model.layers:
        assert not np.array(layer.mixer.cell.recurrent_weight).any()
    shares = measure(model, "parity", 300, count=3)
    assert 0 <= shares["last"] <= 1
    assert 0.2 < shares["all"] < 0.8


def test_the_table():
    lengths = {
        n: {"last": share, "all": 1.0} for n, share in zip(LENGTHS, (1.0, 0.99, 0.5, 0.493), strict=True)
    }
    shown = table([{"task": "parity", "kind": "gru", "lengths": lengths}])
    assert shown.splitlines()[2] == "| parity | gru | 100% | 99% | 50% | 49% |"


def test_the_charts():
    """One a task, with a line for each recurrence."""
    lengths = {n: {"last": 0.5, "all": 1.0} for n in LENGTHS}
    kinds = [("parity", "gru"), ("parity", "linear"), ("recall", "gru")]
    charts = panels([{"task": task, "kind": kind, "lengths": lengths} for task, kind in kinds])
    assert [(chart.title, [*chart.lines]) for chart in charts] == [
        ("parity", ["gru", "linear"]),
        ("recall", ["gru"]),
    ]
    assert charts[0].lines["gru"] == [(n, 50.0) for n in LENGTHS]
