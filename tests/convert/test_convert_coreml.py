"""`mlx-pararnn convert --to coreml`, as a user has it.

What the packages compute is tested in tests/convert/coreml.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields as fields_of

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

import mlx.core as mx
from coremltools.proto import MIL_pb2
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mlx_pararnn import Cell, ModelArgs, load_model, register_cell
from mlx_pararnn.cells.activations import ACTIVATIONS, Functions
from mlx_pararnn.cells.dual import Dual, DualFunctions
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.package import export_memory as memory
from mlx_pararnn.convert.package.constants import Linear, Palette, Plain, stored
from mlx_pararnn.convert.package.iterations import LIMIT, iterations_needed
from mlx_pararnn.convert.package.program import EXPORTED
from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from tests.support.converting import convert
from tests.support.coreml.exports import (
    difference,
    export_to_coreml,
    failing_export,
    formula,
    plain_model,
    reference_logits,
    settings,
    weight_bytes,
)
from tests.support.coreml.interpreter import Package
from tests.support.pt_writer import write_pt
from tests.support.small_models import apple_gru, babylm


@pytest.fixture
def model(tmp_path):
    return plain_model(tmp_path / "mlx")


@pytest.fixture
def no_export(tmp_path):
    return failing_export(export_to_coreml, tmp_path)


# --- what OUT holds -----------------------------------------------------------------------------------------


def test_a_checkpoint_becomes_a_package_with_its_tokenizer(data, tmp_path):
    out = tmp_path / "out"
    result = export_to_coreml(data / "trained/paragru/final.pt", out, "--tokenizer", "bytes")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        "model.mlpackage", "pararnn.json", "reference.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    made = settings(out)
    assert made["functions"] == ["decode", "prefill", "prefill_16"]
    assert (made["chunk"], made["chunks"]) == (64, {"prefill": 64, "prefill_16": 16})
    assert 2 <= made["iterations"] <= 5
    assert made["states"][0] == {"name": "cell_state", "shape": [3, 1, 128], "dtype": "float16"}
    # every weight once, though two functions use it
    assert 2 * made["parameters"] < weight_bytes(out) < 2 * made["parameters"] + 20_000
    assert f"{made['parameters']:,} parameters, float16, 1.6 MB" in result.stdout
    assert "Read: " not in result.stderr  # it was named
    assert "128 of 128 likeliest tokens are the same" in result.stdout
    assert f"prefill 64 and prefill_16 16, with {made['iterations']} Newton iterations" in result.stdout


def test_metadata_in_the_package_is_the_runners_file(model, tmp_path):
    import coremltools as ct

    out = tmp_path / "out"
    assert export_to_coreml(model, out, "--tokenizer", "none", "--state", "io", "--chunk", 8).exit_code == 0
    description = ct.utils.load_spec(str(out / "model.mlpackage")).description
    assert json.loads(description.metadata.userDefined["pararnn"]) == settings(out)
    assert description.metadata.author == "converted from mlx"
    assert all(
        (
            description.metadata.license,
            description.metadata.shortDescription,
            description.metadata.versionString,
        )
    )
    assert description.defaultFunctionName == "decode"


def test_iterations_and_end_ids_are_taken_over(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 7, "bos_token_id": 3}))
    out = tmp_path / "out"
    assert export_to_coreml(model, out, "--tokenizer", "none", "--iterations", 6, "--chunk", 8).exit_code == 0
    made = settings(out)
    assert (made["eos_token_id"], made["bos_token_id"], made["iterations"]) == ([7], 3, 6)


def test_a_model_that_newton_does_not_solve_ships_decode_only(tmp_path):
    folder = plain_model(tmp_path / "slstm", cell="slstm", mixer="plain")
    result = export_to_coreml(folder, tmp_path / "out", "--tokenizer", "none", "--chunk", 32)
    assert result.exit_code == 0, result.output
    assert f"Read: {folder / 'model.safetensors'}\n" in result.stderr
    made = settings(tmp_path / "out")
    assert (made["functions"], made["chunk"], made["iterations"]) == (["decode"], None, None)
    assert "warning: this model's prompts need more than 8 Newton iterations" in result.stderr


def test_iterations_grow_with_the_recurrent_weights(tmp_path):
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 40, 128)]

    def needed(scale, dtype=np.float32):
        folder = plain_model(tmp_path / f"scaled-{scale}-{np.dtype(dtype).name}", scale, mixer="plain")
        import mlx_pararnn

        return iterations_needed(mlx_pararnn.load_model(folder)[0], tokens, 64, dtype)

    counts = [needed(scale) for scale in (0.01, 1, 8)]
    assert counts == sorted(counts)
    assert counts[0] < counts[2] <= LIMIT
    assert needed(1, np.float16) == counts[1]
    assert needed(400) is None


def test_iterations_are_measured_on_more_than_two_small_chunks(tmp_path, data):
    """The first two chunks of this sLSTM take 8 iterations, later ones more, and 8 are wrong there."""
    assert (
        convert(
            data / "pararnn_torch/paraslstm_causal_lm_1", "-o", tmp_path / "mlx", "--tokenizer", "none"
        ).exit_code
        == 0
    )
    result = export_to_coreml(tmp_path / "mlx", tmp_path / "out", "--tokenizer", "none", "--chunk", 8)
    assert result.exit_code == 0, result.output
    assert settings(tmp_path / "out")["functions"] == ["decode"]
    assert "of 128 likeliest tokens" in result.stdout


@pytest.mark.large
@pytest.mark.parametrize(
    ("cell", "options", "state", "dtype", "recurrence"),
    [
        ("gru", "", "graph", "float16", "float16"),
        ("gru", "--state io", "io", "float16", "float16"),
        ("gru", "--layout ane", "io", "float16", "float16"),
        ("gru", "--recurrence float32", "io", "float32", "float32"),
        ("slstm", "", "io", "float32", "float32"),
        ("slstm", "--state io", "io", "float32", "float32"),
        ("slstm", "--state graph", "graph", "float16", "float16"),
        ("slstm", "--recurrence float16", "graph", "float16", "float16"),
        ("slstm", "--state io --recurrence float16", "io", "float16", "float16"),
        ("slstm", "--layout ane", "io", "float16", "float32"),
        ("slstm", "--layout ane --recurrence float16", "io", "float16", "float16"),
    ],
)
def test_the_state_is_in_float32_where_it_grows(tmp_path, cell, options, state, dtype, recurrence):
    """Unless it was asked for otherwise; a state in float16 that grows is warned of."""
    folder = plain_model(tmp_path / "mlx", cell=cell, mixer="plain")
    asked = ("--tokenizer", "none", "--chunk", 2, "--iterations", 2, *options.split())
    result = export_to_coreml(folder, tmp_path / "out", *asked)
    assert result.exit_code == 0, result.output
    made = settings(tmp_path / "out")
    assert (made["state"], made["states"][0]["dtype"]) == (state, dtype)
    wide = [
        op for op in Package(tmp_path / "out/model.mlpackage").block("decode").operations if in_float32(op)
    ]
    assert (len(wide) > 1) == (recurrence == "float32")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    if cell == "slstm" and dtype == "float16":
        given = options.removeprefix("--state io ").replace(" --rec", " and --rec")
        assert warnings == [
            "warning: sLSTM's state grows with the text and loses digits in float16; without "
            f"{given} it is kept in float32"
        ]
    else:
        assert not warnings


def in_float32(op):
    return MIL_pb2.FLOAT32 in {o.type.tensorType.dataType for o in op.outputs}


@pytest.mark.large
def test_a_config_may_leave_the_cell_out(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    assert "cell" not in config  # nor anything else that has a default
    assert export_to_coreml(model, tmp_path / "out", "--tokenizer", "none", "--chunk", 4).exit_code == 0
    assert settings(tmp_path / "out")["cell"] == "gru"


# --- fewer bits ---------------------------------------------------------------------------------------------


@pytest.mark.large
@pytest.mark.parametrize(
    ("options", "how", "share"),
    [(["-q"], "int8", 0.56), (["-q", "--q-bits", 4], "int4", 0.36), (["--palettize", 4], "palette4", 0.31)],
)
def test_fewer_bits(data, tmp_path, options, how, share):
    out = tmp_path / "out"
    result = export_to_coreml(
        data / "trained/paragru/final.pt", out, "--tokenizer", "none", "--chunk", 16, *options
    )
    assert result.exit_code == 0, result.output
    made = settings(out)
    assert made["weights"] == how
    assert weight_bytes(out) < share * 2 * made["parameters"]
    error = float(result.stdout.partition("logits differ by ")[2].split()[0])
    assert 1e-4 < error < 0.3, "the cost of fewer bits, against the original weights"


def test_what_fits_no_block_stays_float16(tmp_path):
    folder = plain_model(tmp_path / "odd", hidden_size=24)
    result = export_to_coreml(
        folder, tmp_path / "out", "--tokenizer", "none", "-q", "--q-bits", 4, "--chunk", 8
    )
    assert "model.embed_tokens left float16 (1)" in result.stdout
    assert "mlp.down_proj left" not in result.stdout  # 64 inputs: whole blocks


def test_integers_and_palettes_are_the_nearest_there_are():
    matrix = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    eight, four, palette = (stored(matrix, how) for how in ("int8", "int4", "palette4"))
    assert isinstance(eight, Linear)
    assert isinstance(four, Linear)
    assert isinstance(palette, Palette)
    for packed, blocks in ((eight, 1), (four, 2)):
        step = np.repeat(packed.scale.astype(np.float32), 64 // blocks, axis=1)
        assert packed.scale.shape == (6, blocks)
        assert np.all(
            np.abs(packed.values() - matrix) < 0.6 * step
        )  # half a step, and the product's own rounding
    table = palette.table.astype(np.float32)
    nearest = table[np.abs(matrix[..., None] - table).argmin(-1)]
    np.testing.assert_array_equal(palette.values(), nearest)
    assert np.linalg.norm(palette.values() - matrix) < 0.12 * np.linalg.norm(matrix)
    zeros = stored(np.zeros((2, 32), np.float32), "int4")
    assert not zeros.values().any()
    assert isinstance(stored(matrix[:, :31], "int4"), Plain)


# --- the op namespace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ACTIVATIONS, "maximum", "where", "equal", "arithmetic"])
def test_the_op_namespace_is_that_of_numpy(name):
    """Values and derivatives; coremltools computes operations on constants as they are added."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function

    from mlx_pararnn.convert.coreml.mil import MIL
    from mlx_pararnn.convert.package.values import Value, ValueFunctions

    x = np.linspace(-3, 3, 37, dtype=np.float32)
    expected = formula(name, DualFunctions(Functions(np)), Dual(x, (1.0,)))
    with Function({"unused": mb.placeholder((1,))}, ct.target.iOS18):
        made = formula(
            name, DualFunctions(ValueFunctions(np.float32)), Dual(Value(MIL(), mb.const(val=x)), (1.0,))
        )
        got = [v.var.val if isinstance(v, Value) else v for v in (made.value, *made.tangents)]
    for ours, theirs in zip(got, (expected.value, *expected.tangents), strict=True):
        np.testing.assert_allclose(
            ours, np.broadcast_to(theirs, x.shape) if np.ndim(ours) else theirs, 2e-6, 2e-6
        )


