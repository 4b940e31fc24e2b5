"""What an exported package computes, executed from the file, against the MLX model it came from.

The MLX model has the same float16-rounded weights and computes in float32. A difference is
||ours - reference|| / ||reference||.
"""

import shutil

import numpy as np
import pytest

ct = pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

import mlx.core as mx  # noqa: E402
from coremltools.proto import MIL_pb2, Model_pb2  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_pararnn import load_model, register_cell  # noqa: E402
from tests.support.coreml.exports import (  # noqa: E402
    BUNDLED_MODELS,
    GOLDEN,
    KINDS,
    QUANTIZED,
    TRAINED,
    Damped,
    bundled,
    difference,
    export,
    golden,
    greedy,
    held_out,
    prefilled,
    reference_logits,
    rounded,
    rounded_model,
    small_model,
    some_ids,
    until_a_tie,
    weight_bytes,
)
from tests.support.coreml.interpreter import Package  # noqa: E402
from tests.support.coreml.runner import Runner  # noqa: E402

TOLERANCE = {"float64": 2e-5, "float16": 5e-3}


def check(folder, model, ids, modes=tuple(TOLERANCE)):
    """Read `ids` with prefill and decode, and again with decode alone: all logits, and the state."""
    expected = reference_logits(model, ids)
    package = None
    for mode in modes:
        tolerance = TOLERANCE[mode]
        runner = Runner(folder, mode, package)
        package = runner.package
        assert difference(runner.decode(ids), expected) < tolerance, f"{mode}: decode"
        by_decode = runner.state
        chunk = runner.info["chunk"]
        if chunk is None:
            continue
        runner.reset()
        read, ends = prefilled(runner, ids, chunk)
        assert difference(read, expected[ends]) < tolerance, f"{mode}: prefill, then decode"
        for name, states in by_decode.items():
            if np.any(states):
                assert difference(runner.state[name], states) < tolerance, f"{mode}: {name} after prefill"


# Where the state is, and the type of the recurrence that goes with it.
STATE = {"graph": ("--state", "graph"), "io": ("--state", "io", "--recurrence", "float32")}


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    ("source", "folder", "prefix", "state"),
    [(*g, state) for g in GOLDEN for state in ("graph", "io") if state == "graph" or g in GOLDEN[:2]],
    ids=lambda value: value.split("/")[-1] if "." not in value else "",
)
def test_golden_models(exports, source, folder, prefix, state):
    model = exports.source(source)
    out = exports(model, "--chunk", 8, *STATE[state])
    ids = np.array(golden(folder)[f"{prefix}input_ids"])[0][:50]
    check(out, exports.model(model), ids)
    # the original's own numbers: its weights are float32, so rounding them shows
    theirs = np.array(golden(folder)[f"{prefix}logits"])[0][: len(ids)]
    for mode in TOLERANCE:
        assert difference(Runner(out, mode).decode(ids), theirs) < TOLERANCE["float16"], mode


# With the state in the graph the recurrence's own constants are float16 as well: 0.01 of leaky_relu, selu's
# two and sLSTM's 1e-6. MLX has them in float32, so there only the comparison in float16 is one of equals.
ROUNDED_CONSTANTS = {("lstm_constants", "graph")}


@pytest.mark.sampled("large", by=lambda: ["one"])  # each is an export of some seconds
@pytest.mark.parametrize("state", ["graph", "io"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(exports, kind, state):
    source = exports.small(**KINDS[kind])
    chunk = 4 if KINDS[kind]["cell"] == "slstm" else 8
    out = exports(source, "--chunk", chunk, *STATE[state])
    modes = ("float16",) if (kind, state) in ROUNDED_CONSTANTS else ("float64", "float16")
    check(out, exports.model(source), some_ids(50, 2 * chunk + 3), modes)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "slstm", "nlru"])
def test_a_state_outside_in_float16(exports, kind):
    """Nothing is left in float32 then, so that nothing changes from float16 to it and back."""
    source = exports.small(**KINDS[kind])
    chunk = 4 if kind == "slstm" else 8
    out = exports(source, "--chunk", chunk, "--state", "io", "--recurrence", "float16")
    check(out, exports.model(source), some_ids(50, 2 * chunk + 3))
    runner = Runner(out)
    assert {s["dtype"] for s in runner.info["states"]} == {"float16"}
    for name in runner.info["functions"]:
        made = [o.type.tensorType for op in runner.package.block(name).operations for o in op.outputs]
        assert MIL_pb2.FLOAT32 not in {tensor.dataType for tensor in made}


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("state", ["graph", "io"])
def test_a_cell_of_ones_own(exports, tmp_path, state):
    register_cell(Damped)
    source = exports.small(cell="damped", num_hidden_layers=1)
    out = exports(source, "--chunk", 8, *STATE[state])
    check(out, exports.model(source), some_ids(50, 19))


