"""`mlx-pararnn convert --to coreai`, `verify` and `inspect` of what it wrote, as a user has them.

What the packages compute is tested in tests/convert/coreai.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_pararnn import Cell, register_cell
from mlx_pararnn.cells.activations import ACTIVATIONS, Functions
from mlx_pararnn.cells.dual import Dual, DualFunctions
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.coreai import require_coreai as tools
from tests.support.converting import convert
from tests.support.coreml.exports import failing_export, formula, small_model
from tests.support.disks import small_disk

needs_coreai = pytest.mark.skipif(
    not tools.is_installed(), reason="coreai-core is not installed, or has no wheel for this Python"
)


def export(source, out, *options):
    return convert(source, "--to", "coreai", "-o", out, *options)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def settings(out: Path) -> dict:
    return json.loads((out / "pararnn.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    fields = {"num_hidden_layers": 1, "max_position_embeddings": 64, "vocab_size": 256}
    return small_model(tmp_path_factory.mktemp("model") / "mlx", **fields)


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("package") / "out"
    result = export(model, out, "--tokenizer", "bytes", "--chunk", 4)
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture
def no_export(tmp_path):
    return failing_export(export, tmp_path)


# --- what OUT holds -----------------------------------------------------------------------------------------


@needs_coreai
def test_a_model_becomes_a_package_with_its_tokenizer(package):
    out, result = package
    assert {path.name for path in out.iterdir()} == {
        "model.aimodel", "pararnn.json", "reference.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    made = settings(out)
    assert (made["format"], made["package"], made["state"]) == ("pararnn-coreai", "model.aimodel", "graph")
    assert (made["functions"], made["chunk"], made["weights"]) == (["decode", "prefill"], 4, "float32")
    assert made["states"][0] == {"name": "cell_state", "shape": [1, 1, 32], "dtype": "float32"}
    about = json.loads((out / "model.aimodel/metadata.json").read_text())
    assert json.loads(about["creatorDefinedMetadata"]["pararnn"]) == made
    assert about["author"] == "converted from mlx"
    assert "Core AI (experimental), gru" in result.stdout
    assert "Check it here or on a Mac: mlx-pararnn verify" in result.stderr


@needs_coreai
def test_inspect_reads_it(package):
    out, _ = package
    for path in (out, out / "model.aimodel"):
        result = run("inspect", path)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("kind                     Core AI package\n")
        assert "precision                float32\n" in result.stdout


@needs_coreai
def test_a_package_is_no_checkpoint(package, tmp_path):
    result = convert(package[0], "-o", tmp_path / "again", "--tokenizer", "none")
    assert "a Core AI package, not a checkpoint" in result.stderr


# --- verify -------------------------------------------------------------------------------------------------


@needs_coreai
def test_verify_runs_it_here(package, capfd):
    result = run("verify", package[0], "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert [check["name"].split(" against")[0] for check in checks] == ["decode", "prefill, then decode"]
    assert all(0 < check["difference"] < 1e-5 and "9 of 9" in check["note"] for check in checks)
    assert capfd.readouterr().err == "", "the runtime's own lines"
    result = run("verify", package[0])
    assert "Same numbers. " in result.stdout
    assert sys.platform == "darwin" or "Apple's hardware was not asked" in result.stdout
    assert run("verify", package[0], "--against", "x").exit_code == 2


@needs_coreai
def test_verify_of_a_package_that_is_not_whole(package, tmp_path):
    out = shutil.copytree(package[0], tmp_path / "out")
    program = out / "model.aimodel/main.mlirb"
    data = bytearray(program.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    program.write_bytes(data)
    assert "its weights are not those that were exported" in run("verify", out).stderr
    os.truncate(program, 100)
    assert "its weights are not those that were exported" in run("verify", out).stderr
    made = settings(out)
    (out / "pararnn.json").write_text(json.dumps(made | {"chunk": 9, "chunks": {"prefill": 9}}))
    assert "is not the package that pararnn.json describes" in run("verify", out).stderr
    (out / "pararnn.json").write_text(json.dumps(made | {"format_version": 2}))
    assert "not a description this version reads" in run("verify", out).stderr
    (out / "pararnn.json").write_text(json.dumps(made))
    (out / "reference.safetensors").write_bytes(b"nothing")
    assert "reference.safetensors: cannot be read" in run("verify", out).stderr
    (out / "model.aimodel/metadata.json").unlink()
    assert "is no whole Core AI package" in run("verify", out).stderr


@needs_coreai
@pytest.mark.large
def test_verify_sees_other_numbers(package, tmp_path):
    """Logits that the package does not give."""
    out = shutil.copytree(package[0], tmp_path / "out")
    arrays, metadata = mx.load(str(out / "reference.safetensors"), return_metadata=True)
    arrays["logits"] = 1.001 * arrays["logits"]
    mx.save_safetensors(str(out / "reference.safetensors"), arrays, metadata)
    result = run("verify", out)
    assert result.exit_code == 1
    assert result.stdout.count("FAIL") == 2


# --- the op namespace ---------------------------------------------------------------------------------------


@needs_coreai
def test_the_op_namespace_is_that_of_numpy(tmp_path):
    """Values and derivatives of every function of F, as Core AI's runtime computes them."""
    from mlx_pararnn.convert.package.values import Value, ValueFunctions
    from tests.support.coreai import executed

    x = np.linspace(-3, 3, 37, dtype=np.float32)
    names = [*ACTIVATIONS, "maximum", "where", "equal", "arithmetic"]
    expected = {}
    for name in names:
        made = formula(name, DualFunctions(Functions(np)), Dual(x, (1.0,)))
        parts = (made.value, *made.tangents)
        expected |= {f"{name}_{i}": np.broadcast_to(part, x.shape) for i, part in enumerate(parts)}

    def body(ops, variable):
        zeros, outputs = ops.mul(variable, np.float32(0)), {}
        for name in names:
            value = Dual(Value(ops, variable), (1.0,))
            made = formula(name, DualFunctions(ValueFunctions(np.float32)), value)
            for i, part in enumerate((made.value, *made.tangents)):
                number = not isinstance(part, Value)
                outputs[f"{name}_{i}"] = ops.add(zeros, np.float32(part)) if number else part.var
        return outputs

    got = executed(body, x, list(expected), tmp_path / "ops.aimodel")
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, 2e-6, 2e-6, err_msg=name)


