"""Runs a Metal kernel of the project on this machine's processor, all threads of the whole grid.

Shows: bounds of device, threadgroup and thread arrays, to the byte; writes to inputs; threadgroup memory read
before it is written; outputs left unwritten; races within a threadgroup and between threadgroups; barriers
and simd operations not reached by all; over 32 KB of threadgroup memory; integer overflow; a hang.

Cannot show: that Apple's compiler takes the text; register use; speed; Metal's own rounding of exp, tanh and
the like (math="metal" moves them by the ulps its tables allow). Races are found by the barriers between two
accesses, not by timing; but only on the paths that the given inputs take.
"""

import ctypes
import math as mathematics
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

try:
    from numpy.lib.array_utils import byte_bounds
except ModuleNotFoundError:
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]  # NumPy 1.26

from .build import ENTRY, THREADS, build, missing, to_cpp
from .cuda import to_host
from .wrap import Input, KernelCall, Wrapped, dtype_name, wrap

__all__ = ["KernelError", "missing", "run", "text_of"]

LIMIT = 1024  # threads of a threadgroup
ALIGNMENT = 256


class KernelError(Exception):
    """The kernel did something it must not do."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element", ctypes.c_uint64),
        ("output", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int),
        ("may_stay_unwritten", ctypes.POINTER(ctypes.c_char_p)),
        ("may_stay_unwritten_count", ctypes.c_int),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint),
        ("checked", ctypes.c_int),
        ("flush_denormals", ctypes.c_int),
        ("seconds", ctypes.c_double),
        ("error", ctypes.c_char_p),
        ("error_pc", ctypes.c_uint64),
        ("error_line", ctypes.c_int),
        ("threadgroup_bytes", ctypes.c_uint64),
    )


def run(
    launch: KernelCall,
    inputs: dict[str, np.ndarray],
    *,
    order: int = 0,
    check: bool = True,
    dtypes: dict[str, str] | None = None,
    math: str = "ieee",
    may_stay_unwritten: Sequence[str] = (),
    seconds: float = 120.0,
    info: dict[str, int] | None = None,
    cuda: str | None = None,
) -> dict[str, np.ndarray]:
    """Outputs by name; bfloat16 ones as uint16, and inputs that `dtypes` calls bfloat16 too.

    order: 0 forward, 1 backward, others the seed of a shuffle, of lanes, simdgroups and threadgroups.
    check=False: only values, several times faster. math: a key of build.MATH.
    cuda: a text of metal/cuda_compat.h; then the CUDA twin of the kernel runs.
    An input that is a strided view is copied first if `launch.contiguous`, as MLX does; otherwise the kernel
    gets the view's own memory, and may touch nothing before its first or after its last element.
    """
    dtypes = dtypes or {}
    if set(inputs) != set(launch.input_names):
        raise ValueError(f"inputs {sorted(inputs)} given, {sorted(launch.input_names)} expected")
    arrays = {name: _prepare(inputs[name], launch.contiguous) for name in launch.input_names}
    facts = {name: Input(a.shape, dtypes.get(name, a.dtype.name)) for name, a in arrays.items()}
    wrapped = wrap(launch, list(facts.values()))
    source = to_cpp(wrapped, facts) if cuda is None else to_host(launch, wrapped, list(facts.values()), cuda)
    library = build(source, check=check, math=math)

    outputs: dict[str, np.ndarray] = {}
    for name, shape, dtype in zip(
        launch.output_names, launch.output_shapes, launch.output_dtypes, strict=True
    ):
        outputs[name] = _aligned(shape, _numpy(dtype_name(dtype)))
    memory = [_memory(p.of, p.fact, arrays, outputs) for p in wrapped.parameters]
    buffers = (_Buffer * len(memory))()
    for i, (parameter, array) in enumerate(zip(wrapped.parameters, memory, strict=True)):
        low, high = byte_bounds(array) if array.size else (array.ctypes.data,) * 2
        encoded = parameter.name.encode()
        writable = parameter.name in outputs
        buffers[i] = _Buffer(array.ctypes.data, low, high - low, array.itemsize, writable, encoded)
    _launch(
        launch, wrapped, library, buffers, order, check, math == "metal", may_stay_unwritten, seconds, info
    )
    return outputs


def text_of(
    launch: KernelCall, inputs: dict[str, np.ndarray], dtypes: dict[str, str] | None = None
) -> Wrapped:
    """The Metal text of this call."""
    dtypes = dtypes or {}
    given = {name: np.asarray(a) for name, a in inputs.items()}
    return wrap(launch, [Input(a.shape, dtypes.get(n, a.dtype.name)) for n, a in given.items()])


def _numpy(name: str) -> np.dtype:
    return np.dtype("uint16" if name == "bfloat16" else name)


def _prepare(array: np.ndarray, contiguous: bool) -> np.ndarray:
    array = np.asarray(array)
    return np.require(array, requirements=["C", "A"]) if contiguous and array.ndim else array


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array full of 0xff: NaN, or -1."""
    size = mathematics.prod(shape) * dtype.itemsize
    block = np.full(size + ALIGNMENT, 0xFF, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size].view(dtype).reshape(shape)


