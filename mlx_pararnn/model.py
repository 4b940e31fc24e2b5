"""The ParaRNN language model, in MLX-LM's conventions.

Two kinds of layer exist. "gated_conv" is the paper's (arXiv 2510.21450, Fig. 9) and ml-pararnn's: input
projection to a main branch and a gate, causal convolution, SiLU, the recurrent cell, gated RMSNorm, output
projection. "plain" is pararnn-torch's: the cell alone. Both are followed by an MLP.

Letters in shapes: B sequences, T tokens, D channels (hidden_size), V vocabulary.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from .cache import RecurrentCache, held_arrays
from .cells import Cell, get_cell
from .compute import cpu_token, layer_ops, matrix_products
from .compute.choice import PLAIN, Choice
from .compute.module_arrays import (
    Changed,
    handed_arrays,
    head_arrays,
    named_arrays,
    norm_arrays,
    plain_arrays,
    table_arrays,
)
from .compute.recurrence import choice_for_layers, recurrence
from .compute.token_trial import compared_tokens
from .distributed import Group, world
from .errors import PararnnError
from .model_config import ModelArgs
from .process.address_space import check_room, limit
from .process.forking import note_use_of_mlx
from .sharding import Shard, Whole, divide


class RecurrentLayer(nn.Module):
    """A cell with its input projection: x (B, T, input_size) -> hidden (B, T, D) and the last state.

    Weights:
        input_proj.weight: (heads, gates * D / heads, input_size / heads), block diagonal over heads.
        bias: (heads, gates * D / heads).
        recurrent_weight: (P, D), one row for each of the cell's params; diagonal, kept in float32.
        initial_state: (slots, D), where one was learned (`mlx-pararnn train --tune state`): the state before
            the first token, instead of zeros.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_heads: int = 1,
        activations: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._cell = get_cell(cell, activations)
        self.num_heads = num_heads
        width = len(self._cell.gates) * hidden_size // num_heads
        self.input_proj = MultiLinear(input_size // num_heads, width, num_heads)
        self.bias = mx.zeros((num_heads, width))
        scale = hidden_size**-0.5
        self.recurrent_weight = mx.random.uniform(-scale, scale, (len(self._cell.params), hidden_size))

    def __call__(
        self,
        x: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Run the layer; `options` are those of `recurrence`, and so is what is returned.

        Args:
            x: (B, T, input_size).
            state: (B, slots, D) or None for zeros.
            mask: (B, T), False at padding; or None.
        """
        u = self._project(x)
        return recurrence(self._cell, self.recurrent_weight, u, state, bias=self.bias, mask=mask, **options)

    def run(
        self,
        x: mx.array,
        state: mx.array | None,
        mask: mx.array | None,
        every: int,
        choice: Choice,
        *norm: Any,
    ) -> tuple[mx.array, ...]:
        """`__call__` in a model's layer: `layer_ops.recurrence_and_norm` of x (B, T, input_size)."""
        u, weight = self._project(x), self.recurrent_weight
        return layer_ops.recurrence_and_norm(
            choice, self._cell, weight, u, self.bias, state, mask, every, *norm
        )

    @property
    def cell(self) -> Cell:
        """What one step computes."""
        return self._cell

    def add_initial_state(self, values: mx.array | None = None) -> None:
        """Begin from these values (slots, D), which can be learned; None for zeros."""
        shape = len(self._cell.slots), self.recurrent_weight.shape[1]
        self.initial_state = mx.zeros(shape) if values is None else values.astype(mx.float32).reshape(shape)

    def token_arrays(self) -> dict[str, mx.array]:
        """What a token reads, by its names in struct Layer of metal/cpu_token.cpp."""
        arrays = {"bias": self["bias"], "params": self["recurrent_weight"]}
        return arrays | plain_arrays("cell_proj", self["input_proj"])

    def _project(self, x: mx.array) -> mx.array:
        """u (B, heads, T, gates, D / heads) without its bias."""
        return matrix_products.input_projection(self.input_proj, x, self.num_heads, len(self._cell.gates))


class CausalConv(nn.Module):
    """Depthwise causal convolution over time and SiLU; tap K - 1 is the current token.

    Weights as nn.Conv1d has them: weight (D, K, 1), bias (D).
    """

    def __init__(self, dims: int, kernel_size: int) -> None:
        super().__init__()
        scale = kernel_size**-0.5
        self.weight = mx.random.uniform(-scale, scale, (dims, kernel_size, 1))
        self.bias = mx.zeros(dims)

    def __call__(
        self,
        x: mx.array,
        window: mx.array | None,
        spans: list[tuple[int, int]] | None,
        choice: Choice = PLAIN,
    ) -> tuple[mx.array, mx.array]:
        """`layer_ops.conv_silu` of x (B, T, D) after its last K - 1 inputs, `window`; None for zeros."""
        if window is None:
            window = mx.zeros((x.shape[0], self.weight.shape[1] - 1, x.shape[2]), x.dtype)
        return layer_ops.conv_silu(x, window, self.weight.squeeze(-1), self.bias, spans, backend=choice.state)

    def token_arrays(self) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        return {"conv": self["weight"], "conv_bias": self["bias"]}


class GatedConvMixer(nn.Module):
    """Input projection, convolution, cell, gated norm, output projection: (B, T, D) -> (B, T, D)."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        D = args.hidden_size
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.conv1d = CausalConv(D, args.conv_kernel)
        self.cell = RecurrentLayer(args.cell, D, D, args.num_heads, args.activations)
        self.norm = nn.RMSNorm(D, eps=args.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)

    def __call__(self, x: mx.array, cache: RecurrentCache, mask: mx.array | None, choice: Choice) -> mx.array:
        """x (B, T, D) to (B, T, D); the cache takes the new state and window."""
        T, window, part = x.shape[1], cache[1], self.part
        main, gate = mx.split(matrix_products.linear(self.in_proj, part.entered(x)), 2, axis=-1)
        x, cache[1] = self.conv1d(main, window, cache.spans(T), choice)
        x, norm = part.own_to_heads(x), part.cell_norm(gate, self.norm)
        y, cache[0], *states = self.cell.run(x, cache[0], mask, cache.stride(T), choice, *norm)
        cache.keep(states, T, window, main)
        return part.normed_product(y, gate, self.norm, self.out_proj, choice.output)

    def token_arrays(self, eps: float) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        return (
            plain_arrays("in_proj", self["in_proj"])
            | handed_arrays(self["conv1d"], CausalConv)
            | handed_arrays(self["cell"], RecurrentLayer)
            | norm_arrays("mixer_norm", self["norm"], eps)
            | plain_arrays("out_proj", self["out_proj"])
        )


class PlainMixer(nn.Module):
    """The cell alone: (B, T, D) -> (B, T, D)."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.cell = RecurrentLayer(
            args.cell, args.hidden_size, args.hidden_size, args.num_heads, args.activations
        )

    def __call__(self, x: mx.array, cache: RecurrentCache, mask: mx.array | None, choice: Choice) -> mx.array:
        """x (B, T, D) to (B, T, D); the cache takes the new state."""
        T, part = x.shape[1], self.part
        x = part.of_heads(part.entered(x))
        hidden, cache[0], *states = self.cell.run(x, cache[0], mask, cache.stride(T), choice)
        cache.keep(states, T)
        return part.whole(hidden)

    def token_arrays(self, eps: float) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        return handed_arrays(self["cell"], RecurrentLayer)


class MLP(nn.Module):
    """SwiGLU or GELU, (B, T, D) -> (B, T, D)."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        gated = args.mlp == "swiglu"
        if gated:
            self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x: mx.array, choice: Choice) -> mx.array:
        """x (B, T, D) to (B, T, D)."""
        x = self.part.entered(x)
        up = matrix_products.linear(self.up_proj, x)
        if "gate_proj" in self:
            y = layer_ops.swiglu(matrix_products.linear(self.gate_proj, x), up, backend=choice.output)
        else:
            y = nn.gelu(up)
        return self.part.product(self.down_proj, y)

    def token_arrays(self) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        gate = plain_arrays("gate", self["gate_proj"]) if "gate_proj" in self else {}
        return gate | plain_arrays("up", self["up_proj"]) | plain_arrays("down", self["down_proj"])


class Layer(nn.Module):
    """Norm, mixer, residual; norm, MLP, residual: (B, T, D) -> (B, T, D)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
        self.norm = norm(args.hidden_size, eps=args.norm_eps)
        self.mixer = GatedConvMixer(args) if args.mixer == "gated_conv" else PlainMixer(args)
        self.mlp_norm = norm(args.hidden_size, eps=args.norm_eps)
        self.mlp = MLP(args)
        if args.residual_scale:
            self.residual_scale = mx.ones(1)
        self._mlp_residual = args.mlp_residual

    def __call__(
        self,
        x: mx.array | tuple[mx.array, mx.array],
        cache: RecurrentCache,
        mask: mx.array | None,
        choice: Choice = PLAIN,
        apart: bool = False,
        before: Sequence[mx.array | None] | None = None,
    ) -> Any:
        """x (B, T, D) to (B, T, D); the cache takes what the mixer keeps.

        Args:
            x: or two arrays, whose sum it is.
            before: what the cache holds: a layer that is computed a second time for its gradient
                (mx.checkpoint) finds it moved on.
            apart: give two arrays, whose sum it is, where the MLP has a residual: the next norm adds them.
        """
        if before is not None:
            cache.cache = list(before)
        x, added = x if isinstance(x, tuple) else (x, None)
        x, normed = _sum_and_norm(self.norm, x, added, None, choice)
        mixed = self.mixer(normed, cache, mask, choice)
        x, normed = _sum_and_norm(self.mlp_norm, x, mixed, self.get("residual_scale"), choice)
        y = self.mlp(normed, choice)
        if not self._mlp_residual:
            return y
        return (x, y) if apart else x + y

    def token_arrays(self, eps: float) -> dict[str, mx.array]:
        """The arrays that the one-call token reads, by their fields of `compute/cpu_token.py`."""
        scale = {"residual_scale": self["residual_scale"]} if "residual_scale" in self else {}
        return (
            scale
            | norm_arrays("norm", self["norm"], eps)
            | handed_arrays(self["mixer"], GatedConvMixer, PlainMixer, eps=eps)
            | norm_arrays("mlp_norm", self["mlp_norm"], eps)
            | handed_arrays(self["mlp"], MLP)
        )

    def token_constants(self) -> tuple[Cell, int, bool]:
        """What one call for all layers needs to be the same in each: cell, heads, whether the MLP adds."""
        cell = self["mixer"]["cell"]
        return cell._cell, cell.num_heads, self._mlp_residual


def _sum_and_norm(
    norm: nn.Module, x: mx.array, added: mx.array | None, scale: mx.array | None, choice: Choice
) -> tuple[mx.array, mx.array]:
    """The residual sum, added + scale * x, and its norm; x itself where nothing is to be added."""
    backend = choice.output
    if added is not None and type(norm) in (nn.RMSNorm, nn.LayerNorm) and "weight" in norm:
        weights = norm.weight, norm.get("bias"), norm.eps
        return layer_ops.sum_and_norm(x, added, scale, *weights, backend=backend)
    if added is not None:
        x = layer_ops.residual_sum(x, added, scale)
    if isinstance(norm, nn.RMSNorm):
        return x, layer_ops.rms_norm(x, norm.weight, norm.eps, backend=backend)
    return x, norm(x)


class PararnnModel(nn.Module):
    """Token ids to the last norm's output: everything but the head."""

    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.max_position_embeddings is not None:
            self.embed_positions = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        count = args.num_hidden_layers
        self.layers = [Layer(args) for _ in range(count)]
        norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
        self.norm = norm(args.hidden_size, eps=args.norm_eps)
        self._token_memory = cpu_token.Memory()

    def __call__(
        self,
        inputs: mx.array,
        cache: list[RecurrentCache],
        input_embeddings: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """Token ids (B, T) to the last hidden states (B, T, D)."""
        return self.read(inputs, cache, input_embeddings, **options)[0]

    def read(
        self,
        inputs: mx.array,
        cache: list[RecurrentCache],
        input_embeddings: mx.array | None = None,
        head: nn.Module | None = None,
        **options: Any,
    ) -> tuple[mx.array, Choice, mx.array | None]:
        """What `__call__` gives, the backends chosen, and the logits if `head` was called at once with it.

        Args:
            head: what the caller will call with the output.
        """
        x = self.part.embedded(self.embed_tokens, inputs) if input_embeddings is None else input_embeddings
        B, T, _ = x.shape
        for c in cache:
            c.open(B)
        if "embed_positions" in self:
            x = x + self.embed_positions(self._positions(cache[0], T))
        mask = cache[0].make_mask(T)
        choice = choice_for_layers(
            self.layers[0].mixer.cell.cell,
            x,
            mask,
            lambda: [x, *held_arrays(cache), *(array for _, array in named_arrays(self.parameters()))],
            divided=self.part.group is not None,
            **options,
        )
        decoded = None
        if choice.one_call and (weights := self.token_weights(head)) is not None:
            ids = inputs if input_embeddings is None else None
            decoded = cpu_token.decode(weights, x, ids, cache, _TOKEN_TRIAL, self._token_memory)
        if decoded is None:
            last = choice.deferred()
            ours = all(type(layer) is Layer for layer in self.layers)  # others take and give one array
            for layer, c in zip(self.layers, cache, strict=True):
                here = last if layer is self.layers[-1] else choice
                more: dict[str, Any] = {"apart": True, "before": c.cache} if ours else {}
                x = layer(x, c, mask, here, **more)
            x, added = x if isinstance(x, tuple) else (x, None)
            decoded = cpu_token.Decoded(_sum_and_norm(self.norm, x, added, None, last)[1], None)
        for c in cache:
            c.advance(T)
        return decoded.y, choice, decoded.logits

    def token_weights(self, head: nn.Module | None = None) -> cpu_token.Weights | None:
        """What one call for a token of all layers reads; None where modules or settings do not allow it.

        Args:
            head: what the output is for, to be called along with the layers if it can be.
        """
        eps: float = getattr(self["norm"], "eps", math.nan)
        try:
            layers = [handed_arrays(layer, Layer, eps=eps) for layer in self["layers"]]
            last = plain_arrays("norm", self["norm"])
        except Changed:
            return None
        cell, heads, mlp_residual = first = self["layers"][0].token_constants()
        if any(layer.token_constants() != first for layer in self["layers"][1:]):
            return None
        # With learned positions a token's id does not say all that the first layer reads.
        embedding = {} if "embed_positions" in self else table_arrays("embedding", self["embed_tokens"])
        last_matrix = {} if head is None else head_arrays("head", head)
        return cpu_token.Weights(layers, last, cell, heads, mlp_residual, eps, embedding, last_matrix)

    def _positions(self, cache: RecurrentCache, T: int) -> mx.array:
        """Where the next T tokens stand, (B, T); padding stands anywhere."""
        room, longest = self.embed_positions.weight.shape[0], max(cache.offsets_after(T))
        if longest > room:
            raise PararnnError(
                f"this model has {room} learned positions and token {longest} of a sequence has none; "
                "shorten the prompt or generate fewer tokens"
            )
        return mx.clip(cache.next_positions(T), 0, room - 1)


class Model(nn.Module):
    """The language model.

    Raises PararnnError, when called, if a sequence outgrows the learned positions of a model that has them,
    in a process that was forked after MLX was used, and where the address space is limited and too small.

    Attributes:
        recent_steps, snapshot_spacing: what new caches remember (`RecurrentCache.remember`), nothing by
            default. MLX-LM's speculative decoding makes its own caches and needs recent_steps in both models.
        part: what this process has of the model, as its modules know it too; `shard` changes it.
    """

    recent_steps = 0
    snapshot_spacing = 0
    part: Whole | Shard = Whole()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = PararnnModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[RecurrentCache] | None = None,
        input_embeddings: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """Logits (B, T, V) of token ids (B, T), read on from `cache`, which is updated.

        Args:
            inputs: (B, T) token ids.
            cache: what `make_cache` gave, or None to start from zero and keep nothing.
            input_embeddings: (B, T, D), used instead of the tokens' own.
            options: of `recurrence` backend, method, chunk, tol and max_iters; and output_wanted=True if all
                tokens' logits are used (without a cache it is the default): on a CPU they are then faster.
        """
        note_use_of_mlx()
        self._check_room(*inputs.shape[:2])
        options.setdefault("output_wanted", cache is None)
        cache = self.make_cache(inputs.shape[0]) if cache is None else cache
        head = self.model.embed_tokens if self.args.tie_word_embeddings else self.lm_head
        out, choice, logits = self.model.read(inputs, cache, input_embeddings, head=head, **options)
        return self.part.logits(head, out, choice.head) if logits is None else logits

    def _check_room(self, B: int, T: int) -> None:
        if T <= 1 or limit() is None:
            return
        args = self.args
        floats = (2 * len(get_cell(args.cell).gates) + 8) * args.hidden_size + 4 * args.intermediate_size
        check_room(
            4 * B * T * floats,
            f"reading {T} tokens at once takes",
            "read fewer at once (--prefill-step-size, in Python prefill_step_size)",
            mx.get_cache_memory(),
        )

    @property
    def group(self) -> Group | None:
        """The processes that this model is divided among; None if it is whole."""
        return self.part.group

    def shard(self, group: Group | None = None) -> None:
        """Keep this process's part of the weights; all processes then call the model together.

        What goes in and comes out is the same on all of them, the logits too; caches hold a process's own
        channels. Weights that were not read yet (`load_model(lazy=True)`) are read one by one, so that no
        process holds them all at any time.

        Args:
            group: the processes; None for all that mlx.launch started.

        Raises:
            PararnnError: the model's sizes cannot be divided by so many, or it is divided already.
        """
        group = group or world()
        if self.group is not None:
            raise PararnnError("the model is divided among processes already")
        if group is not None and group.size() > 1:
            divide(self, group)

    @property
    def layers(self) -> list[Layer]:
        """The model's layers, as MLX-LM asks for them."""
        return self.model.layers

    def make_cache(self, batch_size: int = 1) -> list[RecurrentCache]:
        """An empty state; it remembers what `recent_steps` and `snapshot_spacing` say."""
        caches = [RecurrentCache(batch_size) for _ in self.layers]
        for layer, cache in zip(self.layers, caches, strict=True):
            cache.remember(self.recent_steps, self.snapshot_spacing)
            cache.initial = layer.mixer.cell.get("initial_state")
        return caches

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop a tied head that a file repeats, and make room for the initial states that it has.

        Raises:
            PararnnError: the head is said to be tied, and the file has another one.
        """
        if self.args.tie_word_embeddings:
            head = weights.pop("lm_head.weight", None)
            embedding = weights.get("model.embed_tokens.weight")
            if head is not None and embedding is not None and not _same_numbers(head, embedding):
                raise PararnnError(
                    "config.json says that the output head is the embedding (tie_word_embeddings), but the "
                    "weights have an lm_head.weight that differs from it; put the model's own config.json "
                    "there, or set tie_word_embeddings to false in it"
                )
        for number, layer in enumerate(self.layers):
            if f"model.layers.{number}.mixer.cell.initial_state" in weights:
                layer.mixer.cell.add_initial_state()
        return weights

    @property
    def cast_predicate(self) -> Any:
        """False for what MLX-LM's `convert --dtype` must leave as it is."""
        return _is_castable

    @property
    def quant_predicate(self) -> Any:
        """True for the matrices; the recurrence, norms and convolution stay float."""
        return _is_quantizable


def _same_numbers(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())


def _is_castable(path: str) -> bool:
    return not path.endswith(("recurrent_weight", "initial_state"))


def _is_quantizable(path: str, module: nn.Module) -> bool:
    matrix = isinstance(module, (nn.Linear, nn.Embedding, MultiLinear))
    return matrix and not path.endswith("embed_positions")


_TOKEN_TRIAL = partial(compared_tokens, PararnnModel, _is_castable, _is_quantizable)
