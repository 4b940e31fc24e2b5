"""The gradient of the recurrence: a linear recurrence backwards in time (the ParaRNN paper, section 3.3).

With s_t = step(s_{t-1}, u_t; w) solved, let g_t be the loss's derivative with respect to s_t where it is
handed out (hidden, last state, every n-th state), and J_t = d step(s_{t-1}, u_t; w) / d s_{t-1}. Then

    lambda_T = g_T,   lambda_t = g_t + J_{t+1}^T lambda_{t+1}
    d_u_t = (d step / d u_t)^T lambda_t,   d_w = sum_t (d step / d w)^T lambda_t,   d_s_0 = J_1^T lambda_1

It does not go through the solver, so every method and backend has the same, exact gradient. Where a step is
masked, s_t = s_{t-1}: J_t is the identity, and u_t and w have no part in it.

`adjoint` is the one entry, for every backend. A kernel for it has the signature

    launch(cell, params, u, state, mask, boundaries, d_hidden, d_last, d_states, every, tile[, bias])
        -> d_params, d_u, d_state[, d_bias]

with the shapes and dtypes of `adjoint`, and is returned by `_launch_of`. It gets the states at the boundaries
of tiles and computes those between again, a tile at a time, so that memory never holds the state of every
step. It may return as soon as the work is recorded, and needs no derivatives of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..cells import Cell
from . import cpu, cpu_adjoint, gpu, gpu_adjoint
from .choice import evaluation, works_here
from .newton import (
    biased,
    laid_out,
    linear_scan,
    masked_step,
    outputs,
    states_between,
    step_jacobian,
    unstack,
)
from .texts import has_kernel

_TILE = 64


def tile_of(backend: str) -> int:
    """Steps between two boundaries. A GPU's are chunks, each of which starts from its own."""
    return gpu.CHUNK if backend in ("metal", "cuda") else _TILE


def adjoint(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: mx.array,
    mask: mx.array | None,
    boundaries: mx.array,
    d_hidden: mx.array,
    d_last: mx.array,
    d_states: mx.array | None = None,
    *,
    bias: mx.array | None = None,
    every: int = 0,
    backend: str,
) -> tuple[mx.array, ...]:
    """The gradients of params, u, state and bias, given those of what `recurrence` returned.

    Args:
        cell: the cell.
        params: (P, D), float32.
        u: (B, heads, T, gates, D / heads), float32, float16 or bfloat16; a strided view is fine.
        state: (B, slots, D), float32, the state before the first step.
        mask: (B, T), bool; None if all steps are real.
        boundaries: (B, T // n, slots, D), float32, the state after every n-th step, n = `tile_of(backend)`.
        d_hidden: (B, T, D), u's dtype.
        d_last: (B, slots, D), float32.
        d_states: (B, T // every, slots, D), float32, where every > 0; else None.
        bias: (heads, gates * D / heads) in u's dtype, which the forward added to u; row contiguous.
        every: the states that were returned are those after every so many steps; 0 for none.
        backend: "metal", "cuda" or "cpu", where there is a kernel for it, else ops.

    Returns:
        d_params (P, D), float32; d_u as u, in its dtype; d_state (B, slots, D), float32; if there is a bias,
        d_bias as bias.
    """
    given = [params, u, state, mx.zeros((u.shape[0], 0)) if mask is None else mask, boundaries]
    given += [d_hidden, d_last] if d_states is None else [d_hidden, d_last, d_states]
    given += [] if bias is None else [bias]
    masked, tile, shifted = mask is not None, tile_of(backend), bias is not None
    launch = _launch_of(cell, backend, given, masked, every > 0)
    if launch is None:
        return _in_ops(cell, masked, every, tile, *given, shifted=shifted)
    return tuple(_differentiable(cell, launch, masked, every, tile, shifted)(*given))


Launch = Callable[..., Sequence[mx.array]]


