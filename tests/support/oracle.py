"""The recurrence and Newton's iterates in NumPy, written apart from the library's solvers.

Cells run on their own `step` with NumPy's functions and dual numbers; golden data holds those to PyTorch.
Layout: u (B, T, gates, D), params (P, D), states (B, T, D) a slot.
"""

import numpy as np

from mlx_pararnn.cells.activations import Functions
from mlx_pararnn.cells.dual import Dual, DualFunctions

F = Functions(np)
DUAL_F = DualFunctions(F)


def sequential(cell, params, u, state=None, mask=None):
    """All states, one array (B, T, D) a slot, straight through time in the inputs' precision."""
    B, T, _, D = u.shape
    slots = len(cell.slots)
    state = tuple(np.zeros((slots, B, D), u.dtype) if state is None else state.swapaxes(0, 1))
    states = []
    for t in range(T):
        new = cell.step(state, _named(cell.gates, np.moveaxis(u[:, t], 1, 0)), _named(cell.params, params), F)
        if mask is not None:
            new = tuple(np.where(mask[:, t, None], n, s) for n, s in zip(new, state, strict=True))
        state = new
        states.append(state)
    return tuple(np.stack(slot, axis=1) for slot in zip(*states, strict=True))


def step_and_jacobian(cell, params, u, state):
    """step for all (..., D) at once: values, and J[i][j] = d slot i / d slot j; u (gates, ..., D)."""
    one, zero = np.ones_like(state[0]), np.zeros_like(state[0])
    seeds = tuple(
        Dual(s, tuple(one if i == j else zero for j in range(len(state)))) for i, s in enumerate(state)
    )
    gates = {k: Dual(v) for k, v in _named(cell.gates, u).items()}
    weights = {k: Dual(v) for k, v in _named(cell.params, params).items()}
    new = cell.step(seeds, gates, weights, DUAL_F)
    J = [
        [np.broadcast_to(t, one.shape) for t in s.tangents] if s.tangents else [zero] * len(state)
        for s in new
    ]
    return tuple(s.value for s in new), J


def apple_lstm_jacobian(cell, params, u, state, exact):
    """Apple's linearisation of the LSTM: the h row is taken at the iterate's own c_t, not at step's c'.

    `exact` is the exact Jacobian at the state before; `state` = (c_t, h_{t-1}) of the iterate.
    """
    c, h = state
    a_o, c_o = params[cell.params.index("a_o")], params[cell.params.index("c_o")]
    output, squash = (getattr(DUAL_F, cell.activations[place]) for place in ("o", "state"))
    one = np.ones_like(c)
    o = output(Dual(a_o * h + u[cell.gates.index("o")] + c_o * c, (one,)))
    s = squash(Dual(c, (one,)))
    do, ds = np.broadcast_to(o.tangents[0], c.shape), np.broadcast_to(s.tangents[0], c.shape)
    k = s.value * do * c_o + o.value * ds
    (Jcc, Jch), _ = exact
    return [[Jcc, Jch], [k * Jcc, k * Jch + s.value * do * a_o]]


def newton_iterates(cell, params, u, iterations, linearisation="exact"):
    """Newton's method on the whole sequence from step(0, u_t): hidden states after 1, 2, ... iterations."""
    slots = len(cell.slots)
    gates = np.moveaxis(u, 2, 0)
    zero = np.zeros_like(gates[0])
    states = cell.step((zero,) * slots, _named(cell.gates, gates), _named(cell.params, params), F)
    hidden = []
    for _ in range(iterations):
        before = tuple(np.concatenate([np.zeros_like(s[:, :1]), s[:, :-1]], axis=1) for s in states)
        after, J = step_and_jacobian(cell, params, gates, before)
        if linearisation == "apple" and cell.name == "lstm":
            J = apple_lstm_jacobian(cell, params, gates, (states[0], before[1]), J)
        states = _newton_update(states, after, J)
        hidden.append(states[cell.output_slot])
    return hidden


