"""One token through all layers of a model in one call, on a CPU: metal/cpu_token.cpp.

In MLX a layer is some forty primitives, each of which costs more to start than its few numbers take, and a
product with one row is done as one of matrices, at half the speed of memory. Here each weight is read once,
and all between the weights is float32 whatever their dtype.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

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
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias", "x", "y", "head", "logits")),
        *((name, ctypes.c_int64) for name in ("depth", "B", "heads", "W", "taps", "wide", "vocab")),
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
        embedding: (V, D), the rows that token ids stand for; None where they are not all that is read.
        head: (V, D), a last matrix without a bias that may be multiplied with too; None for none.
    """

    layers: list[dict[str, mx.array]]
    last: dict[str, mx.array]
    cell: Cell
    heads: int
    mlp_residual: bool
    eps: float
    embedding: mx.array | None = None
    head: mx.array | None = None


class Decoded(NamedTuple):
    """What a token gives.

    Attributes:
        y: (B, 1, D), the last norm's output.
        logits: (B, 1, V); None where the head is not among the weights, or has to be called by itself.
    """

    y: mx.array
    logits: mx.array | None


Trial = Callable[[Cell], Iterable[tuple[Sequence[mx.array], Sequence[mx.array]]]]


def decode(weights: Weights, x: mx.array, cache: Sequence[Any], trial: Trial) -> Decoded | None:
    """All layers, the norm after them and the head for one token, at once; `cache` gets the new states.

    Args:
        x: (B, 1), token ids, where `weights` has an embedding; else (B, 1, D), what the first layer reads.
        cache: one `RecurrentCache` a layer.
        trial: pairs of what this gives for a cell and what MLX's ops give, compared at the first use.

    Returns:
        None, with the cache as it was, where this has no code for the call: weights of several dtypes or of
        other shapes than a model's, a transformation of MLX such as mx.grad, no compiler.
    """
    if not _consistent(weights, x) or not _fits(cache, x, weights):
        return None
    reads = [x, *(array for c in cache for array in c.cache if array is not None)]
    reads += [array for arrays in (*weights.layers, weights.last) for array in arrays.values()]
    if weights.embedding is not None:
        reads.append(weights.embedding)
    head = weights.head if _head_fits(weights, x) else None
    if head is not None and evaluation([*reads, head]) < Evaluation.FREE:
        head = None  # if it is the head alone that MLX traces, the others can be called at once
    if head is None and evaluation(reads) < Evaluation.FREE:
        return None
    if not _works(weights.cell, trial):
        return None
    mx.eval(x)
    if weights.embedding is not None and not all(0 <= i < weights.embedding.shape[0] for i in _ids(x)):
        return None
    return run(weights._replace(head=head), x, cache)


def _ids(x: mx.array) -> list[int]:
    """Token ids (B, 1) as Python's numbers."""
    return [token for (token,) in cast(list[list[int]], x.tolist())]


def _read(weights: Weights, x: mx.array) -> mx.array:
    """What gives a token's numbers: an array with their width and dtype."""
    return x if weights.embedding is None else weights.embedding


def _head_fits(weights: Weights, x: mx.array) -> bool:
    """Whether there is a head, and it has the width and the dtype of the other weights."""
    head, read = weights.head, _read(weights, x)
    return head is not None and (head.ndim, head.shape[-1], head.dtype) == (2, read.shape[-1], read.dtype)


def _consistent(weights: Weights, x: mx.array) -> bool:
    """Whether all arrays have the shapes that the first layer's imply, and one dtype."""
    first, taps, read = weights.layers[0], _taps(weights), _read(weights, x)
    if taps == 1 and "conv" in first:  # no window, which the text does not foresee
        return False
    of_ids = (read.ndim, x.ndim, mx.issubdtype(x.dtype, mx.integer)) == (2, 2, True)
    if read.dtype not in _BITS or not (read is x or of_ids):
        return False
    shapes = _shapes(weights.cell, read.shape[-1], weights.heads, taps, first["up"].shape[0])
    return all(arrays.keys() == first.keys() for arrays in weights.layers) and all(
        array.dtype == (mx.float32 if name == "params" else read.dtype) and array.shape == shapes.get(name)
        for arrays in (*weights.layers, weights.last)
        for name, array in arrays.items()
    )


