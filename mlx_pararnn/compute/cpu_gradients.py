"""Gradients of the elementwise work on the CPU backend: metal/cpu_gradients.cpp, compiled and called.

cpu.py has what is differentiated, but for the cross entropy, which stands here whole. All runs at once.
"""

import ctypes
from functools import lru_cache

import mlx.core as mx

from .cpu import DTYPES, address, in_float32, in_lines, in_rows, room, run, view
from .cpu_build import build
from .freed_memory import keep_freed_memory
from .texts import cpu_gradients_text, for_dtype


@lru_cache(maxsize=3)
def _library(dtype: str) -> ctypes.CDLL:
    keep_freed_memory()
    return build(for_dtype(cpu_gradients_text(), dtype), f"gradients-{dtype}")


def swiglu_gradient(gate: mx.array, up: mx.array, slope: mx.array) -> list[mx.array]:
    """Of gate and up, given the loss's derivative by `swiglu`'s output, `slope` (..., width); at once."""
    rows = [in_rows(array) for array in (gate, up, slope)]
    sizes = [gate.size // gate.shape[-1], gate.shape[-1], *(stride for _, stride in rows)]
    outputs = [room(gate.shape, gate.dtype), room(gate.shape, gate.dtype)]
    return _call("swiglu_gradient", [array for array, _ in rows], outputs, sizes)


def rms_norm_gradient(x: mx.array, weight: mx.array, slope: mx.array, eps: float) -> list[mx.array]:
    """Of x and weight, given the loss's derivative by `rms_norm`'s output, `slope` (..., width); at once."""
    x, stride = in_rows(x)
    slope, slope_stride = in_rows(slope)
    sizes = [x.size // x.shape[-1], x.shape[-1], stride, slope_stride]
    outputs = [room(x.shape, x.dtype), room(weight.shape, mx.float32)]
    dx, d_weight = _call("rms_norm_gradient", [x, in_float32(weight), slope], outputs, sizes, eps)
    return [dx, d_weight.astype(weight.dtype)]


def gated_norm_gradient(
    hidden: mx.array, gate: mx.array, weight: mx.array, slope: mx.array, eps: float
) -> list[mx.array]:
    """Of hidden, gate and weight, given the loss's derivative by `gated_norm`'s output, `slope`; at once."""
    rows = [in_rows(array) for array in (hidden, gate, slope)]
    sizes = [gate.size // gate.shape[-1], gate.shape[-1], *(stride for _, stride in rows)]
    (hidden, gate, slope), exact = (array for array, _ in rows), in_float32(weight)
    outputs = [room(gate.shape, gate.dtype), room(gate.shape, gate.dtype), room(weight.shape, mx.float32)]
    *given, d_weight = _call("gated_norm_gradient", [hidden, gate, exact, slope], outputs, sizes, eps)
    return [*given, d_weight.astype(weight.dtype)]


def conv_silu_gradient(
    x: mx.array, window: mx.array, weight: mx.array, bias: mx.array, slope: mx.array, window_slope: mx.array
) -> list[mx.array]:
    """Of x, window, weight (K, D) and bias, given the loss's derivatives by `conv_silu`'s outputs."""
    B, T, D = x.shape
    K = weight.shape[0]
    x, slope = in_lines(x), in_lines(slope)
    strides = [n // view(a).itemsize for a in (x, slope) for n in view(a).strides[:2]]
    arrays = [
        x,
        mx.contiguous(window),
        in_float32(weight),
        in_float32(bias),
        slope,
        mx.contiguous(window_slope),
    ]
    outputs = [room(x.shape, x.dtype), room(window.shape, x.dtype), room((K + 1, D), mx.float32)]
    dx, d_window, sums = _call("conv_silu_gradient", arrays, outputs, [B, T, D, K, *strides])
    return [dx, d_window, sums[:K].astype(weight.dtype), sums[K].astype(bias.dtype)]


def cross_entropy(logits: mx.array, targets: mx.array) -> list[mx.array]:
    """Of logits (N, V) and targets (N,), int32 and each below V, at once.

    Returns:
        losses (N,), largest logits (N,), sums of exp(logit - largest) (N,), all float32.
    """
    logits, stride = in_rows(logits)
    outputs = [room(targets.shape, mx.float32) for _ in range(3)]
    return _call("cross_entropy", [logits, mx.contiguous(targets)], outputs, [*logits.shape, stride])


def cross_entropy_gradient(
    logits: mx.array, targets: mx.array, largest: mx.array, sums: mx.array, slope: mx.array
) -> mx.array:
    """Of logits, given what `cross_entropy` gave and the loss's derivative by the losses, `slope` (N,)."""
    logits, stride = in_rows(logits)
    rest = [mx.contiguous(array) for array in (targets, largest, sums, slope)]
    outputs = [room(logits.shape, logits.dtype)]
    return _call("cross_entropy_gradient", [logits, *rest], outputs, [*logits.shape, stride])[0]


def _call(
    name: str, arrays: list[mx.array], outputs: list[mx.array], sizes: list[int], number: float = 0.0
) -> list[mx.array]:
    """One function of metal/cpu_gradients.cpp, of the first array's dtype; returns the outputs, filled."""
    mx.eval(arrays, outputs)
    places = (ctypes.c_void_p * len(outputs))(*(address(array) for array in outputs))
    dtype = DTYPES[arrays[0].dtype]
    function = getattr(_library(dtype), f"{name}_{dtype}")
    run(function, arrays, outputs, places, sizes, number)
    return outputs
