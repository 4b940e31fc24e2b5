"""What each operation of MIL computes, in NumPy: functions of its arguments, by MIL's names.

Arithmetic is done in the array type that comes in, float32 or float64; interpreter.py rounds what comes out.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def erf(x):
    return np.frompyfunc(math.erf, 1, 1)(x).astype(x.dtype)


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def gelu(x, mode="EXACT"):
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise NotImplementedError(f"gelu with mode {mode}")


def linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    """x (N, C, *space), weight (C_out, C / groups, *kernel)."""
    rank = x.ndim - 2
    if any(n != 1 for n in (*(strides or ()), *(dilations or ()))) or pad_type not in ("valid", "custom"):
        raise NotImplementedError(f"conv with pad_type {pad_type}, strides {strides}, dilations {dilations}")
    if pad_type == "custom":
        x = np.pad(x, [(0, 0), (0, 0), *zip(pad[::2], pad[1::2], strict=True)])
    kernel = weight.shape[2:]
    space = [n - k + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    y: Any = 0
    for place in np.ndindex(*kernel):
        window = x[(..., *(slice(i, i + n) for i, n in zip(place, space, strict=True)))]
        window = window.reshape(*window.shape[:3], -1)  # (N, groups, in, all places)
        tap = weight[(..., *place)]  # (groups, out, in)
        y = y + (tap * window if tap.shape[1:] == (1, 1) else tap @ window)
    y = y.reshape(y.shape[0], -1, *space)
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def layer_norm(x, axes, gamma=None, beta=None, epsilon=1e-5):
    centred = x - x.mean(axes, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + epsilon)
    shape = [n if i in {a % x.ndim for a in axes} else 1 for i, n in enumerate(x.shape)]
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def reduced(reduce):
    def op(x, axes=None, keep_dims=False):
        return reduce(x, axis=axes, keepdims=keep_dims)

    return op


def reduce_arg(reduce):
    def op(x, axis=-1, keep_dims=False, output_dtype="int32"):
        return reduce(x, axis=axis, keepdims=keep_dims)

    return op


def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    if batch_dims:
        raise NotImplementedError(f"gather with batch_dims {batch_dims}")
    if indices.min() < 0 or indices.max() >= x.shape[axis]:
        raise IndexError(f"gather: an index of {indices.tolist()} is outside 0..{x.shape[axis] - 1}")
    return x.take(indices, axis)


def gather_along_axis(x, indices, axis=0, validate_indices=False):
    if indices.min() < 0 or indices.max() >= x.shape[axis]:
        raise IndexError(f"gather_along_axis: an index is outside 0..{x.shape[axis] - 1}")
    return np.take_along_axis(x, indices, axis)


def split(x, axis, num_splits=None, split_sizes=None):
    if split_sizes is None:
        return np.split(x, num_splits, axis)
    return np.split(x, np.cumsum(split_sizes)[:-1], axis)


def slice_by_size(x, begin, size):
    return x[tuple(slice(b, None if n == -1 else b + n) for b, n in zip(begin, size, strict=True))]


def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    none = (False,) * x.ndim
    which = zip(
        begin,
        end,
        stride or (1,) * x.ndim,
        begin_mask or none,
        end_mask or none,
        squeeze_mask or none,
        strict=True,
    )
    return x[
        tuple(
            b if squeeze else slice(None if open_b else b, None if open_e else e, s)
            for b, e, s, open_b, open_e, squeeze in which
        )
    ]


def pad(x, pad, mode="constant", constant_val=0):
    if mode != "constant":
        raise NotImplementedError(f"pad with mode {mode}")
    sides = list(zip(pad[::2], pad[1::2], strict=True))
    return np.pad(x, [(0, 0)] * (x.ndim - len(sides)) + sides, constant_values=constant_val)


def cumsum(x, axis=0, exclusive=False, reverse=False):
    if exclusive or reverse:
        raise NotImplementedError("cumsum, exclusive or reverse")
    return x.cumsum(axis)


def topk(x, k=1, axis=-1, ascending=False, sort=True, return_indices=True, output_indices_dtype="int32"):
    order = np.argsort(x if ascending else -x, axis, kind="stable").take(range(k), axis)
    return [np.take_along_axis(x, order, axis), order]


def cast(x, dtype):
    return np.trunc(x) if "int" in dtype and x.dtype.kind == "f" else x


OPS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "cast": cast,
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "concat": lambda values, axis, interleave=False: np.concatenate(values, axis),
    "conv": conv,
    "cumsum": cumsum,
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
    "equal": lambda x, y: x == y,
    "erf": erf,
    "exp": lambda x: np.exp(x),
    "expand_dims": lambda x, axes: np.expand_dims(x, axes),
    "floor": lambda x: np.floor(x),
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "layer_norm": layer_norm,
    "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear": linear,
    "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "logical_or": lambda x, y: x | y,
    "matmul": matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pad": pad,
    "pow": lambda x, y: np.power(x, y),
    "real_div": lambda x, y: x / y,
    "reduce_argmax": reduce_arg(np.argmax),
    "reduce_l2_norm": reduced(lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims))),
    "reduce_max": reduced(np.max),
    "reduce_mean": reduced(np.mean),
    "reduce_min": reduced(np.min),
    "reduce_sum": reduced(np.sum),
    "relu": lambda x: np.maximum(x, 0),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "select": lambda cond, a, b: np.where(cond, a, b),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "sign": lambda x: np.sign(x),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "softmax": softmax,
    "softplus": softplus,
    "split": split,
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: x * x,
    "squeeze": lambda x, axes=None: np.squeeze(x, axes),
    "stack": lambda values, axis: np.stack(values, axis),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "tile": lambda x, reps: np.tile(x, reps),
    "topk": topk,
    "transpose": lambda x, perm: x.transpose(perm),
}
# What these return was in an argument: nothing to round.
MOVES = {
    *("concat", "expand_dims", "gather", "gather_along_axis", "identity", "reshape", "slice_by_index"),
    *("slice_by_size", "split", "squeeze", "stack", "tile", "transpose"),
}
# Arguments that are data; the others say what to do and become plain Python values.
DATA = {"x", "y", "a", "b", "cond", "values", "indices", "weight", "bias", "gamma", "beta", "constant_val"}
