"""A model divided among processes: which part of each weight one has, and what the parts tell each other.

Heads, and with them their channels, are divided, so the recurrence, the convolution and the state need no
word from elsewhere. A layer has two sums over the processes, as in other models: after the mixer's and after
the MLP's last product. The gated norm is over all channels; its sum of squares goes along with the first of
them. Embedding and head are divided over the vocabulary.

Letters in shapes: B sequences, T tokens, D channels, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from .compute import layer_ops, matrix_products
from .distributed import Group
from .errors import PararnnError

MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
MATRICES_OF_HEADS = (MultiLinear, QuantizedMultiLinear)


@dataclass(frozen=True)
class Shard:
    """The part of a model that a process has.

    Attributes:
        group: the processes.
        channels: where each one's channels begin, and D.
        tokens: where each one's part of the vocabulary begins, and V.
        heads: the heads, or the one whose channels are divided further, that this process computes.
        head_width: channels of a head.
    """

    group: Group
    channels: list[int]
    tokens: list[int]
    heads: range
    head_width: int

    @property
    def own(self) -> slice:
        """This process's channels."""
        return self._part(self.channels)

    @property
    def whole_heads(self) -> bool:
        """No head is divided."""
        return self.own.stop - self.own.start == len(self.heads) * self.head_width

    def entered(self, x: mx.array) -> mx.array:
        """x, the same in all processes, of which each is about to make its part: its gradient is a sum."""
        return cast(mx.array, sum_gradients(self.group)(x))

    def summed(self, x: mx.array) -> mx.array:
        """The sum of all processes' x."""
        return mx.distributed.all_sum(x, group=self.group)

    def gathered(self, x: mx.array, begins: Sequence[int]) -> mx.array:
        """All processes' x (..., part), one after the other: (..., whole)."""
        sizes = [end - begin for begin, end in pairwise(begins)]
        widest = max(sizes)
        if x.shape[-1] < widest:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, widest - x.shape[-1])])
        parts = mx.distributed.all_gather(x[None], group=self.group)
        if len(set(sizes)) == 1:
            return mx.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], begins[-1])
        return mx.concatenate([part[..., :n] for part, n in zip(parts, sizes, strict=True)], axis=-1)

    def embedded(self, table: nn.Module, ids: mx.array) -> mx.array:
        """The embeddings of token ids (B, T), of which each process has some rows: (B, T, D)."""
        part = self._part(self.tokens)
        here = (ids >= part.start) & (ids < part.stop)
        rows = table(mx.where(here, ids - part.start, 0))
        return self.summed(mx.where(here[..., None], rows, mx.zeros((), rows.dtype)))

    def of_heads(self, x: mx.array) -> mx.array:
        """What this process's heads read of x (B, T, D)."""
        return x[..., self.heads.start * self.head_width : self.heads.stop * self.head_width]

    def whole(self, x: mx.array) -> mx.array:
        """All channels of x (B, T, part): (B, T, D)."""
        return self.gathered(x, self.channels)

    def normed_product(
        self, hidden: mx.array, gate: mx.array, norm: nn.RMSNorm, module: nn.Module, backend: str
    ) -> mx.array:
        """`module` of RMSNorm(hidden) * silu(gate), of which each process has some channels: (B, T, D).

        The norm is one number a token, so it is multiplied in after the product, and a single sum is enough.
        """
        own = matrix_products.linear(module, layer_ops.swiglu(gate, hidden * norm.weight, backend=backend))
        squares = hidden.astype(mx.float32).square().sum(axis=-1, keepdims=True)
        both = self.summed(mx.concatenate([own.astype(mx.float32), squares], axis=-1))
        scale = mx.rsqrt(both[..., -1:] / self.channels[-1] + norm.eps)
        return (both[..., :-1] * scale).astype(own.dtype)

    def product(self, module: nn.Module, x: mx.array) -> mx.array:
        """A linear layer whose inputs are divided, of this process's part of them."""
        own = matrix_products.linear(module, x)
        if "bias" not in module:
            return self.summed(own)
        return self.summed(own - module.bias) + module.bias

    def _part(self, begins: Sequence[int]) -> slice:
        return slice(*begins[self.group.rank() : self.group.rank() + 2])


def divide(model: Any, group: Group) -> Shard:
    """Leave of `model`'s weights those that this process needs; the modules keep their names.

    Raises:
        PararnnError: the model cannot be divided by so many; nothing is changed then.
    """
    shard = _plan(model, group)
    part, own = shard._part(shard.tokens), shard.own
    keep_rows(model.model.embed_tokens, part)
    if "lm_head" in model:
        keep_rows(model.lm_head, part)
    for layer in model.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if "in_proj" in mixer:
            D = shard.channels[-1]
            keep_rows(mixer.in_proj, own, slice(own.start + D, own.stop + D))
            for module in (mixer.conv1d, mixer.norm):
                _keep(module, dict.fromkeys(module.parameters(), (0, [own])))
            keep_columns(mixer.out_proj, own)
        _divide_cell(mixer.cell, shard)
        inner = _unit(mlp.down_proj)
        begins = _begins(mlp.up_proj.weight.shape[0], inner, group.size())
        for name in ("gate_proj", "up_proj"):
            if name in mlp:
                keep_rows(mlp[name], shard._part(begins))
        keep_columns(mlp.down_proj, shard._part(begins))
    return shard


