"""`mlx-pararnn verify` of what `convert --to coreml` wrote, as a user has it."""

import json
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.coreml import mlpackage_check as package_check
from mlx_pararnn.convert.package.constants import Plain
from mlx_pararnn.convert.package.package_digest import stored_digest
from tests.support.coreml.exports import export_to_coreml, plain_model, settings
from tests.support.coreml.interpreter import Package


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Small packages by their options, each made once."""
    root = tmp_path_factory.mktemp("packages")
    folder = plain_model(root / "mlx", max_position_embeddings=64)

    def make(*options):
        out = root / "-".join(["out", *map(str, options)])
        if not out.exists():
            result = export_to_coreml(folder, out, "--tokenizer", "none", "--chunk", 8, *options)
            assert result.exit_code == 0, result.output
        return out

    return make


def test_verify_without_a_mac_says_what_it_did_not_do(packages, monkeypatch):
    monkeypatch.setattr(package_check, "can_predict", lambda: False)
    result = verify(packages())
    assert result.exit_code == 1
    assert "the package is whole" in result.stderr
    assert "none of its numbers were compared; run this on a Mac" in result.stderr
    assert verify(packages(), "--against", "x").exit_code == 2


def test_a_digest_is_of_what_is_stored():
    half = Plain(np.arange(6, dtype=np.float16).reshape(2, 3))
    other = Plain(np.arange(1, 7, dtype=np.float16).reshape(2, 3))
    digest = stored_digest({"a": half, "b": other})
    assert stored_digest({"b": other, "a": half}) == digest
    assert len({digest, stored_digest({"a": other, "b": half}), stored_digest({"a": half, "c": other})}) == 3


@pytest.mark.large
def test_the_same_weights_exported_again_have_the_same_digest(packages):
    digests = {settings(packages(*options))["weights_digest"] for options in ([], ["--argmax"], ["-q"])}
    assert len(digests) == 2
    assert settings(packages())["weights_digest"] == settings(packages("--argmax"))["weights_digest"]


@pytest.mark.parametrize("left", [0.5, 0.99, 0.0])
def test_verify_sees_that_weights_are_cut_short(left, packages, tmp_path):
    package = shutil.copytree(packages(), tmp_path / "cut")
    [file] = package.rglob("weight.bin")
    os.truncate(file, int(left * file.stat().st_size))
    result = verify(package)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "its weights are cut short" in result.stderr


class StandIn:
    """In place of a coremltools model on a Mac: the interpreter of the tests, and an error on request."""

    def __init__(self, package, name, wrong=0.0):
        self.function, self.wrong = Package(package).function(name), wrong

    def make_state(self):
        return self.function.new_state()

    def predict(self, inputs, state=None):
        outputs = self.function(inputs, state or {})
        return {k: v + self.wrong * (k == "logits") for k, v in outputs.items()}


def test_verify_sees_that_weights_are_others(packages, tmp_path):
    """Whole by their sizes, zero from a place on: what a copy that was interrupted leaves."""
    package = shutil.copytree(packages(), tmp_path / "zeroed")
    [file] = package.rglob("weight.bin")
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + 200 : len(data) // 2 + 300] = bytes(100)
    file.write_bytes(data)
    result = verify(package)
    assert result.exit_code == 1
    assert "its weights are not those that were exported" in result.stderr


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("options", [[], ["--state", "io"], ["--argmax"]])
def test_verify_compares_every_processor_with_the_reference(packages, monkeypatch, options):
    out = packages(*options)
    monkeypatch.setattr(package_check, "can_predict", lambda: True)
    monkeypatch.setattr(package_check, "open_function", lambda package, name, unit: StandIn(package, name))
    result = verify(out, "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert [c["name"].split(":")[0].split(" against")[0] for c in checks] == ["CPU", "GPU", "Neural Engine"]
    if not options:
        assert all(0 < c["difference"] < 5e-3 and "9 of 9" in c["note"] for c in checks)
        monkeypatch.setattr(
            package_check,
            "open_function",
            lambda package, name, unit: StandIn(package, name, wrong=float(unit == "CPU_AND_NE")),
        )
        result = verify(out)
        assert result.exit_code == 1
        assert [line.count("FAIL") for line in result.stdout.splitlines()[1:4]] == [0, 0, 1]


def test_verify_of_a_package_that_is_not_whole(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(package_check, "can_predict", lambda: False)
    out = shutil.copytree(packages(), tmp_path / "out")
    made = settings(out)
    (out / "pararnn.json").write_text(json.dumps(made | {"chunk": 9}))
    assert "is not the package that pararnn.json describes" in verify(out).stderr
    (out / "pararnn.json").write_text(json.dumps(made | {"format_version": 2}))
    assert "not a description this version reads" in verify(out).stderr
    (out / "pararnn.json").write_text(json.dumps(made))
    (out / "reference.safetensors").write_bytes(b"nothing")
    assert "reference.safetensors: cannot be read" in verify(out).stderr
    shutil.rmtree(out / "model.mlpackage/Data")
    assert "is no whole Core ML package" in verify(out).stderr
