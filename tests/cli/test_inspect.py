"""`inspect`, `verify --against` and `convert --model-file`, as a user has them."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.cli.app import app
from tests.support.demo import DEMO
from tests.support.golden import golden_file

FINAL = "trained/paragru/final.pt"


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def found(path):
    result = run("inspect", path, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_checkpoint_and_what_becomes_of_it_are_the_same_model(converted, data):
    checkpoint = found(data / FINAL)
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["family"] == "Apple's ml-pararnn language model"
    model = found(converted(FINAL))
    assert model["kind"] == "model"
    for field in ("parameters", "dtypes", "state_bytes", "memory"):
        assert model[field] == checkpoint[field], field
    assert checkpoint["config"].items() <= model["config"].items()
    assert model["parameters"] == 812_419
    assert model["dtypes"] == {"float32": 812_419}


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "source",
    ["lm/paragru_s64/model.safetensors", "lm/paralstm_s96/state_dict.pt", "pararnn_torch/babylm_paraslstm"],
)
def test_the_state_is_as_large_as_it_says(converted, source):
    model, _ = mlx_pararnn.load_model(converted(source))
    cache = model.make_cache()
    model(mx.array([[1, 2, 3]]), cache=cache)
    assert found(golden_file(source))["state_bytes"] == sum(c.nbytes for c in cache)


def test_a_config_that_leaves_out_what_has_a_default(converted, tmp_path):
    folder = shutil.copytree(converted(FINAL), tmp_path / "model")
    whole = found(folder)
    config = json.loads((folder / "config.json").read_text())
    for field in ("cell", "mixer", "conv_kernel"):
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    less = found(folder)
    assert less.pop("disk_bytes") < whole.pop("disk_bytes")
    assert less == whole


def test_a_quantized_model(converted):
    model = found(converted(FINAL, quantize=True, q_bits=8, q_group_size=32))
    assert model["parameters"] == 812_419
    assert model["dtypes"]["8-bit"] > 800_000
    assert model["memory"]["4-bit"] < model["memory"]["8-bit"] < model["memory"]["float16"]


def test_a_table_for_people(data):
    result = run("inspect", data / FINAL)
    assert result.exit_code == 0
    for line in ("checkpoint of Apple's ml-pararnn", "812,419", "6,144 bytes a sequence", "convert writes"):
        assert line in result.stdout


def test_headers_alone_are_read(tmp_path, monkeypatch):
    """Every byte of the weights may be wrong, as long as the headers are right."""
    file = shutil.copy(golden_file("lm/paragru_s64/model.safetensors"), tmp_path)
    size = os.path.getsize(file)
    with open(file, "r+b") as opened:
        begin = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(begin)
        opened.write(os.urandom(size - begin))
    assert found(file)["parameters"] == found(golden_file("lm/paragru_s64/model.safetensors"))["parameters"]


@pytest.mark.parametrize("path", ["nowhere.pt", "."])
def test_what_is_neither(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"quantize": True, "q_group_size": 32},
        {"quantize": True, "q_mode": "mxfp4", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_tensor_is_its_sources(converted, data, options):
    folder = converted(FINAL, **options)
    result = run("verify", folder, "--against", data / FINAL, "--json")
    assert result.exit_code == 0, result.output
    checks = {c["name"]: c for c in json.loads(result.stdout)["checks"]}
    kinds = [name.split(" ", 2)[2] for name in checks if "the source" in name]
    assert kinds
    assert any("quantized" in kind for kind in kinds) == ("quantize" in options)
    assert any("cast" in kind for kind in kinds) == ("dtype" in options)


def test_one_changed_number_is_seen(converted, data, tmp_path):
    folder = shutil.copytree(converted(FINAL), tmp_path / "changed")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-6
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    result = run("verify", folder, "--against", data / FINAL)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


def test_another_models_checkpoint(converted):
    result = run("verify", converted(FINAL), "--against", golden_file("lm/paragru_s64/state_dict.pt"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def mlx_lm(*args):
    command = [sys.executable, "-m", "mlx_lm", "generate", *map(str, args), "-m", "12"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.large
def test_a_model_file_makes_bare_mlx_lm_work(converted):
    folder = converted(FINAL, tokenizer="bytes", model_file=True)
    result = mlx_lm("--model", folder, "--prompt", "def main(", "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert "self, other)" in result.stdout
    refused = mlx_lm("--model", folder, "--prompt", "def main(")
    assert refused.returncode != 0
    assert "trust_remote_code" in refused.stderr


def test_our_own_loading_does_not_run_a_model_file(converted, tmp_path):
    folder = shutil.copytree(converted(FINAL, tokenizer="bytes", model_file=True), tmp_path / "model")
    (folder / "pararnn.py").write_text("raise SystemExit('it ran')")
    assert run("generate", folder, "-p", "def main(", "-m", "4").stdout == "self\n"
    assert run("verify", folder).exit_code == 0


def test_the_demo_is_inspected(tmp_path):
    assert found(DEMO)["dtypes"] == {"float16": 811_267, "float32": 1_152}


@pytest.mark.parametrize("value", [1e308, [1], {"bits": 0}, {"bits": "4"}, {"model.norm": {"x": 1}}])
def test_a_quantization_that_says_no_bits(value, converted, tmp_path):
    folder = shutil.copytree(converted(FINAL), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization": value}
    (folder / "config.json").write_text(json.dumps(config))
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert "config.json: quantization does not say how many bits" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_folder_says_what_else_is_there(converted, tmp_path):
    folder = shutil.copytree(converted(FINAL, tokenizer="bytes"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", "model.embed_tokens": False}
    (folder / "config.json").write_text(
        json.dumps({**config, "eos_token_id": [0, 10], "quantization": quantization})
    )
    model = found(folder)
    assert model["tokenizer"] == "BPE, 256 tokens"
    assert (model["chat_template"], model["end_tokens"]) == (True, [0, 10])
    assert model["disk_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    rows = dict(line.split("  ", 1) for line in run("inspect", folder).stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["quantization"] == "affine, 4 bits in groups of 64; 1 matrices not"
    assert (rows["chat template"], rows["end tokens"]) == ("yes", "0, 10")


def test_a_core_ml_package(tmp_path):
    settings = {
        "format": "pararnn-coreml", "format_version": 1, "package": "model.mlpackage",
        "functions": ["decode"], "states": [{"name": "cell_state", "shape": [2, 1, 64], "dtype": "float16"}],
        "weights": "int8", "cell": "gru", "parameters": 1000, "eos_token_id": [3], "state": "graph",
        "output": "logits", "chunk": None, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9,
        "intermediate_size": 8, "mixer": "plain", "mlp_residual": True, "max_position_embeddings": None,
    }  # fmt: skip
    (tmp_path / "model.mlpackage").mkdir()
    (tmp_path / "pararnn.json").write_text(json.dumps(settings))
    for path in (tmp_path, tmp_path / "model.mlpackage"):
        package = found(path)
        assert (package["kind"], package["parameters"], package["state_bytes"]) == ("package", 1000, 256)
        assert (package["quantization"], package["end_tokens"], package["tokenizer"]) == ("int8", [3], None)
    assert run("inspect", tmp_path).stdout.split("\n")[0].split(maxsplit=1) == ["kind", "Core ML package"]
    (tmp_path / "pararnn.json").write_text(json.dumps({**settings, "states": 3}))
    result = run("inspect", tmp_path)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
