"""Matrix products with a model's weights. On a GPU they are MLX's own. MLX's CPU is fast in float32 alone, so
there all go by way of float32, and the head of a token is the CPU backend's (metal/cpu_linear.h).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from . import cpu
from .choice import evaluation
from .layer_ops import taken_by_cpu, with_derivatives_of

# Rows from which unpacking 4-bit weights and a float32 product take less than MLX's quantized product.
_ROWS_TO_UNPACK = 4
_UNPACKED_AT_ONCE = 1 << 24  # weights: 64 MB of float32


def linear(module: Any, x: mx.array) -> mx.array:
    """A linear layer, `MultiLinear`, or an embedding as the head, quantized or not, of x (..., width).

    On a CPU the layer is given float32, and its weights follow; quantized weights are unpacked where there
    are rows enough to pay for it. The dtype of what comes back is the layer's own.
    """
    apply = getattr(module, "as_linear", module)
    if mx.default_device().type == mx.DeviceType.gpu or x.dtype not in cpu.DTYPES:
        return cast(mx.array, apply(x))
    exact = x.astype(mx.float32)
    if "scales" in module and _rows(x) // math.prod(module.weight.shape[:-2]) >= _ROWS_TO_UNPACK:
        y = _unpacked_product(module, exact)
        y = y + module.bias if "bias" in module else y
    elif type(module) in _WEIGHTS and _rows(x) > cpu.FEW_ROWS and _one_product_each(exact, module.weight):
        y = cast(mx.array, _product(exact, module.weight, *([module.bias] if "bias" in module else [])))
    else:
        y = apply(exact)
    kept = module.get("scales", module.get("weight", x))
    return cast(mx.array, y.astype(mx.result_type(x, kept)))


def input_projection(module: Any, x: mx.array, heads: int, gates: int) -> mx.array:
    """`linear` for all gates of a cell: x (B, T, heads * width), each head of `module` on its part.

    Returns:
        (B, heads, T, gates, D / heads), a strided view: what `recurrence` reads as u.
    """
    B, T, _ = x.shape
    # One matrix product a head over all B * T rows; the result is read by strides, not transposed back. Of a
    # single row MLX would copy a strided view.
    rows = x.reshape(heads, 1, -1) if B * T == 1 else x.reshape(B * T, heads, -1).swapaxes(0, 1)
    return linear(module, rows).reshape(heads, B, T, gates, -1).swapaxes(0, 1)


_WEIGHTS = (nn.Linear, nn.Embedding, MultiLinear)  # whose product is with the transpose of their weight


def _one_product_each(x: mx.array, weight: mx.array) -> bool:
    """Whether each matrix of weight ([heads,] height, width) is multiplied with one matrix of x."""
    return weight.ndim == 2 or weight.shape[:-2] == x.shape[:-2]


@mx.custom_function
def _product(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
    """bias, of one number a column, is that of nn.Linear alone."""
    turned = weight.swapaxes(-1, -2)
    return mx.addmm(bias[0], x, turned) if bias else x @ turned


@_product.vjp
def _product_vjp(primals: tuple[mx.array, ...], slope: mx.array, _: Any) -> tuple[mx.array, ...]:
    """The weight's gradient lies as the weight does; MLX's own is transposed.

    Everything that an optimizer does to both then goes through memory in order, which on a CPU takes a third
    of the time.
    """
    x, weight, *bias = primals
    rows, slopes = (a.reshape(*weight.shape[:-2], -1, a.shape[-1]) for a in (x, slope))
    d_bias = [slope.reshape(-1, b.size).sum(axis=0).astype(b.dtype) for b in bias]
    return slope @ weight, (slopes.swapaxes(-1, -2) @ rows).astype(weight.dtype), *d_bias


def _unpacked_product(module: Any, x: mx.array) -> mx.array:
    """x (..., width) with the weight ([heads,] height, width); some of its rows are unpacked at a time."""
    scales, biases = module.scales, module.get("biases")
    if biases is not None:  # of the modes, only affine has them
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    *heads, height, _ = module.weight.shape
    rows = max(1, _UNPACKED_AT_ONCE // (math.prod(heads) * x.shape[-1]))
    products: list[mx.array] = []
    for begin in range(0, height, rows):
        here = slice(begin, begin + rows)
        packed = module.weight[..., here, :]
        if products:  # else MLX unpacks all before it multiplies
            (packed,) = mx.depends([packed], products[-1:])
        weight = mx.dequantize(
            packed,
            scales[..., here, :],
            None if biases is None else biases[..., here, :],
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            dtype=mx.float32,
        )
        products.append(x @ weight.swapaxes(-1, -2))
    return mx.concatenate(products, axis=-1)


def head(module: nn.Module, x: mx.array, *, backend: str = "ops") -> mx.array:
    """`linear` with the largest matrix of a model, or the transpose of an embedding, of x (B, T, width).

    On the backend "cpu" one token of few sequences at once; more stay lazy, since whoever reads a prompt for
    its state never asks for them.
    """
    few = is_plain(module) and x.shape[-2] == 1 and _rows(x) <= cpu.FEW_ROWS
    few = few and cpu.is_large(module.weight.size)
    # whether MLX traces the head's own weight was not asked when the call began
    if few and taken_by_cpu(backend, module.weight, x) and evaluation([module.weight, x]):
        (y,) = _product_cpu()(x, module.weight)
        return cast(mx.array, y)
    return linear(module, x)


def is_plain(module: nn.Module) -> bool:
    """Whether a head is a product with its weight and nothing else: not quantized, and without an adapter."""
    return type(module) in (nn.Linear, nn.Embedding) and "bias" not in module


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


@lru_cache(maxsize=1)
def _product_cpu() -> Callable[..., Any]:
    return with_derivatives_of(lambda x, weight: (x @ weight.T,), lambda *a: [cpu.product(*a)])
