"""The trial of the one call for a token: its numbers and those of MLX's ops, for small models."""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_map_with_path

from ..cache import RecurrentCache, held_arrays
from ..cells import Cell
from ..model_config import ModelArgs
from .choice import PLAIN
from .cpu_token import Formats, Memory, run


def compared_tokens(
    model_type: type[Any],
    castable: Callable[[str], bool],
    quantizable: Callable[[str, nn.Module], bool],
    cell: Cell,
    dtype: mx.Dtype,
    formats: Formats,
) -> Iterator[tuple[list[mx.array], list[mx.array]]]:
    """What the one call for a token gives, and what MLX's ops give in float32, for small models of a cell.

    The first is not quantized, each of the others in one of the formats.

    Args:
        model_type: `PararnnModel`, from which small ones are made.
        castable: whether weights, by their path, have the dtype.
        quantizable: whether a module, by its path, is a matrix that may be quantized.
    """

    def waves(shape: tuple[int, ...], size: float = 0.5) -> mx.array:
        return size * mx.sin(mx.arange(math.prod(shape))).reshape(shape)

    def weight(path: str, array: mx.array) -> mx.array:
        # numbers of a usual size at any width: an exponential of large ones is not the same twice
        made = waves(array.shape, min(0.5, array.shape[-1] ** -0.5) if array.ndim > 1 else 0.5)
        return made.astype(dtype) if castable(path) else made

    for packed in (None, *formats):
        D, wide = (72, 80) if packed is None else (2 * packed[1], packed[1])
        args = ModelArgs(D, 2, 8, wide, cell=cell.name, num_heads=2, activations=cell.activations)
        high, low = cast(Any, mx.random.state)[0].tolist()
        model, head = model_type(args), nn.Linear(D, 80, bias=False)
        for module in (model, head):
            module.update(tree_map_with_path(weight, module.parameters()))
            if packed is not None:
                nn.quantize(module, packed[1], packed[0], class_predicate=quantizable)
        mx.random.seed(high << 32 | low)  # the user's numbers stay what they would have been
        x = waves((2, 1, D)).astype(dtype)
        caches = [[RecurrentCache(2) for _ in model.layers] for _ in range(2)]
        for c in caches[0] + caches[1]:
            c.cache = [0.5 + waves((2, len(cell.slots), D), 0.3), waves((2, 3, D)).astype(dtype)]
        weights = model.token_weights(head)._replace(embedding={})
        decoded = run(weights, x, caches[0], formats, Memory())
        x = _in_float32(x)
        for module in (model, head):
            module.update(tree_map(_in_float32, module.parameters()))
        for layer, c in zip(model.layers, caches[1], strict=True):
            c.cache = [*map(_in_float32, c.cache)]
            x = layer(x, c, None, PLAIN)
        y = model.norm(x)
        given = decoded.y, cast(mx.array, decoded.logits)
        # the head reads y as it was given, rounded to the dtype
        wanted = [y, head(_in_float32(decoded.y)), *held_arrays(caches[1])]
        yield [*given, *held_arrays(caches[0])], wanted


def _in_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