def test_a_cell_that_leaves_the_op_namespace_is_refused(tmp_path, no_export):
    class Sine(Cell):
        name, gates, slots, output, params = "sine", ("n",), ("h",), "h", ("a",)

        def step(self, state, u, params, F):
            return (mx.sin(params["a"] * state[0] + u["n"]),)

    class Missing(Sine):
        name = "missing"

        def step(self, state, u, params, F):
            h = params["a"] * state[0] + u["n"]
            return (F.tanh(h) if isinstance(h, mx.array | np.ndarray) else F.sin(h),)

    class Absolute(Sine):
        name = "absolute"

        def step(self, state, u, params, F):
            return (params["a"] * state[0] + abs(u["n"]),)

    for cell, reason in ((Sine, "Value"), (Missing, "F.sin: no such function"), (Absolute, "abs()")):
        register_cell(cell)
        folder = plain_model(tmp_path / cell.name, cell=cell.name, mixer="plain")
        for iterations in ((), ("--iterations", 2)):  # counted, or not
            message = no_export(folder, "--tokenizer", "none", "--chunk", 4, *iterations)
            assert message.startswith(f"cell {cell.name!r}: its step cannot become a Core ML program"), (
                message
            )
            assert iterations == () or reason in message


# --- bad input ----------------------------------------------------------------------------------------------


