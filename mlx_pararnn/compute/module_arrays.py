"""The arrays of a model's modules, by name, for what reads them without calling the modules."""

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import is_
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


class Held:
    """What modules and all inside of them hold when this is made; it keeps no array and no module.

    Asked for each token, in a third of the time that gathering the arrays takes.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        inside = [module for outer in modules for _, module in outer.named_modules()]
        self._outer = list(map(weakref.ref, modules))
        self._modules = list(map(weakref.ref, inside))
        self._types = list(map(type, inside))
        self._names = _names(inside)
        self._settings = [value for module in inside for value in vars(module).values()]  # a norm's eps
        try:
            self._values = [weakref.ref(value) for module in inside for value in module.values()]
        except TypeError:  # a list, whose members may change: of such modules nothing is known
            self._outer = []

    def same(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these are the modules, and hold the same objects and settings."""
        inside = cast(list[nn.Module], [seen() for seen in self._modules])
        return (
            0 < len(modules) == len(self._outer)
            and all(map(is_, modules, [seen() for seen in self._outer]))
            and list(map(type, inside)) == self._types
            and _names(inside) == self._names
            and all(
                map(is_, chain.from_iterable(map(dict.values, inside)), [seen() for seen in self._values])
            )
            and all(map(is_, chain.from_iterable(vars(module).values() for module in inside), self._settings))
        )


def _names(modules: Sequence[nn.Module]) -> list[list[str]]:
    return [[*module, *vars(module)] for module in modules]
