"""`--layout ane`: the same numbers in the Neural Engine's layout, (B, C, 1, S) with 1x1 convolutions."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

import mlx.core as mx
from coremltools.proto import MIL_pb2
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from benchmarks import core_ml_operations
from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.coreml.mlpackage import build_function
from mlx_pararnn.convert.package.constants import stored
from mlx_pararnn.convert.package.form import Form
from mlx_pararnn.convert.package.layouts import HEAD_ROWS, LAYOUTS
from tests.support.coreml.exports import (
    GOLDEN,
    KINDS,
    ONE,
    QUANTIZED,
    TRAINED,
    difference,
    golden,
    held_out,
    prefilled,
    reference_logits,
    small_model,
    some_ids,
    weight_bytes,
)
from tests.support.coreml.interpreter import shape_of
from tests.support.coreml.runner import Runner

ANE = ("--layout", "ane")
IO = ("--state", "io")
EQUAL = 1e-12  # float64 beside float64, added in another order
IDS = {name: golden(name)[f"{prefix}input_ids"] for _, name, prefix in GOLDEN}


def readings(folder, ids, mode="float64"):
    """Logits and states after `ids` by decode, and by prefill, then decode."""
    runner = Runner(folder, mode)
    logits = runner.decode(ids)
    found = {"decode": logits} | {f"{name} by decode": state for name, state in runner.state.items()}
    if chunk := runner.info["chunk"]:
        runner.reset()
        found["prefill"] = prefilled(runner, ids, chunk)[0]
        found |= {f"{name} by prefill": state for name, state in runner.state.items()}
    return found


def same_numbers(ours, theirs, ids):
    """Two packages give the same, in every way to read a text."""
    ours, theirs = readings(ours, ids), readings(theirs, ids)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.any(expected), name
        assert difference(ours[name], expected) < EQUAL, name


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(("source", "name"), [g[:2] for g in GOLDEN], ids=lambda value: value.split("/")[-1])
def test_golden_models(exports, source, name):
    model = exports.source(source)
    out = exports(model, "--chunk", 8, *ANE)
    ids = np.array(IDS[name])[0][:30]
    same_numbers(out, exports(model, "--chunk", 8, *IO), ids)
    assert difference(Runner(out).decode(ids), reference_logits(exports.model(model), ids)) < 5e-3


@pytest.mark.large
def test_trained_model(exports):
    source = exports.source(TRAINED)
    same_numbers(exports(source, "--chunk", 33, *ANE), exports(source, "--chunk", 33), held_out(110))


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(("kind", "precision"), [*product(KINDS, ("float16", "float32"))])
def test_every_kind_of_layer(exports, kind, precision):
    source, chunk = exports.small(gate_bias=0.5, **KINDS[kind]), 4 if KINDS[kind]["cell"] == "slstm" else 8
    ours = exports(source, "--chunk", chunk, *ANE, "--recurrence", precision)
    theirs = exports(source, "--chunk", chunk, "--state", "io", "--recurrence", precision)
    same_numbers(ours, theirs, some_ids(50, 2 * chunk + 3))


@pytest.mark.large
@pytest.mark.parametrize(("how", "tied"), [*product(QUANTIZED, (False, True))])
def test_matrices_of_few_bits(exports, how, tied):
    """The very integers, scales and palettes of the other layout; a gate's are a part of a matrix's."""
    fields = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "tie_word_embeddings": tied}
    source, options = exports.small(vocab_size=1000, **fields), ("--chunk", 4, *QUANTIZED[how])
    ours, theirs = exports(source, *options, *ANE), exports(source, *options, *IO)
    # a tied table once: it takes 32 kB at least
    assert abs(weight_bytes(ours) - weight_bytes(theirs)) < 8_000
    same_numbers(ours, theirs, some_ids(50, 10))
    packed = [op for op in Runner(ours).package.op_types("decode") if op.startswith("constexpr")]
    assert packed == ["constexpr_lut_to_dense" if how == "palette4" else "constexpr_blockwise_shift_scale"]
    # a saved chat goes on in the other: by these Swift knows one that does
    told = [[Runner(out).info[key] for key in ("cell", "states", "weights_digest")] for out in (ours, theirs)]
    assert told[0] == told[1]


@pytest.mark.large
@pytest.mark.parametrize("vocabulary", [HEAD_ROWS, HEAD_ROWS + 1, 3 * HEAD_ROWS - 1])
def test_a_large_vocabulary_is_divided(exports, vocabulary):
    fields = {"hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "tie_word_embeddings": True, **ONE}
    source = exports.small(vocab_size=vocabulary, **fields)
    ours, theirs = (exports(source, "--iterations", 1, "--chunk", 2, *o) for o in (ANE, IO))
    same_numbers(ours, theirs, some_ids(vocabulary, 5))
    rows = [weight[0] for weight in convolutions(Runner(ours).package, "decode") if weight[1:] == (8, 1, 1)]
    pieces = [count for count in rows if count > 1000]
    assert sum(pieces) == vocabulary
    assert max(pieces) <= 16_384
    assert len(pieces) == -(-vocabulary // HEAD_ROWS)
    assert max(pieces) - min(pieces) <= 1
    # one piece is the table of the embeddings as well; of several it is a copy
    numbers = Runner(ours).info["parameters"] + (0 if len(pieces) == 1 else 8 * vocabulary)
    assert 0 < weight_bytes(ours) - 2 * numbers < 10_000


@pytest.mark.parametrize("how", ["float16", *QUANTIZED])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_table_is_emitted_once(layout, how):
    """Nothing is left for coremltools to find equal: look-up and head take one variable."""
    fields = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 70, "tie_word_embeddings": True}
    args = ModelArgs(**fields, **ONE)
    parameters = tree_flatten(Model(args).parameters())
    weights = {
        name: stored(np.array(numbers), how if numbers.ndim > 1 else "float16")
        for name, numbers in parameters
    }
    function = build_function(args, weights, Form(graph_state=False, layout=layout), range(1), 1, 1)
    made = [o.shape for op in function.operations for o in op.outputs if op.op_type.startswith("const")]
    assert [shape[:2] for shape in made].count((70, 32)) == (1 if how == "float16" else 2)


def convolutions(package, function):
    """The shapes of the weights of a function's convolutions."""
    shapes = {k: np.shape(v) for k, v in package.constants(function).items()}
    ops = package.block(function).operations
    return [shapes[op.inputs["weight"].arguments[0].name] for op in ops if op.type == "conv"]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "slstm", "babylm"])
