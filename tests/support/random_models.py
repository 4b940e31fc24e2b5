"""Small models of every kind with random weights, their calls, and the same model in float64."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_pararnn import Cell, Model, ModelArgs, get_cell
from tests.support import oracle

# Sizes below, between and beyond the multiples of every vector length, 4, 8 and 16.
SIZES: dict[str, Any] = {"hidden_size": 72, "num_hidden_layers": 2, "vocab_size": 37, "intermediate_size": 43}


KINDS: dict[str, dict[str, Any]] = {
    "gru": {"cell": "gru"},
    "lstm, 4 heads": {"cell": "lstm", "num_heads": 4, "conv_kernel": 3},
    "slstm, layer norm": {"cell": "slstm", "norm": "layer", "mlp": "gelu", "conv_kernel": 2},
    "nlru, biases": {"cell": "nlru", "num_heads": 2, "mlp_bias": True},
    "ml-pararnn": {"cell": "gru", "residual_scale": True, "mlp_residual": False, "tie_word_embeddings": True},
    "plain": {"cell": "slstm", "mixer": "plain", "mlp_bias": True, "hidden_size": 200, "num_heads": 4},
    "plain lstm": {"cell": "lstm", "mixer": "plain", "num_heads": 2, "residual_scale": True},
    "babylm": {
        **{"cell": "nlru", "mixer": "plain", "norm": "layer", "mlp": "gelu", "mlp_bias": True},
        **{"max_position_embeddings": 40, "tie_word_embeddings": True, "intermediate_size": 150},
    },
    "tiny": {"cell": "gru", "num_heads": 4, "hidden_size": 8, "intermediate_size": 5, "mlp_bias": True},
    "activations": {"cell": "lstm", "activations": {"c": "gelu", "state": "silu"}, "norm_eps": 0.1},
}


TOKENS = mx.array(np.random.default_rng(5).integers(0, 37, (2, 5)))


def make(kind="gru", dtype=mx.float32, seed=0, **sizes):
    """A model none of whose weights is 0 or 1, so that each of them counts."""
    rng = np.random.default_rng(seed)
    made = Model(ModelArgs(**(SIZES | KINDS[kind] | sizes)))

    def filled(path, p):
        n = rng.normal(size=p.shape)
        if path.endswith("recurrent_weight"):
            return mx.array((0.6 * n).astype(np.float32))
        fan_in = 3 if "conv1d" in path else p.shape[-1]
        n = n * 1.4 * fan_in**-0.5 if p.ndim > 1 else 0.3 * n + (path.endswith("weight") or "scale" in path)
        return mx.array(n.astype(np.float32)).astype(dtype)

    filled_in = [(path, filled(path, p)) for path, p in flat(made)]
    made.update(tree_unflatten(filled_in))
    mx.eval(made.parameters())
    return made


def quantize(made, group, bits, only=lambda path: True, **options):
    """Pack its matrices, and give the same model with the packed ones' numbers in float32."""
    twin = make_like(made)
    wanted = made.quant_predicate
    nn.quantize(made, group, bits, class_predicate=lambda path, m: only(path) and wanted(path, m), **options)
    weights = dict(flat(made))
    for path in [path for path in weights if path.endswith(".scales")]:
        name = path.removesuffix("scales")
        packed, scales, biases = (weights.pop(name + part) for part in ("weight", "scales", "biases"))
        width = dict(flat(twin))[name + "weight"].shape[-1]
        group_size, width_bits = width // scales.shape[-1], 32 * packed.shape[-1] // width
        weights[name + "weight"] = mx.dequantize(
            packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, width_bits
        )
    twin.update(tree_unflatten([(path, weight.astype(mx.float32)) for path, weight in weights.items()]))
    mx.eval(made.parameters(), twin.parameters())
    return twin


def make_like(made):
    return Model(ModelArgs.from_dict(vars(made.args)))


