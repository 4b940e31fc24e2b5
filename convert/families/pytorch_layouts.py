"""A model of `mlx_pararnn.model` in the names and layouts of the PyTorch code that it may have come from.

What families/ml_pararnn.py, pararnn_torch.py and babylm.py map, the other way round.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from ..readers.dtypes import Array, widened
from ..readers.tensors import Tensor
from .base import Output, Source, computed, copied
from .cell_layouts import TORCH_LAYOUTS
from .torch_blocks import CELL, DEFAULT_CAP

Args = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """One code base's language model.

    Attributes:
        name: its name in `families.names`.
        fields: field of config.json -> what it must be, one of several values.
        outputs: gives its tensors of an MLX model's.
        config: gives its config.json; empty for code that has none.
    """

    name: str
    fields: dict[str, tuple[Any, ...]]
    outputs: Callable[[Source, Args], list[Output]]
    config: Callable[[Source, Args], dict[str, Any]]


def find_layout(checkpoint: Checkpoint, args: Args) -> Layout:
    """The code base whose model this is.

    Raises:
        PararnnError: none has a model of this shape; it says in what the nearest differs.
    """

    def others(layout: Layout) -> list[str]:
        return [name for name, values in layout.fields.items() if args[name] not in values]

    nearest = min(LAYOUTS, key=lambda layout: len(others(layout)))
    if differing := others(nearest):
        there = "; ".join(
            f"{name} is {args[name]!r} and there {' or '.join(map(repr, nearest.fields[name]))}"
            for name in differing
        )
        raise PararnnError(
            f"{checkpoint.folder}: no PyTorch code is known that computes this model; nearest is "
            f"{nearest.name}'s: {there}"
        )
    return nearest


def _ml_pararnn(source: Source, args: Args) -> list[Output]:
    d, width, taps, vocab = (
        args[n] for n in ("hidden_size", "intermediate_size", "conv_kernel", "vocab_size")
    )
    embedding = source.take("model.embed_tokens.weight", (vocab, d))
    outputs = [copied("embedding.weight", embedding)]
    for layer in range(args["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"blocks.{2 * layer}."
        conv = source.take(f"{old}mixer.conv1d.weight", (d, taps, 1))
        outputs += [
            copied(f"{new}norm.weight", source.take(f"{old}norm.weight", (d,))),
            copied(f"{new}residual_scale", source.take(f"{old}residual_scale", (1,))),
            copied(f"{new}in_proj.weight", source.take(f"{old}mixer.in_proj.weight", (2 * d, d))),
            computed(f"{new}conv.conv.weight", (d, 1, taps), [conv], lambda taps: taps.swapaxes(1, 2)),
            copied(f"{new}conv.conv.bias", source.take(f"{old}mixer.conv1d.bias", (d,))),
            copied(f"{new}gate_norm.weight", source.take(f"{old}mixer.norm.weight", (d,))),
            copied(f"{new}out_proj.weight", source.take(f"{old}mixer.out_proj.weight", (d, d))),
            *_apple_cell(source, f"{old}mixer.cell.", f"{new}rnn_cell.", args),
        ]
        new = f"blocks.{2 * layer + 1}."
        outputs += [
            copied(f"{new}0.weight", source.take(f"{old}mlp_norm.weight", (d,))),
            copied(f"{new}1.w1.weight", source.take(f"{old}mlp.gate_proj.weight", (width, d))),
            copied(f"{new}1.w3.weight", source.take(f"{old}mlp.up_proj.weight", (width, d))),
            copied(f"{new}1.w2.weight", source.take(f"{old}mlp.down_proj.weight", (d, width))),
        ]
    outputs.append(copied("final_norm.weight", source.take("model.norm.weight", (d,))))
    tied = args["tie_word_embeddings"]
    return [
        *outputs,
        copied("lm_head.weight", embedding if tied else source.take("lm_head.weight", (vocab, d))),
    ]


def _apple_cell(source: Source, old: str, new: str, args: Args) -> list[Output]:
    heads, d = args["num_heads"], args["hidden_size"]
    w = d // heads
    weight = source.take(f"{old}input_proj.weight", (heads, 3 * w, w))
    bias = source.take(f"{old}bias", (heads, 3 * w))
    lstm = args["cell"] == "lstm"
    rows = source.take(f"{old}recurrent_weight", (5 if lstm else 3, d))
    outputs = [
        computed(
            f"{new}B", (heads, w, 3, w), [weight], lambda b: b.reshape(heads, 3, w, w).transpose(0, 3, 1, 2)
        ),
        computed(f"{new}b", (3, d), [bias], lambda b: b.reshape(heads, 3, w).swapaxes(0, 1)),
        copied(f"{new}A", rows.rows(0, 3)),
    ]
    return [*outputs, copied(f"{new}C", rows.rows(3, 5))] if lstm else outputs


def _torch_blocks(source: Source, args: Args, norm_bias: bool) -> list[Output]:
    d, width, cell = args["hidden_size"], args["intermediate_size"], args["cell"]
    outputs = []
    for layer in range(args["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"blocks.{layer}."
        outputs += _norm(source, f"{old}norm", f"{new}norm_rnn", d, norm_bias)
        outputs += _torch_cell(source, f"{old}mixer.cell.", new + CELL, cell, d)
        outputs += _norm(source, f"{old}mlp_norm", f"{new}norm_mlp", d, norm_bias)
        up = "fc1" if args["mlp"] == "gelu" else "up"
        down = "fc2" if args["mlp"] == "gelu" else "down"
        for part, inner in (("weight", (d,)), ("bias", ())):
            halves = [source.take(f"{old}mlp.up_proj.{part}", (width, *inner))]
            if args["mlp"] == "swiglu":
                halves.insert(0, source.take(f"{old}mlp.gate_proj.{part}", (width, *inner)))
            outputs.append(_joined(f"{new}mlp.{up}.{part}", halves))
        outputs += [
            copied(f"{new}mlp.{down}.weight", source.take(f"{old}mlp.down_proj.weight", (d, width))),
            copied(f"{new}mlp.{down}.bias", source.take(f"{old}mlp.down_proj.bias", (d,))),
        ]
    return outputs


def _torch_cell(source: Source, old: str, new: str, cell: str, d: int) -> list[Output]:
    layout = TORCH_LAYOUTS[cell]
    gates, theirs = len(layout.gate_order), np.argsort(layout.gate_order)
    weight = source.take(f"{old}input_proj.weight", (1, gates * d, d))
    bias = source.take(f"{old}bias", (1, gates * d))
    rows = source.take(f"{old}recurrent_weight", (layout.row_count, d))
    outputs = [
        computed(f"{new}W_x.weight", (gates * d, d), [weight], lambda b: b.reshape(gates, d, d)[theirs]),
        computed(f"{new}W_x.bias", (gates * d,), [bias], lambda b: b.reshape(gates, d)[theirs]),
    ]
    if layout.rows == ("R",):
        return [*outputs, copied(f"{new}R", rows)]

    def row(name: str, number: int) -> Output:
        return computed(f"{new}{name}", (d,), [rows.rows(number, number + 1)], lambda row: row)

    return outputs + [row(name, number) for number, name in enumerate(layout.rows)]


def _joined(name: str, tensors: list[Tensor]) -> Output:
    """Matrices or vectors of one size, the rows of each after those of the one before."""
    shape = len(tensors) * tensors[0].shape[0], *tensors[0].shape[1:]
    return Output(
        name, shape, tensors[0].dtype, lambda: chain.from_iterable(tensor.pieces() for tensor in tensors)
    )


def _norm(source: Source, old: str, new: str, d: int, bias: bool) -> list[Output]:
    return [
        copied(f"{new}.{part}", source.take(f"{old}.{part}", (d,)))
        for part in (("weight", "bias") if bias else ("weight",))
    ]


def _pararnn_torch(source: Source, args: Args) -> list[Output]:
    shape = args["vocab_size"], args["hidden_size"]
    outputs = [copied("embed.weight", source.take("model.embed_tokens.weight", shape))]
    outputs += _torch_blocks(source, args, norm_bias=False)
    outputs += _norm(source, "model.norm", "norm", args["hidden_size"], False)
    if not args["tie_word_embeddings"]:
        outputs.append(copied("lm_head.weight", source.take("lm_head.weight", shape)))
    return outputs


def _pararnn_torch_config(source: Source, args: Args) -> dict[str, Any]:
    d, width = args["hidden_size"], args["intermediate_size"]
    return {
        "model_type": "paraslstm",
        "architectures": ["ParaSLSTMForCausalLM"],
        "vocab_size": args["vocab_size"],
        "hidden_size": d,
        "num_hidden_layers": args["num_hidden_layers"],
        "mlp_ratio": width / d,
        # its clamp where it changes nothing; without it where it would
        "max_recurrent_norm": DEFAULT_CAP if _largest_recurrent(source, args) <= DEFAULT_CAP else None,
        "mix": "diag",
        "rms_norm_eps": args["norm_eps"],
        "tie_word_embeddings": args["tie_word_embeddings"],
        "intermediate_size": width,
    }


def _babylm(source: Source, args: Args) -> list[Output]:
    largest = _largest_recurrent(source, args)
    if largest > DEFAULT_CAP:
        raise PararnnError(
            f"{source.checkpoint.folder}: it has a recurrent weight of {largest:.3g}, and the BabyLM models' "
            f"code clamps them to {DEFAULT_CAP}; train with --max-recurrent-norm {DEFAULT_CAP}"
        )
    d, vocab = args["hidden_size"], args["vocab_size"]
    positions = source.take("model.embed_positions.weight", (args["max_position_embeddings"], d))
    return [
        copied("embed.weight", source.take("model.embed_tokens.weight", (vocab, d))),
        copied("pos.weight", positions),
        *_torch_blocks(source, args, norm_bias=True),
        *_norm(source, "model.norm", "norm_f", d, True),
    ]


def _largest_recurrent(source: Source, args: Args) -> float:
    rows = TORCH_LAYOUTS[args["cell"]].row_count, args["hidden_size"]
    names = [f"model.layers.{n}.mixer.cell.recurrent_weight" for n in range(args["num_hidden_layers"])]
    tensors = [source.take(name, rows) for name in names]
    source.check()
    return max(_largest(tensor.read(), tensor.dtype) for tensor in tensors)


def _largest(array: Array, dtype: str) -> float:
    return float(np.abs(widened(array, dtype)).max())


_PLAIN = {
    "mixer": ("plain",),
    "num_heads": (1,),
    "mlp_bias": (True,),
    "mlp_residual": (True,),
    "residual_scale": (False,),
    "activations": (None,),
}
LAYOUTS = (
    Layout(
        "ml-pararnn",
        {
            "cell": ("gru", "lstm"),
            "mixer": ("gated_conv",),
            "norm": ("rms",),
            "norm_eps": (1e-6,),
            "mlp": ("swiglu",),
            "mlp_bias": (False,),
            "mlp_residual": (False,),
            "residual_scale": (True,),
            "max_position_embeddings": (None,),
            "activations": (None,),
        },
        _ml_pararnn,
        lambda source, args: {},
    ),
    Layout(
        "pararnn-torch",
        {
            "cell": ("slstm",),
            "norm": ("rms",),
            "mlp": ("swiglu",),
            "max_position_embeddings": (None,),
            **_PLAIN,
        },
        _pararnn_torch,
        _pararnn_torch_config,
    ),
    Layout(
        "babylm",
        {
            "cell": tuple(TORCH_LAYOUTS),
            "norm": ("layer",),
            "norm_eps": (1e-5,),
            "mlp": ("swiglu", "gelu"),
            "tie_word_embeddings": (True,),
            **_PLAIN,
        },
        _babylm,
        lambda source, args: {},
    ),
)