def test_tensors_are_as_the_neural_engine_has_them(exports, kind):
    """Four axes, channels second, in float16; 1x1 convolutions in place of products; the state in and out."""
    source, chunk = exports.small(**KINDS[kind]), 4 if kind == "slstm" else 8
    runner = Runner(exports(source, "--chunk", chunk, *ANE, "--recurrence", "float16"))
    info, package = runner.info, runner.package
    assert (info["layout"], info["state"]) == ("ane", "io")
    assert {state["dtype"] for state in info["states"]} == {"float16"}
    for name in info["functions"]:
        ops = [op for op in package.block(name).operations if op.type != "const"]
        assert not {"linear", "matmul", "read_state", "write_state"} & {op.type for op in ops}
        shapes = [shape_of(o.type.tensorType) for op in ops for o in op.outputs]
        dtypes = {o.type.tensorType.dataType for op in ops for o in op.outputs}
        assert dtypes <= {MIL_pb2.FLOAT16, MIL_pb2.INT32, MIL_pb2.BOOL}
        # between the look-up of the tokens and what goes out
        inside = [op for op in ops if op.type in ("conv", "mul", "add", "sigmoid", "tanh", "silu", "sub")]
        for op in inside:
            shape = shape_of(op.outputs[0].type.tensorType)
            steps = {1} if name == "decode" else {chunk, 1}
            if len(shape) == 1:  # places of learned positions
                continue
            assert (len(shape), shape[0], shape[2]) == (4, 1, 1), (op.type, shape)
            assert shape[3] in steps | {chunk + info["conv_kernel"] - 1}, (op.type, shape)
        assert max(map(len, shapes)) == 4


@pytest.mark.large
def test_the_state_is_float16_whatever_the_recurrence(exports):
    runner = Runner(exports(exports.small(**KINDS["gru"]), "--chunk", 8, *ANE, "--recurrence", "float32"))
    assert {state["dtype"] for state in runner.info["states"]} == {"float16"}
    casts = [op for op in runner.package.block("decode").operations if op.type == "cast"]
    layers, gates = runner.info["num_hidden_layers"], 3
    assert len(casts) == 2 + layers * (
        gates + 1
    )  # the state's, all at once, and each layer's gates and output


@pytest.mark.large
def test_the_likeliest_token_and_a_learned_state(exports, tmp_path):
    source = small_model(tmp_path / "model", cell="lstm", num_heads=2)
    states = {f"layers.{n}": mx.random.normal((2, 12), key=mx.random.key(n)) for n in range(2)}
    mx.save_safetensors(str(tmp_path / "states.safetensors"), states)
    options = ("--chunk", 8, "--initial-state", tmp_path / "states.safetensors")
    ids = some_ids(50, 19)
    same_numbers(exports(source, *options, *ANE), exports(source, *options), ids)
    token = Runner(exports(source, *options, *ANE, "--argmax"), "float64")
    logits = Runner(exports(source, *options), "float64")
    assert token.generate(ids, 20) == logits.generate(ids, 20)


@pytest.mark.large
def test_inspect_and_the_export_name_the_layout(exports):
    source = exports.small(**KINDS["slstm"])
    result, out = exports.run(source, "--chunk", 4, *ANE)
    assert "state io, layout ane" in result.stdout
    assert "without --layout ane it is kept in float32" in result.stderr
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert ["layout", "ane"] in [line.split() for line in shown.stdout.splitlines()]
    assert json.loads((out / "pararnn.json").read_text())["layout"] == "ane"


PAGE = Path(__file__).parents[3] / "docs" / "coreml.md"


@pytest.mark.large
@pytest.mark.parametrize("table", ["operations", "placement"])
def test_the_pages_tables_are_what_is_counted(table):
    assert "\n".join(getattr(core_ml_operations, table)()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.large
@pytest.mark.parametrize("cell", ["gru", "lstm", "nlru", "slstm"])
def test_all_but_the_look_up_is_of_listed_kinds(cell):
    counts = core_ml_operations.counted(cell, core_ml_operations.FORMS["layout ane"], 1)
    assert counts["listed"] > 1000
    others = [counts[place] for place in core_ml_operations.PLACES if place != "listed"]
    assert others == [0, 0, 0, 2]  # the token's shape, and the look-up
