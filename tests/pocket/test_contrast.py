"""Addition with pointers and without: what models learn it from, and a small run of each."""

import json
import random
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from examples.pocket import contrast
from examples.pocket.batches import protocol

SMALL = replace(contrast.SETTINGS, steps=2, batch_size=2)


def test_without_pointers_the_answer_follows_the_message():
    ids = protocol()
    for seed in range(20):
        tokens, learned = contrast.turn(random.Random(seed), 5, pointers=False)
        end = tokens.index(ids.end)
        assert not any(learned[: end + 1])
        assert all(learned[end + 1 :])
        a, b = ids.decode(tokens[1:end]).split(" + ")
        assert ids.decode(tokens[end + 2 : -1]) == str(int(a) + int(b))
        assert (tokens[0], tokens[end + 1], tokens[-1]) == (ids.user, ids.answer, ids.end)


def test_batches_go_on_from_their_number():
    sums = contrast.Sums(3, True, 0)
    first = [batch for batch, _ in zip(sums, range(3), strict=False)]
    again = next(iter(sums.starting_at(2)))
    assert np.array_equal(first[2].tokens, again.tokens)
    assert np.array_equal(first[2].mask, again.mask)
    assert len({batch.tokens.tobytes() for batch in first}) == 3


@pytest.mark.large
@pytest.mark.parametrize("kind", contrast.KINDS)
def test_every_kind_learns_and_is_measured_at_a_greater_length(kind):
    model = contrast.train(kind, True, 0, None, SMALL)
    fresh = contrast.make_model(kind, 0)
    assert abs(contrast.parameters(model) / contrast.parameters(contrast.make_model("gru", 0)) - 1) < 0.2
    assert not mx.array_equal(embedding(model), embedding(fresh))
    assert contrast.measure(model, True, 10, 2) == 0
    if kind == "linear":
        assert not any(layer.mixer.cell.recurrent_weight.any().item() for layer in model.layers)


def embedding(model):
    inner = model.backbone.embeddings if hasattr(model, "backbone") else model.model.embed_tokens
    return inner.weight


@pytest.mark.large
def test_results_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contrast, "SETTINGS", SMALL)
    monkeypatch.setattr(contrast, "COUNTS", dict.fromkeys(contrast.LENGTHS, 1))
    monkeypatch.setattr(contrast, "LENGTHS", (5, 10))
    command = ["contrast", "-o", str(tmp_path), "--kinds", "linear", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2"])
    contrast.main()
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["pointers"], r["seed"]) for r in results] == [(True, 0), (False, 0), (True, 1), (False, 1)]
    made = capsys.readouterr().out
    assert made.count("checkpoint") == 4
    contrast.main()
    again = capsys.readouterr().out
    assert "checkpoint" not in again
    assert again == made[-len(again) :]
    assert again.splitlines()[2].startswith(f"| linear | {results[0]['parameters']:,} | yes | 2 | 0% | 0% |")
