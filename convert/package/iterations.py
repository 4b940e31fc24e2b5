"""How many Newton iterations a checkpoint's prefill needs: measured on its own weights, layer by layer."""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_pararnn.cells import Cell
from mlx_pararnn.cells.activations import Functions
from mlx_pararnn.model import Model

from .unrolled_newton import Library, State, explained, first_guess, iterate

Array = npt.NDArray[Any]

FLOOR = 2.0**-11  # half the distance between 1 and float16's next number
LIMIT = 8  # iterations; beyond it one token after the other costs less
_F = Functions(np)


def iterations_needed(
    model: Model, tokens: list[int], chunk: int, dtype: Any, title: str = "Core ML"
) -> int | None:
    """The iterations after which no state of any layer is further than float16's rounding from the true
    one, plus one: the error is squared at each, so the last one leaves rounding alone.

    Args:
        model: with the weights that the package will hold, in float32.
        tokens: at least `chunk`; each whole chunk of them is solved, from the true state at its start. Two
            chunks of 8 say too little: an sLSTM took 8 iterations there, and more on other text.
        dtype: what the package's recurrence is computed in, np.float16 or np.float32.
        title: what the package is for, as messages name it.

    Returns:
        None if `LIMIT` iterations are too few, or if the recurrence does not survive `dtype`: the products
        of its Jacobians may overflow float16.
    """
    needed = 1
    for cell, params, u, first in _problems(model, tokens):
        with explained(cell, title), np.errstate(all="ignore"):
            count = _needed_by_layer(cell, params, u, first, chunk, dtype)
        if count is None:
            return None
        needed = max(needed, count)
    return needed


def _needed_by_layer(cell: Cell, params: Any, u: Any, first: State, chunk: int, dtype: Any) -> int | None:
    steps = next(iter(u.values())).shape[2]
    exact = _sequential(cell, _as(params, np.float64), _as(u, np.float64), steps, first)
    needed = 1
    for begin in range(0, steps - chunk + 1, chunk):
        part = {gate: x[:, :, begin : begin + chunk] for gate, x in u.items()}
        start = tuple(s[:, :, begin - 1 : begin] for s in exact) if begin else first
        truth = tuple(s[:, :, begin : begin + chunk] for s in exact)
        errors = _errors(cell, params, part, start, truth, np.float32)
        count = next((k for k, error in enumerate(errors, 2) if error <= FLOOR), LIMIT + 1)
        if count > LIMIT:
            return None
        needed = max(needed, count)
        if dtype == np.float16 and not _survives(cell, params, part, start, truth, count):
            return None
    return needed


def _survives(cell: Cell, params: Any, u: Any, start: State, truth: State, iterations: int) -> bool:
    """True if the solver in float16 is about as exact as float16's one step after the other."""
    half = np.float16
    plain = _sequential(cell, _as(params, half), _as(u, half), truth[0].shape[2], start)
    errors = [*_errors(cell, params, u, start, truth, half, iterations)]
    return errors[-1] <= 4 * max(FLOOR, _distance(plain, truth))


def _errors(
    cell: Cell, params: Any, u: Any, start: State, truth: State, dtype: Any, limit: int = LIMIT
) -> Iterator[float]:
    """The distance from the truth after 1, 2, ... iterations."""
    params, u = _as(params, dtype), _as(u, dtype)
    begin = tuple(s.astype(dtype) for s in start)
    library = _library(truth[0].shape, dtype)
    states = first_guess(cell, params, u, library)
    for _ in range(limit):
        states = iterate(cell, params, u, begin, states, library, truth[0].shape[2])
        yield _distance(states, truth)


def _distance(states: State, truth: State) -> float:
    """The largest |s - truth| / max(1, |truth|); infinite if a state is no number."""
    largest = max(
        float(np.max(np.abs(s.astype(np.float64) - t) / np.maximum(1, np.abs(t))))
        for s, t in zip(states, truth, strict=True)
    )
    return largest if np.isfinite(largest) else np.inf


def _sequential(
    cell: Cell, params: Mapping[str, Array], u: Mapping[str, Array], steps: int, start: State
) -> State:
    dtype = next(iter(u.values())).dtype
    first = next(iter(u.values()))[:, :, :1]
    state: State = tuple(s.astype(dtype) for s in start)
    states = []
    for t in range(steps):
        state = cell.step(state, {gate: x[:, :, t : t + 1] for gate, x in u.items()}, params, _F)
        states.append(tuple(np.broadcast_to(s, first.shape) for s in state))
    return tuple(np.concatenate(slot, axis=2) for slot in zip(*states, strict=True))


def _library(shape: tuple[int, ...], dtype: Any) -> Library:
    def full(number: float) -> Array:
        return np.full(shape, number, dtype)

    def delay(x: Any, k: int, fill: float) -> Array:
        x = x if isinstance(x, np.ndarray) else full(x)
        return np.concatenate([np.full_like(x[:, :, :k], fill), x[:, :, :-k]], axis=2)

    def after(start: Array, x: Array) -> Array:
        return np.concatenate([start, x[:, :, :-1]], axis=2)

    return Library(_F, delay, after, full)


def _problems(
    model: Any, tokens: list[int]
) -> Iterator[tuple[Cell, dict[str, Array], dict[str, Array], State]]:
    """Each layer's cell, params (1, H, 1, w), inputs u (1, H, T, w), rounded to float16, and first state."""
    cells = [layer.mixer.cell for layer in model.layers]
    projections = [cell.input_proj for cell in cells]
    try:
        for cell in cells:
            cell.input_proj = _Recorder(cell.input_proj)
        mx.eval(model(mx.array([tokens]), method="sequential", backend="ops"))
        projected = [cell.input_proj.seen for cell in cells]
    finally:
        for cell, projection in zip(cells, projections, strict=True):
            cell.input_proj = projection
    for layer, x in zip(cells, projected, strict=True):
        cell = layer.cell
        u = np.array(x + layer.bias[:, None]).astype(np.float16)[None]  # (1, H, T, gates * w)
        gates = np.split(u, len(cell.gates), axis=-1)
        width = gates[0].shape[-1]
        rows = np.array(layer.recurrent_weight).reshape(len(cell.params), 1, layer.num_heads, 1, width)
        first = np.zeros((len(cell.slots), rows[0].size))
        if "initial_state" in layer:
            first = np.array(layer.initial_state, np.float64)
        start = tuple(first.reshape(len(cell.slots), 1, layer.num_heads, 1, width))
        yield (
            cell,
            dict(zip(cell.params, rows, strict=True)),
            dict(zip(cell.gates, gates, strict=True)),
            start,
        )


class _Recorder(nn.Module):
    """A layer that keeps what it last gave."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        self.seen = self.layer(x)
        return self.seen


def _as(arrays: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    return {name: x.astype(dtype) for name, x in arrays.items()}
