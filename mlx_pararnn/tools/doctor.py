"""What this machine offers MLX and this package, and what would make it better: `mlx-pararnn doctor`."""

import ctypes
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..compute.openblas import load_openblas, openblas_core

PACKAGES = ("mlx-pararnn", "mlx", "mlx-lm", "numpy", "safetensors", "transformers", "typer")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to install or set, and is empty where all is well."""

    item: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at versions, device, backends, BLAS, TF32, compiler and cache folder; takes about a second.

    Raises:
        ImportError: MLX cannot be loaded at all.
    """
    blas = load_openblas()
    import mlx.core as mx

    findings = [
        Finding("machine", f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"),
        Finding("python", platform.python_version()),
        *(_package(name) for name in PACKAGES),
        Finding("device", f"{mx.default_device()}, {mx.device_info().get('device_name', 'no name')}"),
        *_backends(),
        _blas(blas),
        Finding("matrix product", f"{_gigaflops():.0f} GFLOP/s in float32 on the default device"),
        _tf32(),
        _compiler(),
        Finding("model cache", _model_cache()),
        Finding("compiled kernels", _compiled_kernels()),
    ]
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed", f"pip install {name}")


def _backends() -> list[Finding]:
    from ..compute.gpu import available_backend

    here = available_backend()
    reasons = {
        "metal": "needs a Mac with Apple silicon",
        "cuda": "needs Linux with an NVIDIA card and MLX's CUDA build",
    }
    asked = os.environ.get("MLX_PARARNN_BACKEND")
    return [
        *(
            Finding(f"backend {n}", "present" if n == here else f"not here: {why}")
            for n, why in reasons.items()
        ),
        _cpu_backend(here),
        Finding("backend ops", "present" + (f"; MLX_PARARNN_BACKEND={asked}" if asked else "")),
    ]


def _cpu_backend(gpu: str | None) -> Finding:
    from ..cells import get_cell
    from ..compute import cpu, cpu_build, cpu_cores, prebuilt

    name = "backend cpu"
    if gpu:
        return Finding(name, f"not used: the device is a GPU ({gpu})")
    try:
        begin = time.perf_counter()
        library = cpu.load(get_cell("gru"), "float32")
    except cpu_build.BuildError as error:
        return Finding(name, "cannot be built: plain MLX ops take its place", str(error))
    seconds = time.perf_counter() - begin
    try:
        made_by = cpu_build.compiler()
    except cpu_build.NoCompilerError:
        made_by = "built before, no compiler now"
    if (brought := Path(library._name)).parent == prebuilt.FOLDER:
        made_by = f"came compiled, {brought.stem.rsplit('-', 2)[0]}"
    return Finding(name, f"present: {made_by}, {cpu_cores.threads()} threads, loaded in {seconds:.1f} s")


def _blas(loaded: str | None) -> Finding:
    if sys.platform == "darwin":
        return Finding("BLAS", "Accelerate")
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    if loaded and (not maps or "openblas" in maps):
        threads = os.environ.get("OPENBLAS_NUM_THREADS", "all cores")
        core = openblas_core(ctypes.CDLL(loaded)) or "an unknown CPU"
        return Finding("BLAS", f"OpenBLAS ({loaded}, {threads}, kernels for {core})")
    return Finding(
        "BLAS",
        "MLX's own (the reference BLAS, slow)",
        "install OpenBLAS, for example: apt install libopenblas0-pthread",
    )


def _gigaflops(n: int = 768) -> float:
    import mlx.core as mx

    a = mx.random.normal((n, n))
    mx.eval(a, a @ a)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best / 1e9


def _tf32() -> Finding:
    on = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    where = "float32 matrix products of newer GPUs may be rounded to TF32"
    return Finding(
        "TF32", f"on: {where}" if on else "off", "MLX_ENABLE_TF32=0 for float32 parity" if on else ""
    )


def _compiler() -> Finding:
    if sys.platform == "darwin":
        return Finding("compiler", "not needed: Metal's is part of macOS")
    found = shutil.which("g++")
    if found:
        return Finding("compiler", found)
    return Finding(
        "compiler", "no g++: MLX cannot fuse elementwise work", "install one, for example: apt install g++"
    )


def _model_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def _compiled_kernels() -> str:
    from ..compute.cpu_build import BuildError, cache_folder

    try:
        return str(cache_folder())
    except BuildError as error:
        return str(error)
