"""What an exported package computes, executed by Core AI's own runtime, against the MLX model it came from.

The MLX model computes in float32, with the same weights: rounded to float16 where the package computes in it.
A difference is ||ours - reference|| / ||reference||.
"""

import json
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("coreai", reason="coreai-core is not installed, or has no wheel for this Python")

import mlx.core as mx

from mlx_pararnn import load_model, register_cell
from mlx_pararnn.convert.coreai.aimodel_check import float16_bound
from mlx_pararnn.convert.coreai.runtime import Runner
from tests.support.coreml.exports import (
    BUNDLED_MODELS,
    GOLDEN,
    KINDS,
    QUANTIZED,
    TRAINED,
    Damped,
    bundled,
    difference,
    golden,
    greedy,
    held_out,
    prefilled,
    reference_logits,
    some_ids,
    until_a_tie,
)

EXACT = 2e-5  # float32 against float32
ORIGINAL = 2e-4  # against the original's own logits
HALF = ("--precision", "float16")
FORMS = {
    "float32": (),
    "float16": HALF,  # with the recurrence and its state in float32
    "float16 state": (*HALF, "--recurrence", "float16"),
}


@contextmanager
def opened(folder):
    settings = json.loads((folder / "pararnn.json").read_text())
    with Runner(folder / "model.aimodel", settings) as runner:
        yield runner, settings


def decoded(runner, ids):
    """All logits (T, V), token by token."""
    return np.stack([runner.call("decode", [token]) for token in ids])


