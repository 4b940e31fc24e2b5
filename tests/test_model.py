"""Golden logits, MLX-LM's conventions, and what must not depend on how a sequence is cut or batched."""

import copy
import json

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs, PararnnError
from mlx_pararnn.cache import held_arrays
from tests.support.golden import DATA, GOLDEN, gap, golden_of


@pytest.mark.sampled("large", by=lambda folder, prefix, method: [folder + prefix, method])
@pytest.mark.parametrize(
    ("source", "folder", "prefix", "options"), GOLDEN, ids=[f"{g[1].split('/')[1]}-{g[2]}" for g in GOLDEN]
)
@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_golden_logits(converted, source, folder, prefix, options, method):
    model, _ = mlx_pararnn.load_model(converted(source, **options))
    golden = golden_of(folder, prefix)
    assert gap(model(golden["input_ids"], method=method), golden["logits"]) < 5e-5


@pytest.mark.parametrize(("folder", "layers"), [("lm/paragru_s64", 3), ("lm/paralstm_s96", 2)])
def test_golden_taps(converted, folder, layers):
    """What each block of the original puts out: the first test here that fails says where to look."""
    model, _ = mlx_pararnn.load_model(converted(f"{folder}/state_dict.pt"))
    golden = golden_of(folder, "T50.")
    cache = model.make_cache(2)
    x = model.model.embed_tokens(golden["input_ids"])
    for i, layer in enumerate(model.layers):
        mixer = layer.mixer
        u, z = mx.split(mixer.in_proj(layer.norm(x)), 2, axis=-1)
        cell_in, _ = mixer.conv1d(u, None, None)
        cell_out, state = mixer.cell(cell_in)
        assert gap(cell_in, golden[f"cell_in.{2 * i}"]) < 2e-5
        assert gap(cell_out, golden[f"cell_out.{2 * i}"]) < 2e-5
        assert gap(state.reshape(2, -1), golden[f"final_state.{2 * i}"]) < 2e-5
        mixed = layer.residual_scale * x + mixer.out_proj(mixer.norm(cell_out) * (z * mx.sigmoid(z)))
        assert gap(mixed, golden[f"block_out.{2 * i}"]) < 2e-5
        x = layer(x, cache[i], None)
        assert gap(x, golden[f"block_out.{2 * i + 1}"]) < 2e-5
    assert gap(model.model.norm(x), golden["final_norm_out"]) < 5e-5


def test_three_iterations_on_the_whole_sequence_are_what_the_original_does(converted):
    model, _ = mlx_pararnn.load_model(converted("trained/paragru/final.pt"))
    golden = golden_of("trained/paragru")
    logits = model(golden["input_ids"], method="newton", chunk=1, tol=0.0, max_iters=3)
    assert gap(logits, golden["logits_parallel3"]) < 5e-5


def test_a_few_iterations_are_refused_where_they_do_not_converge():
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "vocab_size": 5, "intermediate_size": 8}
    model = Model(ModelArgs(**sizes, cell="slstm"))
    with pytest.raises(PararnnError, match=r"max_iters=3: for cell 'slstm' .* leave max_iters out"):
        model(mx.array([[1, 2, 3]]), method="newton", chunk=1, tol=0.0, max_iters=3)
    wanted = model(mx.array([[1, 2, 3]]), method="sequential", backend="ops")
    assert mx.allclose(model(mx.array([[1, 2, 3]]), method="newton", chunk=1), wanted, atol=1e-5)


def test_held_out_cross_entropy(converted):
    model, _ = mlx_pararnn.load_model(converted("trained/paragru/final.pt"))
    golden = golden_of("trained/paragru")
    logits = model(golden["heldout_input_ids"])
    loss = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(
        logits, golden["heldout_targets"][..., None], axis=-1
    ).squeeze(-1)
    expected = json.loads((DATA / "trained/paragru/golden_meta.json").read_text())["heldout_ce"]
    assert loss.mean().item() == pytest.approx(expected, abs=2e-5)
    assert round(expected, 4) == 1.5916


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 16}
KINDS = {
    "gru": {"cell": "gru", "num_heads": 3},
    "lstm": {"cell": "lstm", "num_heads": 2, "conv_kernel": 2},
    "ml_pararnn": {"cell": "gru", "mlp_residual": False, "residual_scale": True, "tie_word_embeddings": True},
    "slstm": {"cell": "slstm", "mixer": "plain", "mlp_bias": True},
    "babylm": {
        "cell": "nlru",
        "mixer": "plain",
        "norm": "layer",
        "mlp": "gelu",
        "mlp_bias": True,
        "max_position_embeddings": 40,
        "tie_word_embeddings": True,
    },
    "activations": {"cell": "lstm", "activations": {"c": "gelu", "state": "silu"}},
}


