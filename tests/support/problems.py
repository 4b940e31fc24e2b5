"""Random inputs for the recurrence, its call, and a loss of all that it returns."""

import mlx.core as mx
import numpy as np

from mlx_pararnn import get_cell
from mlx_pararnn.compute.recurrence import recurrence

# The gate that keeps the old state when its input is large (gru: when it is small).
KEEPING_GATE = {"gru": ("z", -1), "lstm": ("f", 1), "nlru": ("a", 1), "slstm": ("f", 1)}


def problem(name, T=40, D=6, B=2, heads=1, scale=0.5, seed=0, state=False, memory=0.0):
    """cell, params (P, D), u (B, heads, T, gates, D / heads), state (B, slots, D) or None; NumPy float32.

    `memory` shifts the gate that keeps the state: the higher, the further a wrong start is felt.
    """
    cell = get_cell(name)
    rng = np.random.default_rng(seed)
    params = scale * rng.normal(size=(len(cell.params), D))
    u = rng.normal(size=(B, heads, T, len(cell.gates), D // heads))
    if memory:
        gate, sign = KEEPING_GATE[name]
        u[:, :, :, cell.gates.index(gate)] += sign * memory
    initial = 0.3 * rng.normal(size=(B, len(cell.slots), D)) if state else None
    if initial is not None and name == "slstm":
        initial[:, 1] = 1 + initial[:, 1] ** 2  # n is a sum of exponentials
    arrays = (params, u) if initial is None else (params, u, initial)
    single = [a.astype(np.float32) for a in arrays]
    return cell, single[0], single[1], single[2] if len(single) > 2 else None


def solve(cell, params, u, state=None, **options):
    arrays = recurrence(
        cell, mx.array(params), mx.array(u), None if state is None else mx.array(state), **options
    )
    return [np.array(a) if isinstance(a, mx.array) else a for a in arrays]


def loss_of(cell, options, mask=None, return_states=0):
    """A scalar that depends on everything recurrence returns."""

    def loss(params, u, state):
        hidden, last, *states = recurrence(
            cell, params, u, state, mask=mask, return_states=return_states, **options
        )
        total = (hidden * mx.cos(mx.arange(hidden.size).reshape(hidden.shape))).sum() + (last * last).sum()
        return total + sum((s * s * s).sum() for s in states)

    return loss
