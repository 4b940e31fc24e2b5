"""Adjoint on a GPU: metal/adjoint.metal, launched."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from ..cells import Cell
from . import gpu


@lru_cache(maxsize=8)
def solver(backend: str, tiling: str) -> Callable[..., tuple[mx.array, ...]]:
    """`adjoint.adjoint` on "metal" or "cuda" in one of `gpu.SHAPES`; for the same two the same function."""
    return partial(_solve, backend, tiling)


def _solve(
    backend: str,
    tiling: str,
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
    bias: mx.array | None = None,
) -> tuple[mx.array, ...]:
    masked = mask is not None
    launch = gpu.adjoint_launch(cell, u.shape, u.dtype, masked=masked, every=every, tiling=tiling)
    assert tile == gpu.CHUNK, "the kernel's chunks start at boundaries"
    if not boundaries.size:  # an empty array has no memory that could be handed over; it is not read
        boundaries = state[:, None]
    _, heads, _, gates, W = u.shape
    shift = mx.zeros((heads, gates * W), u.dtype) if bias is None else bias
    arrays: dict[str, Any] = {"u": u, "bias": shift, "d_hidden": d_hidden.astype(u.dtype)}
    whole = {"params": params, "initial": state, "boundaries": boundaries, "d_last": d_last}
    if every:
        if d_states is None or not d_states.size:
            d_states = d_last[:, None]
        whole["d_states"], arrays["every"] = d_states, mx.array([every], mx.int32)
    arrays |= {name: mx.contiguous(array.astype(mx.float32)) for name, array in whole.items()}
    if mask is not None:
        arrays["mask"] = mx.contiguous(mask)
    outputs = gpu.run(launch, arrays, backend)
    # heads outermost in memory, as u's projection left it: its own gradient then takes d_u without a copy
    gradients = outputs["d_params"].sum(axis=(0, 1)), outputs["d_u"].swapaxes(0, 1), outputs["d_initial"]
    return gradients if bias is None else (*gradients, outputs["d_bias"].sum(axis=(0, 1)).astype(bias.dtype))
