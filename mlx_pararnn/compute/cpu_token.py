"""One token through all layers of a model in one call, on a CPU: metal/cpu_token.cpp.

In MLX a layer is some forty primitives, each of which costs more to start than its few numbers take, and a
product with one row is done as one of matrices, at half the speed of memory. Here each weight is read once,
and all between the weights is float32 whatever their dtype.
"""

import ctypes
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from operator import is_
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..cache import held_arrays
from ..cells import Cell
from ..files.quantization_formats import BITS, GROUP_SIZES
from . import cpu, cpu_cores
from .choice import Evaluation, evaluation, works_here
from .cpu_build import build, invoke, is_prebuilt
from .module_arrays import Held
from .texts import EVERY_FORMAT, cpu_packed_text, cpu_token_text, for_dtype, plain_name

# Weights fewer than this are read by one thread: starting another takes some 50 microseconds.
_MANY = 1 << 19
_BITS = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}
# Memory is read no faster by more, and every token starts them anew. A bound by reasoning: two were measured.
_MOST_THREADS = 16


class Matrix(ctypes.Structure):
    """struct Matrix of metal/cpu_quantized.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "biases")),
        *((name, ctypes.c_int64) for name in ("bits", "group")),
    )


_MATRICES = ("in_proj", "cell_proj", "out_proj", "gate", "up", "down")


class Layer(ctypes.Structure):
    """struct Layer of metal/cpu_token.cpp."""

    _fields_ = tuple(
        (name, Matrix if name in _MATRICES else ctypes.c_void_p)
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
        *((name, ctypes.c_void_p) for name in ("packed", "norm", "norm_bias")),
        ("embedding", Matrix),
        *((name, ctypes.c_void_p) for name in ("ids", "x", "y")),
        ("head", Matrix),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("depth", "B", "heads", "W", "taps", "wide", "vocab")),
        ("eps", ctypes.c_float),
        ("mlp_residual", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


class Weights(NamedTuple):
    """What a model hands to `decode`.

    A matrix may be quantized: packed words under its name, and beside them "name.scales" and "name.biases".

    Attributes:
        layers: of each layer the arrays that a token reads, by their names in struct Layer.
        last: the same of the norm after the layers.
        cell, heads, mlp_residual, eps: as `ModelArgs` has them, the same in all layers and norms.
        embedding: (V, D), the rows that token ids stand for; empty where ids are not all that is read.
        head: (V, D), a last matrix without a bias that may be multiplied with too; empty for none.
    """

    layers: list[dict[str, mx.array]]
    last: dict[str, mx.array]
    cell: Cell
    heads: int
    mlp_residual: bool
    eps: float
    embedding: Mapping[str, mx.array] = MappingProxyType({})
    head: Mapping[str, mx.array] = MappingProxyType({})


class Decoded(NamedTuple):
    """What a token gives.

    Attributes:
        y: (B, 1, D), the last norm's output.
        logits: (B, 1, V); None where the head is not among the weights, or has to be called by itself.
    """

    y: mx.array
    logits: mx.array | None


Structs = tuple[Any, SimpleNamespace]  # an array of `Layer`, and fields of `Token` that are no layer's
Formats = tuple[tuple[int, int], ...]  # (bits, group size) of quantized matrices
Trial = Callable[[Cell, mx.Dtype, Formats], Iterable[tuple[Sequence[mx.array], Sequence[mx.array]]]]


class Known(NamedTuple):
    """What follows from the shapes and dtypes of a model's arrays.

    Attributes:
        fits: whether all arrays have the shapes that the first layer's imply, and one dtype.
        head_fits: whether the head has the width and the dtype of the others.
        formats: those that code is needed for, with the head and without it.
    """

    fits: bool
    head_fits: bool
    formats: dict[bool, Formats]


class Memory:
    """What is known of one model's arrays, as long as they are the same, of the same shapes and dtypes.

    It keeps none of them.
    """

    def __init__(self) -> None:
        self._gathered: tuple[Held, Weights | None] = Held([]), None  # with references in place of arrays
        self._arrays: list[weakref.ref[mx.array]] = []
        self._kinds: list[tuple[mx.Dtype, tuple[int, ...]]] = []
        self._known = Known(False, False, {})
        self._filled: tuple[list[int], Structs] | None = None
        self.teams: dict[int, cpu_cores.Team] = defaultdict(cpu_cores.Team)  # for so many rows

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        return Memory, ()  # a copy of the model has arrays of its own

    def weights(self, modules: Sequence[nn.Module], gather: Callable[[], Weights | None]) -> Weights | None:
        """What `gather` gives of these modules, or gave when they held the same."""
        held, references = self._gathered
        if held.same(modules):
            return references and _each(references, lambda seen: seen())
        weights = gather()
        self._gathered = Held(modules), weights and _each(weights, weakref.ref)
        return weights

    def of(self, weights: Weights) -> Known:
        """The same as when these arrays were last seen, or found out now."""
        groups = (*weights.layers, weights.last, weights.embedding, weights.head)
        arrays = [array for group in groups for array in group.values()]
        kinds = [(array.dtype, array.shape) for array in arrays]  # += may change both
        if kinds != self._kinds or not all(map(is_, arrays, [seen() for seen in self._arrays])):
            self._known, self._filled = _known(weights), None
            self._arrays, self._kinds = list(map(weakref.ref, arrays)), kinds
        return self._known

    def structs(self, weights: Weights, places: list[int]) -> Structs:
        """The weights' places in the structures that the C++ function reads; the caller's own."""
        filled = self._filled
        if filled is None or filled[0] != places:
            self._filled = filled = places, _filled(weights, places)
        layers, whole = filled[1]
        return type(layers).from_buffer_copy(layers), whole


def decode(
    modules: Sequence[nn.Module],
    gather: Callable[[], Weights | None],
    x: mx.array,
    ids: mx.array | None,
    cache: Sequence[Any],
    trial: Trial,
    memory: Memory,
) -> Decoded | None:
    """All layers, the norm after them and the head for one token, at once; `cache` gets the new states.

    Args:
        modules: all whose arrays and settings `gather` reads.
        gather: gives their arrays, all of them the modules' own; None where a module does not allow a call.
        x: (B, 1, D), what the first layer reads.
        ids: (B, 1), token ids, read instead of x where `weights` has an embedding; or None.
        cache: one `RecurrentCache` a layer.
        trial: pairs of what this gives for a cell, a dtype and formats of quantized matrices, and what MLX's
            ops give, compared at the first use.
        memory: the model's own.

    Returns:
        None, with the cache as it was, where this has no code for the call: weights of several dtypes or of
        other shapes than a model's, a transformation of MLX such as mx.grad, no compiler.
    """
    weights = memory.weights(modules, gather)
    if weights is None:
        return None
    if ids is None:
        weights = weights._replace(embedding={})
    elif weights.embedding:
        x = ids
    known = memory.of(weights)
    if not known.fits or not _readable(weights, x) or not _fits(cache, x, weights):
        return None
    reads = [x, *held_arrays(cache)]
    reads += [array for arrays in (*weights.layers, weights.last) for array in arrays.values()]
    reads += weights.embedding.values()
    if weights.head and not (
        # if it is the head alone that MLX traces, the others can be called at once
        known.head_fits and evaluation([*reads, *weights.head.values()]) == Evaluation.FREE
    ):
        weights = weights._replace(head={})
    if not weights.head and evaluation(reads) < Evaluation.FREE:
        return None
    formats = known.formats[bool(weights.head)]
    if not _works(weights.cell, _dtype(weights), formats, trial):
        return None
    mx.eval(x)
    if weights.embedding and not all(0 <= i < weights.embedding["embedding"].shape[0] for i in _ids(x)):
        return None
    return run(weights, x, cache, formats, memory)


def _ids(x: mx.array) -> list[int]:
    """Token ids (B, 1) as Python's numbers."""
    return [token for (token,) in cast(list[list[int]], x.tolist())]


