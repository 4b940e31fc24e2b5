"""Decoding on a CPU: the calls that the one call must leave to MLX, with the right numbers and gradients."""

import copy
import pickle
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_pararnn import blocks
from mlx_pararnn.cache import held_arrays
from mlx_pararnn.compute import cpu_token
from tests.support.random_models import TOKENS, by_token, distance, make, numbers

pytestmark = pytest.mark.usefixtures("cpu_backend")


def stood_back(made, calls, tolerance=1e-5, tokens=TOKENS, **options):
    calls.clear()
    given = by_token(made, tokens, **options)
    assert not any(calls)
    wanted = by_token(made, tokens, backend="ops")
    assert given.dtype == wanted.dtype
    assert distance(numbers(given), numbers(wanted)) < tolerance


def test_models_that_are_left_to_mlx(calls):
    adapted = make()
    linear_to_lora_layers(adapted, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    adapted.update(tree_map(lambda p: p + 0.1, adapted.trainable_parameters()))
    assert any("lora_b" in path for path, _ in tree_flatten(adapted.parameters()))
    stood_back(adapted, calls)

    stood_back(make(conv_kernel=1), calls)


@pytest.mark.parametrize(("mode", "group", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)])
def test_quantization_that_is_left_to_mlx(mode, group, bits, calls):
    made = make(hidden_size=64, intermediate_size=64)
    nn.quantize(made, group, bits, mode=mode, class_predicate=made.quant_predicate)
    stood_back(made, calls)


def test_scales_of_another_dtype_are_left_to_mlx(calls):
    made = make(hidden_size=64, intermediate_size=64)
    nn.quantize(made, 32, 4, class_predicate=made.quant_predicate)
    made.model.layers[1].mlp.up_proj.scales = made.model.layers[1].mlp.up_proj.scales.astype(mx.bfloat16)
    stood_back(made, calls)


