"""Bare cells: converted, and run by the formulas on the converted layout, they give golden's output."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.converting import config, weights
from tests.support.pt_writer import write_pt

CELLS = Path(__file__).parents[1] / "data" / "cells"
CASES = [
    case
    for case in json.loads((CELLS / "metadata.json").read_text())["cases"]
    if "_nl_" not in case["name"] and case["seq_len"] <= 128
]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def run(folder: Path, x: np.ndarray) -> np.ndarray:
    """The cell of FACTS.md in float64, read off the canonical layout: x (T, inputs) -> hidden (T, D)."""
    w = {name: value.astype(np.float64) for name, value in weights(folder).items()}
    heads, rows, inputs = w["input_proj.weight"].shape
    per_head = x.reshape(len(x), heads, inputs)
    pre = np.einsum("thi,hri->thr", per_head, w["input_proj.weight"]) + w["bias"]
    gates = pre.reshape(len(x), heads, 3, rows // 3).transpose(2, 0, 1, 3).reshape(3, len(x), -1)
    a, h, c, hidden = w["recurrent_weight"], 0.0, 0.0, []
    for u in gates.transpose(1, 0, 2):
        if config(folder)["cell"] == "gru":
            z, r = sigmoid(a[0] * h + u[0]), sigmoid(a[1] * h + u[1])
            h = z * np.tanh(a[2] * (h * r) + u[2]) + (1 - z) * h
        else:
            f = sigmoid(a[0] * h + u[0] + a[3] * c)
            c = f * c + (1 - f) * np.tanh(a[2] * h + u[2])
            h = sigmoid(a[1] * h + u[1] + a[4] * c) * np.tanh(c)
        hidden.append(h)
    return np.stack(hidden)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_converted_cell_computes_what_the_original_did(case, accepted, tmp_path):
    golden = load_file(CELLS / case["file"])
    cell = {name: golden[name] for name in ("A", "B", "C", "b") if name in golden}
    save_file(cell, tmp_path / "cell.safetensors")
    folder = accepted(tmp_path / "cell.safetensors")
    x = golden["x"][None] if golden["x"].ndim == 2 else golden["x"]
    y = golden["y_seq_f64"].reshape(*x.shape[:2], -1)
    ours = np.stack([run(folder, row.astype(np.float64)) for row in x])
    assert np.abs(ours - y).max() <= 2e-6 * max(1, np.abs(y).max())
    assert config(folder) == {
        "model_type": "pararnn_cell",
        "cell": "lstm" if "C" in golden else "gru",
        "input_size": case["input_dim"],
        "hidden_size": case["state_dim"],
        "num_heads": case["num_heads"],
        "activations": None,
    }


@pytest.mark.parametrize("prefix", ["", "cell.", "model.layers.3.rnn."])
def test_a_bare_cell_may_stand_after_any_prefix_and_needs_no_tokenizer(prefix, accepted, tmp_path):
    golden = load_file(CELLS / "lstm_01_d16_h2.safetensors")
    write_pt(tmp_path / "cell.pt", {prefix + name: golden[name] for name in "ABCb"})
    folder = accepted(tmp_path / "cell.pt", "--force")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert weights(folder)["recurrent_weight"].shape == (5, 16)


TORCH_CELLS = {
    "gru": (3, [0, 1, 2], ("a_z", "a_r", "a_n")),
    "lstm": (3, [0, 2, 1], ("a_f", "a_o", "a_z", "c_f", "c_o")),
    "nlru": (2, [0, 1], ("u",)),
    "slstm": (4, [0, 1, 2, 3], ("R",)),
}


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("prefix", ["", "layers.0."])
def test_a_bare_cell_of_pararnn_torch_is_converted_with_its_clamp(cell, prefix, accepted, tmp_path):
    gates, order, rows = TORCH_CELLS[cell]
    random = np.random.default_rng(0)
    shape = (4, 6) if rows == ("R",) else (6,)
    source = {row: random.uniform(-1, 1, shape).astype(np.float32) for row in rows}
    source["W_x.weight"] = random.normal(size=(gates * 6, 5)).astype(np.float32)
    source["W_x.bias"] = random.normal(size=gates * 6).astype(np.float32)
    save_file({prefix + name: value for name, value in source.items()}, tmp_path / "cell.safetensors")
    folder = accepted(tmp_path / "cell.safetensors")
    ours = weights(folder)
    assert np.array_equal(
        ours["input_proj.weight"].reshape(gates, 6, 5), source["W_x.weight"].reshape(gates, 6, 5)[order]
    )
    assert np.array_equal(ours["bias"].reshape(gates, 6), source["W_x.bias"].reshape(gates, 6)[order])
    stacked = np.concatenate([source[row].reshape(-1, 6) for row in rows])
    assert np.array_equal(ours["recurrent_weight"], np.clip(stacked, -0.5, 0.5))
    expected = {"cell": cell, "input_size": 5, "hidden_size": 6, "num_heads": 1}
    assert config(folder).items() >= expected.items()
    assert "clamped to [-0.5, 0.5]" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["ParaGRU", "ParaLSTM", "ParaNLRU", "ParaSLSTM"])
def test_a_bare_cell_of_pararnn_torch_computes_what_it_did(name, accepted, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch (pip install 'mlx-pararnn[parity]')")
    pararnn = pytest.importorskip("pararnn", reason="needs pararnn-torch")
    import mlx.core as mx

    from mlx_pararnn.loading import load_cell

    torch.manual_seed(0)
    peer = getattr(pararnn, name)(5, 6)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.uniform_(-0.9, 0.9)
        x = torch.randn(2, 20, 5)
        expected = pararnn.ParaRNN(peer, solver="sequential")(x)
        expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    torch.save(peer.state_dict(), tmp_path / "cell.pt")
    layer, _ = load_cell(accepted(tmp_path / "cell.pt"))
    hidden = layer(mx.array(x.numpy()))
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert np.abs(np.array(hidden) - expected).max() < 3e-6


def test_a_bare_cell_whose_matrices_mix_channels_is_refused(refused, tmp_path):
    cell = {
        "W_x.weight": np.zeros((12, 4), np.float32),
        "W_x.bias": np.zeros(12, np.float32),
        **{name: np.zeros((2, 2, 2), np.float32) for name in ("A_z", "A_r", "A_n")},
    }
    save_file(cell, tmp_path / "cell.safetensors")
    assert "mix channels" in refused(tmp_path / "cell.safetensors")


def test_several_cells_without_a_model_are_told_from_one(refused, tmp_path):
    zeros = {"W_x.weight": (18, 5), "W_x.bias": (18,), **dict.fromkeys(("a_z", "a_r", "a_n"), (6,))}
    cells = {f"{n}.{name}": np.zeros(shape, "f4") for n in (0, 1) for name, shape in zeros.items()}
    save_file(cells, tmp_path / "cells.safetensors")
    assert "it holds 2 cells (0., 1.) and no model around them" in refused(tmp_path / "cells.safetensors")
    apple = {"A": (3, 6), "B": (1, 5, 3, 6), "b": (3, 6)}
    cells = {f"rnn.{n}.{name}": np.zeros(shape, "f4") for n in (0, 1) for name, shape in apple.items()}
    write_pt(tmp_path / "cells.pt", cells)
    assert "it holds 2 cells (rnn.0., rnn.1.)" in refused(tmp_path / "cells.pt")
