"""What is inside an exported folder, held against docs/coreml.md and what Core ML can load."""

import json
import re

import numpy as np
import pytest

ct = pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

from coremltools.proto import FeatureTypes_pb2, MIL_pb2  # noqa: E402

from tests.support.coreml.exports import GOLDEN, KINDS, ONE, QUANTIZED, TRAINED, some_ids  # noqa: E402
from tests.support.coreml.interpreter import shape_of  # noqa: E402
from tests.support.coreml.record_transcript import main as record  # noqa: E402
from tests.support.coreml.runner import Runner  # noqa: E402

# Words of MIL that coremltools never lets a name be (`NameSanitizer`).
RESERVED = {
    *("any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string"),
    *("bf16", "fp16", "fp32", "fp64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "state"),
}
ARRAY_TYPES = FeatureTypes_pb2.ArrayFeatureType


@pytest.fixture(
    scope="module", params=["gru-graph", "gru-io", "babylm-io", "slstm-io", "slstm-graph", "babylm-ane"]
)
def small(request, exports):
    """One runner a kind and place of the state."""
    kind, state = request.param.split("-")
    chunk = 4 if kind == "slstm" else 8
    place = ("--layout", state) if state == "ane" else ("--state", state)
    return Runner(exports(exports.small(**KINDS[kind]), "--chunk", chunk, *place))


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_names_are_no_words_of_mil(small):
    for name in small.package.functions:
        names = {i.name for i in small.package.inputs(name)}
        for op in small.package.block(name).operations:
            names |= {o.name for o in op.outputs}
        assert not names & RESERVED
        assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", n) for n in names)


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_the_description_is_that_of_the_program(small):
    """An app asks the description what to feed; Core ML runs the program."""
    types = {MIL_pb2.FLOAT16: ARRAY_TYPES.FLOAT16, MIL_pb2.FLOAT32: ARRAY_TYPES.FLOAT32}
    types[MIL_pb2.INT32] = ARRAY_TYPES.INT32
    description = small.package.spec.description
    assert [f.name for f in description.functions] == small.info["functions"]
    assert description.defaultFunctionName == "decode"
    for function in description.functions:
        declared = {i.name: i.type for i in small.package.inputs(function.name)}
        described = {f.name: f.type.multiArrayType for f in function.input}
        described |= {f.name: f.type.stateType.arrayType for f in function.state}
        assert set(described) == set(declared)
        for name, array in described.items():
            is_state = declared[name].WhichOneof("type") == "stateType"
            tensor = (declared[name].stateType.wrappedType if is_state else declared[name]).tensorType
            assert tuple(array.shape) == tuple(d.constant.size for d in tensor.dimensions)
            assert array.dataType == types[tensor.dataType]
        made = {
            o.name: o.type.tensorType
            for op in small.package.block(function.name).operations
            for o in op.outputs
        }
        assert {f.name for f in function.output} == set(small.package.block(function.name).outputs)
        for feature in function.output:
            array, tensor = feature.type.multiArrayType, made[feature.name]
            assert tuple(array.shape) == tuple(d.constant.size for d in tensor.dimensions)
            assert array.dataType == types[tensor.dataType]


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_the_folder_says_what_the_package_does(small):
    info, package = small.info, small.package
    assert json.loads(package.metadata["pararnn"]) == info
    metadata = package.spec.description.metadata
    assert metadata.author
    assert metadata.license
    assert metadata.shortDescription
    assert metadata.versionString
    assert package.functions == sorted(info["functions"])
    for name in info["functions"]:
        function = package.function(name)
        tokens = info["chunk"] if name == "prefill" else 1
        assert function.inputs["tokens"] == ((1, tokens), np.int32)
        inputs = {"tokens"} | ({"position"} if info["max_position_embeddings"] else set())
        states = {s["name"]: tuple(s["shape"]) for s in info["states"]}
        if info["state"] == "graph":
            assert function.states == states
            assert set(function.inputs) == inputs
            assert all(s["dtype"] == "float16" for s in info["states"])
            assert function.outputs == ["logits"]
        else:
            assert not function.states
            assert set(function.inputs) == inputs | set(states)
            assert {n: function.inputs[n][0] for n in states} == states
            assert {s["name"]: np.dtype(function.inputs[s["name"]][1]).name for s in info["states"]} == {
                s["name"]: s["dtype"] for s in info["states"]
            }
            assert set(function.outputs) == {"logits", *(f"{n}_out" for n in states)}
        if "position" in inputs:
            assert function.inputs["position"] == ((1,), np.int32)
    assert info["hidden_size"] == 12


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_states_have_widths_that_the_neural_engine_takes(small):
    """The channels above the model's own are 0 and stay so."""
    width = small.info["hidden_size"]
    assert all(s["shape"][-1] == 32 for s in small.info["states"])
    small.reset()
    small.read(some_ids(50, 11))
    for states in small.state.values():
        assert np.any(states[..., :width])
        assert not np.any(states[..., width:])


@pytest.mark.large
def test_each_weight_is_stored_once(exports):
    runner = Runner(exports(exports.source(TRAINED)))
    parameters = runner.info["parameters"]
    stored = (runner.package.weights_folder / "weight.bin").stat().st_size
    assert 2 * parameters <= stored < 2.05 * parameters + 50_000
    blobs = {}
    for name in runner.package.functions:
        ops = runner.package.block(name).operations
        values = [op.attributes["val"] for op in ops if op.type == "const"]
        blobs[name] = {
            v.blobFileValue.offset
            for v in values
            if v.WhichOneof("value") == "blobFileValue"
            and np.prod([d.constant.size for d in v.type.tensorType.dimensions]) > 5000
        }
    assert blobs["decode"] == blobs["prefill"]


@pytest.mark.large
@pytest.mark.parametrize(("how", "share"), [("int8", 0.55), ("int4", 0.32), ("palette4", 0.29)])
def test_quantized_packages_are_small(exports, how, share):
    source = exports.source(TRAINED)
    sizes = [
        (out / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        for out in (exports(source, "--chunk", 16), exports(source, "--chunk", 16, *QUANTIZED[how]))
    ]
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("kind", ["gru-graph", "babylm-io"])
def test_no_number_is_too_small_for_float16(exports, kind):
    """A GPU may take numbers below float16's normal ones for 0: no norm's eps may be one."""
    kind, state = kind.split("-")
    package = Runner(exports(exports.small(**KINDS[kind]), "--chunk", 8, "--state", state)).package
    for name in package.functions:
        for constant, value in package.constants(name).items():
            if isinstance(value, np.ndarray) and value.dtype == np.float16 and value.ndim == 0:
                assert value == 0 or abs(value) >= np.finfo(np.float16).tiny, constant


@pytest.mark.parametrize("kind", ["gru", pytest.param("trained", marks=pytest.mark.large)])
def test_a_single_step_of_the_state(exports, kind):
    """With the state in the graph each is read once and written once: coremltools mixes up more."""
    if kind == "gru":
        runner = Runner(exports(exports.small(**KINDS["gru"]), "--chunk", 8, "--state", "graph"))
    else:
        runner = Runner(exports(exports.source(TRAINED)))
    for name in runner.package.functions:
        ops = [
            (op.type, op.inputs["input"].arguments[0].name)
            for op in runner.package.block(name).operations
            if op.type in ("read_state", "write_state")
        ]
        assert sorted(ops) == sorted(
            (op, s) for op in ("read_state", "write_state") for s in runner.package.function(name).states
        )


@pytest.mark.large
def test_a_model_that_newton_does_not_solve_ships_decode_only(exports):
    """Recurrent weights so large that eight iterations are too few: the runner loops, a warning says so."""
    source = exports.small(recurrent_scale=60.0, cell="slstm", **ONE)
    result, out = exports.run(source)
    assert "decode" in result.stderr
    runner = Runner(out)
    assert runner.info["functions"] == ["decode"]
    assert runner.info["chunk"] is None
    assert runner.info["iterations"] is None
    assert np.isfinite(runner.read(some_ids(50, 3))).all()


@pytest.mark.large
@pytest.mark.parametrize("state", ["graph", "io"])
def test_a_transcript_says_all_that_a_runner_needs(exports, tmp_path, state):
    out = exports(exports.source(TRAINED), "--tokenizer", "bytes", "--chunk", 16, "--state", state)
    record([str(out), str(tmp_path / "t.json"), "--tokens", "12"])
    assert (tmp_path / "t.json").stat().st_size < 1_000_000
    recorded = json.loads((tmp_path / "t.json").read_text())
    assert recorded["prompt_tokens"] == list(recorded["prompt"].encode())
    assert recorded["text"].encode() == bytes(recorded["tokens"])
    predictions = recorded["predictions"]
    fed = [t for p in predictions for t in p["inputs"]["tokens"]]
    assert fed == recorded["prompt_tokens"] + recorded["tokens"][:-1]
    chosen = [int(np.argmax(np.array(p["outputs"]["logits"], np.float16))) for p in predictions]
    assert chosen[-12:] == recorded["tokens"]
    states = {f"{s['name']}_out" for s in recorded["settings"]["states"]} if state == "io" else set()
    assert all(set(p["outputs"]) == {"logits", *states} for p in predictions)


@pytest.mark.large
def test_no_transcript_is_made_where_two_tokens_are_nearly_as_likely(exports, tmp_path):
    out = exports(exports.source(TRAINED), "--tokenizer", "bytes", "--chunk", 16, "--state", "graph")
    with pytest.raises(SystemExit, match=r"def main.*: '.' leads by 0\.0\d* only"):
        record([str(out), str(tmp_path / "t.json"), "--prompt", "# n\u00e9\ndef main(", "--tokens", "8"])
    assert not (tmp_path / "t.json").exists()


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_coremltools_reads_the_program_back(small):
    reads_back(small.package)


@pytest.mark.large
@pytest.mark.parametrize(("source", "chunk"), [*((g[0], 8) for g in GOLDEN), (TRAINED, 16)])
def test_coremltools_reads_the_golden_programs_back(exports, source, chunk):
    reads_back(Runner(exports(exports.source(source), "--chunk", chunk, "--state", "graph")).package)


def reads_back(package):
    """Its own reader builds every operation anew and infers the types: they are the saved ones."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = package.spec
    program = load(spec, spec.specificationVersion, str(package.weights_folder))
    assert set(program.functions) == set(package.functions)
    for name, function in program.functions.items():
        saved = [op for op in package.block(name).operations if op.type != "const"]
        read = [op for op in function.operations if op.op_type != "const"]
        assert [shape_of(o.type.tensorType) for op in saved for o in op.outputs] == [
            tuple(o.shape) for op in read for o in op.outputs if op.op_type != "coreml_update_state"
        ]
        assert [o.name for o in function.outputs] == list(package.block(name).outputs)