def test_no_coremltools_for_this_python(model, no_export, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    message = no_export(model)
    assert message.startswith("Core ML export needs coremltools 9")
    assert "pip install" in message


@pytest.mark.large
def test_out_exists(model, no_export, tmp_path):
    out = tmp_path / "out"
    assert export_to_coreml(model, out, "--tokenizer", "none", "--chunk", 8).exit_code == 0
    assert f"{out}: already exists" in no_export(model)
    before = settings(out)
    assert export_to_coreml(model, out, "--tokenizer", "none", "--chunk", 4, "--force").exit_code == 0
    assert settings(out)["chunk"] == 4 != before["chunk"]
    # over a package an MLX model may come, and the other way round
    assert convert(
        apple := write_pt(tmp_path / "a.pt", apple_gru()), "-o", out, "--force", "--tokenizer", "none"
    )
    assert (out / "config.json").exists()
    assert not (out / "model.mlpackage").exists()
    assert export_to_coreml(apple, out, "--tokenizer", "none", "--chunk", 4, "--force").exit_code == 0
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt, which no conversion wrote" in no_export(model, "--force", "--tokenizer", "none")
    assert "lies inside the checkpoint's own folder" in no_export(model, out=model / "out")


def test_too_little_memory_is_known_before_the_work(model, no_export, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000_000)
    message = no_export(model)
    assert "needs about 0.5 GB of memory and 0.1 GB are free" in message


def test_available_memory_is_plausible():
    assert 10**8 < memory.available_memory() < 10**14


def test_sizes_and_values_that_core_ml_cannot_take(tmp_path, model, no_export):
    assert "--chunk 1: choose 2 to 128 tokens" in no_export(model, "--chunk", 1)
    assert "--chunk 500: choose 2 to 128 tokens" in no_export(model, "--chunk", 500)
    assert "--iterations 0: choose at least 1" in no_export(model, "--iterations", 0)
    assert "--layers-per-function 0: choose at least 1" in no_export(model, "--layers-per-function", 0)
    assert "Core ML keeps its own states in float16; leave out --state graph" in no_export(
        model, "--state", "graph", "--recurrence", "float32"
    )
    ane = no_export(model, "--layout", "ane", "--state", "graph")
    assert ane == "--layout ane passes its state in and out: leave out --state graph"
    positions = write_pt(tmp_path / "positions.pt", babylm(positions=8))
    message = no_export(positions, "--tokenizer", "none", "--chunk", 16)
    assert "this model has 8 learned positions" in message
    large = apple_gru() | {"final_norm.weight": np.full(4, 7e4, np.float32)}
    message = no_export(write_pt(tmp_path / "large.pt", large))
    assert message.startswith("model.norm.weight: holds NaN or numbers beyond 65504")


def test_what_is_no_model_to_export(tmp_path, model, no_export):
    cell = {name: apple_gru()[f"blocks.0.rnn_cell.{name}"] for name in "ABb"}
    assert "a single cell" in no_export(write_pt(tmp_path / "cell.pt", cell))
    assert "--tokenizer" in no_export(model, "--chunk", 8)  # there is none, and none was declined
    assert "an MLX model already" in no_export(model, "--family", "babylm", "--tokenizer", "none")
    assert "no such file or folder" in no_export("nowhere.pt")
    package = tmp_path / "package"
    assert export_to_coreml(model, package, "--tokenizer", "none", "--chunk", 4).exit_code == 0
    assert "a Core ML package, not a checkpoint" in no_export(package)
    assert CliRunner().invoke(app, ["inspect", str(package)]).exit_code == 0  # what it is can be said


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_a_quantized_model_is_unpacked(tmp_path, mode):
    """Adapters for it are then added into its weights."""
    source, packed, out = write_pt(tmp_path / "a.pt", apple_gru(d=64)), tmp_path / "packed", tmp_path / "out"
    options = ("--tokenizer", "none", "-q", "--q-mode", mode)
    assert convert(source, "-o", packed, *options).exit_code == 0
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    parameters = {"rank": 2, "scale": 1, "dropout": 0, "keys": ["mixer.cell.input_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    key = "model.layers.0.mixer.cell.input_proj.lora_"
    ones = {f"{key}a": mx.ones((2, 32, 2)), f"{key}b": mx.ones((2, 2, 96)) / 4}
    mx.save_safetensors(str(adapters / "adapters.safetensors"), ones)
    seen = []
    for given, options in ((None, ()), (adapters, ("--adapter-path", adapters))):
        result = export_to_coreml(packed, out, "--tokenizer", "none", "--chunk", 4, "--force", *options)
        assert result.exit_code == 0, result.output
        reference = load_file(out / "reference.safetensors")
        model, _ = load_model(packed, adapter_path=given)
        model.set_dtype(mx.float32)
        expected = reference_logits(model, reference["tokens"])[3:]
        assert difference(reference["logits"], expected) < 2e-2  # of weights rounded to float16
        seen.append(expected)
    assert difference(*seen) > 0.05
    plain = apple_gru(d=64)
    assert settings(out)["parameters"] == sum(a.size for a in plain.values()) - plain["lm_head.weight"].size


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "float16"],
        ["--q-mode", "mxfp4", "-q"],
        ["--model-file"],
        ["-q", "--palettize", 4],
        ["-q", "--q-bits", 3],
        ["--q-bits", 8],
    ],
)
def test_options_that_do_not_go_together(model, no_export, options):
    no_export(model, *options, code=2)