def keep_rows(module: nn.Module, *rows: slice) -> None:
    """Leave these outputs of a linear layer, or these rows of an embedding."""
    _keep(
        module,
        {name: (array.ndim - 1 if name == "bias" else -2, rows) for name, array in _arrays(module).items()},
    )


def keep_columns(module: nn.Module, columns: slice) -> None:
    """Leave these inputs of a linear layer."""
    width = _width(module)
    for name, array in _arrays(module).items():
        if name != "bias":
            # words of a quantized weight, its scales and biases each stand for some columns
            begin, end = (place * array.shape[-1] // width for place in (columns.start, columns.stop))
            _keep(module, {name: (-1, [slice(begin, end)])})


def _plan(model: Any, group: Group) -> Shard:
    args, size, rank = model.args, group.size(), group.rank()
    heads, width = args.num_heads, args.hidden_size // args.num_heads
    for name, module in model.named_modules():
        matrix = isinstance(module, (*MATRICES, *MATRICES_OF_HEADS))
        if (matrix and type(module) not in (*MATRICES, *MATRICES_OF_HEADS)) or "lora_a" in module:
            raise PararnnError(
                f"{name} is a {type(module).__name__}, which cannot be divided among processes; with "
                "adapters take weights that are not quantized, to which they are added"
            )
    if heads >= size:
        firsts = _begins(heads, 1, size)
        own = range(firsts[rank], firsts[rank + 1])
        channels = [first * width for first in firsts]
    elif size % heads == 0 and width % (size // heads) == 0:
        own = range(rank * heads // size, rank * heads // size + 1)
        channels = _begins(args.hidden_size, 1, size)
    else:
        raise PararnnError(
            f"a model of {heads} heads with {width} channels cannot be divided among {size} processes; start "
            f"as many as divide {heads}, or fewer"
        )
    if args.mixer == "gated_conv":
        unit = math.lcm(*(_unit(layer.mixer.out_proj) for layer in model.layers))
        if any(begin % unit for begin in channels):
            raise PararnnError(
                f"among {size} processes the channels of a quantization group, {unit}, would be divided; "
                f"start fewer, or quantize with a smaller --q-group-size"
            )
    if args.vocab_size < size:
        raise PararnnError(f"a vocabulary of {args.vocab_size} cannot be divided among {size} processes")
    return Shard(group, channels, _begins(args.vocab_size, 1, size), own, width)


def _divide_cell(cell: Any, shard: Shard) -> None:
    own, heads, width = shard.own, shard.heads, shard.head_width
    gates = len(cell.cell.gates)
    # of the heads' outputs, gate by gate, the channels of this process: all, unless a head is divided
    first = own.start - heads.start * width
    channels = slice(first, first + (own.stop - own.start) // len(heads))
    rows = [slice(g * width + channels.start, g * width + channels.stop) for g in range(gates)]
    for module, names in ((cell.input_proj, _arrays(cell.input_proj)), (cell, {"bias": cell.bias})):
        _keep(module, {name: (0, [slice(heads.start, heads.stop)]) for name in names})
        if not shard.whole_heads:
            _keep(module, dict.fromkeys(names, (1, rows)))
    _keep(cell, {name: (1, [own]) for name in ("recurrent_weight", "initial_state") if name in cell})
    cell.num_heads = len(heads)


def _keep(module: nn.Module, places: dict[str, tuple[int, Sequence[slice]]]) -> None:
    """Leave of a module's arrays these slices along an axis, and free the rest of their memory."""
    for name, (axis, slices) in places.items():
        array = module[name]
        before = (slice(None),) * (axis % array.ndim)
        module[name] = mx.contiguous(mx.concatenate([array[(*before, s)] for s in slices], axis=axis))
        del array
        mx.eval(module[name])


def _arrays(module: nn.Module) -> dict[str, mx.array]:
    return {name: module[name] for name in ("weight", "scales", "biases", "bias") if name in module}


def _begins(total: int, unit: int, size: int) -> list[int]:
    """Where each of `size` parts of `total` begins, in multiples of `unit` as even as can be; and the end."""
    return [unit * (total // unit * rank // size) for rank in range(size)] + [total]


def _unit(module: nn.Module) -> int:
    """How many inputs of a linear layer can only be kept or left together."""
    return module.group_size if "scales" in module else 1


def _width(module: nn.Module) -> int:
    """The inputs of a linear layer."""
    if "scales" in module:
        return cast(int, module.scales.shape[-1] * module.group_size)
    return cast(int, module.weight.shape[-1])
