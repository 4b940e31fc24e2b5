"""What pararnn-torch's and the BabyLM language models share: plain recurrent blocks, MLPs with bias."""

from typing import Any

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from ..readers.tensors import Tensor
from ..readers.wording import shown
from .base import Output, Source, copied
from .cell_layouts import torch_cell

CELL = "rnn.layers.0."
DEFAULT_CAP = 0.5  # pararnn-torch 0.17.4's max_recurrent_norm


def is_torch_lm(checkpoint: Checkpoint) -> bool:
    """Whether tensors have the names of blocks as pararnn-torch makes them."""
    return any(".rnn.layers.0." in name and "blocks." in name for name in checkpoint.tensors)


def refuse_mixing(checkpoint: Checkpoint) -> None:
    """Raise for recurrent matrices that are dense inside a head: their channels are not independent."""
    mix = (checkpoint.config or {}).get("mix", "diag")
    ends = ("R_head", "R_dense.weight", "A_z", "A_r", "A_n")
    dense = [name for name in checkpoint.tensors if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    if dense or mix != "diag":
        found = shown(dense[0] if dense else f"mix={mix!r} in config.json")
        raise PararnnError(
            f"{checkpoint.path}: it was trained with recurrent matrices that mix channels ({found}); "
            "only mix='diag', one recurrent weight a channel, can be converted"
        )


def recurrent_cap(checkpoint: Checkpoint) -> tuple[float | None, list[str]]:
    """The clamp on recurrent weights, from config.json or the library's default, and a note that says so."""
    cap = (checkpoint.config or {}).get("max_recurrent_norm", DEFAULT_CAP)
    if cap is None:
        return None, []
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not cap > 0:
        raise PararnnError(
            f"{checkpoint.folder / 'config.json'}: max_recurrent_norm must be a positive number or null"
        )
    return float(cap), [
        f"Recurrent weights were clamped to [-{cap}, {cap}], as pararnn-torch does on every use."
    ]


def mlp_kind(source: Source) -> tuple[str, int]:
    """("swiglu" or "gelu", width), by the first block's names."""
    if "blocks.0.mlp.fc1.weight" in source:
        return "gelu", source.shape("blocks.0.mlp.fc1.weight", 2)[0]
    return "swiglu", source.shape("blocks.0.mlp.up.weight", 2)[0] // 2


def blocks(
    source: Source, layers: int, cell: str, d: int, norm_bias: bool, cap: float | None
) -> list[Output]:
    """All blocks' outputs: norm_rnn, the cell, norm_mlp and the MLP."""
    mlp, width = mlp_kind(source)
    outputs = []
    for layer in range(layers):
        old, new = f"blocks.{layer}.", f"model.layers.{layer}."
        outputs += norm(source, f"{old}norm_rnn", f"{new}norm", d, norm_bias)
        outputs += torch_cell(source, old + CELL, f"{new}mixer.cell.", cell, d, cap)
        outputs += norm(source, f"{old}norm_mlp", f"{new}mlp_norm", d, norm_bias)
        outputs += (_gelu if mlp == "gelu" else _swiglu)(source, f"{old}mlp.", f"{new}mlp.", d, width)
    return outputs


def norm(source: Source, old: str, new: str, d: int, bias: bool) -> list[Output]:
    """A norm's weight (D,) and, with `bias`, its bias."""
    parts = ("weight", "bias") if bias else ("weight",)
    return [copied(f"{new}.{part}", source.take(f"{old}.{part}", (d,))) for part in parts]


def plain_args(source: Source, cell: str, d: int, layers: int, vocab: int) -> dict[str, Any]:
    """The fields that both families have in common."""
    mlp, width = mlp_kind(source)
    return {
        "cell": cell,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_heads": 1,
        "intermediate_size": width,
        "mixer": "plain",
        "conv_kernel": 4,
        "mlp": mlp,
        "mlp_bias": True,
        "mlp_residual": True,
        "residual_scale": False,
        "activations": None,
    }


def _gelu(source: Source, old: str, new: str, d: int, width: int) -> list[Output]:
    return [
        copied(f"{new}up_proj.weight", source.take(f"{old}fc1.weight", (width, d))),
        copied(f"{new}up_proj.bias", source.take(f"{old}fc1.bias", (width,))),
        copied(f"{new}down_proj.weight", source.take(f"{old}fc2.weight", (d, width))),
        copied(f"{new}down_proj.bias", source.take(f"{old}fc2.bias", (d,))),
    ]


def _swiglu(source: Source, old: str, new: str, d: int, width: int) -> list[Output]:
    weight = source.take(f"{old}up.weight", (2 * width, d))
    bias = source.take(f"{old}up.bias", (2 * width,))

    def halves(part: str, tensor: Tensor) -> list[Output]:
        return [
            copied(f"{new}gate_proj.{part}", tensor.rows(0, width)),
            copied(f"{new}up_proj.{part}", tensor.rows(width, 2 * width)),
        ]

    return [
        *halves("weight", weight),
        *halves("bias", bias),
        copied(f"{new}down_proj.weight", source.take(f"{old}down.weight", (d, width))),
        copied(f"{new}down_proj.bias", source.take(f"{old}down.bias", (d,))),
    ]