@pytest.mark.parametrize(
    "options",
    [
        ["--state", "io"],
        ["--layout", "ane"],
        ["--layers-per-function", 1],
        ["--chunk", 8],
        ["--argmax"],
        ["--recurrence", "float16"],
        ["--palettize", 4],
    ],
)
def test_core_ml_options_need_core_ml(model, tmp_path, options):
    result = convert(model, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "needs --to coreml" in result.stderr


@pytest.mark.large
def test_ctrl_c_leaves_nothing(data, tmp_path):
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", data / "trained/paragru/final.pt"]
    command += ["--to", "coreml", "-o", tmp_path / "out", "--tokenizer", "bytes", "--chunk", "128"]
    with subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out-*.partial/*")):
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.large
def test_no_room_for_the_package(tmp_path):
    source = plain_model(tmp_path / "mlx", vocab_size=30_000)
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", source, "--to", "coreml", "--chunk", 2]
    command += ["-o", tmp_path / "out", "--tokenizer", "none", "--iterations", 1]
    result = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000,) * 2),
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the package could not be written; make room in "), result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_fields_that_no_program_knows_are_refused(model, no_export, tmp_path):
    """Those of a newer version; and a field of our own config.json that nobody taught the export."""
    config = json.loads((model / "config.json").read_text()) | {"logit_softcap": 30, "attention": None}
    (model / "config.json").write_text(json.dumps(config))
    assert "does not know the fields attention, logit_softcap" in no_export(model)
    assert {field.name for field in fields_of(ModelArgs)} == EXPORTED


@pytest.mark.large
def test_a_checkpoint_is_opened_once(model, tmp_path, monkeypatch):
    from mlx_pararnn.convert import exporting, to_mlx

    opened = []

    def spy(source, **options):
        opened.append(source)
        return open_checkpoint(source, **options)

    for module in (exporting, to_mlx):
        monkeypatch.setattr(module, "open_checkpoint", spy)
    options = ("--to", "coreml", "--tokenizer", "none", "--chunk", 4)
    assert convert(model, "-o", tmp_path / "once", *options).exit_code == 0
    assert opened == [str(model)]
