"""What `lm lora` changes in MLX-LM's training."""

from argparse import Namespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss

from mlx_pararnn.cli.lm_training import (
    cap_recurrent_weights,
    in_few_lengths,
    masked_loss,
    run_training,
    unfreeze_ends,
)
from mlx_pararnn.compute import cpu
from mlx_pararnn.errors import PararnnError
from tests.support.training_runs import TEXT, small_model

TOKENS = mx.array([list(TEXT.encode()[i : i + 41]) for i in (0, 500)])
LENGTHS = mx.array([[0, 41], [0, 30]])


@pytest.mark.parametrize("tied", [False, True])
def test_full_learns_every_weight(tied):
    model = small_model(tie_word_embeddings=tied, max_position_embeddings=64)
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    unfreeze_ends(model)
    learned = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert learned == {name for name, _ in tree_flatten(model.parameters())}
    assert any("lm_head" in name for name in learned) is not tied


def test_quantized_matrices_are_not_learned():
    model = small_model(hidden_size=64, intermediate_size=64, num_heads=1)
    nn.quantize(model, 64, 8, class_predicate=model.quant_predicate)
    model.freeze()
    model.layers[0].unfreeze()
    unfreeze_ends(model)
    learned = dict(tree_flatten(model.trainable_parameters()))
    assert learned
    assert all(mx.issubdtype(array.dtype, mx.floating) for array in learned.values())


@pytest.mark.parametrize("kind", [optim.Adam, optim.SGD])
def test_recurrent_weights_stay_within_the_cap(kind):
    model = small_model()
    optimizer = kind(learning_rate=1.0)
    cap_recurrent_weights(optimizer, 0.05)
    step = nn.value_and_grad(model, default_loss)
    for _ in range(2):
        _, gradient = step(model, TOKENS, LENGTHS)
        optimizer.update(model, gradient)
    weights = dict(tree_flatten(model.parameters()))
    capped = [array for name, array in weights.items() if name.endswith("recurrent_weight")]
    assert max(mx.abs(array).max().item() for array in capped) == pytest.approx(0.05)
    assert mx.abs(weights["model.embed_tokens.weight"]).max() > 0.05
    with pytest.raises(PararnnError, match="must be a positive number"):
        cap_recurrent_weights(optimizer, -1)


def test_few_lengths_and_the_same_loss():
    def batches(dataset, max_seq_length):
        for width in dataset:
            yield mx.pad(TOKENS, [(0, 0), (0, 64)])[:, :width], LENGTHS

    made = list(in_few_lengths(batches)(dataset=[33, 65, 97, 100], max_seq_length=100))
    assert [tokens.shape[1] for tokens, _ in made] == [33, 65, 100, 100]
    (tokens, _), *_ = in_few_lengths(batches)(dataset=[97], max_seq_length=2048)
    assert tokens.shape[1] == 129
    model = small_model()
    wanted, count = default_loss(model, *made[1])
    loss, same = default_loss(model, tokens, LENGTHS)
    assert count.item() == same.item()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("backend", ["ops", "cpu"])
def test_the_loss_and_its_gradient_are_mlx_lms(backend, monkeypatch):
    monkeypatch.setattr(cpu, "is_large", lambda size: backend == "cpu")
    model, lengths = small_model(), mx.array([[7, 41], [0, 30]])  # a prompt of 7 tokens, padding from 30
    (wanted, count), gradient = nn.value_and_grad(model, default_loss)(model, TOKENS, lengths)
    (loss, same), ours = nn.value_and_grad(model, masked_loss)(model, TOKENS, lengths)
    assert count.item() == same.item() == 34 + 30
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    for (name, array), (_, ours_of_it) in zip(tree_flatten(gradient), tree_flatten(ours), strict=True):
        assert mx.abs(array - ours_of_it).max() < 1e-6, name


def test_models_of_ours_are_trained_with_our_loss_and_others_with_their_own():
    given = []
    for model in (small_model(), Namespace(model_type="llama")):
        run_training(lambda **options: given.append(options.get("loss", default_loss)), {"model": model})
    assert given == [masked_loss, default_loss]
