"""`mlx-pararnn verify` of what `convert --to coreml` wrote, as a user has it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.coreml import compute_unit
from mlx_pararnn.convert.coreml import mlpackage_check as package_check
from mlx_pararnn.convert.package.constants import Plain
from mlx_pararnn.convert.package.package_digest import stored_digest
from mlx_pararnn.errors import PararnnError
from tests.support.coreml.exports import export_to_coreml, plain_model, settings
from tests.support.coreml.stand_in import StandIn

ROOT = Path(__file__).parents[2]
CHECK_UNITS = ROOT / ".ci" / "check_units.py"


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Small packages by their options, each made once."""
    root = tmp_path_factory.mktemp("packages")
    folder = plain_model(root / "mlx", max_position_embeddings=64, num_hidden_layers=2)

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


def test_verify_sees_that_weights_are_others(packages, tmp_path):
    """Whole by their sizes, zero from a place on: what a copy that was interrupted leaves."""
    package = shutil.copytree(packages(), tmp_path / "zeroed")
    [file] = package.rglob("weight.bin")
    data = bytearray(file.read_bytes())
    data[-100:] = bytes(100)
    file.write_bytes(data)
    result = verify(package)
    assert result.exit_code == 1
    assert "its weights are not those that were exported" in result.stderr


@pytest.fixture
def mac(monkeypatch):
    """A function that makes this machine one with these processors, on which the interpreter runs."""

    def make(units, **wrong):
        def run_on(unit, compiled, settings, tokens, *_):
            if unit in wrong and wrong[unit] is None:
                raise PararnnError("not done after 61 seconds")
            functions = {name: StandIn(compiled, name, wrong.get(unit, 0)) for name in settings["functions"]}
            return compute_unit.read(settings, functions, tokens), {"decode": {"CPU": 7, "GPU": 2}}

        monkeypatch.setattr(package_check, "can_predict", lambda: True)
        monkeypatch.setattr(package_check, "compiled", nullcontext)
        monkeypatch.setattr(package_check, "present_units", lambda: units)
        monkeypatch.setattr(package_check, "run_on", run_on)

    return make


