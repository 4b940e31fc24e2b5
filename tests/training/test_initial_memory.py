"""Gates whose first biases let a unit remember: what is left of a state after tokens that say nothing."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.training.run import remember_long

WIDTH, LONGEST = 16, 100


def layers(cell, heads):
    model = Model(ModelArgs(WIDTH, 2, 8, 8, cell=cell, num_heads=heads))
    return model, [layer.mixer.cell for layer in model.layers]


def kept(layer, tokens):
    """What (D) is left of a state of 0.1 after so many tokens without input and recurrence."""
    layer.recurrent_weight = mx.zeros_like(layer.recurrent_weight)
    state = mx.full((1, len(layer.cell.slots), WIDTH), 0.1)
    _, state = layer(mx.zeros((1, tokens, WIDTH)), state)
    return np.array(state)[0, 0] / 0.1


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_units_of_each_head_remember_for_one_to_the_longest_number_of_tokens(cell, heads):
    model, cells = layers(cell, heads)
    before = [np.array(layer.bias).reshape(heads, 3, -1)[:, 1:] for layer in cells]
    assert all(np.allclose(kept(layer, 8), 2.0**-8, rtol=1e-4) for layer in cells)
    remember_long(model, LONGEST)
    lives = np.geomspace(1, LONGEST, WIDTH // heads)
    for layer, others in zip(cells, before, strict=True):
        for tokens in (1, 50):
            left = (1 - 1 / (1 + lives)) ** tokens
            assert np.allclose(kept(layer, tokens), np.tile(left, heads), rtol=1e-3, atol=1e-7)
        assert np.array_equal(np.array(layer.bias).reshape(heads, 3, -1)[:, 1:], others)


def test_a_cell_without_such_a_gate_stays_as_it_is():
    model, cells = layers("nlru", 1)
    before = [np.array(layer.bias) for layer in cells]
    remember_long(model, LONGEST)
    assert all(np.array_equal(np.array(c.bias), b) for c, b in zip(cells, before, strict=True))
