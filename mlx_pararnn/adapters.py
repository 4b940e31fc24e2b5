"""LoRA and DoRA for the recurrence's projection, which MLX-LM's adapters leave out, and its unpacking.

`import_hook.py` puts `with_recurrence` around MLX-LM's `linear_to_lora_layers`, so that its commands, its
loading of adapters and `mlx-pararnn train` have them alike. Other models than this package's stay as they
are.

Letters in shapes: H heads, I inputs and O outputs of a head, R the adapter's rank.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from .errors import PararnnError


class LoRAMultiLinear(nn.Module):
    """A MultiLinear and a learned product of low rank for each head; zero at first.

    Weights, with MLX-LM's names:
        linear: the MultiLinear, quantized or not.
        lora_a: (H, I, R).
        lora_b: (H, R, O).
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        heads, outputs, inputs = _weight(linear).shape
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (heads, inputs, rank))
        self.lora_b = mx.zeros((heads, rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """x (H, rows, I) -> (H, rows, O)."""
        change = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return cast(mx.array, self.linear(x)) + (self.scale * change).astype(x.dtype)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The MultiLinear with the change added in; quantized as before unless `dequantize`."""
        return _replaced(self.linear, self._changed(), dequantize)

    def _changed(self) -> mx.array:
        weight = _weight(self.linear)
        change = self.scale * (self.lora_a @ self.lora_b).swapaxes(-1, -2)
        return weight + change.astype(weight.dtype)


class DoRAMultiLinear(LoRAMultiLinear):
    """The same with the length of each row learned apart from its direction (arXiv 2402.09353).

    Weights: those of LoRAMultiLinear, and m (H, O).
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        self.m = mx.linalg.norm(_weight(linear).astype(mx.float32), axis=-1)

    def __call__(self, x: mx.array) -> mx.array:
        """x (H, rows, I) -> (H, rows, O)."""
        # DoRA, section 4.3: no gradient through the norm
        norm = mx.stop_gradient(mx.linalg.norm(self._changed().astype(mx.float32), axis=-1))
        return super().__call__(x) * (self.m / norm)[:, None].astype(x.dtype)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """As LoRAMultiLinear's."""
        weight = self._changed()
        scale = self.m / mx.linalg.norm(weight.astype(mx.float32), axis=-1)
        return _replaced(self.linear, weight * scale[..., None].astype(weight.dtype), dequantize)


def with_recurrence(convert: Callable[..., None]) -> Callable[..., None]:
    """MLX-LM's `linear_to_lora_layers`, which then gives our models' recurrences their adapters too."""

    @wraps(convert)
    def both(model: Any, num_layers: int, config: dict[str, Any], use_dora: bool = False) -> None:
        if getattr(model, "model_type", None) != "pararnn":
            return convert(model, num_layers, config, use_dora)
        keys = config.get("keys")
        others = config if keys is None else config | {"keys": [k for k in keys if k != _KEY]}
        convert(model, num_layers, others, use_dora)
        if keys is None or _KEY in keys:
            _add_to_recurrence(model, num_layers, config, use_dora)
        return None

    return both


def unpack(model: nn.Module) -> nn.Module:
    """Put plain matrices in the place of a model's quantized ones; MLX-LM's passes over the recurrence's.

    They are of the type of their scales.
    """
    from mlx_lm.utils import dequantize_model

    packed = [pair for pair in model.named_modules() if isinstance(pair[1], QuantizedMultiLinear)]
    plain = [(name, _replaced(linear, _weight(linear), dequantize=True)) for name, linear in packed]
    model.update_modules(tree_unflatten(plain))
    return dequantize_model(model)


_KEY = "mixer.cell.input_proj"  # as `keys` in MLX-LM's configuration name it


def _add_to_recurrence(model: Any, num_layers: int, config: dict[str, Any], use_dora: bool) -> None:
    kind = DoRAMultiLinear if use_dora else LoRAMultiLinear
    for layer in model.layers[-max(num_layers, 0) :]:
        linear = layer.mixer.cell.input_proj
        if not isinstance(linear, (MultiLinear, QuantizedMultiLinear)):
            raise PararnnError("this model has adapters already; fuse them first: mlx-pararnn lm fuse")
        adapter = kind(linear, config["rank"], config["scale"], config["dropout"])
        layer.update_modules(tree_unflatten([(_KEY, adapter)]))


def _weight(linear: Any) -> mx.array:
    """(H, O, I), unpacked."""
    if isinstance(linear, MultiLinear):
        return linear.weight
    form = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return mx.dequantize(linear.weight, linear.scales, linear.get("biases"), **form)


def _replaced(linear: Any, weight: mx.array, dequantize: bool) -> nn.Module:
    heads, outputs, inputs = weight.shape
    fused = MultiLinear(inputs, outputs, heads)
    fused.weight = weight
    if isinstance(linear, MultiLinear) or dequantize:
        return fused
    return fused.to_quantized(linear.group_size, linear.bits, linear.mode)  # type: ignore[no-any-return]
