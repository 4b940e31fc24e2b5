"""One token through all layers of a model in one call, on a CPU: metal/cpu_token.cpp.

In MLX a layer is some forty primitives, each of which costs more to start than its few numbers take, and a
product with one row is done as one of matrices, at half the speed of memory. Here each weight is read once,
and all between the weights is float32 whatever their dtype.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.mla import MultiLinear

from ..cache import RecurrentCache
from ..cells import Cell
from . import cpu, gpu
from .cpu_build import build
from .texts import cpu_token_text, plain_name

# Weights fewer than this are read by one thread: starting another takes some 50 microseconds.
_MANY = 1 << 19
# Modules whose arrays are read where they lie, and those they must have.
_PLAIN: dict[type, set[str]] = {
    nn.Linear: {"weight"},
    MultiLinear: {"weight"},
    nn.RMSNorm: {"weight"},
    nn.LayerNorm: {"weight", "bias"},
}
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


def decode(model: Any, x: mx.array, cache: Sequence[Any]) -> mx.array | None:
    """All layers and the last norm of a `PararnnModel` for one token, at once; `cache` gets the new states.

    Args:
        x: (B, 1, D), what the first layer reads.
        cache: one `RecurrentCache` a layer.

    Returns:
        (B, 1, D), or None, with the cache as it was, where this has no code for the call: many sequences,
        weights that are not plain matrices of x's dtype (quantized ones, adapters), a transformation of MLX
        such as mx.grad, no working C++ compiler.
    """
    if not 0 < x.shape[0] <= cpu.FEW_ROWS or x.shape[1] != 1 or x.dtype not in _BITS:
        return None
    cell, weights = model.layers[0].mixer.cell._cell, _weights(model, x)
    if weights is None or not _fits(cache, x, cell, weights):
        return None
    states = [array for c in cache for array in c.cache if array is not None]
    # A new array: of one that was evaluated before, async_eval would not notice that mx.grad traces it.
    (x,) = mx.depends([x], [*states, *(array for arrays in weights for array in arrays.values())])
    try:
        mx.async_eval(x)  # other than `eval` it is not allowed under mx.grad
    except ValueError:
        return None
    if not _works(cell):
        return None
    mx.eval(x)
    return _run(model, cell, weights, x, cache)


@lru_cache(maxsize=1)
def _kinds() -> frozenset[type]:
    from .. import model  # which imports this file

    mixers = model.GatedConvMixer, model.CausalConv, model.PlainMixer, model.RecurrentLayer
    return frozenset((model.Layer, *mixers, model.MLP))


def _weights(model: Any, x: mx.array) -> list[dict[str, mx.array]] | None:
    """Of each layer, and last of what stands behind them, the arrays by their names in struct Layer.

    None where a module is another than this file knows, or layers differ in more than their numbers.
    """
    kinds, eps, shared = _kinds(), getattr(model.norm, "eps", None), None
    found: list[dict[str, mx.array]] = []
    for layer in model.layers:
        if type(layer) not in kinds:
            return None
        mixer, mlp = layer["mixer"], layer["mlp"]  # by key: an attribute takes MLX ten times as long
        if type(mixer) not in kinds or type(mlp) not in kinds or type(mixer["cell"]) not in kinds:
            return None
        recurrent = mixer["cell"]
        constants = recurrent._cell, recurrent.num_heads, layer._mlp_residual
        if shared is not None and constants != shared:
            return None
        shared = constants
        arrays = {"bias": recurrent["bias"], "params": recurrent["recurrent_weight"]}
        if "conv1d" in mixer:
            if type(mixer["conv1d"]) not in kinds:
                return None
            arrays |= {"conv": mixer["conv1d"]["weight"], "conv_bias": mixer["conv1d"]["bias"]}
        if "residual_scale" in layer:
            arrays["residual_scale"] = layer["residual_scale"]
        modules = {
            "norm": layer["norm"],
            "in_proj": mixer.get("in_proj"),
            "cell_proj": recurrent["input_proj"],
            "mixer_norm": mixer.get("norm"),
            "out_proj": mixer.get("out_proj"),
            "mlp_norm": layer["mlp_norm"],
            "gate": mlp.get("gate_proj"),
            "up": mlp["up_proj"],
            "down": mlp["down_proj"],
        }
        if not all(
            _read(arrays, name, module, eps) for name, module in modules.items() if module is not None
        ):
            return None
        found.append(arrays)
    cell, heads, _ = constants
    first, last = found[0], dict[str, mx.array]()
    if not _read(last, "norm", model.norm, eps):
        return None
    found.append(last)
    taps = first["conv"].shape[1] if "conv" in first else 2
    shapes = _shapes(cell, x.shape[2], heads, taps, first["up"].shape[0])
    for arrays in found:
        for name, array in arrays.items():
            dtype = mx.float32 if name == "params" else x.dtype
            if array.dtype != dtype or array.shape != shapes.get(name):
                return None
    return found if taps > 1 and all(arrays.keys() == first.keys() for arrays in found[:-1]) else None


def _read(arrays: dict[str, mx.array], name: str, module: Any, eps: float | None) -> bool:
    """Put a module's arrays into `arrays`; False for one that is not plain, or a norm with another eps."""
    wanted = _PLAIN.get(type(module))
    if wanted is None or not wanted <= module.keys():
        return False
    arrays[name] = module["weight"]
    if "bias" in module:
        arrays[f"{name}_bias"] = module["bias"]
    return "norm" not in name or module.eps == eps