def _width(weights: Weights) -> int:
    return weights.last["norm"].shape[-1]


def _dtype(weights: Weights) -> mx.Dtype:
    return weights.last["norm"].dtype


def _known(weights: Weights) -> Known:
    alone = weights._replace(head={})
    fits = _consistent(weights)
    # formats are of shapes that fit
    formats = {bool(of.head): formats_of(of) for of in (alone, weights)} if fits else {}
    head_fits = False
    if fits and weights.head:
        shapes = {"head": (weights.head["head"].shape[0], _width(weights))}
        head_fits = _have_shapes(weights.head, shapes, _dtype(weights))
    return Known(fits, head_fits, formats)


def _readable(weights: Weights, x: mx.array) -> bool:
    """Whether x is what the first layer reads, or ids of the embedding's rows."""
    if weights.embedding:
        return x.ndim == 2 and mx.issubdtype(x.dtype, mx.integer)
    return (x.shape[-1], x.dtype) == (_width(weights), _dtype(weights))


def _consistent(weights: Weights) -> bool:
    """Whether the arrays but the head's have the shapes that the first layer's imply, and one dtype."""
    first, taps = weights.layers[0], _taps(weights)
    D, dtype = _width(weights), _dtype(weights)
    if taps == 1 and "conv" in first:  # no window, which the text does not foresee
        return False
    if dtype not in _BITS:
        return False
    rows = {"embedding": (weights.embedding["embedding"].shape[0], D)} if weights.embedding else {}
    if not _have_shapes(weights.embedding, rows, dtype):
        return False
    shapes = _shapes(weights.cell, D, weights.heads, taps, first["up"].shape[0])
    names = _plain_names(first)
    return all(_plain_names(arrays) == names for arrays in weights.layers) and all(
        _have_shapes(arrays, shapes, dtype) for arrays in (*weights.layers, weights.last)
    )


