"""The recurrence in plain MLX ops: straight through time, or by Newton's method on chunk boundaries.

Newton here is multiple shooting. T steps are cut into N chunks of C. A guess is made of the state at each
chunk's start; one iteration runs every chunk from its guess, in parallel, together with its Jacobian P (chunk
end with respect to chunk start), and a parallel scan over the chunks

    delta_0 = 0,   delta_{c+1} = P_c delta_c + (end_c - start_{c+1}),   start'_{c+1} = end_c + P_c delta_c

corrects all starts at once. With C = 1 this is Newton's method on the whole sequence, the scheme of the
ParaRNN paper (arXiv 2510.21450, section 3): there the starts are the states themselves.

It always ends, with the answer of the sequential run: delta is zero for a chunk whose start is right, so each
iteration makes at least one more start right, bit for bit; a correction that is not finite is replaced by the
plain sweep start'_{c+1} = end_c. So N - 1 iterations suffice whatever the weights; two or three usually do.

Inside, arrays are laid out (B, heads, N, D/heads) for one time step of every chunk; the sequential run is
the case N = 1. Nothing here evaluates an array unless `eager` is set.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..cells import Cell
from ..cells.activations import Functions
from ..cells.dual import Dual, DualFunctions

F = Functions(mx)
DUAL_F = DualFunctions(F)

State = tuple[mx.array, ...]  # one array a slot

# Steps between two hand-overs of the graph to MLX, which computes them while Python builds the next ones.
_EVAL_EVERY = 32


class Solution(NamedTuple):
    """What a solver returns: all states in time order, and how Newton went."""

    states: State  # one array a slot, (B, heads, T, D/heads)
    iterations: int
    residual: mx.array | None  # largest |end_c - start_{c+1}|; None if not asked for


def sequential(
    cell: Cell, params: mx.array, u: mx.array, state: State, mask: mx.array | None, *, eager: bool
) -> Solution:
    """Run the recurrence one step after the other.

    Args:
        cell: the cell.
        params: (P, heads, D/heads) recurrent weight.
        u: (B, heads, T, gates, D/heads) input projection, float32.
        state: the initial state, (B, heads, D/heads) a slot.
        mask: (B, T), False where the state passes through unchanged; or None.
        eager: hand the graph over piece by piece; not allowed inside a transformation.
    """
    states = _run(
        cell, params, u[:, :, None], _chunked_mask(mask, 1), tuple(s[:, :, None] for s in state), eager
    )
    return Solution(_in_time_order(states), 0, None)


def newton(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: State,
    mask: mx.array | None,
    *,
    chunk: int,
    tol: float,
    max_iters: int | None,
    eager: bool,
    want_residual: bool,
) -> Solution:
    """Solve the recurrence by Newton's method on the boundaries of chunks of `chunk` steps.

    Stops when no start moved by more than tol * max(1, |start|), or after max_iters iterations; without
    max_iters the sequential answer is guaranteed. Unless `eager`, nothing can be compared with the tolerance
    and exactly min(max_iters, N - 1) iterations are made. Arguments and layout as for `sequential`.
    """
    T = u.shape[2]
    u, masks = _in_chunks(u, mask, chunk)
    n_chunks, chunk = u.shape[2:4]

    starts = _first_guess(cell, params, u, state)
    limit = n_chunks - 1 if max_iters is None else min(max_iters, n_chunks - 1)
    iterations = 0
    ends: State | None = None
    while iterations < limit:
        ends = _corrected_ends(cell, params, u, masks, starts)
        previous, starts = starts, _after(state, ends)
        iterations += 1
        if eager:
            _hand_over(ends)
            if iterations < limit and _settled(previous, starts, tol):
                break

    iterate = ends if chunk == 1 else None  # with one step a chunk, the corrected ends are all the states
    if iterate is None or want_residual:
        steps = _run(cell, params, u, masks, starts, eager)
    states = _in_time_order(steps) if iterate is None else iterate
    residual = _largest_gap(steps[-1], starts) if want_residual else None
    return Solution(tuple(s[:, :, :T] for s in states), iterations, residual)


def states_between(
    cell: Cell, params: mx.array, u: mx.array, starts: mx.array, mask: mx.array | None, *, chunk: int
) -> mx.array:
    """All states (slots, B, heads, T, D/heads), all chunks at once, each run from its start.

    Args:
        cell, params, u, mask: as for `sequential`.
        starts: (B, N, slots, D), the state before each chunk; what is after the last chunk's is ignored.
        chunk: steps of a chunk.
    """
    B, heads, T, _, width = u.shape
    u, masks = _in_chunks(u, mask, chunk)
    by_slot = starts[:, : u.shape[2]].reshape(B, u.shape[2], -1, heads, width).transpose(2, 0, 3, 1, 4)
    steps = _run(cell, params, u, masks, unstack(by_slot), False)
    return mx.stack([*_in_time_order(steps)])[:, :, :, :T]


def step(cell: Cell, params: mx.array, u: mx.array, state: State) -> State:
    """One time step.

    params (P, heads, D/heads), u (B, heads, gates, D/heads), state (B, heads, D/heads) a slot.
    """
    return _compiled_step(cell)(params, u, *state)


def masked_step(cell: Cell, params: mx.array, u: mx.array, mask: mx.array | None, state: State) -> State:
    """One time step where `mask` is True; the state as it was elsewhere."""
    new = step(cell, params, u, state)
    if mask is None:
        return new
    return tuple(mx.where(mask, n, s) for n, s in zip(new, state, strict=True))


def step_jacobian(cell: Cell, params: mx.array, u: mx.array, mask: mx.array | None, state: State) -> mx.array:
    """The Jacobian of `masked_step`, (slots, slots, ...) in the layout of `state`."""
    return _jacobian(_dual_step(cell, params, u, mask, _seeded(state)))


def biased(u: mx.array, bias: mx.array) -> mx.array:
    """u + bias, of u (B, heads, T, gates, D / heads) and bias (heads, gates * D / heads), in u's layout."""
    _, heads, _, gates, width = u.shape
    return (u.swapaxes(0, 1) + bias.reshape(heads, 1, 1, gates, width)).swapaxes(0, 1)


