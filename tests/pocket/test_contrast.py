"""Tasks with pointers and without: what models learn them from, and a small run of each kind."""

import json
import random
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from examples.pocket import contrast
from examples.pocket.batches import protocol
from examples.pocket.data import logic
from examples.pocket.traces import solve

SMALL = replace(contrast.SETTINGS, steps=2, batch_size=2)


@pytest.mark.parametrize("task", contrast.TASKS)
def test_without_pointers_the_answer_follows_the_message_and_with_them_is_the_same(task):
    ids = protocol()
    for seed in range(40):
        size = 1 + seed % 7
        tokens, learned = contrast.turn(random.Random(seed), task, size, pointers=False)
        end = tokens.index(ids.end)
        assert not any(learned[: end + 1])
        assert all(learned[end + 1 :])
        assert (tokens[0], tokens[end + 1], tokens[-1]) == (ids.user, ids.answer, ids.end)
        message, answer = ids.decode(tokens[1:end]), ids.decode(tokens[end + 2 : -1])
        assert (message, answer) == contrast.TASKS[task](random.Random(seed), size)
        traced, _ = contrast.turn(random.Random(seed), task, size, pointers=True)
        assert traced[: end + 1] == tokens[: end + 1]
        assert solve(message).answered == answer


def test_a_logic_graph_is_worked_out_as_python_does():
    for seed in range(50):
        message, answer = logic(random.Random(seed), 1 + 4 * seed)
        inputs, *gates = message.split(";")
        values = {wire: int(value) for value, wire in zip(inputs[::2], inputs[1::2], strict=True)}
        for gate in gates:
            asked, to = gate.split(">")
            values[to] = last = eval(asked, {}, values)
        assert solve(message).answered == answer == str(last)


def test_each_step_on_a_logic_graph_follows_from_the_last_few_tokens():
    """What is written next is the same wherever the last twelve tokens are the same."""
    following = {}
    for seed in range(200):
        trace = solve(logic(random.Random(seed), 1 + seed % 60)[0])
        for at in range(trace.learned.index(True), len(trace.tokens)):
            if trace.learned[at]:
                before = tuple(trace.tokens[max(0, at - 12) : at])
                assert following.setdefault(before, trace.tokens[at]) == trace.tokens[at]


def test_batches_go_on_from_their_number():
    turns = contrast.Turns(3, "addition", True, 0)
    first = [batch for batch, _ in zip(turns, range(3), strict=False)]
    again = next(iter(turns.starting_at(2)))
    assert np.array_equal(first[2].tokens, again.tokens)
    assert np.array_equal(first[2].mask, again.mask)
    assert len({batch.tokens.tobytes() for batch in first}) == 3


@pytest.mark.large
@pytest.mark.parametrize("kind", contrast.KINDS)
def test_every_kind_learns_and_is_measured_at_a_greater_length(kind):
    model = contrast.train(kind, "addition", True, 0, None, SMALL)
    fresh = contrast.make_model(kind, 0)
    assert abs(contrast.parameters(model) / contrast.parameters(contrast.make_model("gru", 0)) - 1) < 0.2
    assert not mx.array_equal(embedding(model), embedding(fresh))
    assert contrast.measure(model, "addition", True, 10, 2) == 0
    if kind == "linear":
        assert not any(layer.mixer.cell.recurrent_weight.any().item() for layer in model.layers)


def embedding(model):
    inner = model.backbone.embeddings if hasattr(model, "backbone") else model.model.embed_tokens
    return inner.weight


@pytest.mark.large
def test_results_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contrast, "SETTINGS", SMALL)
    monkeypatch.setattr(contrast, "COUNTS", dict.fromkeys(contrast.SIZES, 1))
    monkeypatch.setattr(contrast, "SIZES", (5, 10))
    command = ["contrast", "-o", str(tmp_path), "--tasks", "addition", "--kinds", "linear"]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "0", "1", "--steps", "2"])
    contrast.main()
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["pointers"], r["seed"]) for r in results] == [(True, 0), (False, 0), (True, 1), (False, 1)]
    made = capsys.readouterr().out
    assert made.count("checkpoint") == 4
    contrast.main()
    again = capsys.readouterr().out
    assert "checkpoint" not in again
    assert again == made[-len(again) :]
    assert again.splitlines()[2].startswith("| addition | linear | yes | 2 | 0% | 0% |")