def test_adapters_on_quantized_weights_are_left_to_mlx(calls):
    made = make(hidden_size=64, intermediate_size=64)
    nn.quantize(made, 32, 4, class_predicate=made.quant_predicate)
    linear_to_lora_layers(made, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    made.update(tree_map(lambda p: p + 0.1, made.trainable_parameters()))
    stood_back(made, calls)


@pytest.mark.large
def test_dtypes_that_differ_are_left_to_mlx(calls):
    """And come to what they come to without it: half where all is half, else float32."""
    for path in ("norm.weight", "mixer.cell.recurrent_weight", "mlp.up_proj.weight", "mixer.conv1d.bias"):
        for whole in (mx.float32, mx.bfloat16):
            made = make(dtype=whole)
            other = mx.bfloat16 if whole == mx.float32 else mx.float32
            if path.endswith("recurrent_weight"):
                other = mx.bfloat16
            made.update(
                tree_unflatten(
                    [
                        (p, a.astype(other) if p.endswith(path) else a)
                        for p, a in tree_flatten(made.parameters())
                    ]
                )
            )
            stood_back(made, calls, 1e-5 if whole == mx.float32 else 0.03)
    made = make(dtype=mx.bfloat16)
    made.model.layers[1].mlp.down_proj.weight = made.model.layers[1].mlp.down_proj.weight.astype(mx.float32)
    assert by_token(made, TOKENS).dtype == mx.float32


class Louder(nn.RMSNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Doubled(blocks.MLP):
    def __call__(self, x, where):
        return 2 * super().__call__(x, where)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, *arguments, **options):
        return 2 * self.inner(*arguments, **options)

    @property
    def mixer(self):
        return self.inner.mixer


def a_wrapped_layer(made):
    made.layers[0] = Wrapped(made.layers[0])


def another_norm(made):
    made.layers[1].norm = Louder(72)


def another_last_norm(made):
    made.model.norm = Louder(72)


def a_layer_norm_without_a_bias(made):
    made.layers[0].norm = made.layers[1].norm = nn.LayerNorm(72, bias=False)


def a_layer_norm_without_weights(made):
    made.model.norm = nn.LayerNorm(72, affine=False)


def another_eps(made):
    made.layers[1].mixer.norm.eps = 0.5


def another_mlp(made):
    made.layers[1].mlp = Doubled(made.args)


def a_bias_more(made):
    made.layers[1].mlp.down_proj.bias = mx.ones(72)


def layers_that_differ(made):
    made.layers[1] = make("lstm, 4 heads", conv_kernel=4).layers[0]
    made.layers[1].mlp.gate_proj = made.layers[0].mlp.gate_proj


def layers_whose_streams_differ(made):
    made.layers[1]._mlp_residual = False


@pytest.mark.parametrize(
    "change",
    [
        *(a_wrapped_layer, another_norm, another_last_norm),
        *(a_layer_norm_without_a_bias, a_layer_norm_without_weights),
        *(another_eps, another_mlp, a_bias_more, layers_that_differ, layers_whose_streams_differ),
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_models_that_someone_changed(change, used, calls):
    """Before the first token, or after it, when the model's arrays and settings are known."""
    made = make()
    if used:
        by_token(made, TOKENS)
        assert any(calls)
    change(made)
    stood_back(made, calls)


def test_wishes(calls, monkeypatch):
    made = make()
    for options in ({"method": "sequential"}, {"method": "newton", "chunk": 1}, {"max_iters": 3}):
        stood_back(made, calls, **options)
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    stood_back(made, calls)
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "cpu")
    calls.clear()
    by_token(made, TOKENS)
    assert calls == [True] * 5


@pytest.mark.parametrize("token", [-1, -37])
def test_token_ids_without_a_row(token, calls):
    """MLX counts negative ones from the end."""
    stood_back(make(), calls, tokens=mx.array([[token], [5]]))


def test_a_head_of_another_kind_is_called_by_itself(calls):
    for change in (
        lambda head: head.update({"weight": head.weight.astype(mx.bfloat16)}),
        lambda head: head.update({"bias": mx.ones(37)}, strict=False),
    ):
        made = make()
        by_token(made, TOKENS)
        change(made.lm_head)
        calls.clear()
        given, wanted = by_token(made, TOKENS), by_token(made, TOKENS, backend="ops")
        assert calls == [True] * 5
        assert given.dtype == wanted.dtype
        assert distance(numbers(given), numbers(wanted)) < 1e-5


def test_a_padded_token(calls):
    made = make()
    given, wanted = made.make_cache(2), made.make_cache(2)
    for cache in (given, wanted):
        for c in cache:
            c.prepare(lengths=[1, 2], right_padding=[1, 0])
    a = by_token(made, TOKENS[:, :2], given)
    b = by_token(made, TOKENS[:, :2], wanted, backend="ops")
    assert calls == [True]  # the first; of the second one row is padding
    assert distance(numbers(a[:, :1]), numbers(b[:, :1])) < 1e-5
    assert distance(numbers(a[1]), numbers(b[1])) < 1e-5
    for x, y in zip(held_arrays(given), held_arrays(wanted), strict=True):
        assert distance(numbers(x), numbers(y)) < 1e-5


def loss_of(made, tokens=TOKENS, evaluate=False, **options):
    """(weight, where) -> a loss of three tokens one after the other, with that weight in its place."""

    def loss(weight, path):
        kept = dict(tree_flatten(made.parameters()))[path]
        made.update(tree_unflatten([(path, weight)]))
        cache, total = made.make_cache(tokens.shape[0]), 0
        for t in range(3):
            logits = made(tokens[:, t : t + 1], cache=cache, **options)
            if evaluate:
                mx.eval(logits, held_arrays(cache), weight)
            total = total + (logits**2).sum()
        made.update(tree_unflatten([(path, kept)]))
        return total

    return loss


@pytest.mark.sampled("large", by=lambda evaluate: ["one"] if evaluate else [])
@pytest.mark.parametrize("evaluate", [False, True], ids=["", "evaluated inside"])
@pytest.mark.parametrize("kind", ["lstm, 4 heads", "babylm"])
def test_gradients_of_every_weight(kind, evaluate):
    """Tracing is noticed whichever weight is traced, and though its value is known already."""
    made = make(kind)
    for path, weight in tree_flatten(made.parameters()):
        given = mx.grad(loss_of(made, evaluate=evaluate))(weight, path)
        wanted = mx.grad(loss_of(made, backend="ops"))(weight, path)
        assert mx.abs(wanted).max().item() > 0, path
        assert distance(numbers(given), numbers(wanted)) < 1e-4, path


def test_gradients_of_a_large_head(calls):
    """Computed at once, and evaluated while it is traced; here there is no other product so large."""
    made = make(vocab_size=1000, tie_word_embeddings=False)
    paths = ("lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight")
    weights = dict(tree_flatten(made.parameters()))
    for path in (*paths, "model.layers.0.mixer.cell.recurrent_weight"):
        given = mx.grad(loss_of(made))(weights[path], path)
        wanted = mx.grad(loss_of(made, backend="ops"))(weights[path], path)
        assert mx.abs(wanted).max().item() > 0, path
        assert distance(numbers(given), numbers(wanted)) < 1e-4, path
        assert any(calls) == (path == "lm_head.weight")  # which nothing before it depends on
        calls.clear()


@pytest.mark.large
@pytest.mark.compiled
def test_transformations(calls):
    made = make()
    path = "model.layers.0.mlp.down_proj.weight"
    weight = dict(tree_flatten(made.parameters()))[path]

    def derivatives(**options):
        def loss(w):
            return [loss_of(made, **options)(w, path)]

        return [
            mx.vjp(loss, [weight], [mx.ones(())])[1][0],
            mx.jvp(loss, [weight], [mx.ones_like(weight)])[1][0],
            mx.grad(mx.checkpoint(lambda w: loss(w)[0]))(weight),
            mx.value_and_grad(lambda w: loss(w)[0])(weight)[1],
        ]

    for given, wanted in zip(derivatives(), derivatives(backend="ops"), strict=True):
        assert distance(numbers(given), numbers(wanted)) < 1e-4
    embeddings = mx.array(np.random.default_rng(0).normal(size=(3, 2, 1, 72)).astype(np.float32))

    def one(x, **options):
        return made(TOKENS[:, :1], cache=made.make_cache(2), input_embeddings=x, **options)

    wanted = mx.stack([one(x, backend="ops") for x in embeddings])
    calls.clear()
    assert distance(numbers(mx.vmap(one)(embeddings)), numbers(wanted)) < 1e-5
    assert distance(numbers(mx.compile(one)(embeddings[0])), numbers(wanted[0])) < 1e-5
    gradient = mx.grad(lambda x: (one(x) ** 2).sum())(embeddings[0])
    wanted = mx.grad(lambda x: (one(x, backend="ops") ** 2).sum())(embeddings[0])
    assert distance(numbers(gradient), numbers(wanted)) < 1e-4
    assert not any(calls)


@pytest.mark.large
@pytest.mark.compiled
def test_inside_compile_with_states(calls):
    made = make()
    cache, twin = made.make_cache(2), made.make_cache(2)
    for c in (cache, twin):
        by_token(made, TOKENS[:, :2], c)
    calls.clear()

    @mx.compile
    def step(token, states):
        for one, arrays in zip(cache, states, strict=True):
            one.cache = list(arrays)
        return made(token, cache=cache), [one.cache for one in cache]

    token, states = TOKENS[:, :1], [one.cache for one in cache]
    for _ in range(2):
        logits, states = step(token, states)
        assert not any(calls)
        assert distance(numbers(logits), numbers(made(token, cache=twin))) < 1e-5
        calls.clear()


@pytest.mark.large
@pytest.mark.compiled
def test_the_first_token_of_a_process_inside_a_transformation(calls):
    made = make()
    cpu_token._works.cache_clear()
    one = mx.compile(lambda token: made(token))
    assert distance(numbers(one(TOKENS[:, :1])), numbers(made(TOKENS[:, :1], backend="ops"))) < 1e-5
    cpu_token._works.cache_clear()
    assert mx.abs(mx.grad(loss_of(made))(made.model.norm.weight, "model.norm.weight")).max().item() > 0
    assert not any(calls)
    by_token(made, TOKENS)
    assert all(calls[-5:])


def test_modules_and_numbers_that_are_changed_in_place_are_read_anew(calls):
    """Nothing is kept of them but where they stand, and that is asked for each token."""
    made = make()
    by_token(made, TOKENS)
    for change in (
        lambda: made.layers.reverse(),
        lambda: made.model.norm.weight.__iadd__(1.0),
        lambda: made.layers[0].mlp.up_proj.weight.__setitem__(0, 3.0),
        lambda: made.model.update({"embed_tokens": nn.Embedding(37, 72)}),
        lambda: made.update({"lm_head": nn.Linear(72, 37, bias=False)}),
        lambda: made.layers.pop(),
        lambda: made.model.__setattr__("embed_positions", nn.Embedding(9, 72)),
    ):
        before = numbers(by_token(made, TOKENS))
        change()
        calls.clear()
        given = numbers(by_token(made, TOKENS))
        assert all(calls)
        assert distance(given, before) > 1e-3
        assert distance(given, numbers(by_token(made, TOKENS, backend="ops"))) < 1e-5


def test_arrays_that_are_replaced_are_looked_at_again(calls):
    """What is known of a model's arrays holds for these arrays alone, and does not keep them."""
    made = make(hidden_size=64, intermediate_size=64)
    by_token(made, TOKENS)
    assert all(calls)
    old = weakref.ref(made.model.norm.weight)
    for change in (
        lambda: made.model.norm.update({"weight": made.model.norm.weight.astype(mx.float16)}),
        lambda: made.model.norm.update({"weight": mx.ones(made.model.norm.weight.shape)}),
        lambda: nn.quantize(made, 32, 4, class_predicate=made.quant_predicate),
    ):
        change()
        calls.clear()
        given = by_token(made, TOKENS)
        assert all(calls) == (made.model.norm.weight.dtype == mx.float32)
        assert distance(numbers(given), numbers(by_token(made, TOKENS, backend="ops"))) < 2e-3
    assert old() is None
    assert mx.array_equal(by_token(copy.deepcopy(made), TOKENS), by_token(made, TOKENS))
    calls.clear()
    weight = made.model.norm.weight
    weight += mx.zeros((2, 1))  # the same object is of another shape
    with pytest.raises(ValueError, match="weight"):
        by_token(made, TOKENS)
    assert not any(calls)
    pickle.loads(pickle.dumps(cpu_token.Memory()))
