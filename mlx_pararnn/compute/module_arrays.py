"""The arrays of a model's modules, by name, for what reads them without calling the modules."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear


class Changed(Exception):
    """A module is not as model.py makes it, so its arrays do not say what it computes."""


# Modules of MLX that are read as their arrays, and those they must have.
_PLAIN: dict[type, set[str]] = {
    nn.Linear: {"weight"},
    MultiLinear: {"weight"},
    nn.RMSNorm: {"weight"},
    nn.LayerNorm: {"weight", "bias"},
    nn.QuantizedLinear: {"weight", "scales", "biases"},
    QuantizedMultiLinear: {"weight", "scales", "biases"},
}
_TABLES: dict[type, set[str]] = {
    nn.Embedding: {"weight"},
    nn.QuantizedEmbedding: {"weight", "scales", "biases"},
}


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a module's parameters, or of a part of them, with their dotted names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def plain_arrays(name: str, module: nn.Module) -> dict[str, mx.array]:
    """The arrays of a module of MLX's; raises Changed for an adapter and the like.

    Returns:
        `name`, `name`_bias where there is one, and of a quantized matrix `name`.scales and `name`.biases.
    """
    return _arrays(name, module, _PLAIN)


def table_arrays(name: str, module: nn.Module) -> dict[str, mx.array]:
    """The same of an embedding; empty for any other module."""
    try:
        return _arrays(name, module, _TABLES)
    except Changed:
        return {}


def head_arrays(name: str, module: nn.Module) -> dict[str, mx.array]:
    """The same of a linear layer without a bias, or an embedding in its place; empty for any other module."""
    if type(module) in (nn.Linear, nn.QuantizedLinear) and "bias" not in module:
        try:
            return plain_arrays(name, module)
        except Changed:
            return {}
    return table_arrays(name, module)


def _arrays(name: str, module: nn.Module, kinds: dict[type, set[str]]) -> dict[str, mx.array]:
    wanted = kinds.get(type(module))
    if wanted is None or not wanted <= module.keys() or getattr(module, "mode", "affine") != "affine":
        raise Changed
    arrays = {name: module["weight"]}
    if "scales" in wanted:
        arrays |= {f"{name}.{part}": module[part] for part in ("scales", "biases")}
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
