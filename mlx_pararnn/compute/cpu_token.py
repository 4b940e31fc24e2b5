"""One token through all layers of a model in one call, on a CPU: metal/cpu_token.cpp.

In MLX a layer is some forty primitives, each of which costs more to start than its few numbers take, and a
product with one row is done as one of matrices, at half the speed of memory. Here each weight is read once,
and all between the weights is float32 whatever their dtype.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..cells import Cell
from . import cpu
from .choice import Evaluation, evaluation, works_here
from .cpu_build import build
from .texts import cpu_token_text, plain_name

# Weights fewer than this are read by one thread: starting another takes some 50 microseconds.
_MANY = 1 << 19
_BITS = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}
# Memory is read no faster by more, and every token starts them anew. A bound by reasoning: two were measured.
_MOST_THREADS = 16


class Layer(ctypes.Structure):
    """struct Layer of metal/cpu_token.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("norm", "norm_bias", "in_proj", "conv", "conv_bias", "cell_proj", "bias", "params"),
            *("mixer_norm", "out_proj", "residual_scale", "mlp_norm", "mlp_norm_bias"),
            *("gate", "gate_bias", "up", "up_bias", "down", "down_bias"),
            *("state", "window", "new_state", "new_window"),
        )
    )


class Token(ctypes.Structure):
    """struct Token of metal/cpu_token.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias", "x", "y")),
        *((name, ctypes.c_int64) for name in ("depth", "B", "heads", "W", "taps", "wide")),
        ("eps", ctypes.c_float),
        ("mlp_residual", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


class Weights(NamedTuple):
    """What a model hands to `decode`.

    Attributes:
        layers: of each layer the arrays that a token reads, by their names in struct Layer.
        last: the same of the norm after the layers.
        cell, heads, mlp_residual, eps: as `ModelArgs` has them, the same in all layers and norms.
    """

    layers: list[dict[str, mx.array]]
    last: dict[str, mx.array]
    cell: Cell
    heads: int
    mlp_residual: bool
    eps: float


Trial = Callable[[Cell], Iterable[tuple[Sequence[mx.array], Sequence[mx.array]]]]


def decode(weights: Weights, x: mx.array, cache: Sequence[Any], trial: Trial) -> mx.array | None:
    """All layers and the norm after them for one token, at once; `cache` gets the new states.

    Args:
        x: (B, 1, D), what the first layer reads.
        cache: one `RecurrentCache` a layer.
        trial: pairs of what this gives for a cell and what MLX's ops give, compared at the first use.

    Returns:
        (B, 1, D), or None, with the cache as it was, where this has no code for the call: weights of several
        dtypes or of other shapes than a model's, a transformation of MLX such as mx.grad, no compiler.
    """
    if x.dtype not in _BITS or not _consistent(weights, x) or not _fits(cache, x, weights):
        return None
    states = [array for c in cache for array in c.cache if array is not None]
    reads = [array for arrays in (*weights.layers, weights.last) for array in arrays.values()]
    if evaluation([x, *states, *reads]) < Evaluation.FREE or not _works(weights.cell, trial):
        return None
    mx.eval(x)
    return run(weights, x, cache)


def _consistent(weights: Weights, x: mx.array) -> bool:
    """Whether all arrays have the shapes that the first layer's imply, and x's dtype."""
    first, taps = weights.layers[0], _taps(weights)
    if taps == 1 and "conv" in first:  # no window, which the text does not foresee
        return False
    shapes = _shapes(weights.cell, x.shape[2], weights.heads, taps, first["up"].shape[0])
    return all(arrays.keys() == first.keys() for arrays in weights.layers) and all(
        array.dtype == (mx.float32 if name == "params" else x.dtype) and array.shape == shapes.get(name)
        for arrays in (*weights.layers, weights.last)
        for name, array in arrays.items()
    )


def _taps(weights: Weights) -> int:
    first = weights.layers[0]
    return first["conv"].shape[1] if "conv" in first else 1


def _fits(cache: Sequence[Any], x: mx.array, weights: Weights) -> bool:
    """Whether the cache has this model's shapes and as many rows as x; one from a file may have any."""
    B, _, D = x.shape
    expected = [((B, len(weights.cell.slots), D), mx.float32)]
    if "conv" in weights.layers[0]:
        expected.append(((B, _taps(weights) - 1, D), x.dtype))
    return len(cache) == len(weights.layers) and all(
        c[i] is None or (c[i].shape, c[i].dtype) == wanted for c in cache for i, wanted in enumerate(expected)
    )


