"""Every file form of the golden models gives the weights it must."""

import json
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from tests.support.converting import config, weights
from tests.support.golden import golden_file
from tests.support.pt_writer import write_pt
from tests.support.small_models import apple_gru

GRU, LSTM = "lm/paragru_s64", "lm/paralstm_s96"
FLOAT32_FORMS = [
    *(f"{GRU}/{form}" for form in (
        "ckpt.pt", "state_dict.pt", "model.safetensors", "model_save_model.safetensors",
        "prefixed_compile.pt", "prefixed_ddp_ac_compiled_blocks.pt", "prefixed_fsdp1_nested.pt",
        "prefixed_module.pt", "ckpt_prefixed_orig_mod.pt", "state_dict_fsdp2_dtensor.pt", "dcp_flat",
        "dcp_model",
    )),
    *(f"{LSTM}/{form}" for form in ("ckpt.pt", "state_dict.pt", "model.safetensors")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def canonical_apple(source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The canonical weights of an ml-pararnn model, written down once more, index by index."""
    out = {
        "model.embed_tokens.weight": source["embedding.weight"],
        "model.norm.weight": source["final_norm.weight"],
    }
    for i in range(sum(name.endswith("rnn_cell.B") for name in source)):
        old = {
            name.removeprefix(f"blocks.{2 * i}."): value
            for name, value in source.items()
            if name.startswith(f"blocks.{2 * i}.")
        }
        mlp = f"blocks.{2 * i + 1}."
        heads, inputs, gates, outputs = old["rnn_cell.B"].shape
        projection = np.zeros((heads, gates * outputs, inputs), np.float32)
        bias = np.zeros((heads, gates * outputs), np.float32)
        for h in range(heads):
            for v in range(gates):
                for j in range(outputs):
                    projection[h, v * outputs + j] = old["rnn_cell.B"][h, :, v, j]
                    bias[h, v * outputs + j] = old["rnn_cell.b"][v, h * outputs + j]
        rows = [old["rnn_cell.A"]] + ([old["rnn_cell.C"]] if "rnn_cell.C" in old else [])
        layer = {
            "norm.weight": old["norm.weight"],
            "residual_scale": old["residual_scale"],
            "mixer.in_proj.weight": old["in_proj.weight"],
            "mixer.conv1d.weight": old["conv.conv.weight"][:, 0, :, None],
            "mixer.conv1d.bias": old["conv.conv.bias"],
            "mixer.cell.input_proj.weight": projection,
            "mixer.cell.bias": bias,
            "mixer.cell.recurrent_weight": np.concatenate(rows),
            "mixer.norm.weight": old["gate_norm.weight"],
            "mixer.out_proj.weight": old["out_proj.weight"],
            "mlp_norm.weight": source[mlp + "0.weight"],
            "mlp.gate_proj.weight": source[mlp + "1.w1.weight"],
            "mlp.up_proj.weight": source[mlp + "1.w3.weight"],
            "mlp.down_proj.weight": source[mlp + "1.w2.weight"],
        }
        out |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    return out


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


@pytest.mark.parametrize("form", FLOAT32_FORMS)
def test_every_float32_form_gives_the_same_bits(form, converted):
    plain = golden_file(f"{form.rpartition('/')[0]}/model.safetensors")
    folder = converted(golden_file(form))
    assert same_bits(weights(folder), canonical_apple(load_file(plain)))
    sizes = {
        GRU: {"cell": "gru", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 256, "num_heads": 4,
              "intermediate_size": 256},
        LSTM: {"cell": "lstm", "hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 1000, "num_heads": 2,
               "intermediate_size": 256},
    }  # fmt: skip
    assert config(folder) == sizes[form.rpartition("/")[0]] | {
        "model_type": "pararnn", "mixer": "gated_conv", "conv_kernel": 4, "norm": "rms",
        "norm_eps": 1e-6, "mlp": "swiglu", "mlp_bias": False, "mlp_residual": False, "residual_scale": True,
        "max_position_embeddings": None, "tie_word_embeddings": True, "activations": None,
    }  # fmt: skip


@pytest.mark.parametrize("model", [GRU, LSTM])
def test_both_bfloat16_forms_give_the_same_bits_and_keep_the_format(model, converted):
    forms = [golden_file(f"{model}/{name}") for name in ("ckpt_bf16.pt", "model_bf16.safetensors")]
    folders = [converted(form) for form in forms]
    files = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    with safe_open(folders[0] / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    stored = open_checkpoint(forms[1]).tensors
    ours = open_checkpoint(folders[0] / "model.safetensors").tensors
    rows = ours["model.layers.1.mixer.cell.recurrent_weight"]
    parts = [name for name in ("A", "C") if f"blocks.2.rnn_cell.{name}" in stored]
    assert np.array_equal(
        np.concatenate([stored[f"blocks.2.rnn_cell.{name}"].read() for name in parts]), rows.read()
    )


def test_a_training_checkpoint_keeps_its_configuration_for_the_card_and_nothing_of_the_optimizer(
    converted, data
):
    folder = converted("trained/paragru/final.pt", tokenizer="bytes")
    card = (folder / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "`final.pt`" in card
    assert '"d_model": 128' in card
    assert str(data) not in card
    assert not [name for name in weights(folder) if "exp_avg" in name or "optim" in name]


def test_the_state_of_the_optimizer_is_left_out(accepted, tmp_path):
    model = apple_gru()
    state = {i: {"exp_avg": 0 * a, "exp_avg_sq": 0 * a} for i, a in enumerate(model.values())}
    plain = accepted(write_pt(tmp_path / "plain.pt", model))
    whole = {"step": 3, "model_state_dict": model, "optimizer_state_dict": {"state": state}}
    folder = accepted(write_pt(tmp_path / "whole.pt", whole))
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["babylm_paragru", "babylm_paralstm", "babylm_paraslstm", "babylm_paranlru",
                                  "paraslstm_causal_lm_1"])  # fmt: skip
def test_bin_and_safetensors_of_pararnn_torch_agree(name, converted):
    folder = f"pararnn_torch/{name}"
    assert same_bits(weights(converted(folder)), weights(converted(f"{folder}/pytorch_model.bin")))


# Their row -> ours, and their W_x block for each of our gates.
ROWS = {
    "gru": ["a_z", "a_r", "a_n"],
    "lstm": ["a_f", "a_o", "a_z", "c_f", "c_o"],
    "slstm": ["R"],
    "nlru": ["u"],
}
BLOCKS = {"gru": [0, 1, 2], "lstm": [0, 2, 1], "slstm": [0, 1, 2, 3], "nlru": [0, 1]}


@pytest.mark.parametrize("cell", ROWS)
def test_babylm_layout(cell, converted, data):
    folder = f"pararnn_torch/babylm_para{cell}"
    source, ours, about = (
        load_file(data / folder / "model.safetensors"),
        weights(converted(folder)),
        config(converted(folder)),
    )
    d, old, new = 48, "blocks.1.rnn.layers.0.", "model.layers.1.mixer.cell."
    rows = np.concatenate([source[old + row].reshape(-1, d) for row in ROWS[cell]])
    assert np.array_equal(ours[new + "recurrent_weight"], np.clip(rows, -0.5, 0.5))
    for gate, block in enumerate(BLOCKS[cell]):
        ours_at, theirs_at = slice(gate * d, gate * d + d), slice(block * d, block * d + d)
        assert np.array_equal(
            ours[new + "input_proj.weight"][0, ours_at], source[old + "W_x.weight"][theirs_at]
        )
        assert np.array_equal(ours[new + "bias"][0, ours_at], source[old + "W_x.bias"][theirs_at])
    assert np.array_equal(ours["model.embed_positions.weight"], source["pos.weight"])
    if cell == "nlru":
        assert np.array_equal(ours["model.layers.0.mlp.up_proj.weight"], source["blocks.0.mlp.fc1.weight"])
        assert np.array_equal(ours["model.layers.0.mlp.down_proj.bias"], source["blocks.0.mlp.fc2.bias"])
    else:
        up = source["blocks.0.mlp.up.weight"]
        assert np.array_equal(ours["model.layers.0.mlp.gate_proj.weight"], up[:96])
        assert np.array_equal(ours["model.layers.0.mlp.up_proj.weight"], up[96:])
    expected = {
        "cell": cell, "mixer": "plain", "norm": "layer", "norm_eps": 1e-5,
        "mlp": "gelu" if cell == "nlru" else "swiglu", "mlp_bias": True, "mlp_residual": True,
        "residual_scale": False, "max_position_embeddings": 64,
        "intermediate_size": 96, "tie_word_embeddings": True, "num_heads": 1, "num_hidden_layers": 2,
    }  # fmt: skip
    assert expected.items() <= about.items()


@pytest.mark.parametrize(
    ("name", "tied"), [("paraslstm_causal_lm_0", True), ("paraslstm_causal_lm_1", False)]
)
def test_save_pretrained_folders(name, tied, converted):
    folder = converted(f"pararnn_torch/{name}")
    assert config(folder)["tie_word_embeddings"] is tied
    assert config(folder)["norm"] == "rms"
    assert config(folder)["max_position_embeddings"] is None
    assert ("lm_head.weight" in weights(folder)) is not tied
    assert "clamped to [-0.5, 0.5]" in (folder / "README.md").read_text()


def test_everything_is_converted_without_torch_and_without_mlx(tmp_path):
    import subprocess

    source, out = str(golden_file(f"{GRU}/ckpt.pt")), str(tmp_path / "out")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mlx'] = None\n"
        "from mlx_pararnn.convert.to_mlx import convert_to_mlx\n"
        f"convert_to_mlx({source!r}, {out!r}, tokenizer='bytes')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["cell"] == "gru"