def _fits(cache: Sequence[Any], x: mx.array, cell: Cell, weights: list[dict[str, mx.array]]) -> bool:
    """Whether the cache has this model's shapes and as many rows as x; one from a file may have any."""
    B, _, D = x.shape
    expected = [((B, len(cell.slots), D), mx.float32)]
    if "conv" in weights[0]:
        expected.append(((B, weights[0]["conv"].shape[1] - 1, D), x.dtype))
    return len(cache) == len(weights) - 1 and all(
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


def _run(
    model: Any, cell: Cell, weights: list[dict[str, mx.array]], x: mx.array, cache: Sequence[Any]
) -> mx.array:
    B, _, D = x.shape
    depth, first, bits = len(cache), weights[0], _BITS[x.dtype]
    heads = model.layers[0].mixer.cell.num_heads
    taps = first["conv"].shape[1] if "conv" in first else 1
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
        for name, array in weights[i].items():
            setattr(layer, name, place(array))
        state, window = c.cache
        layer.state = zeros if state is None else place(state)
        layer.window = zeros if window is None else place(window)
        layer.new_state, layer.new_window = states[i].ctypes.data, windows[i].ctypes.data
    many = sum(array.size for array in first.values()) * depth >= _MANY
    token = Token(
        layers,
        *(place(weights[-1][name]) if name in weights[-1] else None for name in ("norm", "norm_bias")),
        place(x),
        y.ctypes.data,
        depth,
        B,
        heads,
        D // heads,
        taps,
        first["up"].shape[0],
        model.norm.eps,
        model.layers[0]._mlp_residual,
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
def _works(cell: Cell) -> bool:
    from ..model import ModelArgs, PararnnModel  # which import this file

    def waves(shape: tuple[int, ...]) -> mx.array:
        return 0.5 * mx.sin(mx.arange(math.prod(shape))).reshape(shape)

    def outcomes() -> Iterator[tuple[list[mx.array], list[mx.array]]]:
        args = ModelArgs(72, 2, 8, 80, cell=cell.name, num_heads=2, activations=cell.activations)
        high, low = cast(Any, mx.random.state)[0].tolist()
        model = PararnnModel(args)
        mx.random.seed(high << 32 | low)  # the user's numbers stay what they would have been
        model.update(tree_map(lambda array: waves(array.shape), model.parameters()))
        x, caches = waves((2, 1, 72)), [[RecurrentCache(2) for _ in model.layers] for _ in range(2)]
        for c in caches[0] + caches[1]:
            c.cache = [waves((2, len(cell.slots), 72)), waves((2, 3, 72))]
        weights = _weights(model, x) or []
        given = [_run(model, cell, weights, x, caches[0])]
        for layer, c in zip(model.layers, caches[1], strict=True):
            x = layer(x, c, None, backend="ops")
        wanted = [model.norm(x)]
        for outcome, used in ((given, caches[0]), (wanted, caches[1])):
            outcome += [array for c in used for array in c.cache]
        yield given, wanted

    return gpu.works_here(f"decoding with {cell.name!r}", "cpu", outcomes)
