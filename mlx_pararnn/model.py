"""The ParaRNN language model, in MLX-LM's conventions; blocks.py has what a layer computes.

Letters in shapes: B sequences, T tokens, D channels (hidden_size), V vocabulary.
"""

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from .blocks import Layer, sum_and_norm
from .cache import RecurrentCache, held_arrays
from .cells import get_cell
from .compute import cpu_token
from .compute.choice import Choice
from .compute.module_arrays import (
    Changed,
    handed_arrays,
    head_arrays,
    named_arrays,
    plain_arrays,
    table_arrays,
)
from .compute.recurrence import choice_for_layers
from .compute.token_trial import compared_tokens
from .distributed import Group, world
from .errors import PararnnError
from .model_config import ModelArgs
from .process.address_space import check_room, limit
from .process.forking import note_use_of_mlx
from .sharding import Shard, Whole, divide


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
        if choice.one_call:
            positions = [self["embed_positions"]] if "embed_positions" in self else []
            modules = [self["norm"], self["embed_tokens"], *self["layers"], *positions]
            modules += [] if head is None else [head]
            decoded = cpu_token.decode(
                modules,
                partial(self.token_weights, head),
                x,
                inputs if input_embeddings is None else None,
                cache,
                _TOKEN_TRIAL,
                self._token_memory,
            )
        if decoded is None:
            decoded = cpu_token.Decoded(self._through_layers(x, cache, mask, choice), None)
        for c in cache:
            c.advance(T)
        return decoded.y, choice, decoded.logits

    def _through_layers(
        self, x: mx.array, cache: list[RecurrentCache], mask: mx.array | None, choice: Choice
    ) -> mx.array:
        """x (B, T, D) through the layers and the last norm, (B, T, D)."""
        last = choice.deferred()
        ours = all(type(layer) is Layer for layer in self.layers)  # others take and give one array
        for layer, c in zip(self.layers, cache, strict=True):
            more: dict[str, Any] = {"apart": True, "before": c.cache} if ours else {}
            x = layer(x, c, mask, last if layer is self.layers[-1] else choice, **more)
        x, added = x if isinstance(x, tuple) else (x, None)
        return sum_and_norm(self.norm, x, added, None, last)[1]

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
