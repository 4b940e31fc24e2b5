"""Every instantiation of the project's kernels, with inputs of the right shapes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_pararnn.cells import Cell, get_cell
from mlx_pararnn.cells.activations import ACTIVATIONS
from mlx_pararnn.compute.gpu import CELLS as NAMES
from mlx_pararnn.compute.gpu import DTYPES as MLX_DTYPES
from mlx_pararnn.compute.gpu import SHAPES, Launch, newton_launch, options, sequential_launch

from .wrap import Input, dtype_name

CELLS = {name: get_cell(name) for name in NAMES}
DTYPES = {dtype_name(dtype): dtype for dtype in MLX_DTYPES}


@dataclass(frozen=True)
class Instance:
    name: str
    cell: Cell
    launch: Launch
    u_shape: tuple[int, ...]
    dtype: str
    masked: bool
    every: int
    activation: str  # the one that is not the default, if any

    def __str__(self) -> str:
        return self.name

    @property
    def inputs(self) -> list[Input]:
        """What the text depends on of the inputs."""
        B, heads, T, _, W = self.u_shape
        D = heads * W
        known = {
            "u": Input(self.u_shape, self.dtype),
            "bias": Input((heads, len(self.cell.gates) * W), self.dtype),
            "params": Input((len(self.cell.params), D), "float32"),
            "initial": Input((B, len(self.cell.slots), D), "float32"),
            "tol": Input((1,), "float32"),
            "max_iters": Input((1,), "int32"),
            "every": Input((1,), "int32"),
            "mask": Input((B, T), "bool"),
        }
        return [known[name] for name in self.launch.input_names]


def instance(
    cell_name: str,
    dtype: str = "float32",
    tiling: str | None = "narrow",
    *,
    masked: bool = False,
    every: int = 0,
    info: bool = False,
    shape: tuple[int, int, int, int] = (2, 1, 40, 9),
    activations: dict[str, str] | None = None,
) -> Instance:
    """tiling None: the sequential kernel. shape: batch, heads, steps, channels of a head."""
    cell = get_cell(cell_name, activations)
    B, heads, T, W = shape
    u_shape = (B, heads, T, len(cell.gates), W)
    options: dict[str, Any] = {"masked": masked, "every": every}
    if tiling is None:
        launch = sequential_launch(cell, u_shape, DTYPES[dtype], **options)
    else:
        launch = newton_launch(cell, u_shape, DTYPES[dtype], tiling=tiling, info=info, **options)
    words = [cell_name, *(activations or {}).values(), dtype, tiling or "sequential"]
    words += [word for word, on in (("masked", masked), ("states", every), ("info", info)) if on]
    return Instance(
        "-".join(words), cell, launch, u_shape, dtype, masked, every, " ".join((activations or {}).values())
    )


def all_instances() -> Iterator[Instance]:
    """Those of the recurrence in gpu.INSTANTIATIONS; every activation in each cell's first place."""
    for cell, dtype in itertools.product(CELLS, DTYPES):
        for row in options("recurrence"):
            yield instance(cell, dtype, **row)
        for row in options("sequential"):
            yield instance(cell, dtype, tiling=None, **row)
    for cell, activation in itertools.product(("gru", "lstm"), ACTIVATIONS):
        place = next(iter(CELLS[cell].default_activations))
        yield instance(cell, activations={place: activation})


def few_instances() -> Iterator[Instance]:
    """Every cell, dtype, tiling, option and activation at least once, for what is slow."""
    for i, (cell, tiling) in enumerate(itertools.product(CELLS, (*SHAPES, None))):
        options: dict[str, Any] = {"masked": i % 2 == 1, "every": 3 * (i // 2 % 2), "info": i % 3 == 0}
        if tiling is None:
            options["info"] = False
        yield instance(cell, list(DTYPES)[i % 3], tiling, **options)
    for i, activation in enumerate(ACTIVATIONS):
        cell = ("gru", "lstm")[i % 2]
        place = next(iter(CELLS[cell].default_activations))
        yield instance(cell, activations={place: activation})


def arrays(of: Instance, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random inputs; u as the float values its dtype can hold, in the dtype's bytes (bfloat16: uint16)."""
    rng = np.random.default_rng(seed)
    B, heads, T, _, W = of.u_shape
    D = heads * W
    shapes = {"u": of.u_shape, "bias": (of.u_shape[1], len(of.cell.gates) * W)}
    given = {}
    for name, shape in shapes.items():
        typed = mx.array(rng.normal(0, scale, shape).astype(np.float32)).astype(DTYPES[of.dtype])
        given[name] = np.array(typed.view(mx.uint16) if of.dtype == "bfloat16" else typed)
    given |= {
        "params": rng.uniform(-0.5, 0.5, (len(of.cell.params), D)).astype(np.float32),
        "initial": rng.uniform(-0.5, 0.5, (B, len(of.cell.slots), D)).astype(np.float32),
        "tol": np.full(1, 1e-6, np.float32),
        "max_iters": np.full(1, 1000, np.int32),
        "every": np.full(1, of.every, np.int32),
        "mask": rng.random((B, T)) < 0.7,
    }
    return {name: given[name] for name in of.launch.input_names}


def dtypes_of(of: Instance) -> dict[str, str]:
    """The `dtypes` argument of harness.run."""
    return {"u": of.dtype, "bias": of.dtype}
