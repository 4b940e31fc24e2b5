"""The CPU backend: the cells of metal/ compiled by the machine's own C++ compiler for its vector unit.

MLX's elementwise work on a CPU costs 30 to 40 ns an exponential; a vector unit does one in under 1. So the
cell texts that make the GPU kernels are compiled again with a vector in place of each float (metal/cpu.h),
straight through time, channels shared out to vectors and cores (built and kept by cpu_build.py). Everything
here runs at once: never inside mx.compile or mx.vmap.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..cells import Cell
from .cpu_build import build, invoke
from .cpu_cores import threads
from .texts import cpu_elementwise_text, cpu_recurrence_text, for_dtype, plain_name

DTYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
# Fewer numbers than this are done by one thread: starting another takes some 50 microseconds.
_LARGE = 1 << 15
# An array to write into that has so many bytes begins with a line of the cache, which takes 10 microseconds.
_LONG, _LINE = 1 << 20, 64
# Up to so many rows a product with a matrix is faster here than in MLX, which arranges the matrix first.
FEW_ROWS = 16


def is_large(numbers: int) -> bool:
    """Whether work on so many numbers is worth a second thread, and to MLX a wait for it."""
    return numbers >= _LARGE


class Call(ctypes.Structure):
    """struct Call of metal/cpu_recurrence.cpp."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("u", "params", "initial", "mask", "hidden", "last", "states")),
        ("u_strides", ctypes.c_int64 * 4),
        *((n, ctypes.c_int64) for n in ("B", "heads", "T", "W", "every")),
        ("threads", ctypes.c_int),
    )


@lru_cache(maxsize=64)
def load(cell: Cell, dtype: str) -> ctypes.CDLL:
    """The cell's library for a dtype; raises BuildError, and PararnnError for a cell without MSL."""
    text = for_dtype(cpu_recurrence_text(cell), dtype)
    return build(text, f"recurrence-{plain_name(cell)}-{dtype}", (Call,))


