"""What runs around the recurrence, and the loss: the library's functions and NumPy's, and gradients."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_pararnn.compute import layer_ops

EPS = 1e-3


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def conv_silu(x, window, weight, bias):
    inputs, (T, K) = np.concatenate([window, x], axis=1), (x.shape[1], weight.shape[1])
    z = bias + sum(weight[:, k] * inputs[:, k : k + T] for k in range(K))
    return silu(z), inputs[:, T:]


def cross_entropy(logits):
    rows = logits.reshape(-1, logits.shape[-1])
    picked = np.take_along_axis(rows, targets_of(rows.shape)[:, None], axis=-1)[:, 0]
    top = rows.real.max(-1, keepdims=True)
    return (top[:, 0] + np.log(np.exp(rows - top).sum(-1)) - picked).reshape(logits.shape[:-1])


def targets_of(shape):
    return np.arange(shape[0]) * 7 % shape[-1]


def library_cross_entropy(logits, *, backend):
    targets = mx.array(targets_of((logits.size // logits.shape[-1], logits.shape[-1])))
    return layer_ops.cross_entropy(logits, targets.reshape(logits.shape[:-1]), backend=backend)


# name: the library's function, the oracle's, and the inputs' shapes
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[str]]] = {
    "swiglu": (layer_ops.swiglu, lambda g, u: silu(g) * u, ["BTD", "BTD"]),
    "rms_norm": (
        lambda x, w, backend: layer_ops.rms_norm(x, w, EPS, backend=backend),
        rms_norm,
        ["BTD", "D"],
    ),
    "gated_norm": (
        lambda h, g, w, backend: layer_ops.gated_norm(h, g, w, EPS, backend=backend),
        lambda h, g, w: rms_norm(h, w) * silu(g),
        ["BTD", "BTD", "D"],
    ),
    **{
        f"conv_silu, {K} taps": (layer_ops.conv_silu, conv_silu, ["BTD", f"B{K - 1}D", f"D{K}", "D"])
        for K in (2, 4, 7)
    },
    "cross_entropy": (library_cross_entropy, cross_entropy, ["BTD"]),
}
SIZES = [(1, 1, 1), (2, 5, 37), (3, 2, 16), (2, 65, 8), (1, 150, 43), (3, 64, 130)]


def inputs_of(name, size, dtype=mx.float32, seed=0):
    letters = dict(zip("BTD", size, strict=True))
    rng = np.random.default_rng(seed)
    shapes = [tuple(letters.get(n) or int(n) for n in shape) for shape in FUNCTIONS[name][2]]
    return [mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype) for shape in shapes]


def as_list(outputs):
    return [*outputs] if isinstance(outputs, tuple | list) else [outputs]


def slopes_of(name, arrays):
    """Cotangents: random numbers of the outputs' shapes and dtypes."""
    outputs = as_list(FUNCTIONS[name][0](*arrays, backend="ops"))
    rng = np.random.default_rng(9)
    return [mx.array(rng.normal(size=y.shape).astype(np.float32)).astype(y.dtype) for y in outputs]


def given_by(name, arrays, slopes, backend="cpu"):
    function = FUNCTIONS[name][0]
    return mx.vjp(lambda *a: as_list(function(*a, backend=backend)), arrays, slopes)[1]