def _launch_of(
    cell: Cell, backend: str, given: Sequence[mx.array], masked: bool, states: bool
) -> Launch | None:
    """The backend's kernel, where it has one, may run it on these arrays and is right; None for ops."""
    if not has_kernel(cell):
        return None
    if backend == "cpu":
        works = evaluation(given) and _agrees(cell, "cpu", cpu_adjoint.solve, given[1].dtype)
        return cpu_adjoint.solve if works else None
    if backend in ("metal", "cuda"):
        u = given[1]
        B, heads, _, _, W = u.shape
        tiling = gpu.tiling_for(B, heads * W)
        works = gradient_works(cell, backend, u.dtype, tiling, masked=masked, states=states)
        return gpu_adjoint.solver(backend, tiling) if works else None
    return None


def gradient_works(
    cell: Cell, backend: str, dtype: mx.Dtype, tiling: str, *, masked: bool = False, states: bool = False
) -> bool:
    """Try the gradient's kernel on a GPU, once a process; arguments as of `recurrence.kernel_works`."""
    launch = gpu_adjoint.solver(backend, tiling)
    return _agrees(cell, backend, launch, dtype, tiling, masked, states)


@lru_cache(maxsize=256)
def _agrees(
    cell: Cell,
    backend: str,
    launch: Launch,
    dtype: mx.Dtype = mx.float32,
    tiling: str = "wide",
    masked: bool = True,
    states: bool = True,
) -> bool:
    """Try a kernel on a small problem of more than one tile, once a process: `choice.works_here`.

    On a GPU it is the text and the threadgroup that a call is about to launch; the CPU's has them all.
    """
    B, heads, T, width, every = 2, 2, gpu.tile_steps(tiling) + 22, 21, 7 if states else 0
    slots, D = len(cell.slots), heads * width

    def waves(*shape: int) -> mx.array:
        return mx.sin(mx.arange(math.prod(shape))).reshape(shape)

    params = 0.3 * waves(len(cell.params), D)
    u = waves(B, heads, T, len(cell.gates), width).astype(dtype)
    mask = mx.arange(T) < mx.array([[T], [T - 20]]) if masked else None
    state = mx.zeros((B, slots, D))
    bias = [] if backend == "cpu" else [(0.1 * waves(heads, len(cell.gates) * width)).astype(dtype)]
    shifted = biased(u.astype(mx.float32), bias[0].astype(mx.float32)) if bias else u
    starts = states_between(cell, *laid_out(params, shifted, state, mask)[:2], state[:, None], mask, chunk=T)
    tile = tile_of(backend)
    boundaries = outputs(cell, starts, mask, tile, mx.float32)[2]
    slopes = [waves(B, T, D).astype(dtype), waves(B, slots, D)]
    slopes += [waves(B, T // every, slots, D)] if states else []
    given = [params, u, state, mx.zeros((B, 0)) if mask is None else mask, boundaries, *slopes]

    def outcomes() -> Iterator[tuple[Sequence[mx.array], Sequence[mx.array]]]:
        slots_of = [] if states else [None]
        made = launch(cell, *given[:3], mask, *given[4:], *slots_of, every, tile, *bias)
        yield made, _in_ops(cell, masked, every, tile, *given, *bias, shifted=bool(bias))

    words = [cpu.DTYPES[dtype]]
    if backend != "cpu":
        words.append(tiling)
        words += [word for word, there in (("masked", masked), ("states", states)) if there]
    return works_here(", ".join([f"the gradient of {cell.name!r}", *words]), backend, outcomes)


@lru_cache(maxsize=256)
def _differentiable(
    cell: Cell, launch: Launch, masked: bool, every: int, tile: int, shifted: bool
) -> Callable[..., Any]:
    """`launch` with the derivatives of `_in_ops`: a second derivative goes through ops."""

    @mx.custom_function
    def solve(*given: mx.array) -> list[mx.array]:
        params, u, state, mask, *rest = given
        bias = [rest.pop()] if shifted else []
        cotangents = rest if every else [*rest, None]
        steps = mask if masked else None
        return [*launch(cell, params, u, state, steps, *cotangents, every, tile, *bias)]

    def in_ops(*given: mx.array) -> list[mx.array]:
        return [*_in_ops(cell, masked, every, tile, *given, shifted=shifted)]

    @solve.vjp
    def solve_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], _: object
    ) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(in_ops, [*primals], [*cotangents])[1])

    @solve.jvp
    def solve_jvp(
        primals: tuple[mx.array, ...], tangents: tuple[mx.array | None, ...]
    ) -> tuple[mx.array, ...]:
        return directional(in_ops, primals, tangents)

    return solve