def chunked_iterates(cell, params, u, chunk, iterations, state=None, mask=None):
    """Newton's method on the boundaries of chunks: all states (B, T, D) a slot after exactly `iterations`.

    Chunk by chunk in Python: no scan, no padding, nothing in common with the library's version but the text
    of `step`.
    """
    B, T, _, D = u.shape
    slots = len(cell.slots)
    bounds = [(b, min(b + chunk, T)) for b in range(0, T, chunk)]
    zero = np.zeros((B, D), u.dtype)
    first = (zero,) * slots if state is None else tuple(state.swapaxes(0, 1))
    keep = np.ones((B, T), bool) if mask is None else mask
    guesses = [
        cell.step(
            (zero,) * slots,
            _named(cell.gates, np.moveaxis(u[:, b - 1], 1, 0)),
            _named(cell.params, params),
            F,
        )
        for b, _ in bounds[1:]
    ]
    starts = [first, *guesses]
    for _ in range(min(iterations, len(bounds) - 1)):
        delta = [zero] * slots
        new = [starts[0]]
        for c, (b, e) in enumerate(bounds[:-1]):
            end = starts[c]
            P = [[np.ones_like(zero) if i == j else zero for j in range(slots)] for i in range(slots)]
            for t in range(b, e):
                stepped, J = step_and_jacobian(cell, params, np.moveaxis(u[:, t], 1, 0), end)
                here = keep[:, t, None]
                end = tuple(np.where(here, n, s) for n, s in zip(stepped, end, strict=True))
                moved = [
                    [sum(J[i][k] * P[k][j] for k in range(slots)) for j in range(slots)] for i in range(slots)
                ]
                P = [[np.where(here, moved[i][j], P[i][j]) for j in range(slots)] for i in range(slots)]
            corrected = [end[i] + sum(P[i][j] * delta[j] for j in range(slots)) for i in range(slots)]
            corrected = [np.where(np.isfinite(m), m, s) for m, s in zip(corrected, end, strict=True)]
            delta = [m - s for m, s in zip(corrected, starts[c + 1], strict=True)]
            new.append(tuple(corrected))
        starts = new
    pieces = [
        sequential(cell, params, u[:, b:e], np.stack(s, axis=1), keep[:, b:e])
        for s, (b, e) in zip(starts, bounds, strict=True)
    ]
    return tuple(np.concatenate(slot, axis=1) for slot in zip(*pieces, strict=True))


def tiled_iterates(cell, params, u, tile, chunk, iterations, state=None, mask=None):
    """As `chunked_iterates`, tile after tile of `tile` steps, each starting from the last one's end."""
    pieces = []
    for t in range(0, u.shape[1], tile):
        here = None if mask is None else mask[:, t : t + tile]
        states = chunked_iterates(cell, params, u[:, t : t + tile], chunk, iterations, state, here)
        state = np.stack([s[:, -1] for s in states], axis=1)
        pieces.append(states)
    return tuple(np.concatenate(slot, axis=1) for slot in zip(*pieces, strict=True))


def _newton_update(states, after, J):
    slots, T = len(states), states[0].shape[1]
    delta = [np.zeros_like(states[0][:, 0])] * slots
    new = [np.empty_like(s) for s in states]
    for t in range(T):
        delta = [
            after[i][:, t] - states[i][:, t] + sum(J[i][j][:, t] * delta[j] for j in range(slots))
            for i in range(slots)
        ]
        for i in range(slots):
            new[i][:, t] = states[i][:, t] + delta[i]
    return tuple(new)


def _named(names, arrays):
    return dict(zip(names, arrays, strict=True))


def adjoint(cell, params, u, state, mask, g):
    """The gradients of params (P, D), u (B, T, gates, D) and state (B, slots, D), step by step backwards.

    g (B, T, slots, D): the loss's derivative by each state where it is handed out.
    """
    B, T, gates, D = u.shape
    slots = len(cell.slots)
    states = [state, *np.stack(sequential(cell, params, u, state, mask), axis=2).swapaxes(0, 1)]
    keep = np.ones((B, T), bool) if mask is None else mask
    d_params, d_u = np.zeros_like(params), np.zeros_like(u)
    lambdas = np.zeros_like(state)
    for t in reversed(range(T)):
        lambdas = lambdas + g[:, t]
        here = keep[:, t, None]
        inputs = [*states[t].swapaxes(0, 1), *np.moveaxis(u[:, t], 1, 0), *params]
        inputs = [np.broadcast_to(x, (B, D)) for x in inputs]
        zero, one = np.zeros((B, D), u.dtype), np.ones((B, D), u.dtype)
        duals = [
            Dual(x, tuple(one if i == j else zero for j in range(len(inputs)))) for i, x in enumerate(inputs)
        ]
        new = cell.step(
            tuple(duals[:slots]),
            _named(cell.gates, duals[slots : slots + gates]),
            _named(cell.params, duals[slots + gates :]),
            DUAL_F,
        )
        back = [
            sum(lambdas[:, s] * new[s].tangents[k] for s in range(slots) if new[s].tangents)
            for k in range(len(inputs))
        ]
        back = [np.where(here, d, 0) for d in back]
        d_u[:, t] = np.stack(back[slots : slots + gates], axis=1)
        d_params += np.stack([d.sum(axis=0) for d in back[slots + gates :]])
        lambdas = np.where(here[:, None], np.stack(back[:slots], axis=1), lambdas)
    return d_params, d_u, lambdas
