"""What happens when `mlx_pararnn` is imported: a few modules are watched for, none is imported.

* `mlx.core`: just before its first import a system OpenBLAS is loaded, on Linux. The BLAS that MLX's Linux
  wheel brings is the reference one, many times slower in float32 matrix products.
* `mlx_lm.models.pararnn`: MLX-LM finds a model class by importing a module of that name; it gets `model.py`.
* `mlx_lm.models.cache`: MLX-LM's saved prompt caches name their class; ours is put there.
* `mlx_pararnn.convert`, `mlx_pararnn.cli`: in a checkout these two stand beside this folder and not in it, so
  `import mlx_pararnn` from the repository's root would not find them.

An import hook does this, so that `import mlx_pararnn` costs nothing until MLX is used, and so that
`mlx_lm.load` works after it. Every import of this file's own is paid by all who import the package: ctypes
waits until it is needed; pathlib, typing and `importlib.abc`, with its base classes, are done without.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from types import ModuleType
    from typing import Any


def install() -> None:
    """Register with MLX-LM; called once, by the package's `__init__`."""
    if "mlx_lm.models.cache" in sys.modules:
        _import_cache()
    if not any(type(finder).__name__ == _Watcher.__name__ for finder in sys.meta_path):  # a reload
        sys.meta_path.insert(0, _Watcher())


def load_openblas() -> str | None:
    """Load a system OpenBLAS so that MLX's CPU matrix products use it.

    Returns:
        The library's name, or None where there is none or it is not needed (macOS). Only what is loaded
        before `mlx.core` has an effect: symbols are bound when MLX is loaded.
    """
    if sys.platform != "linux":
        return None
    import ctypes

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
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            del os.environ["OPENBLAS_CORETYPE"]
        return name
    return None


def openblas_core(library: ctypes.CDLL) -> str:
    """The CPU whose kernels a loaded OpenBLAS uses, by OpenBLAS's name for it; "" if it does not say."""
    from ctypes import c_char_p

    try:
        library.openblas_get_corename.restype = c_char_p
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


def _import_cache() -> None:
    import_module(f"{__package__}.cache")  # puts its class into MLX-LM's module at its end


class _Watcher:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "mlx.core":
            load_openblas()
        elif name == "mlx_lm.models.pararnn":
            return ModuleSpec(name, _ModelModule())  # type: ignore[arg-type]
        elif name == "mlx_lm.models.cache":
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Then(spec.loader, _import_cache)  # type: ignore[assignment]
            return spec
        elif name in ("mlx_pararnn.convert", "mlx_pararnn.cli", "mlx_pararnn.metal"):
            return _beside_this_folder(name)
        return None


def _beside_this_folder(name: str) -> ModuleSpec | None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.path.join(root, name.rpartition(".")[2])
    if not (os.path.isfile(os.path.join(root, "pyproject.toml")) and os.path.isdir(folder)):
        return None
    from importlib.util import spec_from_file_location

    return spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )


class _ModelModule:
    """`mlx_lm.models.pararnn`: the names MLX-LM asks a model's module for."""

    def create_module(self, spec: ModuleSpec) -> None:
        """None: the import system makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        model = import_module(f"{__package__}.model")
        vars(module).update(Model=model.Model, ModelArgs=model.ModelArgs)


class _Then:
    """Load a module as usual, then call `action`."""

    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self.loader = loader
        self.action = action

    def __getattr__(self, name: str) -> Any:  # get_source, get_data, is_package: as the loader has them
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action()
