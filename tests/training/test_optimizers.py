"""AdamW on the CPU backend: MLX's own, but for rounding."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_pararnn.training.optimizers import AdamW, clipping, groups, optimizers_of
from mlx_pararnn.training.settings import Settings
from tests.support.training_runs import losses, same, trainer

SHAPES = {
    "layer.weight": (40, 33),
    "layer.recurrent_weight": (3, 16),
    "embed.weight": (300, 8),
    "norm": (16,),
}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_many_steps_are_mlxs(clip):
    """Every step from the same numbers within a few roundings of float32, by group, at its own rate."""
    settings = Settings(steps=30, warmup=5, learning_rate=0.1, weight_decay=0.5, clip=clip)
    weights = drawn(0)
    for optimizer, own in zip(optimizers_of(settings), groups(weights), strict=True):
        assert optimizer.at_once
        options = {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
        theirs = optim.AdamW(0.0, bias_correction=True, **options)
        optimizer.init(own)
        for step in range(30):
            gradients = {name: drawn(step + 1)[name] for name in own}
            optimizer.factor, norm = clipping(gradients, clip, at_once=True)
            scaled, wanted_norm = optim.clip_grad_norm(gradients, clip or float("inf"))
            assert norm.item() == pytest.approx(wanted_norm.item(), rel=1e-6)
            theirs.state = {k: dict(v) if isinstance(v, dict) else v for k, v in optimizer.state.items()}
            new = optimizer.apply_gradients(gradients, own)
            theirs.learning_rate = optimizer.learning_rate
            wanted = theirs.apply_gradients(scaled, own)
            for name in own:
                np.testing.assert_allclose(new[name], wanted[name], rtol=3e-7, atol=3e-7)
                for moment in "mv":
                    given, exact = optimizer.state[name][moment], theirs.state[name][moment]
                    np.testing.assert_allclose(given, exact, rtol=3e-7, atol=3e-7)
            own = new
        assert optimizer.step.item() == theirs.step.item() == 30


def test_a_tree_of_weights_and_none():
    optimizer = AdamW(1e-2)
    weights = {"a": {"b": mx.ones((2, 3))}, "c": [mx.ones(4)]}
    optimizer.init(weights)
    new = optimizer.apply_gradients(weights, weights)
    assert mx.allclose(new["a"]["b"], mx.full((2, 3), 0.99 - 1e-4))
    assert new["c"][0].shape == (4,)
    assert optimizer.apply_gradients({}, weights) == {}


def test_half_precision_is_left_to_mlx():
    weights = {"a": mx.ones((5, 7), mx.bfloat16), "b": mx.ones(3)}
    made = []
    for optimizer in (AdamW(1e-2), optim.AdamW(1e-2, bias_correction=True)):
        optimizer.init(weights)
        made.append(optimizer.apply_gradients(weights, weights))
    assert same(*made)
    assert made[0]["a"].dtype == mx.bfloat16


def test_the_run_is_that_of_mlxs_operations(monkeypatch):
    """Clipping, decay by group, average and all: the losses of a run without the CPU backend."""
    settings = {"steps": 8, "weight_decay": 0.3, "clip": 0.5, "ema": 0.9, "max_recurrent_norm": 0.5}
    run = trainer(settings)
    assert all(optimizer.at_once for optimizer in optimizers_of(run.settings))
    run.run()
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    in_ops = trainer(settings)
    assert not any(optimizer.at_once for optimizer in optimizers_of(in_ops.settings))
    in_ops.run()
    for step, told in losses(run.lines).items():
        for (name, value), (_, wanted) in zip(told, losses(in_ops.lines)[step], strict=True):
            assert value == pytest.approx(wanted, rel=1e-4), (step, name)
    assert not same(run.weights, run.average)
    for name, weight in run.average.items():
        assert mx.allclose(weight, in_ops.average[name], atol=1e-4), name
