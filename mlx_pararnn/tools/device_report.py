"""One block of text about a machine, to paste into an issue: `mlx-pararnn doctor --report`."""

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from ..cells import Cell, get_cell
from ..compute import adjoint, choice, gpu, layer_ops, recurrence
from ..compute.gpu_cores import gpu_cores
from ..compute.texts import metal_text

RUNS = 5  # of each timing, whose median is given
TOO_MANY_THREADS = 4096
TOO_MANY_BYTES = 1 << 20


def device_report() -> str:
    """Device, its limits, the kernels tried and five timings, in a block of Markdown; takes some minutes.

    On a GPU some 50 of the kernels' instantiations are tried: every cell, kernel, shape, dtype and option.
    """
    backend = gpu.available_backend() or "cpu"
    info = mx.device_info()
    lines = [
        f"mlx-pararnn {version('mlx-pararnn')}, MLX {version('mlx')}, Python {platform.python_version()}, "
        f"{platform.platform()}",
        f"device: {mx.default_device()}, backend {backend}",
        *(f"  {name}: {info[name]}" for name in sorted(info)),
        *_limits(backend),
        *_kernels(backend),
        *_timings(backend),
    ]
    return "\n".join(["```text", *lines, "```"])


def _limits(backend: str) -> list[str]:
    if backend == "cpu":
        return ["limits: no GPU that MLX uses"]
    # Where MLX has no function that tells a limit, its error for what is too much does.
    threads = _refusal(backend, "y[0] = thread_position_in_grid.x;", TOO_MANY_THREADS)
    memory = f"threadgroup char many[{TOO_MANY_BYTES}]; many[thread_position_in_grid.x] = 1; y[0] = many[1];"
    return [
        f"limits, as MLX's errors tell them of {TOO_MANY_THREADS} threads and of {TOO_MANY_BYTES} bytes:",
        f"  threads of a threadgroup: {threads}",
        f"  threadgroup memory: {_refusal(backend, memory, 32)}",
        f"cores, by which method and shape are chosen: {gpu_cores()}",
    ]


def _refusal(backend: str, source: str, threads: int) -> str:
    kernel: Any
    names: dict[str, Any] = {"name": f"too_much_{threads}", "input_names": ["x"], "output_names": ["y"]}
    try:
        if backend == "metal":
            kernel = mx.fast.metal_kernel(**names, source=source)
        else:
            header = metal_text("cuda_compat.h")
            kernel = mx.fast.cuda_kernel(**names, source=source, header=header)
        shape = {"output_shapes": [(1,)], "output_dtypes": [mx.float32]}
        mx.eval(kernel(inputs=[mx.zeros(8)], grid=(threads, 1, 1), threadgroup=(threads, 1, 1), **shape))
    except Exception as error:  # of every type that MLX raises
        return " ".join(f"{error}".split())[:300]
    return "not refused"


def _kernels(backend: str) -> list[str]:
    before = set(choice.TRIALS)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        for attempt in _trials(backend):
            attempt()
    seconds = time.perf_counter() - begin
    tried = {what: why for what, why in choice.TRIALS.items() if what not in before} or choice.TRIALS
    failed = {what: why for what, why in tried.items() if why}
    first = f"kernels: {len(tried) - len(failed)} of {len(tried)} passed their trial, {seconds:.0f} s"
    return [first, *(f"  {what}: {' '.join(why.split())[:300]}" for what, why in failed.items())]


def _trials(backend: str) -> Iterator[Callable[[], object]]:
    """What is tried, one kernel a call."""
    cells = [get_cell(name) for name in gpu.CELLS]
    if backend == "cpu":
        for cell in cells:
            yield partial(recurrence.recurrence, cell, *_problem(cell, 64, 64))
        return
    for dtype in gpu.DTYPES:
        yield partial(layer_ops.conv_works, backend, 4, dtype)
        yield partial(layer_ops.norm_works, backend, False, False, dtype)
        yield partial(layer_ops.norm_works, backend, True, True, dtype)
    for cell in cells:
        yield from _trials_of(cell, backend)


def _trials_of(cell: Cell, backend: str) -> Iterator[Callable[[], object]]:
    options = {"masked": True, "states": True}
    kernel = partial(recurrence.kernel_works, cell, backend)
    for tiling, dtype in zip(gpu.SHAPES, gpu.DTYPES, strict=True):
        yield partial(kernel, "newton", dtype, tiling)
        yield partial(adjoint.gradient_works, cell, backend, dtype, tiling, **options)
        yield partial(layer_ops.decode_works, cell, backend, dtype)
    yield partial(kernel, "newton", mx.float16, "wide", info=True, **options)
    yield partial(kernel, "sequential", mx.float16, "wide")
    yield partial(kernel, "sequential", mx.float32, "wide", **options)
    yield partial(layer_ops.decode_works, cell, backend, mx.float16, False)


def _problem(cell: Cell, T: int, D: int) -> tuple[mx.array, mx.array]:
    params = 0.1 * mx.random.normal((len(cell.params), D))
    return params, mx.random.normal((1, 1, T, len(cell.gates), D))


def _timings(backend: str, T: int = 1024, D: int = 1024) -> list[str]:
    cell = get_cell("gru")
    params, u = _problem(cell, T, D)
    params, u = params, u.astype(mx.float16)
    state, matrix = mx.zeros((1, 1, D)), mx.random.normal((D, D))
    token = u[:, :, :1], mx.zeros((1, 3 * D), mx.float16), state
    gate, weight = mx.ones((1, 1, D), mx.float16), mx.ones(D, mx.float16)

    def loss(params: mx.array, u: mx.array) -> mx.array:
        return recurrence.recurrence(cell, params, u)[0].sum()

    works: dict[str, Callable[[], Any]] = {
        f"product of {D} x {D}, float32": lambda: matrix @ matrix,
        f"gru, {T} steps, {D} channels, float16": lambda: recurrence.recurrence(cell, params, u),
        "the same, sequential": lambda: recurrence.recurrence(cell, params, u, method="sequential"),
        "its gradient": lambda: mx.grad(loss, argnums=(0, 1))(params, u),
        "a token of it, with the gated norm": lambda: layer_ops.decode(
            cell, params, *token, gate, weight, 1e-6, backend=backend
        ),
    }
    mx.eval(params, u, matrix, *token, gate, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what failed its trial stands above
        return [f"timings, median of {RUNS}:", *(f"  {n}: {_median(w):.3f} ms" for n, w in works.items())]


def _median(work: Callable[[], Any]) -> float:
    """Milliseconds; the first call, which compiles, is left out."""
    taken = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        mx.eval(work())
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[1:])