ALL = list(compute_unit.UNITS)
DIVIDED = ["--layers-per-function", 1]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("options", [[], ["--state", "io"], ["--layout", "ane"], ["--argmax"], DIVIDED])
def test_verify_compares_every_processor_with_the_reference(packages, mac, options):
    out = packages(*options)
    mac(ALL)
    result = verify(out, "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert [c["name"].split(":")[0].split(" against")[0] for c in checks] == ["CPU", "GPU", "Neural Engine"]
    assert all("; decode: 7 operations on CPU, 2 operations on GPU" in c["note"] for c in checks)
    if not options:
        assert all(0 < c["difference"] < 5e-3 and "9 of 9" in c["note"] for c in checks)
        mac(ALL, CPU_AND_NE=1.0)
        result = verify(out)
        assert result.exit_code == 1
        assert [line.count("FAIL") for line in result.stdout.splitlines()[1:4]] == [0, 0, 1]


def test_a_processor_that_fails_is_one_failed_check(packages, mac, tmp_path):
    """The others are compared as ever, so a CPU that is right passes in CI; none speaks for an absent one."""
    mac(["CPU_ONLY", "CPU_AND_GPU"], CPU_AND_GPU=None)
    result = verify(packages(), "--json")
    assert result.exit_code == 1
    cpu, gpu = json.loads(result.stdout)["checks"]
    assert (cpu["passed"], gpu["passed"]) == (True, False)
    assert gpu["name"] == "GPU: runs that failed"
    assert gpu["note"] == "not done after 61 seconds"
    file = tmp_path / "verified.json"
    file.write_text(result.stdout)
    assert failed_units("CPU", file) == (0, "all passed\n")
    assert failed_units("GPU", file) == (1, f"{file}: GPU: runs that failed: 1 (not done after 61 seconds)\n")
    assert failed_units("Neural Engine", file) == (1, f"{file}: nothing was run on Neural Engine\n")
    mac(["CPU_ONLY"])
    assert (
        "Same numbers. Not asked, as this machine has none: GPU, Neural Engine.\n"
        in verify(packages()).stdout
    )


def test_every_prefill_is_compared(packages, mac, monkeypatch):
    """One that gives other numbers is seen, though the largest is right."""
    out = packages("--chunk", 32)
    assert settings(out)["chunks"] == {"prefill": 32, "prefill_16": 16}
    mac(["CPU_ONLY"])
    checks = json.loads(verify(out, "--json").stdout)["checks"]
    assert [check["name"].split(" against")[0] for check in checks] == [
        "CPU, 32 at once,",
        "CPU, 16 at once,",
    ]
    assert all(check["passed"] and "9 of 9" in check["note"] for check in checks)
    predict = StandIn.predict

    def wrong(self, inputs, state=None):
        given = predict(self, inputs, state)
        for name in state if inputs["tokens"].size == 16 else ():
            state[name] = state[name] * 0
        return given

    monkeypatch.setattr(StandIn, "predict", wrong)
    checks = json.loads(verify(out, "--json").stdout)["checks"]
    assert [check["passed"] for check in checks] == [True, False]


def reference_of(out):
    with safe_open(out / "reference.safetensors", "numpy") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def test_what_is_allowed_is_measured_on_float16(packages, mac, tmp_path):
    """Eight times as far as MLX's own float16, up to 0.1; packages of earlier versions have a fixed bound."""
    out = shutil.copytree(packages(), tmp_path / "out")
    arrays, metadata = reference_of(out)
    assert 1e-4 < arrays["yardstick"] < 2e-3
    assert arrays["margins"].shape == (9,)
    size = np.sqrt((arrays["logits"] ** 2).mean())
    mac(["CPU_ONLY"], CPU_ONLY=float(9e-3 * size))
    result = verify(out, "--json")
    [check] = json.loads(result.stdout)["checks"]
    assert (check["passed"], check["tolerance"]) == (False, pytest.approx(8 * arrays["yardstick"]))
    wide = arrays | {"yardstick": np.array(0.5, np.float32)}
    save_file(wide, out / "reference.safetensors", metadata)
    [check] = json.loads(verify(out, "--json").stdout)["checks"]
    assert check["tolerance"] == 0.1
    save_file({name: arrays[name] for name in ("tokens", "logits")}, out / "reference.safetensors", metadata)
    [check] = json.loads(verify(out, "--json").stdout)["checks"]
    assert (check["passed"], check["tolerance"]) == (True, 1e-2)


@pytest.mark.large
def test_tokens_that_are_as_likely_pass(packages, mac, tmp_path):
    """Where the second likeliest comes as near as float16 is off; nothing else does."""
    out = shutil.copytree(packages("--argmax"), tmp_path / "out")
    mac(["CPU_ONLY"])
    arrays, metadata = reference_of(out)
    logits, margins = arrays["logits"], arrays["margins"]
    best, place = logits.argmax(-1), len(margins) - 2
    other = (best[place] + 1) % logits.shape[-1]
    for behind, passes in ((7.9 * margins[place], True), (8.1 * margins[place], False)):
        changed = logits.copy()  # MLX's own likeliest is another, and the package's so far behind it
        changed[place, other] = logits[place, best[place]] + behind
        save_file(arrays | {"logits": changed}, out / "reference.safetensors", metadata)
        [check] = json.loads(verify(out, "--json").stdout)["checks"]
        assert (check["passed"], check["difference"]) == (passes, float(not passes))
        assert check["note"].startswith(f"8 of 9 likeliest tokens equal{', 1 as likely' * passes};")


@pytest.mark.parametrize(
    "wrong", [{"yardstick": None}, {"margins": None}, {"yardstick": np.inf}, {"margins": np.zeros(3)}]
)
def test_a_yardstick_that_is_none_is_refused(packages, mac, tmp_path, wrong):
    out = shutil.copytree(packages(), tmp_path / "out")
    mac(["CPU_ONLY"])
    arrays, metadata = reference_of(out)
    [(name, value)] = wrong.items()
    arrays.pop(name)
    arrays |= {} if value is None else {name: np.array(value, np.float32)}
    save_file(arrays, out / "reference.safetensors", metadata)
    result = verify(out)
    assert result.exit_code == 1
    assert "is not of the model that pararnn.json describes" in result.stderr


def failed_units(*arguments):
    done = subprocess.run(
        [sys.executable, CHECK_UNITS, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("text", ["", "error: no", "[]", '{"checks": 3}', '{"checks": [{"name": "CPU"}]}'])
def test_what_verify_did_not_end_does_not_pass(text, tmp_path):
    file = tmp_path / "verified.json"
    file.write_text(text)
    assert failed_units("CPU", file) == (1, f"{file}: verify did not end\n")


@pytest.mark.large
def test_each_processor_has_a_process_of_its_own(packages, monkeypatch):
    """One ends, one hangs, one is right: the command's own processes, with the interpreter in them."""
    monkeypatch.setattr(package_check, "can_predict", lambda: True)
    monkeypatch.setattr(package_check, "compiled", nullcontext)
    monkeypatch.setattr(package_check, "present_units", lambda: ALL)
    monkeypatch.setattr(package_check, "_SECONDS", 40)
    monkeypatch.setattr(compute_unit, "COMMAND", [sys.executable, "-m", "tests.support.coreml.stand_in"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("STAND_IN", json.dumps({"CPU_AND_GPU": "end", "CPU_AND_NE": "hang"}))
    result = verify(packages(), "--json")
    assert result.exit_code == 1, result.output
    cpu, gpu, neural = json.loads(result.stdout)["checks"]
    assert cpu["passed"], cpu
    assert cpu["note"].startswith("9 of 9 likeliest tokens equal; decode: 5 operations on CPU")
    assert gpu["note"] == f"it ended with code {-signal.SIGABRT}"
    assert neural["note"] == "not done after 40 seconds"
    monkeypatch.setenv("STAND_IN", json.dumps(dict.fromkeys(ALL[1:], "refuse") | {"CPU_ONLY": "no plan"}))
    cpu, gpu, neural = json.loads(verify(packages(), "--json").stdout)["checks"]
    assert (cpu["passed"], cpu["note"]) == (True, "9 of 9 likeliest tokens equal")
    assert gpu["note"] == neural["note"] == "it ended with code 1: no such model"


def test_verify_of_a_package_that_is_not_whole(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(package_check, "can_predict", lambda: False)
    out = shutil.copytree(packages(), tmp_path / "out")
    made = settings(out)
    (out / "pararnn.json").write_text(json.dumps(made | {"chunk": 9, "chunks": {"prefill": 9}}))
    assert "is not the package that pararnn.json describes" in verify(out).stderr
    (out / "pararnn.json").write_text(json.dumps(made | {"format_version": 2}))
    assert "not a description this version reads" in verify(out).stderr
    (out / "pararnn.json").write_text(json.dumps(made))
    (out / "reference.safetensors").write_bytes(b"nothing")
    assert "reference.safetensors: cannot be read" in verify(out).stderr
    shutil.rmtree(out / "model.mlpackage/Data")
    assert "is no whole Core ML package" in verify(out).stderr
