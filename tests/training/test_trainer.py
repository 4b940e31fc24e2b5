"""The loop: what one update does, what is carried, and that a resumed run is the run itself."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.training import checkpoints
from mlx_pararnn.training.batches import Batch
from mlx_pararnn.training.optimizers import decays, schedule
from mlx_pararnn.training.settings import Settings
from tests.support.training_runs import TEXT, Text, losses, same, small_model, trainer


def test_the_loss_falls():
    made = trainer({"steps": 30, "warmup": 3}, batches=Text(rows=8, length=32))
    outcome = made.run()
    assert (outcome.step, outcome.stopped) == (30, False)
    assert made.lines[0]["loss"] == pytest.approx(math.log(256), abs=0.6)
    assert outcome.loss < made.lines[0]["loss"] - 1.5
    assert made.lines[-1]["tokens"] == 30 * 8 * 32
    weights = dict(tree_flatten(made.model.parameters()))
    assert same({name: weights[name] for name in made.weights}, made.weights)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_accumulated_gradients_are_those_of_the_large_batch(cell):
    batches = list(itertools.islice(Text(rows=6), 3))
    mask = np.random.default_rng(0).random((6, 16)) < 0.5  # parts that count different numbers of tokens
    mask[:2] = False
    batches = [batch._replace(mask=mask) for batch in batches]
    at_once = trainer({"steps": 3, "epsilon": 1e-3}, small_model(cell=cell), batches)
    in_parts = trainer({"steps": 3, "epsilon": 1e-3, "accumulate": 3}, small_model(cell=cell), batches)
    at_once.run()
    in_parts.run()
    for one, other in zip(at_once.lines, in_parts.lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    for name, weight in at_once.weights.items():
        assert mx.allclose(weight, in_parts.weights[name], atol=1e-5), name


@pytest.mark.parametrize(("cell", "mixer"), [("gru", "gated_conv"), ("lstm", "plain")])
def test_pieces_with_carried_states_have_the_loss_of_the_whole(cell, mixer):
    model = small_model(cell=cell, mixer=mixer)
    tokens = np.frombuffer(TEXT.encode(), np.uint8)[: 2 * 97].reshape(2, 97)
    cuts = [(0, 32), (32, 64), (64, 96)]
    pieces = [Batch(tokens[:, a : b + 1], None, fresh=a == 0) for a, b in cuts]
    made = trainer(model=model)
    whole, count = made.evaluate([Batch(tokens)])
    carried, also = made.evaluate(pieces)
    reset, _ = made.evaluate([piece._replace(fresh=True) for piece in pieces])
    assert count == also == 192
    assert carried == pytest.approx(whole, rel=1e-6)
    assert abs(reset - whole) > 1e-4


def test_training_carries_the_state_too():
    carried, reset = (trainer({"steps": 3}, batches=Text(fresh=fresh)) for fresh in (False, True))
    carried.run()
    reset.run()
    first, second = ([line["loss"] for line in made.lines] for made in (carried, reset))
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({}, {}),
        ({"ema": 0.9, "accumulate": 2, "schedule": "wsd"}, {"cell": "lstm"}),
        ({"max_recurrent_norm": 0.1, "report_every": 3}, {"mixer": "plain", "mlp": "gelu", "norm": "layer"}),
    ],
)
def test_a_resumed_run_is_the_run_itself(settings, model, tmp_path):
    settings = {"steps": 9, "eval_every": 4, "eval_batches": 2, **settings}
    held_out = list(itertools.islice(Text(rows=2), 3))
    whole = trainer(settings, small_model(**model), held_out=held_out, folder=tmp_path / "whole")
    whole.run()
    lines = []
    for stop in (4, 7, 9):
        # a resumed run has other weights at first: all must come from the checkpoint
        part = trainer(settings, small_model(stop - 4, **model), held_out=held_out, folder=tmp_path / "parts")
        assert part.resume() is (stop > 4)
        stop_after(part, stop)
        outcome = part.run()
        lines += part.lines
    assert outcome.step == 9
    assert losses(lines) == losses(whole.lines)
    assert same(part.weights, whole.weights)
    assert same(part.average, whole.average)
    (a, one), (b, other) = (checkpoints.load(tmp_path / name) for name in ("whole", "parts"))
    assert same(a, b)
    assert (one.pop("previous"), other.pop("previous")) == (0, 7)
    assert one == other


def stop_after(made, step):
    make_step = made._make_step

    def stepping(batch):
        make_step(batch)
        if made.step >= step:
            made.stop()

    made._make_step = stepping


@pytest.mark.compiled
@pytest.mark.large
@pytest.mark.parametrize("settings", [{}, {"ema": 0.5, "accumulate": 2}])
def test_a_compiled_step_is_the_same_step(settings, tmp_path):
    """As it runs on a GPU; here in MLX's ops."""
    settings = {"epsilon": 1e-3, **settings}
    plain = trainer(settings)
    plain.run()
    first = trainer(settings, compiled=True, folder=tmp_path)
    stop_after(first, 3)
    first.run()
    second = trainer(settings, compiled=True, folder=tmp_path)
    assert second.resume()
    second.run()
    for one, other in zip(
        plain.lines, [line for line in first.lines + second.lines if "loss" in line], strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
    for name, weight in plain.weights.items():
        assert mx.allclose(weight, second.weights[name], atol=1e-3), name


def test_plain_iterables_are_read_again_up_to_where_a_run_stopped(tmp_path):
    batches = list(itertools.islice(Text(fresh=True), 6))
    whole = trainer(batches=batches)
    whole.run()
    first = trainer(batches=batches, folder=tmp_path)
    stop_after(first, 2)
    first.run()
    second = trainer(batches=iter(batches), folder=tmp_path)
    assert second.resume()
    second.run()
    assert losses(first.lines + second.lines) == losses(whole.lines)


def test_only_matrices_decay():
    model = small_model(cell="lstm", residual_scale=True, max_position_embeddings=32)
    named = {name for name, weight in tree_flatten(model.parameters()) if decays(name, weight)}
    kinds = {name.split(".", 3)[-1] for name in named if ".layers." in name} | {
        name for name in named if ".layers." not in name
    }
    assert kinds == {
        *(f"mixer.{name}.weight" for name in ("in_proj", "conv1d", "cell.input_proj", "out_proj")),
        *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
        "lm_head.weight",
    }


def test_weight_decay_shrinks_what_decays_and_nothing_else():
    nothing = next(iter(Text()))._replace(mask=np.zeros((4, 16), bool))
    model = small_model()
    before = dict(tree_flatten(model.parameters()))
    made = trainer({"steps": 1, "warmup": 0, "weight_decay": 0.5}, model, [nothing])
    made.run()
    for name, weight in made.weights.items():
        factor = 1 - 1e-2 * 0.5 if decays(name, weight) else 1
        assert mx.allclose(weight, factor * before[name], rtol=1e-6), name


def rates(**settings):
    rate = schedule(Settings(learning_rate=1.0, final_rate=0.1, **settings))
    return [rate(mx.array(step)).item() for step in range(settings["steps"])]


def test_schedules():
    cosine = rates(steps=101, warmup=10, schedule="cosine")
    assert cosine[:11] == pytest.approx([(n + 1) / 11 for n in range(11)])
    assert cosine[10 + 45] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert cosine[-1] == pytest.approx(0.1, abs=1e-3)
    wsd = rates(steps=100, warmup=10, schedule="wsd", decay=0.2)
    assert wsd[10:81] == pytest.approx([1.0] * 71)
    assert wsd[90] == pytest.approx(0.55)
    assert wsd[99] == pytest.approx(0.145)
    assert rates(steps=20, warmup=0, schedule="constant") == pytest.approx([1.0] * 20)


def change_of(settings):
    model = small_model()
    before = dict(tree_flatten(model.parameters()))
    # with so large an epsilon AdamW's step is its gradient times a number
    made = trainer({"steps": 1, "warmup": 0, "weight_decay": 0.0, "epsilon": 1e3} | settings, model)
    made.run()
    squares = [(made.weights[name] - before[name]).square().sum().item() for name in before]
    return math.sqrt(sum(squares)), made.lines[0]["gradient_norm"]


def test_clipping_limits_the_norm_of_the_gradient():
    free, norm = change_of({"clip": 0})
    clipped, same_norm = change_of({"clip": 0.25})
    assert norm == same_norm
    assert norm > 0.5
    assert clipped == pytest.approx(free * 0.25 / norm, rel=1e-2)


def test_recurrent_weights_stay_within_their_limit():
    made = trainer({"learning_rate": 0.5, "max_recurrent_norm": 0.05})
    made.run()
    for name, weight in made.weights.items():
        largest = abs(weight).max().item()
        assert largest <= 0.0500001 if name.endswith("recurrent_weight") else largest > 0.06, name


def test_the_moving_average(tmp_path):
    made = trainer({"steps": 4, "ema": 0.5}, folder=tmp_path)
    expected = dict(made.weights)
    step_of = made._make_step

    def stepping(batch):
        step_of(batch)
        decay = min(0.5, (1 + made.step) / (10 + made.step))
        for name, weight in made.weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight

    made._make_step = stepping
    made.run()
    assert all(mx.allclose(made.average[name], expected[name], atol=1e-6) for name in expected)
    assert not same(made.average, made.weights)
    with made.averaged():
        assert same(dict(tree_flatten(made.model.parameters())), made.average)
    assert same(dict(tree_flatten(made.model.parameters())), made.weights)


def test_mixed_precision_keeps_float32_weights():
    exact, mixed = trainer(), trainer({"precision": "bfloat16"})
    exact.run()
    mixed.run()
    assert {weight.dtype for weight in mixed.weights.values()} == {mx.float32}
    first, second = ([line["loss"] for line in made.lines] for made in (exact, mixed))
    assert first != second
    assert first == pytest.approx(second, rel=0.02)


def test_bfloat16_models_are_trained_in_float32():
    model = small_model()
    model.set_dtype(mx.bfloat16)
    made = trainer(model=model)
    made.run()
    assert {weight.dtype for weight in made.weights.values()} == {mx.float32}


def test_a_loss_that_is_no_number_ends_training_and_keeps_the_last_checkpoint(tmp_path):
    made = trainer({"save_every": 2}, folder=tmp_path)
    report = made._report

    def breaking(line):
        report(line)
        if line.get("loss") and line["step"] == 3:
            made.weights["model.norm.weight"] = made.weights["model.norm.weight"] * math.nan

    made._report = breaking
    with pytest.raises(
        PararnnError, match=r"no number at step 4.*checkpoint is that of step 2.*lower learning"
    ):
        made.run()
    arrays, state = checkpoints.load(tmp_path)
    assert state["step"] == 2
    assert all(mx.isfinite(array.astype(mx.float32)).all() for array in arrays.values())


@pytest.mark.parametrize(
    ("settings", "batches", "words"),
    [
        ({}, [], "ended at step 0 of 6"),
        ({"accumulate": 3}, Text(), "4 rows, which accumulate=3"),
    ],
)
def test_batches_that_do_not_fit(settings, batches, words):
    with pytest.raises(PararnnError, match=words):
        trainer(settings, batches=batches or iter(())).run()


def test_checkpoints_of_another_model_are_refused(tmp_path):
    trainer(folder=tmp_path).run()
    with pytest.raises(PararnnError, match="of another model or of other settings"):
        trainer(model=small_model(cell="lstm"), folder=tmp_path).resume()


def test_old_checkpoints_go_and_half_written_ones_do_not_count(tmp_path):
    trainer({"steps": 5, "save_every": 1, "keep": 2}, folder=tmp_path).run()
    assert checkpoints.steps(tmp_path) == [4, 5]
    (tmp_path / "00000009.partial").mkdir()
    _, state = checkpoints.load(tmp_path)
    assert state["step"] == 5
    assert not (tmp_path / "00000009.partial").exists()
    (tmp_path / "00000005/arrays.safetensors").write_bytes(b"short")
    with pytest.raises(PararnnError, match=r"00000005 cannot be read.*delete that folder"):
        checkpoints.load(tmp_path)
