"""What happens when `mlx_pararnn` is imported: a few modules are watched for, none is imported.

* `mlx.core`: just before its first import a system OpenBLAS is loaded, on Linux (`compute/openblas.py`), and
  it is made sure that the folder where MLX compiles for a CPU is the user's own (`compute/mlx_folder.py`).
* `mlx_lm.models.pararnn`: MLX-LM finds a model class by importing a module of that name; it gets `model.py`.
* `mlx_lm.models.cache`: MLX-LM's saved prompt caches name their class; ours is put there.
* `mlx_lm.tuner.utils`: adapters of our models are for the recurrence's projection too (`adapters.py`).
* `mlx_lm.utils`: it asks for 4096 open files as it is imported, which fails where fewer are allowed; the
  limit then stays as it is.

An import hook does this, so that `import mlx_pararnn` costs nothing until MLX is used, and so that
`mlx_lm.load` works after it. Every import of this file's own is paid by all who import the package: typing
and `importlib.abc`, with its base classes, are done without.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from types import ModuleType
    from typing import Any


def install() -> None:
    """Register with MLX-LM; called once, by the package's `__init__`."""
    if "mlx.core" in sys.modules:
        from .compute.openblas import warn_if_late

        warn_if_late()
        _secure_mlx_folder()
    if "mlx_lm.models.cache" in sys.modules:
        _import_cache()
    if "mlx_lm.tuner.utils" in sys.modules:
        _extend_adapters(sys.modules["mlx_lm.tuner.utils"])
    if not any(type(finder).__name__ == _Watcher.__name__ for finder in sys.meta_path):  # a reload
        sys.meta_path.insert(0, _Watcher())


def _import_cache() -> None:
    import_module(f"{__package__}.cache")  # puts its class into MLX-LM's module at its end


def _extend_adapters(module: ModuleType) -> None:
    with_recurrence = import_module(f"{__package__}.adapters").with_recurrence
    if not hasattr(module.linear_to_lora_layers, "__wrapped__"):  # a reload
        module.linear_to_lora_layers = with_recurrence(module.linear_to_lora_layers)  # type: ignore[attr-defined]


def _secure_mlx_folder() -> None:
    from .compute.mlx_folder import secure_mlx_folder

    secure_mlx_folder()


class _Watcher:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "mlx.core":
            from .compute.openblas import load_openblas
            from .process.address_space import check_address_space

            check_address_space()
            load_openblas()
            _secure_mlx_folder()
        elif name == "mlx_lm.models.pararnn":
            return ModuleSpec(name, _ModelModule())  # type: ignore[arg-type]
        elif name in _WRAPPED:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _WRAPPED[name](spec.loader)  # type: ignore[assignment]
            return spec
        return None


class _ModelModule:
    """`mlx_lm.models.pararnn`: the names MLX-LM asks a model's module for."""

    def create_module(self, spec: ModuleSpec) -> None:
        """None: the import system makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        model = import_module(f"{__package__}.model")
        vars(module).update(Model=model.Model, ModelArgs=model.ModelArgs)


class _Wrapped:
    """Load a module as its own loader does."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # get_source, get_data, is_package: as the loader has them
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)


class _ThenOurCache(_Wrapped):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _import_cache()


class _ThenOurAdapters(_Wrapped):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _extend_adapters(module)


class _KeepFileLimit(_Wrapped):
    """Load a module that may find it cannot raise the limit of open files."""

    def exec_module(self, module: ModuleType) -> None:
        import resource
        from contextlib import suppress

        setrlimit = resource.setrlimit

        def try_to_set(kind: int, limits: tuple[int, int]) -> None:
            with suppress(ValueError, OSError):
                setrlimit(kind, limits)

        resource.setrlimit = try_to_set
        try:
            super().exec_module(module)
        finally:
            resource.setrlimit = setrlimit


_WRAPPED = {
    "mlx_lm.models.cache": _ThenOurCache,
    "mlx_lm.tuner.utils": _ThenOurAdapters,
    "mlx_lm.utils": _KeepFileLimit,
}
