"""Calls of adjoint.metal, with strided data and the answer in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mlx_pararnn.cells import Cell, get_cell
from mlx_pararnn.cells.activations import ACTIVATIONS
from mlx_pararnn.compute.choice import CHUNK
from mlx_pararnn.compute.gpu import CELLS, Launch, adjoint_launch, options
from tests.support import oracle
from tests.support.problems import KEEPING_GATE

from . import harness
from .instances import DTYPES
from .layer_kernels import STEP, part
from .problem import rounded, widened
from .wrap import Input

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class AdjointCall:
    """One call of the kernel; the checks of battery.py take it where they take a `Case`.

    `memory` shifts the gate that keeps the state, so that lambda reaches over many chunks.
    """

    cell: Cell
    B: int
    T: int
    D: int
    heads: int = 1
    dtype: str = "float32"
    shape: str = "wide"
    masked: bool = False
    every: int = 0
    scale: float = 0.5
    memory: float = 0.0
    seed: int = 0

    tiling = None  # Newton's, of which battery.py asks more

    def __str__(self) -> str:
        words = [self.cell.name, *self.cell.activations.values(), self.B, self.T, self.D, self.heads]
        words += [self.dtype, self.shape, "masked" * self.masked, "states" * bool(self.every)]
        return "-".join(["adjoint", *(str(word) for word in words if word)])

    @property
    def made(self) -> "AdjointCall":
        return self

    @property
    def u_shape(self) -> tuple[int, ...]:
        return self.B, self.heads, self.T, len(self.cell.gates), self.D // self.heads

    @cached_property
    def launch(self) -> Launch:
        return adjoint_launch(
            self.cell,
            self.u_shape,
            DTYPES[self.dtype],
            masked=self.masked,
            every=self.every,
            tiling=self.shape,
        )

    @property
    def dtypes(self) -> dict[str, str]:
        other = {"every": "int32", "mask": "bool", "u": self.dtype, "bias": self.dtype}
        other["d_hidden"] = self.dtype
        return {name: other.get(name, "float32") for name in self.launch.input_names}

    @property
    def inputs(self) -> list[Input]:
        B, T, D, slots = self.B, self.T, self.D, len(self.cell.slots)
        shapes = {
            "u": self.u_shape,
            "bias": (self.heads, len(self.cell.gates) * D // self.heads),
            "params": (len(self.cell.params), D),
            "boundaries": (B, max(1, T // CHUNK), slots, D),
            "d_hidden": (B, T, D),
            "d_states": (B, T // max(1, self.every), slots, D),
            "every": (1,),
            "mask": (B, T),
        }
        return [Input(shapes.get(n, (B, slots, D)), self.dtypes[n]) for n in self.launch.input_names]

    @cached_property
    def _problem(self) -> tuple[Arrays, dict]:
        """The kernel's inputs, and those of the oracle in float64."""
        rng = np.random.default_rng(self.seed)
        cell, B, T, D, heads = self.cell, self.B, self.T, self.D, self.heads
        gates, slots, W = len(cell.gates), len(cell.slots), D // heads
        shift = np.zeros((gates, 1))
        if self.memory:
            gate, sign = KEEPING_GATE[cell.name]
            shift[cell.gates.index(gate)] = sign * self.memory
        # as the projection leaves it: heads outermost
        u, exact_u = part(rng, self.dtype, heads, B, T, gates, W, loc=shift)
        d_hidden, exact_d_hidden = part(rng, self.dtype, B, T, D)
        shift_of_u = 0.2 * np.random.default_rng(1000 + self.seed).normal(size=(heads, gates * W))
        bias, exact_bias = rounded(shift_of_u.astype(np.float32), self.dtype)
        exact_u = exact_u + exact_bias.reshape(heads, 1, 1, gates, W)
        params = (self.scale * rng.normal(size=(len(cell.params), D))).astype(np.float32)
        initial = (0.3 * rng.normal(size=(B, slots, D))).astype(np.float32)
        if cell.name == "slstm":  # n is a sum of exponentials
            initial[:, 1] = 1 + initial[:, 1] ** 2
        d_last = rng.normal(size=(B, slots, D)).astype(np.float32)
        mask = rng.random((B, T)) < 0.8 if self.masked else None

        exact = {
            "params": params.astype(float),
            "u": exact_u.transpose(1, 2, 3, 0, 4).reshape(B, T, gates, D),
            "g": np.zeros((B, T, slots, D)),
            "state": initial.astype(float),
        }
        states = oracle.sequential(cell, exact["params"], exact["u"], exact["state"], mask)
        boundaries = np.stack(states, axis=2)[:, CHUNK - 1 :: CHUNK].astype(np.float32)
        exact["g"][:, :, cell.output_slot] = exact_d_hidden * (1 if mask is None else mask[..., None])
        exact["g"][:, -1] += d_last
        given = {
            "u": u.swapaxes(0, 1),
            "bias": bias,
            "params": params,
            "initial": initial,
        }
        # where there is no boundary, another array: an empty one has no memory that a GPU could be given
        given["boundaries"] = boundaries if T >= CHUNK else initial[:, None]
        given |= {"d_hidden": d_hidden, "d_last": d_last}
        if self.every:
            d_states = rng.normal(size=(B, T // self.every, slots, D)).astype(np.float32)
            exact["g"][:, self.every - 1 :: self.every] += d_states
            given |= {"d_states": d_states, "every": np.array([self.every], np.int32)}
        if mask is not None:
            given["mask"] = mask
        return given, exact

    @property
    def given(self) -> Arrays:
        return self._problem[0]

    @cached_property
    def wanted(self) -> Arrays:
        return self._gradients(np.float64)

    @cached_property
    def noise(self) -> float:
        """What NumPy in float32 is off by, where the worst of all is."""
        single = self._gradients(np.float32)
        return max(np.max(np.abs(single[n] - w) / np.maximum(1, np.abs(w))) for n, w in self.wanted.items())

    def _gradients(self, kind: type) -> Arrays:
        exact = {name: array.astype(kind) for name, array in self._problem[1].items()}
        d_params, d_u, d_initial = oracle.adjoint(self.cell, **exact, mask=self.given.get("mask"))
        B, heads, T, gates, W = self.u_shape
        d_u = d_u.reshape(B, T, gates, heads, W).transpose(3, 0, 1, 2, 4)
        d_bias = d_u.sum(axis=(1, 2)).reshape(heads, gates * W)
        return {"d_params": d_params, "d_bias": d_bias, "d_u": d_u, "d_initial": d_initial}

    def run(self, change: Callable[[Launch], Launch] = lambda launch: launch, **options) -> Arrays:
        return harness.run(change(self.launch), self.given, dtypes=self.dtypes, seconds=20.0, **options)

    def compare(self, got: Arrays, _: object = None, tolerance: float = 3e-6) -> str:
        """What differs, or "": no more is allowed than four times what NumPy in float32 is off by.

        Eight times for sLSTM, whose exponentials amplify rounding twice: of the states, then of lambda.
        """
        factor = 8 if self.cell.name == "slstm" else 4
        values = {"d_u": widened(got["d_u"], self.dtype), "d_initial": got["d_initial"]}
        values |= {name: got[name].sum(axis=(0, 1)) for name in ("d_params", "d_bias")}
        for name, want in self.wanted.items():
            allowed = max(tolerance, factor * self.noise) + (STEP[self.dtype] if name == "d_u" else 0)
            summed = (
                np.abs(self.wanted["d_u"]).sum(axis=(1, 2)).reshape(want.shape) if name == "d_bias" else want
            )
            error = np.max(np.abs(values[name] - want) / np.maximum(1, np.abs(summed)))
            if not error <= allowed:
                return f"{name} is off by {error:.1e}, {allowed:.1e} is allowed"
        return ""


def adjoint(cell: str, *sizes, activations: dict[str, str] | None = None, **options) -> AdjointCall:
    return AdjointCall(get_cell(cell, activations), *sizes, **options)


def all_adjoints() -> Iterator[AdjointCall]:
    """Those in gpu.INSTANTIATIONS; every activation in each cell's first place."""
    for dtype in DTYPES:
        for cell in CELLS:
            for row in options("adjoint"):
                shape = row.pop("tiling")
                yield adjoint(cell, 2, 40, 18, 2, dtype, shape, **row)
    for cell in ("gru", "lstm"):
        place = next(iter(get_cell(cell).default_activations))
        for activation in ACTIVATIONS:
            yield adjoint(cell, 1, 40, 9, shape="narrow", activations={place: activation})
    yield adjoint("gru", 1, 1, 1)  # arrays of fewer than 8 elements are in constant memory


def adjoint_cases(cell: str) -> list[AdjointCall]:
    """Three tiles, two groups of channels, several rows, long memory; then with all options, each shape."""
    options: dict[str, Any] = {"masked": True, "memory": 2.0}
    return [
        adjoint(cell, 2, 300, 40, 2, memory=2.0),
        adjoint(cell, 1, 530, 9, 1, "bfloat16", "narrow", every=3, **options),
        adjoint(cell, 2, 37, 33, 3, "float16", "straight", every=5, **options),
    ]