def _plain_names(arrays: Mapping[str, mx.array]) -> set[str]:
    """Without those of scales and biases: in a model some layers may be quantized."""
    return {name for name in arrays if "." not in name}


def _have_shapes(
    arrays: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype
) -> bool:
    return all(
        "." in name
        or (
            _is_packed(arrays, name, shapes.get(name, ()), dtype)
            if f"{name}.scales" in arrays
            else (array.dtype, array.shape) == (mx.float32 if name == "params" else dtype, shapes.get(name))
        )
        for name, array in arrays.items()
    )


def _is_packed(arrays: Mapping[str, mx.array], name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> bool:
    """Whether it is a matrix of this shape, quantized in a way that there is code for.

    That is mode "affine"; mxfp4, nvfp4 and mxfp8 have no biases, and are left to MLX.
    """
    weight, scales, biases = (arrays.get(f"{name}{part}") for part in ("", ".scales", ".biases"))
    if len(shape) < 2 or weight is None or scales is None or biases is None:
        return False
    bits, group = _format(weight, scales, shape[-1])
    return (
        weight.dtype == mx.uint32
        and bits in BITS
        and group in GROUP_SIZES
        and weight.shape == (*shape[:-1], shape[-1] // 32 * bits)
        and scales.shape == biases.shape == (*shape[:-1], shape[-1] // group)
        and scales.dtype == biases.dtype == dtype
    )


def _format(weight: mx.array, scales: mx.array, width: int) -> tuple[int, int]:
    """Bits and group size of a quantized matrix with rows of `width` numbers."""
    return 32 * weight.shape[-1] // width, width // max(scales.shape[-1], 1)


def formats_of(weights: Weights) -> Formats:
    """Those that code is needed for."""
    D, wide = _width(weights), weights.layers[0]["up"].shape[0]
    widths = {"cell_proj": D // weights.heads, "down": wide}
    return tuple(
        sorted(
            {
                _format(arrays[name], scales, widths.get(name, D))
                for arrays in (*weights.layers, weights.embedding, weights.head)
                for part, scales in arrays.items()
                if part.endswith(".scales")
                and (name := part.removesuffix(".scales"))
                and name != "embedding"  # which is read, not multiplied with
            }
        )
    )


def _taps(weights: Weights) -> int:
    first = weights.layers[0]
    return first["conv"].shape[1] if "conv" in first else 1


def _fits(cache: Sequence[Any], x: mx.array, weights: Weights) -> bool:
    """Whether the cache has this model's shapes and as many rows as x; one from a file may have any."""
    B, D = x.shape[0], _width(weights)
    expected = [((B, len(weights.cell.slots), D), mx.float32)]
    if "conv" in weights.layers[0]:
        expected.append(((B, _taps(weights) - 1, D), _dtype(weights)))
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


def run(weights: Weights, x: mx.array, cache: Sequence[Any], formats: Formats, memory: Memory) -> Decoded:
    """`decode` without its checks, by libraries that have code for these formats of quantized matrices."""
    first, cell, dtype = weights.layers[0], weights.cell, _dtype(weights)
    B, D, depth, taps = x.shape[0], _width(weights), len(cache), _taps(weights)
    bits, wide = _BITS[dtype], first["up"].shape[0]
    vocab = weights.head["head"].shape[0] if weights.head else 0
    y, logits = np.empty((B, 1, D), bits), np.empty((B, 1, vocab), bits)
    states = np.empty((depth, B, len(cell.slots), D), np.float32)
    windows = np.empty((depth, B, taps - 1, D), bits)
    nothing = np.zeros(max(states[0].nbytes, windows[0].nbytes), np.uint8)
    ids = np.array(_ids(x), np.int64) if weights.embedding else None

    groups = (*weights.layers, weights.last, weights.embedding, weights.head)
    of_weights = [array for arrays in groups for array in arrays.values()]
    library = _library(cell, cpu.DTYPES[dtype])
    of_cache = held_arrays(cache)
    places, _kept = _places(library, [*of_weights, *of_cache, *([] if weights.embedding else [x])])
    layers, whole = memory.structs(weights, places[: len(of_weights)])
    others = iter(places[len(of_weights) :])
    zeros, new_state, new_window = (a.ctypes.data for a in (nothing, states, windows))
    for i, (layer, c) in enumerate(zip(layers, cache, strict=True)):
        layer.state, layer.window = (zeros if array is None else next(others) for array in c.cache)
        layer.new_state = new_state + i * states.strides[0]
        layer.new_window = new_window + i * windows.strides[0]
    numbers = sum(array.size for array in first.values()) * depth
    many = numbers + sum(array.size for array in weights.head.values()) >= _MANY
    team = memory.teams[B]
    packed: Any = getattr(_packed(formats), f"packed_{cpu.DTYPES[dtype]}") if formats else None
    token = Token(
        layers,
        ctypes.cast(packed, ctypes.c_void_p),
        whole.norm,
        whole.norm_bias,
        whole.embedding,
        None if ids is None else ids.ctypes.data,
        next(others, None),
        y.ctypes.data,
        whole.head,
        logits.ctypes.data,
        depth,
        B,
        weights.heads,
        D // weights.heads,
        taps,
        wide,
        vocab,
        weights.eps,
        weights.mlp_residual,
        team.size(min(cpu_cores.threads(), _MOST_THREADS) if many else 1),
    )
    begin = time.perf_counter()
    invoke(getattr(library, f"decode_{cpu.DTYPES[dtype]}"), ctypes.byref(token))
    team.took(time.perf_counter() - begin)
    for i, c in enumerate(cache):
        c[0] = mx.array(states[i])
        if taps > 1:
            c[1] = mx.array(windows[i]).view(dtype)
    return Decoded(mx.array(y).view(dtype), mx.array(logits).view(dtype) if weights.head else None)


def _each(weights: Weights, change: Callable[[Any], Any]) -> Weights:
    """The same with each array, or what stands for it, changed."""
    groups = (weights.last, weights.embedding, weights.head)
    last, embedding, head = ({name: change(value) for name, value in group.items()} for group in groups)
    layers = [{name: change(value) for name, value in layer.items()} for layer in weights.layers]
    return weights._replace(layers=layers, last=last, embedding=embedding, head=head)


def _filled(weights: Weights, places: Sequence[int]) -> Structs:
    """`Memory.structs`, made anew."""
    D, wide = _width(weights), weights.layers[0]["up"].shape[0]
    left, layers = iter(places), (Layer * len(weights.layers))()
    for layer, arrays in zip(layers, weights.layers, strict=True):
        _fill(layer, arrays, left, {"cell_proj": D // weights.heads, "down": wide}, D)
    whole = SimpleNamespace(norm=None, norm_bias=None, embedding=Matrix(), head=Matrix())
    for table in (weights.last, weights.embedding, weights.head):
        _fill(whole, table, left, {}, D)
    return layers, whole


def _fill(
    struct: Any,
    arrays: Mapping[str, mx.array],
    places: Iterator[int],
    widths: Mapping[str, int],
    D: int,
) -> None:
    """Put where arrays stand into fields of their names; a matrix has rows of widths[name] or D numbers."""
    for name in arrays:
        place = next(places)
        field, _, part = name.partition(".")
        if field in _MATRICES or field in ("embedding", "head"):
            matrix = getattr(struct, field)
            setattr(matrix, part or "weight", place)
            if part == "scales":
                matrix.bits, matrix.group = _format(arrays[field], arrays[name], widths.get(field, D))
        else:
            setattr(struct, name, place)


def _places(library: ctypes.CDLL, arrays: list[mx.array]) -> tuple[list[int], list[Any]]:
    """Where the numbers of each array stand, row by row, and what is to be kept while they are read."""
    places = cpu.dense_addresses(library, arrays)
    strided = [i for i, place in enumerate(places) if place is None]
    if strided:
        copies = [mx.contiguous(arrays[i]) for i in strided]
        mx.eval(copies)
        for i, copy in zip(strided, copies, strict=True):
            places[i] = cpu.address(copy)
        arrays = [*arrays, *copies]
    return cast(list[int], places), arrays


@lru_cache(maxsize=64)
def _library(cell: Cell, dtype: str) -> ctypes.CDLL:
    text = for_dtype(cpu_token_text(cell), dtype)
    return build(text, f"decode-{plain_name(cell)}-{dtype}", (Matrix, Layer, Token))


@lru_cache(maxsize=64)
def _packed(formats: Formats) -> ctypes.CDLL:
    if not is_prebuilt(text := cpu_packed_text(EVERY_FORMAT)):
        text = cpu_packed_text(formats)
    kind = "".join(f"-{bits}of{group}" for bits, group in formats)
    return build(text, f"packed{kind}", (Matrix,))


@lru_cache(maxsize=64)
def _works(cell: Cell, dtype: mx.Dtype, formats: Formats, trial: Trial) -> bool:
    what = f"decoding with {cell.name!r}, {cpu.DTYPES[dtype]}"
    return works_here(what, "cpu", partial(trial, cell, dtype, formats))