def _memory(
    name: str, fact: str, arrays: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> np.ndarray:
    """What a parameter of the kernel points to."""
    if name in outputs:
        return outputs[name]
    array = arrays[name]
    if fact == "_shape":
        return np.array(array.shape, np.int32)
    if fact == "_strides":
        return np.array(array.strides, np.int64) // array.itemsize
    return np.array(array.ndim, np.int32) if fact else array


@cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.msl_launch.argtypes = [ctypes.POINTER(_Launch)]
    library.msl_launch.restype = ctypes.c_int
    return library


def _check_sizes(launch: KernelCall) -> None:
    threads = mathematics.prod(launch.threadgroup)
    if not 0 < threads <= LIMIT:
        raise KernelError(f"a threadgroup of {threads} threads; {LIMIT} is the most")
    fits = THREADS.search(launch.header)
    if fits and threads > int(fits[1]):
        raise KernelError(f"a threadgroup of {threads} threads; the text is compiled for {fits[1]}")
    for size, step in zip(launch.grid, launch.threadgroup, strict=True):
        if size <= 0 or size % step:
            # MLX would run a smaller last threadgroup (Metal) or more threads than asked for (CUDA)
            raise KernelError(f"grid {launch.grid} is no multiple of the threadgroup {launch.threadgroup}")


def _launch(
    launch: KernelCall,
    wrapped: Wrapped,
    path: Path,
    buffers: "ctypes.Array[_Buffer]",
    order: int,
    check: bool,
    flush_denormals: bool,
    may_stay_unwritten: Sequence[str],
    seconds: float,
    info: dict[str, int] | None,
) -> None:
    _check_sizes(launch)
    library = _library(path)
    error = ctypes.create_string_buffer(4096)
    allowed = (ctypes.c_char_p * max(1, len(may_stay_unwritten)))(*(n.encode() for n in may_stay_unwritten))
    request = _Launch(
        entry=ctypes.cast(getattr(library, ENTRY), ctypes.c_void_p),
        buffers=buffers,
        buffer_count=len(buffers),
        may_stay_unwritten=allowed,
        may_stay_unwritten_count=len(may_stay_unwritten),
        grid=(ctypes.c_uint32 * 3)(*launch.grid),
        threadgroup=(ctypes.c_uint32 * 3)(*launch.threadgroup),
        order=order,
        checked=check,
        flush_denormals=flush_denormals,
        seconds=seconds,
        error=ctypes.addressof(error),
    )
    failed = library.msl_launch(ctypes.byref(request))
    if info is not None:
        info["threadgroup_bytes"] = request.threadgroup_bytes
    if failed:
        line = request.error_line or _line_of(path, request.error_pc)
        raise KernelError(error.value.decode(errors="replace") + _quote(wrapped.text, line))


def _line_of(library: Path, pc: int) -> int:
    """The kernel's line a machine instruction comes from; 0 if unknown."""
    if not pc or not shutil.which("addr2line"):
        return 0
    command = ["addr2line", "-i", "-e", str(library), hex(pc - 1)]
    places = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [p.rpartition(":")[2].split()[0] for p in places if "/kernel." in p]
    return int(lines[0]) if lines and lines[0].isdigit() else 0


def _quote(text: str, line: int) -> str:
    lines = text.splitlines()
    return f"\n  line {line}: {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