def laid_out(
    params: mx.array, u: mx.array, state: mx.array, mask: mx.array | None
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The arguments in float32 and in the layout of this file."""
    B, heads, _, _, width = u.shape
    u = u.astype(mx.float32)
    if mask is not None:
        u = mx.where(mask[:, None, :, None, None], u, 0)  # what stands in padding, NaN too, has no gradient
    return (
        params.astype(mx.float32).reshape(-1, heads, width),
        u,
        state.astype(mx.float32).reshape(B, -1, heads, width),
        mx.zeros((B, 0)) if mask is None else mask,
    )


def outputs(
    cell: Cell, states: mx.array, mask: mx.array | None, every: int, dtype: mx.Dtype
) -> tuple[mx.array, ...]:
    """hidden (B, T, D), last state (B, slots, D) and, if `every` n > 0, states (B, T // n, slots, D)."""
    slots, B, heads, T, width = states.shape
    D = heads * width
    hidden = states[cell.output_slot].swapaxes(1, 2).reshape(B, T, D)
    if mask is not None:
        hidden = mx.where(mask[..., None], hidden, 0.0)
    # gathered where there are many: a view of the last step would keep the memory of all
    last = states if T == 1 else states[:, :, :, mx.array([T - 1])]
    last = last.swapaxes(0, 1).reshape(B, slots, D)
    if not every:
        return hidden.astype(dtype), last
    every_nth = states[:, :, :, every - 1 :: every].transpose(1, 3, 0, 2, 4)
    return hidden.astype(dtype), last, every_nth.reshape(B, T // every, slots, D)


def unstack(states: mx.array) -> State:
    """(slots, ...) -> one array a slot. By index: iterating makes a split, which can break mx.compile."""
    return tuple(states[i] for i in range(states.shape[0]))


def linear_scan(P: mx.array, r: mx.array) -> mx.array:
    """x_c = P_c x_{c-1} + r_c with x_{-1} = 0, for all c at once, in log2(N) rounds (Hillis and Steele).

    Args:
        P: (slots, slots, ..., N, W).
        r: (slots, ..., N, W).

    Returns:
        x like r.
    """
    n = r.shape[-2]
    shift = 1
    while shift < n:
        later = P[..., shift:, :]
        r = mx.concatenate(
            [r[..., :shift, :], r[..., shift:, :] + _apply(later, r[..., :-shift, :])], axis=-2
        )
        if 2 * shift < n:
            P = mx.concatenate([P[..., :shift, :], _compose(later, P[..., :-shift, :])], axis=-2)
        shift *= 2
    return r


def _in_chunks(u: mx.array, mask: mx.array | None, chunk: int) -> tuple[mx.array, list[mx.array] | None]:
    """u (B, heads, N, C, gates, D/heads), and the mask as `_chunked_mask` gives it."""
    B, heads, T, gates, width = u.shape
    chunk = min(chunk, T)
    n_chunks = -(-T // chunk)
    padding = n_chunks * chunk - T  # steps past the end: nothing comes after them, so their values are idle
    if padding:
        u = mx.pad(u, [(0, 0), (0, 0), (0, padding), (0, 0), (0, 0)])
        mask = mask if mask is None else mx.pad(mask, [(0, 0), (0, padding)])
    return u.reshape(B, heads, n_chunks, chunk, gates, width), _chunked_mask(mask, n_chunks)


def _apply(P: mx.array, x: mx.array) -> mx.array:
    """P x over the slots."""
    return P[0] * x if len(x) == 1 else (P * x[None]).sum(axis=1)


def _compose(P: mx.array, Q: mx.array) -> mx.array:
    """P Q over the slots."""
    return P * Q if len(P) == 1 else (P[:, :, None] * Q[None]).sum(axis=1)


def _first_guess(cell: Cell, params: mx.array, u: mx.array, state: State) -> State:
    """The paper's: each chunk starts from step(0, u) of the step before it."""
    zero = mx.zeros((*u.shape[:3], u.shape[-1]))
    return _after(state, step(cell, params[:, :, None], u[:, :, :, -1], (zero,) * len(state)))


def _after(state: State, ends: State) -> State:
    """The chunks' starts, given the chunks' ends."""
    return tuple(
        mx.concatenate([s[:, :, None], e[:, :, :-1]], axis=2) for s, e in zip(state, ends, strict=True)
    )


def _corrected_ends(
    cell: Cell, params: mx.array, u: mx.array, masks: list[mx.array] | None, starts: State
) -> State:
    """One Newton iteration: end_c + P_c delta_c for every chunk c."""
    params = params[:, :, None]
    values, tangents = starts, _seeded(starts)
    for j in range(u.shape[3]):
        u_j, mask_j = u[:, :, :, j], None if masks is None else masks[j]
        duals = tuple(Dual(v, t.tangents) for v, t in zip(values, tangents, strict=True))
        tangents = _dual_step(cell, params, u_j, mask_j, duals)
        # The values come from the step that `_run` takes: two compilations of one formula may round
        # differently (fused multiply-add), and then a start that is right would never equal its end.
        values = masked_step(cell, params, u_j, mask_j, values)
    P = _jacobian(tangents)
    end, start = mx.stack([*values]), mx.stack([*starts])
    gap = end[..., :-1, :] - start[..., 1:, :]
    no_padding = [(0, 0)] * (gap.ndim - 2)
    delta = mx.pad(linear_scan(P[..., :-1, :], gap), [*no_padding, (1, 0), (0, 0)])
    correction = _apply(P, delta)
    return unstack(mx.where(mx.isfinite(correction), end + correction, end))


def _settled(before: State, after: State, tol: float) -> bool:
    """True if no start moved by more than the tolerance; a channel that stays NaN has settled too."""
    old, new = mx.stack([*before]), mx.stack([*after])
    small = mx.abs(new - old) <= tol * mx.maximum(1.0, mx.abs(new))
    return bool((small | (new == old) | (mx.isnan(new) & mx.isnan(old))).all().item())


def _largest_gap(ends: State, starts: State) -> mx.array:
    gap = mx.abs(mx.stack([*ends])[..., :-1, :] - mx.stack([*starts])[..., 1:, :])
    return gap.max() if gap.size else mx.array(0.0)


def _run(
    cell: Cell, params: mx.array, u: mx.array, masks: list[mx.array] | None, state: State, eager: bool
) -> list[State]:
    """All chunks through time: the states (B, heads, N, D/heads) after each of the C steps."""
    params = params[:, :, None]
    states = []
    for j in range(u.shape[3]):
        state = masked_step(cell, params, u[:, :, :, j], None if masks is None else masks[j], state)
        states.append(state)
        if eager and (j + 1) % _EVAL_EVERY == 0:
            _hand_over(state)
    return states


def _hand_over(state: State) -> None:
    """Let MLX compute what has been built so far; under mx.grad it can only do so while Python waits."""
    try:
        mx.async_eval(state)
    except ValueError:
        mx.eval(state)


def _in_time_order(states: Sequence[State]) -> State:
    """C states (B, heads, N, W) a slot -> (B, heads, N * C, W) a slot."""
    if len(states) == 1:
        return states[0]
    return tuple(mx.stack([*slot], axis=3).flatten(2, 3) for slot in zip(*states, strict=True))


def _chunked_mask(mask: mx.array | None, n_chunks: int) -> list[mx.array] | None:
    """(B, N * C) -> for each of the C steps (B, 1, N, 1)."""
    if mask is None:
        return None
    mask = mask.reshape(mask.shape[0], 1, n_chunks, -1, 1)
    return [mask[:, :, :, j] for j in range(mask.shape[3])]


def _dual_step(
    cell: Cell, params: mx.array, u: mx.array, mask: mx.array | None, state: tuple[Dual, ...]
) -> tuple[Dual, ...]:
    gates = {gate: Dual(u[..., i, :]) for i, gate in enumerate(cell.gates)}
    weights = {name: Dual(params[i]) for i, name in enumerate(cell.params)}
    new = cell.step(state, gates, weights, DUAL_F)
    if mask is None:
        return new
    return tuple(DUAL_F.where(mask, n, s) for n, s in zip(new, state, strict=True))


def _seeded(state: State) -> tuple[Dual, ...]:
    """`state` with the unit tangents: direction j is slot j."""
    one = mx.ones_like(state[0])
    zero = mx.zeros_like(one)
    return tuple(
        Dual(s, tuple(one if i == j else zero for j in range(len(state)))) for i, s in enumerate(state)
    )


def _jacobian(state: tuple[Dual, ...]) -> mx.array:
    zero = mx.zeros_like(state[0].value)
    rows = [s.tangents or (zero,) * len(state) for s in state]  # a slot may not depend on the state at all
    return mx.stack([mx.stack([*row]) for row in rows])


@lru_cache(maxsize=64)
def _compiled_step(cell: Cell) -> Callable[..., State]:
    def one_step(params: mx.array, u: mx.array, *state: mx.array) -> State:
        gates = {gate: u[..., i, :] for i, gate in enumerate(cell.gates)}
        weights = {name: params[i] for i, name in enumerate(cell.params)}
        return tuple(cell.step(state, gates, weights, F))

    return mx.compile(one_step)