def check(folder, exports, source, ids):
    """`ids` by decode and by prefill, then decode: logits, likeliest tokens, the state. Decode's logits."""
    with opened(folder) as (runner, settings):
        exact = settings["precision"] == settings["states"][0]["dtype"] == "float32"
        tolerance = EXACT if exact else float16_bound(settings)
        model = exports.exact(source) if settings["precision"] == "float32" else exports.model(source)
        expected = reference_logits(model, ids)
        ours = decoded(runner, ids)
        assert difference(ours, expected) < tolerance, "decode"
        if exact:
            assert (ours.argmax(-1) == expected.argmax(-1)).all()
        if settings["chunk"]:
            by_decode = runner.states()
            runner.reset()
            read, places = prefilled(runner, ids, settings["chunk"])
            assert difference(read, expected[places]) < tolerance, "prefill, then decode"
            assert difference(read, ours[places]) < tolerance
            for name, states in runner.states().items():
                assert difference(states, by_decode[name]) < tolerance, name
    return ours


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("source", "folder", "prefix"), GOLDEN, ids=lambda value: value.split("/")[-1])
def test_golden_models(exports, source, folder, prefix, form):
    model = exports.source(source)
    out = exports(model, "--chunk", 8, *FORMS[form])
    ids = np.array(golden(folder)[f"{prefix}input_ids"])[0][: 30 if form == "float32" else 20]
    ours = check(out, exports, model, ids)
    if form != "float32":  # its bound is that of MLX's logits
        return
    theirs = np.array(golden(folder)[f"{prefix}logits"])[0][: len(ids)]
    assert difference(ours, theirs) < ORIGINAL
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.sampled("large", by=lambda form: [form == "float32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(exports, kind, form):
    source = exports.small(**KINDS[kind])
    chunk = 4 if KINDS[kind]["cell"] == "slstm" else 8
    out = exports(source, "--chunk", chunk, *FORMS[form])
    check(out, exports, source, some_ids(50, 2 * chunk + 3))


@pytest.mark.large
def test_a_cell_of_ones_own(exports):
    register_cell(Damped)
    source = exports.small(cell="damped", num_hidden_layers=1)
    check(exports(source, "--chunk", 8), exports, source, some_ids(50, 19))


@pytest.mark.large
@pytest.mark.parametrize("form", FORMS)
def test_trained_model(exports, form):
    """The original's own continuation: its likeliest two come as close as 0.0013, at logits of 10 to 20."""
    source = exports.source(TRAINED)
    out = exports(source, "--chunk", 16, *FORMS[form])
    check(out, exports, source, held_out(50))
    prompt = [int(i) for i in np.array(golden(TRAINED_FOLDER)["prompt_ids"]).ravel()]
    expected = [int(i) for i in np.array(golden(TRAINED_FOLDER)["greedy_ids"]).ravel()]
    tokens, logits = greedy(exports.exact(source), prompt, 96)
    assert tokens == expected
    sure = tokens if form == "float32" else until_a_tie(tokens, logits)[:24]
    assert len(sure) > 20
    with opened(out) as (runner, _):
        assert continued(runner, prompt, len(sure)) == sure


TRAINED_FOLDER = "trained/paragru"


def continued(runner, prompt, count):
    result, tokens = decoded(runner, prompt)[-1], []
    while len(tokens) < count:
        tokens.append(int(result.argmax()))
        result = runner.call("decode", tokens[-1:])
    return tokens


@pytest.mark.large
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_models(exports, name, form):
    source, ids = bundled(name)
    check(exports(source, "--chunk", 16, *FORMS[form]), exports, source, ids[:20])


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("how", QUANTIZED)
def test_quantized_is_what_mlx_computes_from_the_same_numbers(exports, how):
    """reference.safetensors has the logits of the weights as they are stored."""
    source = exports.small(hidden_size=32, num_heads=2, intermediate_size=64, tie_word_embeddings=True)
    out = exports(source, "--chunk", 8, *QUANTIZED[how])
    reference = {k: np.array(v) for k, v in mx.load(str(out / "reference.safetensors")).items()}
    ids, expected = reference["tokens"], reference["logits"]
    with opened(out) as (runner, settings):
        assert settings["weights"] == how
        read, places = prefilled(runner, ids, 8)
        assert difference(read[-len(expected) :], expected[np.array(places) - 7][-len(read) :]) < EXACT
    plain = reference_logits(exports.exact(source), ids)
    assert difference(expected, plain[7:]) > 1e-3, "fewer bits cost nothing?"


@pytest.mark.large
@pytest.mark.parametrize("chunk", [2, 33])
def test_chunks(exports, chunk):
    source = exports.small(**KINDS["gru"])
    check(exports(source, "--chunk", chunk), exports, source, some_ids(50, 2 * chunk + 1))


@pytest.mark.large
@pytest.mark.parametrize("form", FORMS)
def test_two_thousand_steps(exports, form):
    """The state is rounded at every step; what that does must not grow."""
    source = exports.small(**KINDS["lstm"])
    out = exports(source, "--chunk", 8, *FORMS[form])
    ids = some_ids(50, 2000)
    with opened(out) as (runner, settings):
        ours = decoded(runner, ids)
        tolerance = EXACT if form == "float32" else float16_bound(settings)
    model = exports.exact(source) if form == "float32" else exports.model(source)
    expected = reference_logits(model, ids)
    pieces = [difference(ours[i : i + 500], expected[i : i + 500]) for i in range(0, 2000, 500)]
    assert max(pieces) < tolerance
    assert max(pieces) < 1.5 * pieces[0]


def test_a_learned_state_is_where_a_package_begins(exports, tmp_path):
    source = exports.small(cell="lstm", num_heads=2, num_hidden_layers=1)
    states = {"layers.0": mx.random.normal((2, 12), key=mx.random.key(0))}
    mx.save_safetensors(str(tmp_path / "states.safetensors"), states)
    tuned, _ = load_model(source, state=tmp_path / "states.safetensors")
    out = exports(source, "--chunk", 4, "--initial-state", tmp_path / "states.safetensors")
    ids = some_ids(50, 9)
    with opened(out) as (runner, settings):
        ours = decoded(runner, ids)
        runner.reset()
        read, places = prefilled(runner, ids, settings["chunk"])
    expected = reference_logits(tuned, ids)
    assert max(difference(ours, expected), difference(read, expected[places])) < EXACT
    assert difference(ours, reference_logits(exports.exact(source), ids)) > 0.05


def test_each_weight_is_stored_once(exports):
    """Though two functions use it."""
    source = exports.small(vocab_size=4000, num_hidden_layers=1)
    out = exports(source, "--chunk", 4, *HALF)
    parameters = json.loads((out / "pararnn.json").read_text())["parameters"]
    size = (out / "model.aimodel/main.mlirb").stat().st_size
    assert 2 * parameters < size < 2 * parameters + 60_000
