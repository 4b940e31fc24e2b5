"""ParaRNN language models on Apple silicon, as one more MLX-LM model.

Importing this package is cheap: it neither imports MLX nor loads anything until a name below is used. What
it does at import time is register its model and cache with MLX-LM (see `import_hook.py`).
"""

from __future__ import annotations

from importlib import import_module

from . import import_hook

TYPE_CHECKING = False  # typing's, which is slow to import
if TYPE_CHECKING:
    from typing import Any

    __version__: str
    from .cells import Cell, get_cell, register_cell
    from .completion import Completer, complete
    from .drafts import generate_with_draft
    from .errors import PararnnError
    from .generation import generate, stream_generate
    from .images.image_model import load_image_model
    from .images.use import draw, see
    from .loading import load, load_cell, load_model
    from .model import Model
    from .model_config import ModelArgs
    from .pocket.answers import answer, stream_answer
    from .pocket.functions import Functions

_HOME = {
    "Cell": "cells",
    "Completer": "completion",
    "Functions": "pocket.functions",
    "Model": "model",
    "ModelArgs": "model_config",
    "PararnnError": "errors",
    "answer": "pocket.answers",
    "complete": "completion",
    "draw": "images.use",
    "generate": "generation",
    "generate_with_draft": "drafts",
    "get_cell": "cells",
    "load": "loading",
    "load_cell": "loading",
    "load_image_model": "images.image_model",
    "load_model": "loading",
    "register_cell": "cells",
    "see": "images.use",
    "stream_answer": "pocket.answers",
    "stream_generate": "generation",
}

__all__ = [
    "Cell",
    "Completer",
    "Functions",
    "Model",
    "ModelArgs",
    "PararnnError",
    "__version__",
    "answer",
    "cells",
    "complete",
    "draw",
    "generate",
    "generate_with_draft",
    "get_cell",
    "load",
    "load_cell",
    "load_image_model",
    "load_model",
    "register_cell",
    "see",
    "stream_answer",
    "stream_generate",
]

import_hook.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name == "cells":
        return import_module(".cells", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """Of the package as installed; of a checkout that is not, what its pyproject.toml says."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlx-pararnn")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["project"]["version"])


def __dir__() -> list[str]:
    return sorted(__all__)
