"""The pocket model's training: rows of turns, a short run in two parts, and the check of whole traces."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from examples.pocket import batches as data
from examples.pocket import evaluate, train
from examples.pocket.batches import batches, encode, english_turns, kind_turns, number_turns, protocol, turns
from examples.pocket.fillers import FOLDER
from examples.pocket.traces import NUMBERS, solve
from mlx_pararnn import answer, load
from mlx_pararnn.files.hub import BUNDLED


def test_rows_go_on_from_batch_to_batch():
    rows = [np.zeros((3, 0), int), np.zeros((3, 0), bool)]
    for number, batch in enumerate(itertools.islice(batches(number_turns, 3, 40, seed=5), 4)):
        assert batch.fresh == (number == 0)
        assert batch.tokens.shape == (3, 41)
        if number:
            assert (batch.tokens[:, 0] == rows[0][:, -1]).all()
        rows = [np.hstack([rows[0], batch.tokens[:, 1:]]), np.hstack([rows[1], batch.mask])]
    for row in range(3):
        turns = itertools.chain.from_iterable(zip(*turn, strict=True) for turn in number_turns(5000 + row))
        expected = list(itertools.islice(turns, 161))[1:]
        assert list(zip(rows[0][row], rows[1][row], strict=True)) == expected


@pytest.mark.parametrize("source", [number_turns, english_turns])
def test_turns_are_in_the_protocols_order(source):
    """And what the loop feeds is what has no loss, but for a kind of message that is noted in error."""
    ids = protocol()
    for tokens, learned in itertools.islice(source(0), 40):
        expected, kind = ids.loss_mask(tokens), tokens.index(ids.end) + 1
        assert expected[kind]
        assert [*expected[:kind], learned[kind], *expected[kind + 1 :]] == learned


def test_kinds_are_learned_from_beginnings_of_turns():
    """The same kinds as whole turns note, with the pointer put on them, and nothing after that."""
    ids = protocol()
    for tokens, learned in itertools.islice(kind_turns(0), 60):
        *message, end, kind, last = tokens
        assert learned == [False] * (len(tokens) - 2) + [True, True]
        assert (end, ids.commands[last].name) == (ids.end, "<|last3|>")
        assert (kind == ids.encode(NUMBERS)[0]) == (solve(ids.decode(message)) is not None)


def test_all_rows_begin_anew_now_and_then(monkeypatch):
    monkeypatch.setattr(data, "RESTART", 2)
    user = protocol().user
    for number, batch in enumerate(itertools.islice(batches(turns, 3, 40, seed=5), 5)):
        assert batch.fresh == (number % 2 == 0)
        assert not batch.fresh or (batch.tokens[:, 0] == user).all()


class Recorded:
    """A model that has learned a few turns by heart, but for the tokens at some places."""

    def __init__(self, turns, wrong):
        self.turns, self.wrong, self.at = turns, wrong, 0

    def make_cache(self, rows):
        return []

    def __call__(self, inputs, cache):
        logits = np.zeros((*inputs.shape, 300), np.float32)
        for row, (tokens, _) in enumerate(self.turns):
            for step in range(inputs.shape[1]):
                place = self.at + step + 1
                if place < len(tokens):
                    logits[row, step, 299 if (row, place) in self.wrong else tokens[place]] = 1
        self.at += inputs.shape[1]
        return mx.array(logits)


def test_the_first_token_that_a_model_would_not_write_is_found(monkeypatch):
    monkeypatch.setattr(evaluate, "PIECE", 16)
    turns = [encode(solve(message), protocol()) for message in ("1 + 2", "sort 3 1 2", "12 - 7")]
    told = turns[2][1].index(False, 30)  # an observation: no matter what the model would write
    own = [i for i, learned in enumerate(turns[1][1]) if learned]
    model = Recorded(turns, {(1, own[20]), (1, own[30]), (2, told)})
    assert evaluate.check_traces(model, turns) == [None, own[20], None]


def test_a_kind_noted_otherwise_is_no_fault_of_its_own(monkeypatch):
    """The trace goes on from the kind that the model notes."""
    monkeypatch.setattr(evaluate, "PIECE", 16)
    turns = [encode(solve(message), protocol()) for message in ("1 + 2", "reverse abcdefghijklmnopqrs")]
    kinds = [own.index(True) for _, own in turns]
    noted = evaluate.with_own_kinds(Recorded(turns, {(1, kinds[1])}), turns)
    assert noted[0] == turns[0]
    assert noted[1][0][kinds[1]] == 299
    assert noted[1][0][: kinds[1]] + noted[1][0][kinds[1] + 1 :] == (
        turns[1][0][: kinds[1]] + turns[1][0][kinds[1] + 1 :]
    )
    assert evaluate.check_traces(Recorded(noted, set()), noted) == [None, None]


def test_a_table_of_results():
    results = [
        {"task": "addition", "digits": digits, "count": 10, "exact": exact}
        for digits, exact in ((5, 1.0), (50, 0.8))
    ]
    assert evaluate.table(results).splitlines()[2] == "| addition | 10 of 10 | 8 of 10 |"


@pytest.mark.large
def test_the_bundled_model_goes_on_with_a_function_of_a_users_own(tmp_path):
    """By the command; with one step it is as good as it was."""
    lamp = ("--functions", FOLDER / "lamp.json", "--phrasings", FOLDER / "lamp.txt")
    command = [
        sys.executable,
        "-m",
        "examples.pocket.train",
        "-o",
        tmp_path,
        "--from",
        BUNDLED,
        "--steps",
        "1",
    ]
    done = subprocess.run(
        [*command, *lamp], cwd=FOLDER.parents[1], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[0])["loss"] < 1
    assert answer(*load(tmp_path / "model"), "12345 + 67890") == "80235"
    assert subprocess.run([*command, *lamp[:2]], cwd=FOLDER.parents[1], capture_output=True).returncode == 2


@pytest.mark.large
def test_a_short_run_learns_and_is_taken_up_again(tmp_path):
    lines = []
    few = replace(train.SETTINGS, steps=20, warmup=5, batch_size=8, length=128, report_every=5)
    train.train(tmp_path, few, report=lines.append)
    folder = train.train(tmp_path, replace(few, steps=40), report=lines.append)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["checkpoint"] for line in lines if "checkpoint" in line] == ["00000020", "00000040"]
    assert losses[-1] < losses[0] / 2
    model, tokenizer = load(folder)
    result = evaluate.evaluate(model, tokenizer, "reversal", 5, 4, decode=False)
    assert result["count"] == 4
