"""Launches the kernels of metal/ on a GPU: for one call its text with its constants, grid and outputs.

metal/README.md explains the algorithm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import mlx.core as mx

from ..cells import Cell
from ..errors import PararnnError
from .gpu_cores import gpu_cores
from .texts import cuda_text, kernel_text, metal_text

CHUNK = 16  # steps of a chunk
# The threadgroup shapes there are: (CW channels a simdgroup, C steps a chunk, S simdgroups a threadgroup).
# Wide: every load of 32 lanes is one line. The others trade that for more chunks in time, where there are too
# few channels to fill a GPU. Threadgroup memory is counted in metal/README.md.
SHAPES = {"wide": (32, CHUNK, 8), "medium": (16, CHUNK, 8), "narrow": (8, CHUNK, 8)}
# The gradient's have one more: a single chunk, straight back through time, for cells of many slots.
ADJOINT_SHAPES = {**SHAPES, "straight": (32, CHUNK, 1)}
# With more channels a core than these, Newton, which makes each step twice or (float32) three times, is the
# slower method. By arithmetic (metal/README.md), until a GPU has been timed.
FULL_CORE = {mx.float16: 64, mx.bfloat16: 64, mx.float32: 32}
# Bytes of threadgroup memory that every Apple GPU has.
THREADGROUP_MEMORY = 32768
# What u and hidden may be.
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# The cells of metal/cells/.
CELLS = ("gru", "lstm", "slstm", "nlru")
# Every instantiation of the kernels: for each text of metal/ what its launch function takes, each with each,
# for all DTYPES and, but for the convolution and the norm, all CELLS and their activations. A free number
# (taps) stands here with those that the tests take; of `every` only whether it is 0 is compiled in.
INSTANTIATIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "recurrence": {
        "tiling": tuple(SHAPES),
        "masked": (False, True),
        "every": (0, 3),
        "info": (False, True),
    },
    "sequential": {"masked": (False, True), "every": (0, 3)},
    "adjoint": {"tiling": tuple(ADJOINT_SHAPES), "masked": (False, True), "every": (0, 3)},
    "decode": {"gated": (False, True)},
    "conv": {"taps": (2, 4, 7)},
    "norm": {"centered": (False, True), "scaled": (False, True)},
}
_SEQUENTIAL_THREADS = 64
# Steps whose gates the sequential kernel has under way: more than a load takes steps, few enough for
# the steps, which are all written out, to stay in an instruction cache of 12 KB.
_RING = 6
# Threads that share the norm of a row: half of what a threadgroup may have, for the registers.
_NORM_THREADS = 512
# Steps a thread of the convolution makes: each input is read (STEPS + K - 1) / STEPS times.
_CONV_STEPS = 16


@dataclass(frozen=True)
class Launch:
    """One kernel call, without its arrays.

    Attributes:
        name: unique for the text: cell, activations and kernel.
        source: the body of the kernel function, a file of metal/.
        header: what stands before it: dual numbers, activations, the cell, the constants, and how many
            threads a threadgroup has, so that Metal's compiler must make them fit.
        constants: name -> int or dtype, as the header has them.
        grid: threads in x, y, z; a multiple of `threadgroup`.
        contiguous: whether inputs have to be row contiguous; u is read by strides.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    constants: tuple[tuple[str, Any], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    contiguous: bool = False


def options(kernel: str) -> Iterator[dict[str, Any]]:
    """Each row of a kernel's table in `INSTANTIATIONS`, as keyword arguments of its launch function."""
    names, values = INSTANTIATIONS[kernel].keys(), INSTANTIATIONS[kernel].values()
    return (dict(zip(names, row, strict=True)) for row in product(*values))


def available_backend() -> str | None:
    """ "metal", "cuda", or None where MLX runs on a CPU alone."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def tiling_for(B: int, D: int) -> str:
    """The widest of `SHAPES` that gives each core of the GPU a threadgroup, of B rows of D channels."""
    for name, (channels, _, _) in SHAPES.items():
        if B * -(-D // channels) >= gpu_cores():
            return name
    return "narrow"


def method_for(cell: Cell, B: int, T: int, D: int, dtype: mx.Dtype) -> str:
    """ "newton" or "sequential": by arithmetic, the faster for u of `dtype`, B rows of T steps of D channels.

    sLSTM, of four slots, needs too many of Newton's iterations.
    """
    few = B * D / gpu_cores() <= FULL_CORE.get(dtype, FULL_CORE[mx.float32])
    return "newton" if T > 1 and few and len(cell.slots) < 4 else "sequential"


def tile_steps(tiling: str) -> int:
    """Steps of a tile of a shape of `ADJOINT_SHAPES`."""
    CW, C, S = ADJOINT_SHAPES[tiling]
    return S * 32 // CW * C


def newton_launch(
    cell: Cell,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    *,
    masked: bool = False,
    every: int = 0,
    info: bool = False,
    tiling: str | None = None,
) -> Launch:
    """Newton on chunk boundaries for u of `shape` (B, heads, T, gates, D / heads) and `dtype`.

    Inputs: u without its bias, bias (heads, gates * D / heads) in `dtype`, params (P, D), initial
    (B, slots, D), tol (1,), max_iters (1,), every (1,) if every > 0, and mask (B, T) if masked.
    Outputs: hidden (B, T, D) in `dtype`, last (B, slots, D); states (B, T // every, slots, D) if every > 0;
    gap (B, chunks, D) and iterations_made (B, D) if info.
    """
    B, heads, _, _, W = shape
    D = heads * W
    CW, C, S = SHAPES[tiling or tiling_for(B, D)]
    slots = len(cell.slots)
    memory = 4 * ((slots + 2) * slots * S * 32 + slots * CW + S)
    if memory > THREADGROUP_MEMORY:
        raise PararnnError(
            f"cell {cell.name!r} has {slots} slots, whose Jacobians take {memory} bytes of threadgroup "
            f"memory where {THREADGROUP_MEMORY} are there; take method='sequential' or backend='ops'"
        )
    outputs = _outputs(cell, shape, dtype, every)
    if info:
        outputs["gap"] = ((B, S * 32 // CW, D), mx.float32)
        outputs["iterations_made"] = ((B, D), mx.int32)
    constants = {"InT": dtype, "OutT": dtype, "CW": CW, "C": C, "S": S}
    return _launch(
        cell,
        "recurrence",
        ("u", "bias", "params", "initial", "tol", "max_iters"),
        outputs,
        constants,
        masked,
        every,
        grid=(-(-D // CW) * S * 32, B, 1),
        threads=S * 32,
    )


def sequential_launch(
    cell: Cell, shape: tuple[int, ...], dtype: mx.Dtype, *, masked: bool = False, every: int = 0
) -> Launch:
    """One thread a channel straight through time; inputs and outputs as above, without tol and max_iters."""
    B, heads, _, _, W = shape
    blocks = -(-heads * W // _SEQUENTIAL_THREADS)
    return _launch(
        cell,
        "sequential",
        ("u", "bias", "params", "initial"),
        _outputs(cell, shape, dtype, every),
        {"InT": dtype, "OutT": dtype, "RING": _RING},
        masked,
        every,
        grid=(blocks * _SEQUENTIAL_THREADS, B, 1),
        threads=_SEQUENTIAL_THREADS,
    )


def adjoint_launch(
    cell: Cell,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    *,
    masked: bool = False,
    every: int = 0,
    tiling: str | None = None,
) -> Launch:
    """The gradient of a recurrence on u of `shape` (B, heads, T, gates, D / heads) and `dtype`.

    Inputs: u and bias as `newton_launch` has them, params (P, D), initial (B, slots, D), boundaries
    (B, T // CHUNK, slots, D), the states after every CHUNK-th step, d_hidden (B, T, D) in `dtype`, read by
    strides, d_last (B, slots, D); d_states (B, T // every, slots, D) and every (1,) if every > 0, and mask
    (B, T) if masked.
    Outputs: d_u (heads, B, T, gates, D / heads) in `dtype`; d_bias (B, chunks, heads, gates * D / heads) and
    d_params (B, chunks, P, D), whose sums over B and chunks are the gradients of bias and params; d_initial
    (B, slots, D).
    """
    B, heads, T, gates, W = shape
    D, slots = heads * W, len(cell.slots)
    tiling = tiling or tiling_for(B, D)
    CW, C, S = ADJOINT_SHAPES[tiling]
    if 4 * ((slots + 1) * slots * S * 32 + slots * CW) > THREADGROUP_MEMORY:
        CW, C, S = ADJOINT_SHAPES["straight"]
    return _assembled(
        "adjoint",
        cell,
        {"MASKED": int(masked), "STATES": int(every > 0)},
        (
            *("u", "bias", "params", "initial", "boundaries", "d_hidden", "d_last"),
            *(("d_states", "every") if every else ()),
            *(("mask",) if masked else ()),
        ),
        {
            "d_u": ((heads, B, T, gates, W), dtype),
            "d_bias": ((B, S * 32 // CW, heads, gates * W), mx.float32),
            "d_params": ((B, S * 32 // CW, len(cell.params), D), mx.float32),
            "d_initial": ((B, slots, D), mx.float32),
        },
        {"InT": dtype, "CW": CW, "C": C, "S": S},
        (-(-D // CW) * S * 32, B, 1),
        S * 32,
    )


@lru_cache(maxsize=256)
def decode_launch(cell: Cell, shape: tuple[int, ...], dtype: mx.Dtype, *, gated: bool) -> Launch:
    """One step of the cell for u of `shape` (B, heads, 1, gates, D / heads); if gated, the gated norm too.

    Inputs, all read by strides: u, without its bias, and `bias` (heads, gates * D / heads), params (P, D),
    initial (B, slots, D); if gated also gate (B, 1, D), weight (D,), eps (1,).
    Outputs: y (B, 1, D) in `dtype`, last (B, slots, D).
    """
    B, heads, _, _, W = shape
    D = heads * W
    most = _NORM_THREADS if gated else _SEQUENTIAL_THREADS
    threads = min(most, -(-D // 32) * 32)
    inputs = ("u", "bias", "params", "initial")
    return _assembled(
        "decode",
        cell,
        {"GATED": int(gated)},
        (*inputs, "gate", "weight", "eps") if gated else inputs,
        {"y": ((B, 1, D), dtype), "last": ((B, len(cell.slots), D), mx.float32)},
        {"OutT": dtype},
        (threads if gated else -(-D // threads) * threads, B, 1),
        threads,
    )


@lru_cache(maxsize=256)
def conv_launch(shape: tuple[int, ...], taps: int, dtype: mx.Dtype) -> Launch:
    """Causal depthwise convolution with `taps` >= 2 taps and SiLU, for x of `shape` (B, T, D).

    Inputs, all read by strides: x, window (B, taps - 1, D), weight (D, taps), bias (D,).
    Outputs, in `dtype`: y (B, T, D), new_window (B, taps - 1, D).
    """
    B, T, D = shape
    return _assembled(
        "conv",
        None,
        {},
        ("x", "window", "weight", "bias"),
        {"y": ((B, T, D), dtype), "new_window": ((B, taps - 1, D), dtype)},
        {"OutT": dtype, "K": taps, "STEPS": _CONV_STEPS},
        (-(-D // _SEQUENTIAL_THREADS) * _SEQUENTIAL_THREADS, -(-T // _CONV_STEPS), B),
        _SEQUENTIAL_THREADS,
    )


@lru_cache(maxsize=256)
def norm_launch(shape: tuple[int, ...], dtype: mx.Dtype, *, centered: bool, scaled: bool) -> Launch:
    """A residual sum and the norm after it, RMSNorm or, if centered, LayerNorm, for x of `shape` (B, T, D).

    Inputs, all read by strides: x and added (B, T, D), weight (D,), eps (1,); if centered bias (D,); if
    scaled scale (1,), by which x is multiplied.
    Outputs, in `dtype`: total (B, T, D), the sum, and y (B, T, D), its norm.
    """
    B, T, D = shape
    threads = min(_NORM_THREADS, -(-D // 32) * 32)
    return _assembled(
        "norm",
        None,
        {"CENTERED": int(centered), "SCALED": int(scaled)},
        ("x", "added", "weight", "eps", *(["bias"] if centered else []), *(["scale"] if scaled else [])),
        {"total": (shape, dtype), "y": (shape, dtype)},
        {"OutT": dtype},
        (threads, T, B),
        threads,
    )


def run(launch: Launch, arrays: dict[str, mx.array], backend: str) -> dict[str, mx.array]:
    """Launch on the GPU: `backend` is "metal" or "cuda"; arrays by input name, all but u row contiguous."""
    kernel = _compiled(
        backend, launch.name, launch.input_names, launch.output_names, launch.source, launch.header
    )
    outputs = kernel(
        inputs=[arrays[name] for name in launch.input_names],
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[*launch.output_shapes],
        output_dtypes=[*launch.output_dtypes],
    )
    return dict(zip(launch.output_names, outputs, strict=True))


@lru_cache(maxsize=128)
def _compiled(
    backend: str, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str
) -> Any:
    names: dict[str, Any] = {"name": name, "input_names": [*inputs], "output_names": [*outputs]}
    if backend == "metal":
        return mx.fast.metal_kernel(
            **names,
            source=source,
            header=header,
            ensure_row_contiguous=False,
            compile_options={"math_mode": "safe"},
        )
    return mx.fast.cuda_kernel(
        **names,
        source=cuda_text(source),
        header=metal_text("cuda_compat.h") + cuda_text(header),
        ensure_row_contiguous=False,
    )


def _launch(
    cell: Cell,
    kernel: str,
    inputs: tuple[str, ...],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    constants: dict[str, Any],
    masked: bool,
    every: int,
    *,
    grid: tuple[int, int, int],
    threads: int,
) -> Launch:
    # What a call does not have must not be named in its text either: the preprocessor cuts it out.
    flags = {"MASKED": int(masked), "STATES": int(every > 0), "INFO": int("gap" in outputs)}
    inputs = (*inputs, *(["every"] if every else []), *(["mask"] if masked else []))
    return _assembled(kernel, cell, flags, inputs, outputs, constants, grid, threads)


def _assembled(
    kernel: str,
    cell: Cell | None,
    flags: dict[str, int],
    inputs: tuple[str, ...],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    constants: dict[str, Any],
    grid: tuple[int, int, int],
    threads: int,
) -> Launch:
    name, source, header = kernel_text(kernel, cell, tuple(flags.items()), tuple(constants.items()), threads)
    return Launch(
        name=name,
        input_names=inputs,
        output_names=tuple(outputs),
        source=source,
        header=header,
        constants=tuple(constants.items()),
        grid=grid,
        threadgroup=(threads, 1, 1),
        output_shapes=tuple(shape for shape, _ in outputs.values()),
        output_dtypes=tuple(dtype for _, dtype in outputs.values()),
    )


def _outputs(
    cell: Cell, shape: tuple[int, ...], dtype: mx.Dtype, every: int
) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    B, heads, T, _, W = shape
    D, slots = heads * W, len(cell.slots)
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {
        "hidden": ((B, T, D), dtype),
        "last": ((B, slots, D), mx.float32),
    }
    if every:
        outputs["states"] = ((B, T // every, slots, D), mx.float32)
    return outputs
