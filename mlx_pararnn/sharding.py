"""A model divided among processes: which part of each weight one has, and what the parts tell each other.

Heads, and with them their channels, are divided, so the recurrence, the convolution and the state need no
word from elsewhere. A layer has two sums over the processes, as in other models: after the mixer's and after
the MLP's last product. The gated norm is over all channels; its sum of squares goes along with the first of
them. Embedding and head are divided over the vocabulary.

Letters in shapes: B sequences, T tokens, D channels, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import sum_gradients
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from .compute import layer_ops, matrix_products
from .compute.module_arrays import named_arrays
from .distributed import Group
from .errors import PararnnError

MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
MATRICES_OF_HEADS = (MultiLinear, QuantizedMultiLinear)
MATRIX_ARRAYS = ("weight", "scales", "biases", "bias")

# What a process keeps of an array: of each axis that is named these slices.
Cuts: TypeAlias = list[tuple[int, Sequence[slice]]]


class Whole:
    """A model in one process: what `Shard` does where nothing is divided."""

    group = None

    def entered(self, x: mx.array) -> mx.array:
        """x itself."""
        return x

    def embedded(self, table: nn.Module, ids: mx.array) -> mx.array:
        """The embeddings (B, T, D) of token ids (B, T)."""
        return cast(mx.array, table(ids))

    def of_heads(self, x: mx.array) -> mx.array:
        """x itself: all heads are here."""
        return x

    def own_to_heads(self, x: mx.array) -> mx.array:
        """x itself: all heads are here."""
        return x

    def whole(self, x: mx.array) -> mx.array:
        """x itself: all channels are here."""
        return x

    def cell_norm(self, gate: mx.array, norm: nn.RMSNorm) -> tuple[Any, ...]:
        """The gated norm goes along with the cell."""
        return gate, norm.weight, norm.eps

    def normed_product(
        self, hidden: mx.array, gate: mx.array, norm: nn.RMSNorm, module: nn.Module, backend: str
    ) -> mx.array:
        """`module` of hidden, which is normed already: (B, T, D)."""
        return matrix_products.linear(module, hidden)

    def product(self, module: nn.Module, x: mx.array) -> mx.array:
        """A linear layer."""
        return matrix_products.linear(module, x)

    def logits(self, head: nn.Module, x: mx.array, backend: str) -> mx.array:
        """Logits (B, T, V) of the last norm's output (B, T, D)."""
        return matrix_products.head(head, x, backend=backend)


@dataclass(frozen=True)
class Shard:
    """The part of a model that a process has; `Whole` has the same methods.

    Attributes:
        group: the processes.
        channels: where each one's channels begin, and D.
        tokens: where each one's part of the vocabulary begins, and V.
        heads: the heads, or the one whose channels are divided further, that this process computes.
        head_width: channels of a head.
        parts: of each weight the shape that it has as a whole, and what this process keeps of it; nothing
            for one that every process has.
    """

    group: Group
    channels: list[int]
    tokens: list[int]
    heads: range
    head_width: int
    parts: dict[str, tuple[tuple[int, ...], Cuts]] = field(default_factory=dict)

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

    def own_to_heads(self, x: mx.array) -> mx.array:
        """What this process's heads read of x (B, T, part), its own channels."""
        return x if self.whole_heads else self.of_heads(self.entered(self.whole(x)))

    def whole(self, x: mx.array) -> mx.array:
        """All channels of x (B, T, part): (B, T, D)."""
        return self.gathered(x, self.channels)

    def cell_norm(self, gate: mx.array, norm: nn.RMSNorm) -> tuple[Any, ...]:
        """Nothing: the cell leaves the gated norm, which is over all channels, to `normed_product`."""
        return ()

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

    def logits(self, head: nn.Module, x: mx.array, backend: str) -> mx.array:
        """Logits (B, T, V) of the last norm's output (B, T, D)."""
        return self.gathered(matrix_products.head(head, self.entered(x), backend=backend), self.tokens)

    def joined(self, name: str, own: mx.array) -> mx.array:
        """The whole of a weight, float32, of which each process has its part; all have to ask."""
        shape, cuts = self.parts[name]
        if not cuts:
            return own
        places = [np.arange(n) for n in shape]
        for axis, slices in cuts:
            places[axis] = np.concatenate([places[axis][s] for s in slices])
        whole = np.zeros(shape, np.float32)
        whole[np.ix_(*places)] = np.array(own)
        # as bytes: the sum of minus zero and zero has another bit
        return self.summed(mx.array(whole).view(mx.uint8)).view(mx.float32)

    def _part(self, begins: Sequence[int]) -> slice:
        return slice(*begins[self.group.rank() : self.group.rank() + 2])


