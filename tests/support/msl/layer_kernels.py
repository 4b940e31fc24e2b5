"""Calls of conv.metal, decode.metal and norm.metal: data as strided views, and the answer in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlx_pararnn.cells import get_cell
from mlx_pararnn.compute.gpu import Launch, conv_launch, decode_launch, norm_launch, options
from tests.support import oracle

from . import harness
from .instances import CELLS, DTYPES
from .problem import rounded, widened
from .wrap import Input

STEP = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of rounding once


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclass
class Call:
    """One call of a kernel; the checks of battery.py take it where they take a `Case`."""

    name: str
    launch: Launch
    dtype: str
    given: dict[str, np.ndarray]  # in their dtype's bytes
    single: tuple[str, ...]  # those that are float32 whatever the dtype
    wanted: dict[str, np.ndarray]

    tiling = None

    def __str__(self) -> str:
        return self.name

    @property
    def made(self) -> "Call":
        return self

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: "float32" if name in self.single else self.dtype for name in self.launch.input_names}

    @property
    def inputs(self) -> list[Input]:
        return [Input(self.given[name].shape, self.dtypes[name]) for name in self.launch.input_names]

    def run(self, change: Callable[[Launch], Launch] = lambda launch: launch, **options) -> dict:
        return harness.run(change(self.launch), self.given, dtypes=self.dtypes, seconds=20.0, **options)

    def compare(self, got: dict[str, np.ndarray], _: object = None, tolerance: float = 3e-6) -> str:
        """What differs, or ""."""
        for name, want in self.wanted.items():
            exact = name == "last"
            values = got[name] if exact else widened(got[name], self.dtype)
            allowed = tolerance + (0 if exact else STEP[self.dtype])
            error = np.max(np.abs(values - want) / np.maximum(1, np.abs(want)))
            if not error <= allowed:
                return f"{name} is off by {error:.1e}"
        return ""


def part(rng: np.random.Generator, dtype: str, *shape: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers in `dtype`, and in float64; both every second number of wider arrays.

    So no axis has neighbours side by side, and one that a kernel takes for such is seen.
    """
    wide = rng.normal(**options, size=(*shape[:-1], 2 * shape[-1] + 1)).astype(np.float32)
    given, exact = rounded(wide, dtype)
    return given[..., 1::2], exact[..., 1::2]


def conv(B: int, T: int, D: int, K: int = 4, dtype: str = "float32", seed: int = 0) -> Call:
    rng = np.random.default_rng(seed)
    given, exact = {}, {}
    for name, shape in (("x", (B, T, D)), ("window", (B, K - 1, D)), ("weight", (D, K)), ("bias", (1, D))):
        given[name], exact[name] = part(rng, dtype, *shape)
    given["bias"], bias = given["bias"][0], exact["bias"][0]
    inputs = np.concatenate([exact["window"], exact["x"]], axis=1)
    y = bias + sum(exact["weight"][:, k] * inputs[:, k : k + T] for k in range(K))
    wanted = {"y": y * sigmoid(y), "new_window": inputs[:, T:]}
    launch = conv_launch((B, T, D), K, DTYPES[dtype])
    return Call(f"conv-{B}-{T}-{D}-{K}-{dtype}", launch, dtype, given, (), wanted)