@needs_coreai
def test_a_cell_that_leaves_the_op_namespace_is_refused(tmp_path, no_export):
    class Missing(Cell):
        name, gates, slots, output, params = "missing", ("n",), ("h",), "h", ("a",)

        def step(self, state, u, params, F):
            h = params["a"] * state[0] + u["n"]
            return (F.tanh(h) if isinstance(h, mx.array | np.ndarray) else F.sin(h),)

    register_cell(Missing)
    source = small_model(tmp_path / "missing", cell="missing", mixer="plain")
    message = no_export(source, "--tokenizer", "none", "--chunk", 4, "--iterations", 2)
    assert message.startswith("cell 'missing': its step cannot become a Core AI program")


# --- bad input ----------------------------------------------------------------------------------------------


def test_without_coreai_core_the_extra_is_named(model, no_export, monkeypatch):
    monkeypatch.setitem(sys.modules, "coreai.authoring", None)
    message = no_export(model)
    assert message.startswith("Core AI packages need coreai-core")
    assert "pip install 'mlx-pararnn[coreai]'" in message


def test_another_version_of_coreai_core_is_refused(model, no_export, monkeypatch):
    monkeypatch.setattr(tools, "version", lambda name: "9.9")
    message = no_export(model)
    assert f"coreai-core {tools.VERSION} only, and 9.9 is installed" in message


@pytest.mark.parametrize(
    "options", [["--argmax"], ["--state", "io"], ["--dtype", "float16"], ["-q", "--palettize", 4]]
)
def test_options_that_do_not_go_together(model, no_export, options):
    no_export(model, *options, code=2)


@pytest.mark.parametrize("options", [["--precision", "float16"]])
def test_core_ai_options_need_core_ai(model, tmp_path, options):
    result = convert(model, "-o", tmp_path / "out", "--to", "coreml", *options)
    assert result.exit_code == 2
    assert "needs --to coreai" in result.stderr


@needs_coreai
@pytest.mark.large
def test_out_exists(package, model, no_export, tmp_path):
    out = shutil.copytree(package[0], tmp_path / "out")
    assert f"{out}: already exists" in no_export(model)
    assert export(model, out, "--tokenizer", "none", "--chunk", 2, "--force").exit_code == 0
    assert settings(out)["chunk"] == 2
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt, which no conversion wrote" in no_export(model, "--force", "--tokenizer", "none")
    assert "give it a name without .aimodel" in no_export(model, out=tmp_path / "x.aimodel")


@needs_coreai
@pytest.mark.large
def test_ctrl_c_leaves_nothing(data, tmp_path):
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", data / "trained/paragru/final.pt"]
    command += ["--to", "coreai", "-o", tmp_path / "out", "--tokenizer", "bytes", "--chunk", "128"]
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


@needs_coreai
@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(("size", "most"), [("9m", 1_500_000), ("3m", resource.RLIM_INFINITY)])
def test_no_room_for_the_package(size, most, tmp_path):
    """A limit of a file's size, and a full disk: coreai-core itself ends the process there."""
    source = small_model(tmp_path / "mlx", vocab_size=30_000)
    with small_disk(tmp_path / "disk", size) as disk:
        out = disk.path / "out"
        command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", source, "--to", "coreai"]
        command += ["--chunk", 2, "-o", out, "--tokenizer", "none", "--iterations", 1]
        result = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        )
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {out}: it could not be written ("), result.stderr
        assert result.stderr.count("\n") == 1
        assert list(disk.path.iterdir()) == []
