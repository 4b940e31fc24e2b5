"""A system OpenBLAS for MLX's matrix products on Linux.

The BLAS that MLX's Linux wheel brings is the reference one, many times slower in float32 products. MLX binds
its symbols when it is loaded, so this runs just before (`import_hook.py`).
"""

import ctypes
import logging
import mmap
import os
import re
import sys

from ..process.address_space import limit
from .cpu_cores import threads


def load_openblas() -> str | None:
    """Load a system OpenBLAS so that MLX's CPU matrix products use it.

    Returns:
        The library's name, or None where there is none or it is not needed (macOS). Only what is loaded
        before `mlx.core` has an effect: symbols are bound when MLX is loaded.
    """
    if sys.platform != "linux" or not _has_room():
        return None
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        better = _better_kernels(openblas_core(library))
        if better:
            from _ctypes import dlclose

            dlclose(library._handle)
            os.environ["OPENBLAS_CORETYPE"] = better
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            del os.environ["OPENBLAS_CORETYPE"]
        limit_threads(library)
        if limit() is not None:
            _take_memory(library)
        return name
    return None


def warn_if_late() -> None:
    """Say so where MLX was imported first, and a system OpenBLAS could have served it."""
    if sys.platform != "linux":
        return
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        there = re.search(r"/libopenblas(?!64_)", maps.read())  # 64_: numpy's own, with other names inside
    if not there and load_openblas():
        logging.getLogger(__name__).warning(
            "mlx was imported before mlx_pararnn, so its float32 matrix products do without the system's "
            "OpenBLAS and are many times slower; import mlx_pararnn first"
        )


# What OpenBLAS allocates for each thread that computes, once, and asks for again and again, for ever, where
# there is no room: the process then spins in native code and heeds no signal. Its threads do so as soon as
# the library is loaded. With it what the C library reserves for a thread: an arena and a stack.
_BUFFER, _ARENA_AND_STACK = 160 << 20, 136 << 20


def _has_room() -> bool:
    """Asked before the library is loaded: a thread of its that spins keeps it from being closed again."""
    if sys.platform != "linux" or limit() is None:
        return True
    # It starts one a core as it is loaded, whatever it is told then.
    started = len(os.sched_getaffinity(0)) + 1
    try:
        mmap.mmap(-1, started * (_BUFFER + _ARENA_AND_STACK)).close()
    except (OSError, ValueError):
        return False
    return True


def limit_threads(library: ctypes.CDLL) -> None:
    """To what this process may use: OpenBLAS heeds no container's quota, and its threads spin."""
    if "OPENBLAS_NUM_THREADS" in os.environ or "OMP_NUM_THREADS" in os.environ:
        return
    try:
        if threads() < library.openblas_get_num_threads():
            library.openblas_set_num_threads(threads())
    except AttributeError:  # a build without threads, or another BLAS under its name
        pass


def _take_memory(library: ctypes.CDLL) -> None:
    """Have OpenBLAS allocate while there is room: by a product that is too large for its small kernels."""
    n, row_major, as_it_is = 128, 101, 111
    numbers = (ctypes.c_float * (n * n))()
    one = ctypes.c_float(1)
    library.cblas_sgemm(row_major, as_it_is, as_it_is, n, n, n, one, numbers, n, numbers, n, one, numbers, n)


def openblas_core(library: ctypes.CDLL) -> str:
    """The CPU whose kernels a loaded OpenBLAS uses, by OpenBLAS's name for it; "" if it does not say."""
    try:
        library.openblas_get_corename.restype = ctypes.c_char_p
        return str((library.openblas_get_corename() or b"").decode())
    except AttributeError:
        return ""


def _better_kernels(core: str) -> str | None:
    """What OPENBLAS_CORETYPE should say where OpenBLAS is older than the CPU, and so does not know it.

    Then it takes the kernels of a Prescott, without AVX: measured on such a CPU, five times slower.
    """
    if core != "Prescott" or "OPENBLAS_CORETYPE" in os.environ:
        return None
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            features = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    except OSError:
        return None
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= {*features}:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= {*features} else None