def flat(made: Model) -> list[tuple[str, mx.array]]:
    """Its weights by their paths."""
    return cast(list[tuple[str, mx.array]], tree_flatten(made.parameters()))


def cell_of(made) -> Cell:
    return get_cell(made.args.cell, made.args.activations)


def by_token(made, tokens, cache=None, *, head=True, **options):
    """Logits, or without the head what it reads, of `tokens` (B, T), one after the other."""
    cache = made.make_cache(tokens.shape[0]) if cache is None else cache
    call = made if head else made.model
    pieces = [call(tokens[:, t : t + 1], cache=cache, **options) for t in range(tokens.shape[1])]
    return mx.concatenate(pieces, axis=1)


def numbers(array, dtype=np.float64):
    return np.array(array.astype(mx.float32)).astype(dtype)


def silu(x):
    return x / (1 + np.exp(-x))


def exact(made, tokens):
    """The model in NumPy and float64, written apart: logits (B, T, V) and the last state of each layer."""
    args = made.args
    p: dict[str, np.ndarray] = {path: numbers(a) for path, a in flat(made)}

    def norm(x, path):
        if f"{path}.bias" in p:
            x = x - x.mean(-1, keepdims=True)
            bias = p[f"{path}.bias"]
        else:
            bias = np.zeros(())
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + args.norm_eps) * p[f"{path}.weight"] + bias

    def linear(x, path):
        return x @ p[f"{path}.weight"].T + p.get(f"{path}.bias", 0)

    x = p["model.embed_tokens.weight"][np.array(tokens)]
    B, T, D = x.shape
    if args.max_position_embeddings:
        x = x + p["model.embed_positions.weight"][:T]
    cell, heads, states = cell_of(made), args.num_heads, []
    for i in range(args.num_hidden_layers):
        path = f"model.layers.{i}"
        y = norm(x, f"{path}.norm")
        if args.mixer == "gated_conv":
            y, gate = np.split(linear(y, f"{path}.mixer.in_proj"), 2, axis=-1)
            taps = p[f"{path}.mixer.conv1d.weight"][..., 0]
            padded = np.pad(y, [(0, 0), (taps.shape[1] - 1, 0), (0, 0)])
            y = silu(
                p[f"{path}.mixer.conv1d.bias"]
                + sum(taps[:, k] * padded[:, k : k + T] for k in range(taps.shape[1]))
            )
        weight = p[f"{path}.mixer.cell.input_proj.weight"]
        u = np.einsum("bthi,hoi->btho", y.reshape(B, T, heads, -1), weight) + p[f"{path}.mixer.cell.bias"]
        u = u.reshape(B, T, heads, len(cell.gates), -1).swapaxes(2, 3).reshape(B, T, len(cell.gates), D)
        solved = oracle.sequential(cell, p[f"{path}.mixer.cell.recurrent_weight"], u)
        states.append(np.stack([s[:, -1] for s in solved], axis=1))
        y = solved[cell.output_slot]
        if args.mixer == "gated_conv":
            y = linear(norm(y, f"{path}.mixer.norm") * silu(gate), f"{path}.mixer.out_proj")
        x = y + p.get(f"{path}.residual_scale", 1) * x
        y = norm(x, f"{path}.mlp_norm")
        up = linear(y, f"{path}.mlp.up_proj")
        if args.mlp == "swiglu":
            up = silu(linear(y, f"{path}.mlp.gate_proj")) * up
        else:
            up = up * (1 + np.array(mx.erf(mx.array(up * 0.5**0.5)), np.float64)) / 2
        y = linear(up, f"{path}.mlp.down_proj")
        x = x + y if args.mlp_residual else y
    y = norm(x, "model.norm")
    return linear(y, "model.embed_tokens" if args.tie_word_embeddings else "lm_head"), states


def distance(given, wanted):
    """The largest difference, in parts of the largest number."""
    return np.abs(given - wanted).max() / np.abs(wanted).max()