@pytest.fixture(scope="module")
def trained(exports):
    """Path and model of the really trained one."""
    source = exports.source(TRAINED)
    return source, exports.model(source)


@pytest.mark.large
@pytest.mark.parametrize("state", STATE)
def test_trained_model(exports, trained, state):
    source, model = trained
    out = exports(source, *STATE[state])
    check(out, model, held_out(150))
    prompt = [int(i) for i in held_out(70)]
    tokens, logits = greedy(model, prompt, 96)
    assert until_a_tie(tokens, logits) == tokens
    for mode in TOLERANCE:
        runner = Runner(out, mode)
        assert runner.generate(prompt, 96) == tokens
        assert [name for name, *_ in runner.predictions[:7]] == ["prefill", *["decode"] * 6]


@pytest.mark.large
@pytest.mark.parametrize("state", STATE)
@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_models(exports, name, state):
    source, ids = bundled(name)
    check(exports(source, "--chunk", 8, *STATE[state]), exports.model(source), ids[:20])


@pytest.mark.large
@pytest.mark.parametrize("state", STATE)
def test_the_originals_own_continuation(exports, trained, state):
    """96 tokens in which the likeliest two come as close as 0.0013, at logits of 10 to 20."""
    out = exports(trained[0], *STATE[state])
    prompt = [int(i) for i in np.array(golden("trained/paragru")["prompt_ids"]).ravel()]
    expected = [int(i) for i in np.array(golden("trained/paragru")["greedy_ids"]).ravel()]
    tokens, logits = greedy(trained[1], prompt, 96)
    assert tokens == expected
    assert Runner(out, "float64").generate(prompt, 96) == expected
    sure = until_a_tie(tokens, logits)
    assert len(sure) > 20
    assert Runner(out, "float16").generate(prompt, len(sure)) == sure


@pytest.mark.large
@pytest.mark.parametrize("state", STATE)
def test_argmax_in_the_model(exports, trained, state):
    source, model = trained
    out = exports(source, "--argmax", "--chunk", 16, *STATE[state])
    runner = Runner(out)
    assert runner.info["output"] == "token"
    prompt = [int(i) for i in held_out(70)]
    assert runner.generate(prompt, 40) == greedy(model, prompt, 40)[0]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("chunk", [2, 5, 33])
def test_chunks(exports, chunk):
    source = exports.small(**KINDS["gru"])
    out = exports(source, "--chunk", chunk)
    assert Runner(out).info["chunk"] == chunk
    check(out, exports.model(source), some_ids(50, 2 * chunk + 1))


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("state", ["graph", "io"])
def test_a_text_is_read_by_the_largest_prefill_that_fits(exports, state):
    source = exports.small(**KINDS["gru"])
    out = exports(source, "--chunk", 33, *STATE[state])
    ids = some_ids(50, 33 + 16 + 2)
    expected = reference_logits(exports.model(source), ids)
    for mode, tolerance in TOLERANCE.items():
        runner = Runner(out, mode)
        assert difference(runner.read(ids), expected[-1]) < tolerance
        called = [(name, inputs["tokens"].size) for name, inputs, _ in runner.predictions]
        assert called == [("prefill", 33), ("prefill_16", 16), ("decode", 1), ("decode", 1)]
        answers = [outputs["logits"][0, 0] for *_, outputs in runner.predictions]
        assert difference(np.stack(answers), expected[[32, 48, 49, 50]]) < tolerance


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("options", [*STATE.values(), ("--layout", "ane")], ids=[*STATE, "ane"])
@pytest.mark.parametrize(("kind", "most"), [("gru", 2), ("lstm", 1), ("babylm", 1)])
def test_a_prefill_in_parts_is_the_whole_one(exports, kind, most, options):
    """To the bit: the same operations, of fewer layers a function."""
    source = exports.small(**KINDS[kind] | {"num_hidden_layers": 3})
    options = ("--chunk", 33, *options)
    whole, divided = exports(source, *options), exports(source, *options, "--layers-per-function", most)
    ids = some_ids(50, 37 if kind == "babylm" else 33 + 16 + 2)
    ours, theirs = Runner(divided), Runner(whole)
    np.testing.assert_array_equal(ours.read(ids), theirs.read(ids))
    for name, state in theirs.state.items():
        assert np.any(state)
        np.testing.assert_array_equal(ours.state[name], state)
    parts = {2: [1, 2], 1: [1, 2, 3]}[most]
    names = [f"{name}_part_{n}" for name in ("prefill", "prefill_16") for n in parts]
    assert ours.info["functions"] == ["decode", *names]
    assert ours.info["parts"] == len(parts)
    assert "parts" not in theirs.info
    called = [name for name, *_ in ours.predictions]
    assert called[: len(parts)] == names[: len(parts)]
    assert abs(weight_bytes(divided) - weight_bytes(whole)) < 100 * len(names)  # each weight once