def solve(
    cell: Cell, params: mx.array, u: mx.array, state: mx.array, mask: mx.array | None, every: int
) -> tuple[mx.array, ...]:
    """The recurrence straight through time, at once: hidden, last[, states].

    Shapes as in `recurrence`; params, state (float32) and mask (bool) are row contiguous.
    """
    B, heads, T, _, W = u.shape
    D, slots = heads * W, len(cell.slots)
    name = DTYPES[u.dtype]
    hidden = room((B, T, D), u.dtype)
    last = room((B, slots, D), mx.float32)
    states = room((B, T // every, slots, D), mx.float32) if every else None
    mx.eval(params, state, hidden, last, *([] if mask is None else [mask]), *([states] if every else []))
    u = in_lines(u)
    read = view(u)
    call = Call(
        read.ctypes.data,
        address(params),
        address(state),
        None if mask is None else address(mask),
        address(hidden),
        address(last),
        None if states is None else address(states),
        (ctypes.c_int64 * 4)(*(stride // read.itemsize for stride in read.strides[:4])),
        B,
        heads,
        T,
        W,
        every,
        threads() if is_large(u.size) else 1,
    )
    invoke(getattr(load(cell, name), f"pararnn_{name}"), ctypes.byref(call))
    return (hidden, last) if states is None else (hidden, last, states)


@lru_cache(maxsize=3)
def _elementwise(dtype: str) -> ctypes.CDLL:
    return build(for_dtype(cpu_elementwise_text(), dtype), f"elementwise-{dtype}")


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, both (..., width), at once."""
    rows = in_rows(gate), in_rows(up)
    sizes = [gate.size // gate.shape[-1], gate.shape[-1], *(stride for _, stride in rows)]
    return _call("swiglu", [array for array, _ in rows], gate.shape, sizes)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm of x (..., width) with weight (width,), at once."""
    x, stride = in_rows(x)
    sizes = [x.size // x.shape[-1], x.shape[-1], stride]
    return _call("rms_norm", [x, in_float32(weight)], x.shape, sizes, eps)


def gated_norm(hidden: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm(hidden) * silu(gate), both (..., width), with the norm's weight (width,); at once."""
    rows = in_rows(hidden), in_rows(gate)
    sizes = [gate.size // gate.shape[-1], gate.shape[-1], *(stride for _, stride in rows)]
    return _call("gated_norm", [*(array for array, _ in rows), in_float32(weight)], gate.shape, sizes, eps)


def conv_silu(x: mx.array, window: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Causal depthwise convolution and SiLU, at once.

    Args:
        x: (B, T, D).
        window: (B, K - 1, D), the inputs before x.
        weight: (K, D) with K > 1, tap K - 1 for the current step.
        bias: (D,).

    Returns:
        y (B, T, D) and the new window, both in x's dtype.
    """
    B, T, D = x.shape
    K = weight.shape[0]
    x, window = in_lines(x), mx.contiguous(window.astype(x.dtype))
    mx.eval(window)
    read = view(x)
    sizes = [B, T, D, K, *(stride // read.itemsize for stride in read.strides[:2])]
    y = _call("conv_silu", [x, window, in_float32(weight), in_float32(bias)], x.shape, sizes)
    moved = np.concatenate([view(window), read[:, -(K - 1) :]], axis=1)[:, -(K - 1) :].copy()
    return y, mx.array(moved).view(x.dtype)


def product(x: mx.array, weight: mx.array) -> mx.array:
    """x (..., width) times the transpose of weight (height, width), at once; for few rows."""
    shape = (*x.shape[:-1], weight.shape[0])
    sizes = [x.size // x.shape[-1], x.shape[-1], weight.shape[0]]
    return _call("product", [mx.contiguous(x), mx.contiguous(weight)], shape, sizes)


def _call(
    name: str, arrays: list[mx.array], shape: tuple[int, ...], sizes: list[int], number: float = 0.0
) -> mx.array:
    """One function of metal/cpu_elementwise.cpp; the output has the first array's dtype."""
    out = room(shape, arrays[0].dtype)
    mx.eval(out, *arrays)
    place = ctypes.c_void_p(address(out))
    dtype = DTYPES[out.dtype]
    run(getattr(_elementwise(dtype), f"{name}_{dtype}"), arrays, [out], place, sizes, number)
    return out


def run(
    function: Any,
    arrays: list[mx.array],
    outputs: list[mx.array],
    places: Any,
    sizes: list[int],
    number: float,
) -> None:
    """Call a C++ function on evaluated arrays; `places` is what it is given for its outputs."""
    invoke(
        function,
        (ctypes.c_void_p * len(arrays))(*(address(array) for array in arrays)),
        places,
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.byref(ctypes.c_float(number)),
        threads() if any(is_large(array.size) for array in (*outputs, *arrays)) else 1,
    )


def room(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array to write into. MLX fills every new one, and bytes faster than floats.

    MLX's begin anywhere, and vectors that are stored across two lines of the cache take longer.
    """
    size = math.prod(shape) * dtype.size
    if not _LONG <= size < 2**31 - _LINE:  # no axis of MLX's is longer
        return mx.zeros((*shape[:-1], shape[-1] * dtype.size), mx.uint8).view(dtype)
    filled = mx.zeros(size + _LINE, mx.uint8)
    mx.eval(filled)
    begin = -address(filled) % _LINE
    return filled[begin : begin + size].view(dtype).reshape(shape)


def in_float32(weight: mx.array) -> mx.array:
    """A weight as the C++ reads it: float32, in one piece."""
    return mx.contiguous(weight.astype(mx.float32))


def in_lines(array: mx.array) -> mx.array:
    """The array, evaluated, such that numbers of its last axis are neighbours."""
    mx.eval(array)
    if view(array).strides[-1] != view(array).itemsize:
        array = mx.contiguous(array)
        mx.eval(array)
    return array


def in_rows(array: mx.array) -> tuple[mx.array, int]:
    """The array, evaluated, such that its rows are equally far apart, and how many elements that is."""
    array = in_lines(array)
    seen = view(array)
    axes = [(n, stride) for n, stride in zip(seen.shape[:-1], seen.strides, strict=False) if n > 1]
    if any(outer != n * inner for (_, outer), (n, inner) in pairwise(axes)):
        array = mx.contiguous(array)
        mx.eval(array)
        return array, array.shape[-1]
    return array, axes[-1][1] // seen.itemsize if axes else array.shape[-1]


def view(array: mx.array) -> np.ndarray:
    """The array's own memory; bfloat16, which NumPy lacks, as its 16 bits."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


class _Python(ctypes.Structure):
    """struct PyBufferFunctions of metal/cpu_buffers.h."""

    _fields_ = (("get", ctypes.c_void_p), ("release", ctypes.c_void_p))


_PYTHON = _Python(
    *(
        ctypes.cast(function, ctypes.c_void_p)
        for function in (ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release)
    )
)


def dense_addresses(library: ctypes.CDLL, arrays: Sequence[mx.array]) -> list[int | None]:
    """Where evaluated arrays stand, each None unless row contiguous; much quicker than `address`.

    Args:
        library: one that has metal/cpu_buffers.h.
    """
    count = len(arrays)
    addresses = (ctypes.c_void_p * count)()
    _holding_the_lock(library).buffer_addresses(
        ctypes.byref(_PYTHON),
        (ctypes.py_object * count)(*cast(Any, arrays)),
        ctypes.c_int64(count),
        addresses,
    )
    return list(addresses)


@lru_cache(maxsize=64)
def _holding_the_lock(library: ctypes.CDLL) -> ctypes.PyDLL:
    """The library for calls that use Python's objects."""
    return ctypes.PyDLL(library._name, handle=library._handle)


def address(array: mx.array) -> int:
    """Where the numbers of an evaluated array lie."""
    return view(array).ctypes.data
