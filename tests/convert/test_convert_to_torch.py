"""`convert --to torch`: an MLX model goes back to the names and layouts of PyTorch, bit for bit."""

import json
import shutil

import numpy as np
import pytest

from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from mlx_pararnn.convert.to_torch import convert_to_torch
from mlx_pararnn.errors import PararnnError
from tests.support.converting import convert
from tests.support.golden import golden_file

SOURCES = {
    "lm/paragru_s64/state_dict.pt": "ml-pararnn",
    "lm/paralstm_s96/state_dict.pt": "ml-pararnn",
    "pararnn_torch/paraslstm_causal_lm_0": "pararnn-torch",
    "pararnn_torch/paraslstm_causal_lm_1": "pararnn-torch",
    "pararnn_torch/babylm_paragru": "babylm",
    "pararnn_torch/babylm_paralstm": "babylm",
    "pararnn_torch/babylm_paraslstm": "babylm",
    "pararnn_torch/babylm_paranlru": "babylm",
}


def clamped(name, array):
    """pararnn-torch clamps recurrent weights on every use, so conversion bakes it in."""
    last = name.rpartition(".")[2]
    recurrent = last in ("R", "u") or last.startswith(("a_", "c_"))
    return np.clip(array, -0.5, 0.5) if recurrent else array


@pytest.mark.parametrize("source", SOURCES)
def test_there_and_back(source, converted, tmp_path):
    done = convert(converted(source), "--to", "torch", "-o", tmp_path / "back")
    assert done.exit_code == 0, done.output
    assert f"for {SOURCES[source]}" in done.stdout
    before, after = open_checkpoint(golden_file(source)), open_checkpoint(tmp_path / "back")
    names = {name for name in before.tensors if name != "lm_head.weight"}
    assert {name for name in after.tensors if name != "lm_head.weight"} == names
    for name in after.tensors:
        wanted, given = before.tensors[name], after.tensors[name]
        assert (given.dtype, given.shape) == (wanted.dtype, wanted.shape), name
        array = wanted.read() if SOURCES[source] == "ml-pararnn" else clamped(name, wanted.read())
        assert given.read().tobytes() == array.tobytes(), name


def test_a_model_that_no_pytorch_code_has(converted, tmp_path):
    folder = converted("lm/paragru_s64/state_dict.pt")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"mlp_residual": True}))
    with pytest.raises(PararnnError, match="nearest is ml-pararnn's: mlp_residual is True and there False"):
        convert_to_torch(tmp_path / "model", tmp_path / "out")
    with pytest.raises(PararnnError, match="takes an MLX model folder"):
        convert_to_torch(golden_file("lm/paragru_s64/state_dict.pt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_with_it(converted, tmp_path):
    for option in (["-q"], ["--chunk", 8], ["--dtype", "float16"], ["--tokenizer", "none"]):
        done = convert("model", "--to", "torch", "-o", tmp_path / "out", *option)
        assert done.exit_code == 2
        assert "error: " in done.stderr