@pytest.mark.large
def test_iterations_are_what_was_asked_for(exports):
    source = exports.small(**KINDS["gru"])
    folders = {n: exports(source, "--chunk", 8, "--iterations", n) for n in (1, 4)}
    tanh = {n: Runner(f).package.op_types("prefill")["tanh"] for n, f in folders.items()}
    layers = 2
    assert tanh[4] - tanh[1] == 3 * layers
    assert {n: Runner(f).info["iterations"] for n, f in folders.items()} == {1: 1, 4: 4}
    ids = some_ids(50, 8)
    expected = reference_logits(exports.model(source), ids)[-1]
    errors = {n: difference(Runner(f, "float64").read(ids), expected) for n, f in folders.items()}
    assert errors[4] < TOLERANCE["float64"] < errors[1]


def alone(package, name, out):
    """One function of a package as a package: coremltools decompresses no other kind."""
    spec = Model_pb2.Model()
    spec.CopyFrom(package.spec)
    functions = spec.mlProgram.functions
    functions["main"].CopyFrom(functions[name])
    for other in package.functions:
        del functions[other]
    (described,) = (f for f in spec.description.functions if f.name == name)
    for kind in ("input", "output", "state"):
        getattr(spec.description, kind).extend(getattr(described, kind))
    del spec.description.functions[:]
    spec.description.defaultFunctionName = ""
    weights = str(package.weights_folder)
    model = ct.models.MLModel(spec, weights_dir=weights, skip_model_load=True)
    model.save(str(out))
    return ct.models.MLModel(str(out), skip_model_load=True)


@pytest.fixture(scope="module")
def quantized(exports, trained):
    return lambda how: exports(trained[0], "--chunk", 16, *QUANTIZED[how])


@pytest.mark.large
@pytest.mark.parametrize("how", QUANTIZED)
def test_quantized_is_what_coremltools_decompresses(quantized, tmp_path, how):
    runner = Runner(quantized(how))
    for name, count in (("decode", 1), ("prefill", 16)):
        decompressed = ct.optimize.coreml.decompress_weights(
            alone(runner.package, name, tmp_path / f"{name}.mlpackage")
        )
        decompressed.save(str(tmp_path / f"{name}_plain.mlpackage"))
        plain = Package(tmp_path / f"{name}_plain.mlpackage")
        assert not any(op.startswith("constexpr") for op in plain.op_types())
        assert any(op.startswith("constexpr") for op in runner.package.op_types(name))
        tokens = {"tokens": held_out(count)[None].astype(np.int32)}
        for mode in TOLERANCE:
            ours, theirs = runner.package.function(name, mode), plain.function(mode=mode)
            states = ours.new_state(), theirs.new_state()
            for _ in range(2):  # the second call from a state that is not zero
                a, b = ours(tokens, states[0])["logits"], theirs(tokens, states[1])["logits"]
                np.testing.assert_array_equal(a, b)
            for key in states[0]:
                np.testing.assert_array_equal(states[0][key], states[1][key])


MATRICES = ("embed_tokens", "lm_head", "_proj")


def matrices(folder):
    """Name -> the MLX model's float32 matrices."""
    weights = mx.load(str(folder / "model.safetensors"))
    return {k: np.array(v) for k, v in weights.items() if any(m in k for m in MATRICES) and v.ndim > 1}