def small_model(kind, seed=0):
    mx.random.seed(seed)
    model = Model(ModelArgs(**SMALL, **KINDS[kind]))
    # initial weights make a model that hardly looks back; larger ones make the state count
    model.update(tree_map(lambda p: 2 * p if p.ndim > 1 else p, model.parameters()))
    mx.eval(model.parameters())
    return model


def states(cache):
    return mx.concatenate([a.reshape(-1) for a in held_arrays(cache)])


@pytest.mark.sampled("large", by=lambda kind: ["one"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_mlx_lm_tests_of_every_model(kind):
    model = small_model(kind)
    assert len(model.layers) == 2
    assert model.model_type == "pararnn"
    for dtype in (mx.float32, mx.float16):
        model.update(tree_map(lambda p, t=dtype: p.astype(t), model.parameters()))
        inputs = mx.array([[0, 1]])
        outputs = model(inputs)
        assert outputs.shape == (1, 2, 50)
        assert outputs.dtype == dtype
        cache = make_prompt_cache(model)
        outputs = model(inputs, cache=cache)
        assert outputs.shape == (1, 2, 50)
        assert outputs.dtype == dtype
        outputs = model(mx.argmax(outputs[0, -1:, :], keepdims=True), cache=cache)
        assert outputs.shape == (1, 1, 50)
        assert outputs.dtype == dtype
        assert all(c[0].dtype == mx.float32 for c in cache)
    assert model(mx.array([[0, 1], [2, 3]])).shape == (2, 2, 50)
    again = copy.deepcopy(model)
    assert mx.array_equal(again(inputs), model(inputs))
    embedded = model(inputs, input_embeddings=model.model.embed_tokens(inputs))
    assert mx.array_equal(embedded, model(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_predicates(kind):
    model = small_model(kind)
    cast = {k for k, _ in tree_flatten(model.parameters()) if not model.cast_predicate(k)}
    assert cast == {f"model.layers.{i}.mixer.cell.recurrent_weight" for i in range(2)}
    quantized = {p for p, m in model.named_modules() if model.quant_predicate(p, m)}
    assert not any("norm" in p or "conv" in p or "positions" in p for p in quantized)
    assert {
        "model.embed_tokens",
        "model.layers.0.mixer.cell.input_proj",
        "model.layers.1.mlp.up_proj",
    } <= quantized


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_prompt_may_be_cut_anywhere(kind, data):
    model = small_model(kind)
    T = data.draw(st.integers(2, 38))
    tokens = mx.random.randint(0, 50, (2, T), key=mx.random.key(T))
    whole_cache = model.make_cache(2)
    whole = model(tokens, cache=whole_cache)
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=6)))
    method = data.draw(st.sampled_from(["sequential", "newton"]))
    cache = model.make_cache(2)
    pieces = [
        model(tokens[:, a:b], cache=cache, method=method) for a, b in zip([0, *cuts], [*cuts, T], strict=True)
    ]
    assert gap(mx.concatenate(pieces, axis=1), whole) < 5e-5
    assert gap(states(cache), states(whole_cache)) < 5e-5
    assert cache[0].offsets == [T, T]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_is_prefill(kind):
    model = small_model(kind)
    tokens = mx.random.randint(0, 50, (2, 30), key=mx.random.key(1))
    cache, by_token = model.make_cache(2), model.make_cache(2)
    whole = model(tokens, cache=cache, method="newton")
    pieces = [model(tokens[:, t : t + 1], cache=by_token) for t in range(30)]
    assert gap(mx.concatenate(pieces, axis=1), whole) < 5e-5
    assert gap(states(by_token), states(cache)) < 5e-5


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_padded_batch_gives_each_row_what_it_gets_alone(kind, data):
    """Two padded pieces, the second read on top of the first, left or right; then one token decoded."""
    model = small_model(kind)
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=3).filter(any))
    more = data.draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    sides = data.draw(st.tuples(st.booleans(), st.booleans()))
    rows = [
        [(7 * r + 3 * t) % 50 for t in range(n + m)]
        for r, (n, m) in enumerate(zip(lengths, more, strict=True))
    ]
    cache = model.make_cache(len(rows))
    outputs = []
    for left, begins, sizes in ((sides[0], [0] * len(rows), lengths), (sides[1], lengths, more)):
        width = max(sizes)
        padding = [width - n for n in sizes]
        tokens = [
            [49] * (p if left else 0) + row[b : b + n] + [49] * (0 if left else p)
            for row, b, n, p in zip(rows, begins, sizes, padding, strict=True)
        ]
        for c in cache:
            c.prepare(**({"left_padding": padding} if left else {"lengths": sizes}))
        cut = data.draw(st.integers(0, width))
        logits = mx.concatenate(
            [model(mx.array(tokens)[:, a:b], cache=cache) for a, b in ((0, cut), (cut, width)) if b > a],
            axis=1,
        )
        for c in cache:
            c.finalize()
        outputs.append(
            [logits[r, p if left else 0 :][:n] for r, (n, p) in enumerate(zip(sizes, padding, strict=True))]
        )
    decoded = model(mx.full((len(rows), 1), 5), cache=cache)
    for r, row in enumerate(rows):
        alone_cache = model.make_cache()
        alone = model(mx.array([row]), cache=alone_cache)[0]
        together = mx.concatenate([outputs[0][r], outputs[1][r]])
        assert gap(together, alone) < 5e-5
        assert gap(decoded[r], model(mx.array([[5]]), cache=alone_cache)[0]) < 5e-5
        row_cache = [c.extract(r) for c in cache]
        assert gap(states(row_cache), states(alone_cache)) < 5e-5
        assert row_cache[0].offsets == alone_cache[0].offsets