def divide(model: nn.Module, group: Group) -> None:
    """Leave of `model`'s weights those that this process needs, and tell its modules; they keep their names.

    Raises:
        PararnnError: the model cannot be divided by so many, or has a parameter of which nothing here says
            whether it is divided; nothing is changed then.
    """
    shard = _plan(model, group)
    cuts = _cuts(model, shard)
    names = [name for name, _ in named_arrays(model.parameters())]
    for name in names:
        if name not in cuts:
            raise PararnnError(
                f"{name} cannot be divided among processes: nothing says how; it must be named in "
                "mlx_pararnn/sharding.py"
            )
    modules = dict(model.named_modules())
    shard.parts.update({name: (array.shape, cuts[name]) for name, array in named_arrays(model.parameters())})
    for name in names:
        path, _, key = name.rpartition(".")
        for axis, slices in cuts[name]:
            _keep(modules[path], key, axis, slices)
    model.part = model.model.part = shard
    for layer in model.layers:
        layer.mixer.cell.num_heads = len(shard.heads)
        layer.mixer.part = layer.mlp.part = shard


def _cuts(model: nn.Module, shard: Shard) -> dict[str, Cuts]:
    """Of every parameter that a model may have what this process keeps of it, by its name."""
    own, part = shard.own, shard._part(shard.tokens)
    cuts: dict[str, Cuts] = {}
    cuts |= _rows("model.embed_tokens", part) | _rows("lm_head", part)
    cuts |= _whole("model.embed_positions.weight", *_norm("model.norm"))
    for number, layer in enumerate(model.layers):
        name, mixer, mlp = f"model.layers.{number}", layer.mixer, layer.mlp
        cuts |= _whole(f"{name}.residual_scale", *_norm(f"{name}.norm"), *_norm(f"{name}.mlp_norm"))
        if "in_proj" in mixer:
            D = shard.channels[-1]
            cuts |= _rows(f"{name}.mixer.in_proj", own, slice(own.start + D, own.stop + D))
            for array in ("conv1d.weight", "conv1d.bias", "norm.weight"):
                cuts[f"{name}.mixer.{array}"] = [(0, [own])]
            cuts |= _columns(f"{name}.mixer.out_proj", mixer.out_proj, own)
        cuts |= _cell_cuts(f"{name}.mixer.cell", mixer.cell, shard)
        begins = _begins(mlp.up_proj.weight.shape[0], _unit(mlp.down_proj), shard.group.size())
        inner = shard._part(begins)
        cuts |= _rows(f"{name}.mlp.gate_proj", inner) | _rows(f"{name}.mlp.up_proj", inner)
        cuts |= _columns(f"{name}.mlp.down_proj", mlp.down_proj, inner) | _whole(f"{name}.mlp.down_proj.bias")
    return cuts


def _whole(*names: str) -> dict[str, Cuts]:
    """Parameters that every process has."""
    return {name: [] for name in names}


def _norm(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def _rows(name: str, *rows: slice) -> dict[str, Cuts]:
    """Leave these outputs of a linear layer, or these rows of an embedding."""
    return {f"{name}.{array}": [(0, rows)] for array in MATRIX_ARRAYS}


def _columns(name: str, module: nn.Module, columns: slice) -> dict[str, Cuts]:
    """Leave these inputs of a linear layer."""
    width = module.scales.shape[-1] * module.group_size if "scales" in module else module.weight.shape[-1]
    cuts: dict[str, Cuts] = {}
    for array in MATRIX_ARRAYS:
        if array in module and array != "bias":
            # words of a quantized weight, its scales and biases each stand for some columns
            size = module[array].shape[-1]
            begin, end = (place * size // width for place in (columns.start, columns.stop))
            cuts[f"{name}.{array}"] = [(1, [slice(begin, end)])]
    return cuts


def _cell_cuts(name: str, cell: nn.Module, shard: Shard) -> dict[str, Cuts]:
    own, heads, width = shard.own, shard.heads, shard.head_width
    cut: Cuts = [(0, [slice(heads.start, heads.stop)])]
    if not shard.whole_heads:
        # of a head's outputs, gate by gate, the channels of this process
        first, count = own.start - heads.start * width, own.stop - own.start
        begins = [gate * width + first for gate in range(len(cell.cell.gates))]
        cut.append((1, [slice(begin, begin + count) for begin in begins]))
    names = ["bias", *(f"input_proj.{array}" for array in MATRIX_ARRAYS)]
    cuts = {f"{name}.{array}": cut for array in names}
    return cuts | {f"{name}.{array}": [(1, [own])] for array in ("recurrent_weight", "initial_state")}


def _plan(model: nn.Module, group: Group) -> Shard:
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


def _keep(module: nn.Module, key: str, axis: int, slices: Sequence[slice]) -> None:
    """Leave of an array these slices along an axis, and free the rest of its memory."""
    array = module[key]
    before = (slice(None),) * axis
    module[key] = mx.contiguous(mx.concatenate([array[(*before, s)] for s in slices], axis=axis))
    del array
    mx.eval(module[key])


def _begins(total: int, unit: int, size: int) -> list[int]:
    """Where each of `size` parts of `total` begins, in multiples of `unit` as even as can be; and the end."""
    return [unit * (total // unit * rank // size) for rank in range(size)] + [total]


def _unit(module: nn.Module) -> int:
    """How many inputs of a linear layer can only be kept or left together."""
    return module.group_size if "scales" in module else 1
