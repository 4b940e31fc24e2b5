"""Adjoint on the CPU backend: metal/cpu_adjoint.cpp, compiled for a cell and called; at once, as cpu.py."""

import ctypes
from functools import lru_cache

import mlx.core as mx

from ..cells import Cell
from .cpu import DTYPES, address, in_lines, is_large, room, view
from .cpu_build import build, invoke
from .cpu_cores import threads
from .freed_memory import keep_freed_memory
from .texts import cpu_adjoint_text, for_dtype, plain_name


class Adjoint(ctypes.Structure):
    """struct Adjoint of metal/cpu_adjoint.cpp."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("u", "params", "initial", "mask", "boundaries")),
        *((n, ctypes.c_void_p) for n in ("d_hidden", "d_last", "d_states")),
        *((n, ctypes.c_void_p) for n in ("d_u", "d_params", "d_initial", "sums")),
        *((n, ctypes.c_int64 * 4) for n in ("u_strides", "d_u_strides")),
        ("d_hidden_strides", ctypes.c_int64 * 2),
        *((n, ctypes.c_int64) for n in ("B", "heads", "T", "W", "every", "tile")),
        ("threads", ctypes.c_int),
    )


@lru_cache(maxsize=64)
def load(cell: Cell, dtype: str) -> ctypes.CDLL:
    """The cell's library for a dtype; raises BuildError, and PararnnError for a cell without MSL."""
    keep_freed_memory()
    return build(for_dtype(cpu_adjoint_text(cell), dtype), f"adjoint-{plain_name(cell)}-{dtype}", (Adjoint,))


def solve(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: mx.array,
    mask: mx.array | None,
    boundaries: mx.array,
    d_hidden: mx.array,
    d_last: mx.array,
    d_states: mx.array | None,
    every: int,
    tile: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """`adjoint.adjoint` at once; `tile` steps stand between two boundaries."""
    B, heads, T, _, W = u.shape
    D, slots, P = heads * W, len(cell.slots), len(cell.params)
    u, d_hidden = in_lines(u), in_lines(d_hidden.astype(u.dtype))
    read, slope = view(u), view(d_hidden)
    # d_u lies as u does, so that whoever made u a view takes its gradient without a copy
    axes = sorted(range(4), key=lambda axis: -read.strides[axis])
    lying = room((*(u.shape[axis] for axis in axes), W), u.dtype)
    d_u = lying.transpose(*(axes.index(axis) for axis in range(4)), 4)
    d_params, d_state = room((P, D), mx.float32), room((B, slots, D), mx.float32)
    sums = room((B, P, D), mx.float32)
    params, state, boundaries, d_last = (
        mx.contiguous(array.astype(mx.float32)) for array in (params, state, boundaries, d_last)
    )
    optional = [
        None if array is None or not array.size else mx.contiguous(array)
        for array in (mask, boundaries, d_states)
    ]
    mx.eval(params, state, d_last, d_u, d_params, d_state, sums, *(a for a in optional if a is not None))
    kept, starts, d_kept = (None if array is None else address(array) for array in optional)
    written = view(d_u)
    call = Adjoint(
        read.ctypes.data,
        address(params),
        address(state),
        kept,
        starts,
        slope.ctypes.data,
        address(d_last),
        d_kept,
        written.ctypes.data,
        address(d_params),
        address(d_state),
        address(sums),
        (ctypes.c_int64 * 4)(*(stride // read.itemsize for stride in read.strides[:4])),
        (ctypes.c_int64 * 4)(*(stride // written.itemsize for stride in written.strides[:4])),
        (ctypes.c_int64 * 2)(*(stride // slope.itemsize for stride in slope.strides[:2])),
        B,
        heads,
        T,
        W,
        every,
        tile,
        threads() if is_large(u.size) else 1,
    )
    dtype = DTYPES[u.dtype]
    invoke(getattr(load(cell, dtype), f"pararnn_adjoint_{dtype}"), ctypes.byref(call))
    return d_params, d_u, d_state