@pytest.mark.parametrize("tokens", [500, pytest.param(10_000, marks=pytest.mark.large)])
def test_the_state_does_not_grow(tokens):
    model = small_model("gru")
    cache = model.make_cache()
    token = mx.array([[1]])
    model(token, cache=cache)
    after_one = [c.nbytes for c in cache]
    for n in range(tokens):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        if n % 100 == 0:
            mx.eval(token, [c.cache for c in cache])
    assert [c.nbytes for c in cache] == after_one
    assert cache[0].offset == tokens + 1


def test_learned_positions_have_an_end():
    model = small_model("babylm")
    with pytest.raises(PararnnError, match="40 learned positions and token 41 of a sequence has none"):
        model(mx.zeros((1, 41), mx.int32))
    cache = model.make_cache(2)
    model(mx.zeros((2, 40), mx.int32), cache=cache)
    with pytest.raises(PararnnError):
        model(mx.zeros((2, 1), mx.int32), cache=cache)


@pytest.mark.large
def test_gradients_reach_every_weight():
    model = small_model("lstm")
    tokens = mx.random.randint(0, 50, (2, 20), key=mx.random.key(2))
    for method in ("sequential", "newton"):

        def loss(parameters, method=method):
            model.update(parameters)
            logits = model(tokens[:, :-1], method=method)
            picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
            return (mx.logsumexp(logits, axis=-1, keepdims=True) - picked).mean()

        for name, gradient in tree_flatten(mx.grad(loss)(model.trainable_parameters())):
            assert mx.abs(gradient).max() > 0, name


@pytest.mark.sampled("large", by=lambda carried: [carried])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_computes_the_same_gradient(kind, carried, monkeypatch):
    """MLX-LM puts a function of its own in a layer's place, and calls the layer again for the gradient."""
    model, calls = small_model(kind), []
    tokens = mx.random.randint(0, 50, (2, 20), key=mx.random.key(2))
    first = model.layers[0].mixer.cell
    first.add_initial_state(0.1 * mx.random.normal((len(first.cell.slots), first.recurrent_weight.shape[1])))

    def loss(parameters):
        model.update(parameters)
        cache = model.make_cache(2)
        if carried:
            model(tokens[:, :5], cache=cache)
        return (model(tokens, cache=cache if carried else None) ** 2).mean()

    gradient = mx.grad(loss)
    wanted = dict(tree_flatten(gradient(model.trainable_parameters())))
    layer = type(model.layers[0])
    monkeypatch.setattr(layer, "__call__", layer.__call__)  # as it was, after this test
    grad_checkpoint(model.layers[0])
    checkpointed = layer.__call__
    monkeypatch.setattr(layer, "__call__", lambda *a, **k: calls.append(a) or checkpointed(*a, **k))
    for name, again in tree_flatten(gradient(model.trainable_parameters())):
        assert mx.allclose(again, wanted[name], rtol=1e-5, atol=1e-7), name
    assert len(calls) == len(model.layers) * (1 + carried)
    assert mx.abs(wanted["model.layers.0.mixer.cell.initial_state"]).max() > 0


# The paper's Table 2 names sizes only (400M, 1B, 2.9B, 7B); these counts are those of the shapes inferred
# from it, in millions.
@pytest.mark.parametrize(
    ("name", "millions"), [("400m", 405.6), ("1b", 1415.2), ("2.9b", 2901.8), ("7b", 6756.8)]
)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_presets(name, millions, cell):
    model = Model(ModelArgs.preset(name, cell))  # lazy: nothing is allocated
    count = sum(p.size for _, p in tree_flatten(model.parameters()))
    assert count / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number of at least 1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"mixer": "attention"}, "mixer is 'attention'; it must be one of gated_conv, plain"),
        ({"num_heads": 5}, "hidden_size 12 is not a multiple of num_heads 5"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(PararnnError) as error:
        ModelArgs.from_dict({**SMALL, **fields})
    assert message in str(error.value)


def test_missing_fields_and_presets():
    with pytest.raises(PararnnError, match="missing 1 required positional argument: 'vocab_size'"):
        ModelArgs.from_dict({k: v for k, v in SMALL.items() if k != "vocab_size"})
    with pytest.raises(PararnnError, match="unknown preset '3b'; choose one of 400m, 1b"):
        ModelArgs.preset("3b")
