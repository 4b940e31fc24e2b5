"""A stranger's packages, given to `inspect` and `verify`: one sentence, whatever they say of themselves."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from tests.support.coreml.exports import export, small_model

KINDS = {"coreml": "coremltools", "coreai": "coreai"}
MANIFEST = "model.mlpackage/Manifest.json"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    model = small_model(root / "model")

    def make(kind: str) -> Path:
        pytest.importorskip(KINDS[kind])
        if not (root / kind).exists():
            options = ("--tokenizer", "none", "--chunk", 2, "--iterations", 1)
            result = export(model, root / kind, *options, to=kind)
            assert result.exit_code == 0, result.output
        return root / kind

    return make


@pytest.fixture
def package(packages, tmp_path):
    return lambda kind: shutil.copytree(packages(kind), tmp_path / kind)


def say(folder: Path, settings: dict) -> None:
    """pararnn.json, and the package itself, which says the same."""
    text = json.dumps(settings)
    (folder / "pararnn.json").write_text(text)
    if (folder / "model.aimodel").is_dir():
        file = folder / "model.aimodel/metadata.json"
        about = json.loads(file.read_text())
        about["creatorDefinedMetadata"]["pararnn"] = text
        file.write_text(json.dumps(about))
    else:
        change_program(folder, lambda spec: spec.description.metadata.userDefined.update({"pararnn": text}))


def change_program(folder: Path, change) -> None:
    import coremltools as ct

    [file] = folder.rglob("*.mlmodel")
    spec = ct.utils.load_spec(str(folder / "model.mlpackage"))
    change(spec)
    file.write_bytes(spec.SerializeToString())


def refused(command: str, folder: Path) -> str:
    result = CliRunner().invoke(app, [command, str(folder)])
    assert result.exit_code == 1, result.output
    return sentence(result)


def sentence(result) -> str:
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "--debug" not in result.stderr, "an error that nobody foresaw"
    return result.stderr


WRONG = {
    "chunk": [0, 1, 129, True, 2.0, "2", None],
    "chunks": [None, [], {}, {"prefill": 3}, {"prefill": [2]}, {"prefill": 2, "x": 1}, {"x": 2}],
    "functions": [["decode"], ["prefill"], [], "decode", [["decode"]], {"decode": 1}],
    "parts": [0, 2, 1 << 40, True, "1", None],
    "state": ["", None, 1],
    "layout": ["", None, 1, "ane"],  # the state of these is inside
    "states": [[], None, {}, [1], [{"name": "cell_state"}]],
    "output": ["text", None],
    "weights": ["float64", None, []],
    "parameters": [0, -1, 1e999, 1.5, 1 << 60, True, None, "7"],
    "hidden_size": [0, 1 << 30, "16", None],
    "vocab_size": [0, True],
    "cell": ["none", 1],
    "package": ["../x", "/dev/zero", None],
    "format_version": [2, None, "1"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_that_no_export_writes(kind, package):
    folder = package(kind)
    right = json.loads((folder / "pararnn.json").read_text())
    for name, values in WRONG.items():
        for value in values:
            (folder / "pararnn.json").write_text(json.dumps({**right, name: value}))
            for command in ("inspect", "verify"):
                assert "not a description this version reads" in refused(command, folder), (name, value)
    for state in ({"shape": [True, 1, 32]}, {"shape": [1 << 40]}, {"dtype": "object"}, {"name": "x"}):
        states = [{**right["states"][0], **state}, *right["states"][1:]]
        (folder / "pararnn.json").write_text(json.dumps({**right, "states": states}))
        assert "states is wrong" in refused("verify", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_without_one_of_its_fields(kind, package):
    folder = package(kind)
    right = json.loads((folder / "pararnn.json").read_text())
    for missing in right:
        say(folder, {name: value for name, value in right.items() if name != missing})
        result = CliRunner().invoke(app, ["verify", str(folder)])
        if result.exit_code:
            sentence(result)


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_would_take_the_memory(kind, package):
    folder = package(kind)
    right = json.loads((folder / "pararnn.json").read_text())
    wide = 1 << 30
    states = [{**state, "shape": [*state["shape"][:2], wide]} for state in right["states"]]
    say(folder, {**right, "hidden_size": wide, "states": states})
    assert "states is wrong" in refused("verify", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_of_something_else(kind, package):
    folder = package(kind)
    file = folder / "reference.safetensors"
    right = load_file(file)
    tokens, logits = right["tokens"], right["logits"]
    for wrong in (
        {"tokens": tokens + 1000},
        {"tokens": tokens - 1000},
        {"tokens": tokens.astype(np.int64)},
        {"tokens": tokens[None]},
        {"tokens": np.zeros(0, np.int32)},
        {"tokens": np.zeros(100_000, np.int32), "logits": np.ones((99_999, 50), np.float32)},
        {"logits": logits[1:]},
        {"logits": logits[:, 1:]},
        {"logits": logits * np.inf},
        {"logits": logits * 0},
    ):
        save_file({**right, **wrong}, file)
        assert "is not of the model that pararnn.json describes" in refused("verify", folder), wrong


def test_a_core_ml_program_that_says_no_json_of_itself(package):
    folder = package("coreml")
    for text in ("{", "[" * 100_000, "null"):
        change_program(
            folder, lambda spec, t=text: spec.description.metadata.userDefined.update({"pararnn": t})
        )
        assert "model.mlpackage: is n" in refused("verify", folder)


@pytest.mark.parametrize("path", ["../../../dev/zero", "/dev/zero", {"path": 1}, None, "com.apple.CoreML/x"])
def test_a_manifest_that_names_a_file_elsewhere(path, package):
    folder = package("coreml")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "is no whole Core ML package" in refused("verify", folder)


def test_weights_in_a_file_elsewhere(package, tmp_path):
    """A pipe would be waited for."""
    folder = package("coreml")
    os.mkfifo(tmp_path / "pipe")

    def change(spec):
        from mlx_pararnn.convert.coreml.mlpackage_check import file_values

        for value in file_values(spec.mlProgram):
            value.fileName = f"@model_path/{tmp_path / 'pipe'}"

    change_program(folder, change)
    assert "cut short" in refused("verify", folder)


def test_a_program_too_large_to_be_one(package):
    folder = package("coreml")
    [file] = folder.rglob("*.mlmodel")
    os.truncate(file, 1 << 40)  # a file with a hole: it takes no room
    assert "is no whole Core ML package" in refused("verify", folder)


def test_a_core_ai_program_of_another_model(package):
    """pararnn.json, the metadata and the reference are of one model, and the program is another's."""
    folder = package("coreai")
    right = json.loads((folder / "pararnn.json").read_text())
    say(folder, {**right, "max_position_embeddings": 64})  # a position is given, which it does not take
    assert "is not the program that pararnn.json describes" in refused("verify", folder)