def directional(
    function: Callable[..., Sequence[mx.array]],
    primals: Sequence[mx.array],
    tangents: Sequence[mx.array | None],
) -> tuple[mx.array, ...]:
    """The Jacobian-vector product of `function` as `mx.custom_function.jvp` has it: a tangent may be None."""
    given = [mx.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)]
    return tuple(mx.jvp(lambda *arrays: [*function(*arrays)], [*primals], given)[1])


def _in_ops(
    cell: Cell,
    masked: bool,
    every: int,
    tile: int,
    params: mx.array,
    u: mx.array,
    state: mx.array,
    mask: mx.array,
    boundaries: mx.array,
    *cotangents: mx.array,
    shifted: bool = False,
) -> tuple[mx.array, ...]:
    """`adjoint` in plain MLX, the reference: all states at once, then `states_adjoint`.

    Of the cotangents the last is the bias if `shifted`.
    """
    steps = mask if masked else None
    given_u = u
    if shifted:
        bias, cotangents = cotangents[-1], cotangents[:-1]
        u = biased(u.astype(mx.float32), bias.astype(mx.float32))
    laid = laid_out(params, u, state, steps)
    starts = mx.concatenate([state[:, None], boundaries], axis=1)
    states = states_between(cell, *laid[:2], starts, steps, chunk=tile)
    _, (g,) = mx.vjp(lambda s: [*outputs(cell, s, steps, every, given_u.dtype)], [states], [*cotangents])
    d_params, d_u, d_state = states_adjoint(cell, *laid[:3], steps, states, g)
    gradients = d_params.reshape(params.shape), d_u.astype(given_u.dtype), d_state.reshape(state.shape)
    return (*gradients, d_u.sum(axis=(0, 2)).reshape(bias.shape).astype(bias.dtype)) if shifted else gradients


def states_adjoint(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: mx.array,
    mask: mx.array | None,
    states: mx.array,
    g: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradients of params, u and state, given all states and g, the loss's derivative for each.

    Jacobians of all steps at once, lambda by a parallel scan over reversed time, then one vector-Jacobian
    product of all steps.

    Args:
        params: (P, heads, W).
        u: (B, heads, T, gates, W), float32.
        state: (B, slots, heads, W).
        mask: (B, T) or None.
        states, g: (slots, B, heads, T, W).
    """
    before = mx.concatenate([state.swapaxes(0, 1)[:, :, :, None], states[:, :, :, :-1]], axis=3)
    slots = unstack(before)
    keep = None if mask is None else mask[:, None, :, None]
    weights = params[:, :, None]

    JT = step_jacobian(cell, weights, u, keep, slots).swapaxes(0, 1)
    later = mx.concatenate([JT[..., 1:, :], mx.zeros_like(JT[..., :1, :])], axis=-2)
    lambdas = linear_scan(later[..., ::-1, :], g[..., ::-1, :])[..., ::-1, :]

    def all_steps(weights: mx.array, u: mx.array, *before: mx.array) -> list[mx.array]:
        return [*masked_step(cell, weights, u, keep, before)]

    _, (d_weights, d_u, *d_before) = mx.vjp(all_steps, [weights, u, *slots], [*unstack(lambdas)])
    d_state = mx.stack([d[:, :, 0] for d in d_before], axis=1)
    return d_weights[:, :, 0], d_u, d_state