@pytest.mark.large
@pytest.mark.parametrize("how", QUANTIZED)
def test_quantized_weights_are_near_the_models(quantized, trained, how):
    package = Runner(quantized(how)).package
    wanted = matrices(trained[0])
    for function in package.functions:
        kinds = package.op_types(function)
        assert sum(n for op, n in kinds.items() if op.startswith("constexpr")) == len(wanted)
        constants = package.constants(function)
        unpacked = {
            o.outputs[0].name for o in package.block(function).operations if o.type.startswith("constexpr")
        }
        for name, weight in wanted.items():
            ours = min(
                (constants[c].astype(np.float32) for c in unpacked if constants[c].shape == weight.shape),
                key=lambda candidate: np.abs(candidate - weight).mean(),
            )
            error = np.abs(ours - weight)
            if how == "palette4":
                assert len(np.unique(ours)) <= 16, name
                assert np.sqrt((error**2).mean() / (weight**2).mean()) < 0.12, name
                continue
            levels, block = (127, weight.shape[-1]) if how == "int8" else (7, 32)
            step = np.abs(weight.reshape(*weight.shape[:-1], -1, block)).max(-1) / levels
            # half a step, the scale and the product each rounded to float16
            allowed = (0.5 * step.repeat(block, -1) + 2**-10 * np.abs(weight)) * 1.01
            assert (error <= allowed).all(), name


@pytest.mark.large
@pytest.mark.parametrize("how", ["float16", *QUANTIZED])
def test_reference_logits(exports, quantized, trained, how):
    """The logits that `verify` compares with are those of the weights as the package stores them."""
    out = exports(trained[0], "--chunk", 16) if how == "float16" else quantized(how)
    reference = {k: np.array(v) for k, v in mx.load(str(out / "reference.safetensors")).items()}
    tokens, logits = reference["tokens"], reference["logits"]
    for mode in TOLERANCE:
        runner = Runner(out, mode)
        whole = runner.info["chunk"]
        ours = [runner.call("prefill", tokens[:whole]), *runner.decode(tokens[whole:])]
        assert runner.info["weights"] == how
        assert difference(np.stack(ours), logits) < TOLERANCE[mode]
    if how == "float16":
        assert difference(logits, reference_logits(trained[1], tokens)[whole - 1 :]) < TOLERANCE["float64"]


@pytest.mark.large
def test_large_and_small_streams(exports):
    """Numbers whose squares float16 cannot hold, and such as are small beside eps, go through the norms."""
    for kind in ("gru", "babylm"):
        for scale in (3000, 1e-3):
            fields = KINDS[kind] | {"tie_word_embeddings": False, "num_hidden_layers": 1}
            source = exports.small(embedding_scale=scale, **fields)
            out = exports(source, "--chunk", 4)
            stream = exports.model(source).model.embed_tokens.weight
            assert (np.abs(np.array(stream)).max() > 300) == (scale > 1)
            check(out, exports.model(source), some_ids(50, 11))


@pytest.mark.large
@pytest.mark.parametrize("state", ["graph", "io"])
def test_two_thousand_steps(exports, trained, state):
    """The state is rounded at every step; what that does must not grow."""
    source, model = trained
    out = exports(source, *STATE[state])
    ids = held_out(2000)
    ours, expected = Runner(out).decode(ids), reference_logits(model, ids)
    pieces = [difference(ours[i : i + 500], expected[i : i + 500]) for i in range(0, 2000, 500)]
    assert max(pieces) < TOLERANCE["float16"]
    assert max(pieces) < 1.25 * pieces[0]


@pytest.mark.large
@pytest.mark.parametrize("state", ["graph", "io"])
def test_a_learned_state_is_where_a_package_begins(state, tmp_path):
    """An app's zeros stand for it; from a file of states, as from the model's own."""
    source = small_model(tmp_path / "plain", cell="lstm", num_heads=2)
    states = {f"layers.{n}": mx.random.normal((2, 12), key=mx.random.key(n)) for n in range(2)}
    mx.save_safetensors(str(tmp_path / "states.safetensors"), states)
    tuned, _ = load_model(source, state=tmp_path / "states.safetensors")
    out = tmp_path / "out"
    options = (*STATE[state], "--chunk", 8, "--initial-state", tmp_path / "states.safetensors")
    result = export(source, out, *options, "--tokenizer", "none")
    assert result.exit_code == 0, result.output
    ids = some_ids(50, 20)
    rounded(tuned)
    check(out, tuned, ids)
    assert difference(reference_logits(tuned, ids), reference_logits(rounded_model(source), ids)) > 0.05

    with_own = tmp_path / "tuned"
    shutil.copytree(source, with_own)
    mx.save_safetensors(str(with_own / "model.safetensors"), dict(tree_flatten(tuned.parameters())))
    assert export(with_own, tmp_path / "own", *options[:-2], "--tokenizer", "none").exit_code == 0
    ours, theirs = (Runner(folder).decode(ids[:4]) for folder in (out, tmp_path / "own"))
    assert np.array_equal(ours, theirs)
