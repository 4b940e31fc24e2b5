"""What each process of test_sharding.py does: every form of model, whole and divided, side by side."""

import sys
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_pararnn.compute.module_arrays import named_arrays
from mlx_pararnn.distributed import Group, all_numbers, world
from mlx_pararnn.model import Model
from tests.support.training_runs import small_model

WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_heads": 4, "vocab_size": 259}
# form of the model; bits of its weights, 0 for none
CASES: dict[str, tuple[dict, int]] = {
    "gru": ({"num_heads": 4, "residual_scale": True}, 0),
    "lstm, one head, tied": ({"cell": "lstm", "num_heads": 1, "tie_word_embeddings": True}, 0),
    "slstm, two heads": ({"cell": "slstm", "num_heads": 2, "vocab_size": 257, "mlp_residual": False}, 0),
    "nlru, plain, one head, gelu": (
        {"cell": "nlru", "mixer": "plain", "num_heads": 1, "norm": "layer", "mlp": "gelu"}
        | {"mlp_bias": True, "max_position_embeddings": 40, "intermediate_size": 30},
        0,
    ),
    "lstm, plain, uneven heads": ({"cell": "lstm", "mixer": "plain", "num_heads": 6, "hidden_size": 24}, 0),
    "gru, 4 bits": (WIDE, 4),
    "gru, 3 bits": (WIDE | {"tie_word_embeddings": True}, 3),
}
TOKENS = mx.array([[7, 1, 250, 33, 0, 128, 5, 99, 64, 200, 17], [3, 255, 2, 8, 8, 8, 190, 5, 77, 1, 0]])


def main() -> None:
    """Compare the cases that are named; a line each."""
    group = world()
    assert group is not None
    for name in sys.argv[1:]:
        form, bits = CASES[name]
        layers = 2 if form.get("residual_scale") else 1  # sums take long on a busy machine
        print(f"{name}: {compare(group, form | {'num_hidden_layers': layers}, bits):.1e}")


def made(form: dict, bits: int) -> Model:
    """The same model in every process, with learned initial states."""
    model = small_model(3, **form)
    for layer in model.layers:
        cell = layer.mixer.cell
        cell.add_initial_state(0.1 * mx.ones((len(cell.cell.slots), model.args.hidden_size)))
    if bits:
        nn.quantize(model, 64, bits, class_predicate=model.quant_predicate)
    return model


def compare(group: Group, form: dict, bits: int) -> float:
    """The largest difference of logits."""
    whole, part = made(form, bits), made(form, bits)
    part.shard(group)
    sizes = [sum(a.nbytes for _, a in named_arrays(m.parameters())) for m in (whole, part)]
    assert sizes[1] < sizes[0] * (0.75 if group.size() == 2 else 0.55), sizes
    caches = whole.make_cache(2), part.make_cache(2)
    difference = 0.0
    for tokens in (TOKENS[:, :9], TOKENS[:, 9:10], TOKENS[:, 10:]):
        wanted, given = (m(tokens, cache=c) for m, c in zip((whole, part), caches, strict=True))
        difference = max(difference, cast(float, mx.abs(wanted - given).max().item()))
    assert difference < 5e-5, difference
    widths = all_numbers(group, caches[1][0].cache[0].shape[-1])
    begin = sum(widths[: group.rank()])
    own = slice(begin, begin + widths[group.rank()])
    assert sum(widths) == whole.args.hidden_size
    for layer, ours in zip(*caches, strict=True):
        assert mx.allclose(layer.cache[0][..., own], ours.cache[0], rtol=1e-4, atol=1e-5)

    def loss(model: Model) -> mx.array:
        return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:], reduction="mean")

    gradients = []
    for model in (whole, part):
        if bits:
            model.freeze(keys=["weight", "scales", "biases"])
            for _, module in model.named_modules():
                if "scales" not in module:
                    module.unfreeze(recurse=False)
        gradients.append(dict(named_arrays(nn.value_and_grad(model, loss)(model)[1])))
    mx.eval(gradients)
    expected = made(form, bits)
    expected.update(whole.parameters())
    for name, gradient in sliced(group, expected, gradients[0]).items():
        mine = gradients[1][name]
        assert mine.shape == gradient.shape, name
        assert mx.allclose(gradient, mine, rtol=1e-4, atol=2e-6), (name, mx.abs(gradient - mine).max())
    return difference


def sliced(group: Group, model: Model, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parts of the gradients that a process has: cut as the weights are, in their place."""
    weights = dict(named_arrays(model.parameters()))
    model.load_weights([*(weights | gradients).items()])
    model.shard(group)
    parts = dict(named_arrays(model.parameters()))
    return {name: parts[name] for name in gradients}


if __name__ == "__main__":
    main()