@lru_cache(maxsize=16)
def _shapes(cell: Cell, D: int, heads: int, taps: int, wide: int) -> dict[str, tuple[int, ...]]:
    gates = len(cell.gates) * D // heads
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj": (2 * D, D),
        "conv": (D, taps, 1),
        "cell_proj": (heads, gates, D // heads),
        "bias": (heads, gates),
        "params": (len(cell.params), D),
        "out_proj": (D, D),
        "residual_scale": (1,),
        "down": (D, wide),
    }
    for name in ("norm", "norm_bias", "conv_bias", "mixer_norm", "mlp_norm", "mlp_norm_bias", "down_bias"):
        shapes[name] = (D,)
    for name in ("gate", "up"):
        shapes |= {name: (wide, D), f"{name}_bias": (wide,)}
    return shapes


def run(weights: Weights, x: mx.array, cache: Sequence[Any]) -> mx.array:
    """`decode` without its checks."""
    B, _, D = x.shape
    depth, first, cell, bits = len(cache), weights.layers[0], weights.cell, _BITS[x.dtype]
    taps = _taps(weights)
    y = np.empty((B, 1, D), bits)
    states = np.empty((depth, B, len(cell.slots), D), np.float32)
    windows = np.empty((depth, B, taps - 1, D), bits)
    nothing = np.zeros(max(states[0].nbytes, windows[0].nbytes), np.uint8)
    zeros = nothing.ctypes.data
    kept: list[mx.array] = []

    def place(array: mx.array) -> int:
        """Where the array's numbers stand, row by row."""
        if (found := cpu.dense_address(array)) is not None:
            return found
        kept.append(mx.contiguous(array))  # until the call is over
        mx.eval(kept)
        return cpu.address(kept[-1])

    layers = (Layer * depth)()
    for i, (layer, c) in enumerate(zip(layers, cache, strict=True)):
        for name, array in weights.layers[i].items():
            setattr(layer, name, place(array))
        state, window = c.cache
        layer.state = zeros if state is None else place(state)
        layer.window = zeros if window is None else place(window)
        layer.new_state, layer.new_window = states[i].ctypes.data, windows[i].ctypes.data
    many = sum(array.size for array in first.values()) * depth >= _MANY
    token = Token(
        layers,
        *(place(weights.last[name]) if name in weights.last else None for name in ("norm", "norm_bias")),
        place(x),
        y.ctypes.data,
        depth,
        B,
        weights.heads,
        D // weights.heads,
        taps,
        first["up"].shape[0],
        weights.eps,
        weights.mlp_residual,
        min(cpu.threads(), _MOST_THREADS) if many else 1,
    )
    getattr(_library(cell), f"decode_{cpu.DTYPES[x.dtype]}")(ctypes.byref(token))
    for i, c in enumerate(cache):
        c[0] = mx.array(states[i])
        if taps > 1:
            c[1] = mx.array(windows[i]).view(x.dtype)
    return mx.array(y).view(x.dtype)


@lru_cache(maxsize=64)
def _library(cell: Cell) -> ctypes.CDLL:
    return build(cpu_token_text(cell), f"decode-{plain_name(cell)}", (Layer, Token))


@lru_cache(maxsize=64)
def _works(cell: Cell, trial: Trial) -> bool:
    return works_here(f"decoding with {cell.name!r}", "cpu", partial(trial, cell))
