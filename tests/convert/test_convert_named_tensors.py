"""Checkpoints of one's own: a table of names that a module of the user's registers."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.families import NamedTensors, names, register_family
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.errors import PararnnError
from tests.support.golden import golden_file

mx = pytest.importorskip("mlx.core")

D = 8
CELL = {
    "input_proj.weight": ("z.weight", "r.weight", "h.weight"),
    "bias": ("z.bias", "r.bias", "h.bias"),
    "recurrent_weight": ("a_z", "a_r", "a_h"),
}


def state(**other):
    random = np.random.default_rng(0)
    shapes = {f"{gate}.weight": (D, D) for gate in "zrh"} | {f"{gate}.bias": (D,) for gate in "zrh"}
    shapes |= {f"a_{gate}": (D,) for gate in "zrh"}
    return {name: random.normal(size=shape).astype("float32") for name, shape in shapes.items()} | other


def register(parameters=CELL, **config):
    register_family(NamedTensors("mine", {"cell": "gru", **config}, parameters))


def converted(tmp_path, tensors):
    save_file(tensors, tmp_path / "w.safetensors")
    return convert_to_mlx(tmp_path / "w.safetensors", tmp_path / "out")


def test_gates_and_rows_are_joined(tmp_path):
    register()
    tensors = state()
    layer, config = mlx_pararnn.load_cell(converted(tmp_path, tensors))
    assert (config["hidden_size"], config["input_size"], config["num_heads"]) == (D, D, 1)
    expected = {
        "input_proj.weight": np.concatenate([tensors[f"{g}.weight"] for g in "zrh"])[None],
        "bias": np.concatenate([tensors[f"{g}.bias"] for g in "zrh"])[None],
        "recurrent_weight": np.stack([tensors[f"a_{g}"] for g in "zrh"]),
    }
    assert np.array_equal(layer.input_proj.weight, expected["input_proj.weight"])
    assert np.array_equal(layer.bias, expected["bias"])
    assert np.array_equal(layer.recurrent_weight, expected["recurrent_weight"])


def test_a_function_makes_what_joining_cannot(tmp_path):
    """One fused matrix (inputs, gates), its gates in another order."""
    tensors = state()
    fused = np.ascontiguousarray(np.concatenate([tensors.pop(f"{g}.weight").T for g in "hrz"], axis=1))
    register({**CELL, "input_proj.weight": (from_fused, "fused")}, input_size=D)
    layer, _ = mlx_pararnn.load_cell(converted(tmp_path, tensors | {"fused": fused}))
    assert np.array_equal(layer.input_proj.weight[0, :D], state()["z.weight"])
    assert np.array_equal(layer.input_proj.weight[0, 2 * D :], state()["h.weight"])


def from_fused(fused):
    h, r, z = np.split(fused.T, 3)
    return np.concatenate([z, r, h])[None]


@pytest.mark.parametrize(
    ("table", "config", "change", "message"),
    [
        (CELL, {}, {"z.weight": np.zeros((D, D + 1), "f4")}, "input_proj.weight has tensors of shapes"),
        (CELL, {}, {"surplus": np.zeros(3, "f4")}, "not expected (1): surplus"),
        (CELL, {"cell": "gruu"}, {}, "unknown cell 'gruu'"),
        (CELL, {"hidden_size": 9}, {}, "says hidden_size is 9, but the tensors say 8"),
        ({**CELL, "extra": "a_z"}, {}, {}, "parameters that the model does not have: extra"),
        ({k: v for k, v in CELL.items() if k != "bias"}, {}, {}, "parameters without a tensor: bias"),
        (
            {**CELL, "bias": (lambda *b: b[0], *CELL["bias"])},
            {},
            {},
            "bias: its function gave (8,), expected",
        ),
        ({**CELL, "bias": (lambda *b: 1 / 0, *CELL["bias"])}, {}, {}, "ZeroDivisionError in its function"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, table, config, change, message):
    register(table, **config)
    with pytest.raises(PararnnError) as error:
        converted(tmp_path, state() | change)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_built_in_name_is_taken():
    with pytest.raises(PararnnError, match="is built in"):
        register_family(NamedTensors("babylm", {}, {}))
    register()
    assert "mine" in names.family_names()


def test_import_makes_a_table_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "its_names.py").write_text(
        "from mlx_pararnn.convert.families import NamedTensors, register_family\n"
        f"register_family(NamedTensors('its', {{'cell': 'gru'}}, {CELL!r}))\n"
    )
    save_file(state(), tmp_path / "w.safetensors")
    result = CliRunner().invoke(app, ["convert", "w.safetensors", "-o", "out", "--import", "its_names"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["cell"] == "gru"
    assert "Try it: import its_names; mlx_pararnn.load_cell('out')" in result.stderr
    more = ["-o", "a model", "--tokenizer", "bytes", "--import", "its_names", "--import", "json"]
    result = CliRunner().invoke(app, ["convert", str(golden_file("trained/paragru/final.pt")), *more])
    assert result.exit_code == 0, result.output
    assert "Try it: mlx-pararnn generate 'a model' --import its_names --import json -p" in result.stderr