def _taps(weights: Weights) -> int:
    first = weights.layers[0]
    return first["conv"].shape[1] if "conv" in first else 1


def _fits(cache: Sequence[Any], x: mx.array, weights: Weights) -> bool:
    """Whether the cache has this model's shapes and as many rows as x; one from a file may have any."""
    B, read = x.shape[0], _read(weights, x)
    D = read.shape[-1]
    expected = [((B, len(weights.cell.slots), D), mx.float32)]
    if "conv" in weights.layers[0]:
        expected.append(((B, _taps(weights) - 1, D), read.dtype))
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


def run(weights: Weights, x: mx.array, cache: Sequence[Any]) -> Decoded:
    """`decode` without its checks."""
    read, first, cell = _read(weights, x), weights.layers[0], weights.cell
    B, D, depth, taps = x.shape[0], read.shape[-1], len(cache), _taps(weights)
    head, dtype, bits = weights.head, read.dtype, _BITS[read.dtype]
    vocab = 0 if head is None else head.shape[0]
    y, logits = np.empty((B, 1, D), bits), np.empty((B, 1, vocab), bits)
    states = np.empty((depth, B, len(cell.slots), D), np.float32)
    windows = np.empty((depth, B, taps - 1, D), bits)
    nothing = np.zeros(max(states[0].nbytes, windows[0].nbytes), np.uint8)

    of_layers = [layer[name] for layer in weights.layers for name in first]
    of_cache = [array for c in cache for array in c.cache if array is not None]
    of_head = [] if head is None else [head]
    places, kept = _places(cell, [read, *of_layers, *of_cache, *weights.last.values(), *of_head])
    start = next(places)
    if read is not x:
        rows = (ctypes.string_at(start + token * D * dtype.size, D * dtype.size) for token in _ids(x))
        kept.append(ctypes.create_string_buffer(b"".join(rows), B * D * dtype.size))
        start = ctypes.addressof(kept[-1])
    layers = (Layer * depth)()
    for layer in layers:
        for name in first:
            setattr(layer, name, next(places))
    new_state, new_window, zeros = (array.ctypes.data for array in (states, windows, nothing))
    for i, (layer, c) in enumerate(zip(layers, cache, strict=True)):
        layer.state, layer.window = (zeros if array is None else next(places) for array in c.cache)
        layer.new_state = new_state + i * states.strides[0]
        layer.new_window = new_window + i * windows.strides[0]
    last = dict(zip(weights.last, places, strict=False))
    many = sum(array.size for array in first.values()) * depth + vocab * D >= _MANY
    token = Token(
        layers,
        last["norm"],
        last.get("norm_bias"),
        start,
        y.ctypes.data,
        next(places, None),
        logits.ctypes.data,
        depth,
        B,
        weights.heads,
        D // weights.heads,
        taps,
        first["up"].shape[0],
        vocab,
        weights.eps,
        weights.mlp_residual,
        min(cpu.threads(), _MOST_THREADS) if many else 1,
    )
    getattr(_library(cell), f"decode_{cpu.DTYPES[dtype]}")(ctypes.byref(token))
    for i, c in enumerate(cache):
        c[0] = mx.array(states[i])
        if taps > 1:
            c[1] = mx.array(windows[i]).view(dtype)
    return Decoded(mx.array(y).view(dtype), None if head is None else mx.array(logits).view(dtype))


def _places(cell: Cell, arrays: list[mx.array]) -> tuple[Iterator[int], list[Any]]:
    """Where the numbers of each array stand, row by row, and what is to be kept while they are read."""
    places = cpu.dense_addresses(_library(cell), arrays)
    strided = [i for i, place in enumerate(places) if place is None]
    if strided:
        copies = [mx.contiguous(arrays[i]) for i in strided]
        mx.eval(copies)
        for i, copy in zip(strided, copies, strict=True):
            places[i] = cpu.address(copy)
        arrays = [*arrays, *copies]
    return iter(cast(list[int], places)), list(arrays)


@lru_cache(maxsize=64)
def _library(cell: Cell) -> ctypes.CDLL:
    return build(cpu_token_text(cell), f"decode-{plain_name(cell)}", (Layer, Token))


@lru_cache(maxsize=64)
def _works(cell: Cell, trial: Trial) -> bool:
    return works_here(f"decoding with {cell.name!r}", "cpu", partial(trial, cell))
