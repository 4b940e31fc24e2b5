"""A quick start: MLX-LM without transformers and the Hugging Face client, whose imports take longest.

MLX-LM's modules import both at their top. For the few names that they import, stand-ins are there while they
are loaded. Any other name of the two brings the real package, and whoever imports one of them later gets it
whole.

For a process of our own, as a command is, that reads no tokenizer or a plain one
(`files.model_files.has_plain_tokenizer`): `mlx_lm.load` does not work in it.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn


def start_quickly() -> None:
    """Import MLX-LM without the two, where none of the three is imported yet."""
    if {"mlx_lm", *_NAMES} & sys.modules.keys():
        return
    sys.modules.update({package: _StandIn(package, names) for package, names in _NAMES.items()})
    try:
        import_module("mlx_lm")
    finally:
        _remove_stand_ins()


def started_quickly() -> bool:
    """Whether MLX-LM has no transformers in this process."""
    utils: Any = sys.modules.get("mlx_lm.tokenizer_utils")
    return utils is not None and utils.AutoTokenizer is _AutoTokenizer


class _StandIn(ModuleType):
    def __init__(self, package: str, names: dict[str, Any]) -> None:
        super().__init__(package)
        vars(self).update(names)
        spec = find_spec(package) if "." not in package else None
        if spec is not None:
            self.__path__ = list(spec.submodule_search_locations or [])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks modules for such names
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(import_module(self.__name__), name)


def _remove_stand_ins() -> None:
    for package in _NAMES:
        if isinstance(sys.modules.get(package), _StandIn):
            del sys.modules[package]


class _Tokenizer:
    """MLX-LM derives a class from it, and asks whether a tokenizer renders templates otherwise than this."""

    apply_chat_template = None


class _AutoTokenizer:
    @staticmethod
    def register(*given: Any, **more: Any) -> None:
        """MLX-LM's own class, which only a tokenizer that is not plain names."""

    @staticmethod
    def from_pretrained(*given: Any, **more: Any) -> NoReturn:
        _refuse()


def _refuse(*given: Any, **more: Any) -> NoReturn:
    raise RuntimeError("this process was started without transformers and the Hugging Face client")


_NAMES: dict[str, dict[str, Any]] = {
    "transformers": {
        "AutoTokenizer": _AutoTokenizer,
        "PreTrainedTokenizer": _Tokenizer,
        "PreTrainedTokenizerFast": _Tokenizer,
    },
    "transformers.tokenization_utils_base": {"PreTrainedTokenizerBase": _Tokenizer},
    "huggingface_hub": {"snapshot_download": _refuse},
}
