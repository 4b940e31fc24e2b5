"""A one-layer checkpoint of each family, small enough to be broken in many ways."""

import json

import numpy as np
from safetensors.numpy import save_file

from tests.support.pt_writer import write_pt

Weights = dict[str, np.ndarray]


def apple_gru(d: int = 4, vocab: int = 256, heads: int = 2, width: int = 6, lstm: bool = False) -> Weights:
    """An ml-pararnn language model; the head is the embedding's very array, as in a tied state dict."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    weights = {
        "embedding.weight": normal(vocab, d),
        "blocks.0.residual_scale": normal(1),
        "blocks.0.norm.weight": normal(d),
        "blocks.0.in_proj.weight": normal(2 * d, d),
        "blocks.0.conv.conv.weight": normal(d, 1, 4),
        "blocks.0.conv.conv.bias": normal(d),
        "blocks.0.rnn_cell.A": normal(3, d),
        "blocks.0.rnn_cell.B": normal(heads, d // heads, 3, d // heads),
        "blocks.0.rnn_cell.b": normal(3, d),
        "blocks.0.gate_norm.weight": normal(d),
        "blocks.0.out_proj.weight": normal(d, d),
        "blocks.1.0.weight": normal(d),
        "blocks.1.1.w1.weight": normal(width, d),
        "blocks.1.1.w2.weight": normal(d, width),
        "blocks.1.1.w3.weight": normal(width, d),
        "final_norm.weight": normal(d),
    }
    if lstm:
        weights["blocks.0.rnn_cell.C"] = normal(2, d)
    return weights | {"lm_head.weight": weights["embedding.weight"]}


# Names and shapes of each cell's recurrent weights, in units of the width.
TORCH_CELLS: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "gru": (3, {"a_z": (1,), "a_r": (1,), "a_n": (1,)}),
    "lstm": (3, {"a_f": (1,), "a_z": (1,), "a_o": (1,), "c_f": (1,), "c_o": (1,)}),
    "nlru": (2, {"u": (1,)}),
    "slstm": (4, {"R": (4, 1)}),
}


def torch_lm(cell: str = "slstm", d: int = 4, vocab: int = 256, width: int = 6) -> Weights:
    """A pararnn-torch language model (RMSNorm, tied head not stored)."""
    random = np.random.default_rng(1)
    gates, recurrent = TORCH_CELLS[cell]

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    weights = {
        "embed.weight": normal(vocab, d),
        "blocks.0.norm_rnn.weight": normal(d),
        "blocks.0.rnn.layers.0.W_x.weight": normal(gates * d, d),
        "blocks.0.rnn.layers.0.W_x.bias": normal(gates * d),
        "blocks.0.norm_mlp.weight": normal(d),
        "blocks.0.mlp.up.weight": normal(2 * width, d),
        "blocks.0.mlp.up.bias": normal(2 * width),
        "blocks.0.mlp.down.weight": normal(d, width),
        "blocks.0.mlp.down.bias": normal(d),
        "norm.weight": normal(d),
    }
    for name, shape in recurrent.items():
        weights[f"blocks.0.rnn.layers.0.{name}"] = normal(*shape[:-1], d)
    return weights


def babylm(cell: str = "gru", d: int = 4, positions: int = 8) -> Weights:
    weights = torch_lm(cell, d)
    weights["norm_f.weight"] = weights.pop("norm.weight")
    weights |= {name: np.zeros(d, np.float32) for name in ("norm_f.bias", "blocks.0.norm_rnn.bias")}
    return weights | {
        "blocks.0.norm_mlp.bias": np.zeros(d, np.float32),
        "pos.weight": np.ones((positions, d), np.float32),
    }


def write_shards(folder, model, suffix=".safetensors", count=3):
    """`model` in `count` files and an index, as Hugging Face's save_pretrained and MLX-LM write them."""
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05}-of-{count:05}{suffix}"
        part = dict(list(model.items())[i::count])
        if suffix == ".safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            write_pt(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def tokenizer_json(tokens: int, added: dict[str, int] | None = None) -> str:
    vocab = {f"t{i}": i for i in range(tokens)}
    return json.dumps(
        {
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
            "added_tokens": [{"id": id_, "content": token} for token, id_ in (added or {}).items()],
        }
    )
