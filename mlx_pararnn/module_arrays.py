"""The arrays of a model's modules, by name, for what reads them without calling the modules."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear


class Changed(Exception):
    """A module is not as model.py makes it, so its arrays do not say what it computes."""


# Modules of MLX that are read as their arrays, and those they must have.
_PLAIN: dict[type, set[str]] = {
    nn.Linear: {"weight"},
    MultiLinear: {"weight"},
    nn.RMSNorm: {"weight"},
    nn.LayerNorm: {"weight", "bias"},
}


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a module's parameters, or of a part of them, with their dotted names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def plain_arrays(name: str, module: nn.Module) -> dict[str, mx.array]:
    """The arrays of a module of MLX's; raises Changed for a quantized one, an adapter and the like."""
    wanted = _PLAIN.get(type(module))
    if wanted is None or not wanted <= module.keys():
        raise Changed
    arrays = {name: module["weight"]}
    return arrays | {f"{name}_bias": module["bias"]} if "bias" in module else arrays


def norm_arrays(name: str, module: nn.Module, eps: float) -> dict[str, mx.array]:
    """A norm's arrays; raises Changed where its eps is another."""
    arrays = plain_arrays(name, module)
    if module.eps != eps:
        raise Changed
    return arrays


def handed_arrays(module: Any, *kinds: type, **arguments: Any) -> dict[str, mx.array]:
    """What a module of model.py hands out; raises Changed for any other, a subclass too."""
    if type(module) not in kinds:
        raise Changed
    return module.token_arrays(**arguments)  # type: ignore[no-any-return]