def decode(
    name: str,
    B: int,
    D: int,
    heads: int = 1,
    dtype: str = "float32",
    *,
    gated: bool = True,
    activations: dict[str, str] | None = None,
    seed: int = 0,
) -> Call:
    rng = np.random.default_rng(seed)
    cell = get_cell(name, activations)
    gates, slots, W = len(cell.gates), len(cell.slots), D // heads
    # as the projection leaves u: heads outermost in memory
    given_u, exact_u = part(rng, dtype, heads, B, 1, gates, W)
    given_bias, exact_bias = part(rng, dtype, heads, gates * W, scale=0.3)
    params, exact_params = part(rng, "float32", len(cell.params), D, scale=0.5)
    initial, exact_initial = part(rng, "float32", B, slots, D, scale=0.3)
    if name == "slstm":  # n is a sum of exponentials
        initial, exact_initial = initial.copy(), exact_initial.copy()
        for array in (initial, exact_initial):
            array[:, 1] = 1 + array[:, 1] ** 2
    u = exact_u.swapaxes(0, 1) + exact_bias.reshape(heads, 1, gates, W)
    states = oracle.sequential(
        cell, exact_params, u.transpose(0, 2, 3, 1, 4).reshape(B, 1, gates, D), exact_initial
    )
    hidden = states[cell.output_slot]
    given = {"u": given_u.swapaxes(0, 1), "bias": given_bias, "params": params, "initial": initial}
    if gated:
        given["gate"], gate = part(rng, dtype, B, 1, D)
        given["weight"], weight = (a[0] for a in part(rng, dtype, 1, D))
        given["eps"] = np.array([0.01], np.float32)  # large enough to be missed
        hidden = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 0.01) * weight
        hidden = hidden * gate * sigmoid(gate)
    wanted = {"y": hidden, "last": np.stack([s[:, 0] for s in states], axis=1)}
    launch = decode_launch(cell, given["u"].shape, DTYPES[dtype], gated=gated)
    words = [name, *(activations or {}).values(), str(B), str(D), str(heads), dtype, "gated" * gated]
    single = ("params", "initial", "eps")
    return Call("-".join(words), launch, dtype, given, single, wanted)


def norm(
    B: int,
    T: int,
    D: int,
    dtype: str = "float32",
    *,
    centered: bool = False,
    scaled: bool = False,
    seed: int = 0,
) -> Call:
    rng = np.random.default_rng(seed)
    given, exact = {}, {}
    for name in ("x", "added"):
        given[name], exact[name] = part(rng, dtype, B, T, D, loc=0.5)
    for name in ("weight", *(["bias"] if centered else [])):
        given[name], exact[name] = (a[0] for a in part(rng, dtype, 1, D))
    given["eps"] = np.array([0.01], np.float32)  # large enough to be missed
    x = exact["x"].astype(np.float32)
    if scaled:
        given["scale"], scale = rounded(np.array([0.7], np.float32), dtype)
        x = rounded(x * scale.astype(np.float32), dtype)[1].astype(np.float32)
    total = rounded(x + exact["added"].astype(np.float32), dtype)[1]  # as an addition of arrays rounds it
    away = total - total.mean(-1, keepdims=True) if centered else total
    y = away / np.sqrt((away**2).mean(-1, keepdims=True) + 0.01) * exact["weight"]
    wanted = {"total": total, "y": y + exact["bias"] if centered else y}
    launch = norm_launch((B, T, D), DTYPES[dtype], centered=centered, scaled=scaled)
    words = ["norm", str(B), str(T), str(D), dtype, "centered" * centered, "scaled" * scaled]
    return Call("-".join(words), launch, dtype, given, ("eps",), wanted)


def all_calls() -> Iterator[Call]:
    """Those of these kernels in gpu.INSTANTIATIONS."""
    for dtype in DTYPES:
        for row in options("conv"):
            yield conv(2, 40, 9, row["taps"], dtype)
        for row in options("norm"):
            yield norm(2, 3, 40, dtype, **row)
        for cell in CELLS:
            for row in options("decode"):
                yield decode(cell, 2, 18, 2, dtype, **row)
    # arrays of fewer than 8 elements are in constant memory
    yield conv(1, 1, 1, 2)
    yield decode("gru", 1, 1)
    yield norm(1, 1, 1)


def conv_cases(_: str = "") -> list[Call]:
    """Three runs of steps and two groups of channels; then fewer steps than the window has."""
    return [conv(2, 37, 70), conv(2, 2, 9, 5, "bfloat16")]


def norm_cases(_: str = "") -> list[Call]:
    """More channels than threads; fewer than a simdgroup, for whom 512 would be too many; each kind."""
    return [
        norm(2, 3, 1060, scaled=True),
        norm(2, 2, 70, centered=True),
        norm(1, 2, 9, "bfloat16", centered=True, scaled=True),
    ]


def decode_cases(cell: str) -> list[Call]:
    """More channels than threads; fewer than a simdgroup; and several threadgroups, without norm."""
    return [
        decode(cell, 2, 1060, 2),
        decode(cell, 2, 18, 2, "bfloat16"),
        decode(cell, 2, 150, 3, "float16", gated=False),
    ]
