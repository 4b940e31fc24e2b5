"""The ParaRNN language model, in MLX-LM's conventions.

Two kinds of layer exist. "gated_conv" is the paper's (arXiv 2510.21450, Fig. 9) and ml-pararnn's: input
projection to a main branch and a gate, causal convolution, SiLU, the recurrent cell, gated RMSNorm, output
projection. "plain" is pararnn-torch's: the cell alone. Both are followed by an MLP.

Letters in shapes: B sequences, T tokens, D channels (hidden_size), V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.mla import MultiLinear

from .cache import RecurrentCache
from .cells import get_cell
from .compute import cpu_token, layer_ops, matrix_products
from .compute.recurrence import recurrence
from .errors import PararnnError


@dataclass
class ModelArgs(BaseModelArgs):
    """config.json's fields.

    Attributes:
        num_heads: blocks of the block-diagonal input projection; hidden_size is a multiple of it.
        mixer: "gated_conv" or "plain".
        norm: "rms" or "layer".
        mlp: "swiglu" or "gelu" (the exact one).
        mlp_residual: False only for ml-pararnn's training code, whose MLP replaces the stream.
        residual_scale: each layer scales the stream it adds to by a learned number.
        max_position_embeddings: how many learned positions there are; None for none.
        activations: the cell's activations where they are not its defaults.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
    model_type: str = "pararnn"
    cell: str = "gru"
    num_heads: int = 1
    mixer: str = "gated_conv"
    conv_kernel: int = 4
    norm: str = "rms"
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    mlp_bias: bool = False
    mlp_residual: bool = True
    residual_scale: bool = False
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    activations: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "intermediate_size",
            "num_heads",
            "conv_kernel",
        ):
            _check_whole_number(name, getattr(self, name))
        for name, choices in (
            ("mixer", ("gated_conv", "plain")),
            ("norm", ("rms", "layer")),
            ("mlp", ("swiglu", "gelu")),
        ):
            if getattr(self, name) not in choices:
                raise PararnnError(
                    f"config.json: {name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        if self.max_position_embeddings is not None:
            _check_whole_number("max_position_embeddings", self.max_position_embeddings)
        for name in ("mlp_bias", "mlp_residual", "residual_scale", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise PararnnError(
                    f"config.json: {name} is {getattr(self, name)!r}; it must be true or false"
                )
        if (
            isinstance(self.norm_eps, bool)
            or not isinstance(self.norm_eps, (int, float))
            or self.norm_eps < 0
        ):
            raise PararnnError(
                f"config.json: norm_eps is {self.norm_eps!r}; it must be a number, not below 0"
            )
        if not isinstance(self.activations, dict | None) or not isinstance(self.cell, str):
            raise PararnnError("config.json: cell must be a name, and activations an object or null")
        get_cell(self.cell, self.activations)
        if self.hidden_size % self.num_heads:
            raise PararnnError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Raises PararnnError for a missing field; fields it does not know are ignored."""
        try:
            return super().from_dict(params)  # type: ignore[no-any-return]
        except TypeError as error:
            raise PararnnError(f"config.json: {str(error).removeprefix('ModelArgs.__init__() ')}") from None

    @classmethod
    def preset(cls, name: str, cell: str = "gru") -> "ModelArgs":
        """The shapes of the paper's models (its Table 2): "400m", "1b", "2.9b" or "7b"; cell "gru" or "lstm".

        The paper's own language model was never released: what is not in its text (vocabulary, MLP width,
        heads) is inferred from its parameter counts.

        Raises:
            PararnnError: no such preset.
        """
        if name not in PRESETS:
            raise PararnnError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        hidden_size, layers, heads, intermediate_size = PRESETS[name]
        return cls(
            cell=cell,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_heads=heads,
            intermediate_size=intermediate_size,
            vocab_size=50432,
        )


def _check_whole_number(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PararnnError(f"config.json: {name} is {value!r}; it must be a whole number of at least 1")


# name -> hidden_size, num_hidden_layers, num_heads, intermediate_size
PRESETS = {
    "400m": (1024, 24, 4, 2816),
    "1b": (2048, 24, 4, 5632),
    "2.9b": (2560, 32, 2, 6912),
    "7b": (4096, 32, 4, 11008),
}


class RecurrentLayer(nn.Module):
    """A cell with its input projection: x (B, T, input_size) -> hidden (B, T, D) and the last state.

    Weights:
        input_proj.weight: (heads, gates * D / heads, input_size / heads), block diagonal over heads.
        bias: (heads, gates * D / heads).
        recurrent_weight: (P, D), one row for each of the cell's params; diagonal, kept in float32.
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
        u = self._project(x, self.bias[:, None])
        return recurrence(self._cell, self.recurrent_weight, u, state, mask=mask, **options)

    def backend(self, **options: Any) -> str:
        """The backend that `recurrence` takes with these options."""
        return layer_ops.backend_for(self._cell, **options)

    def decode(
        self, x: mx.array, state: mx.array | None, backend: str, *gated_norm: Any
    ) -> tuple[mx.array, mx.array]:
        """One token; `gated_norm`: the gate, weight and eps of `layer_ops.decode`, or nothing."""
        if state is None:
            state = mx.zeros((x.shape[0], len(self._cell.slots), self.recurrent_weight.shape[1]))
        u = self._project(x)
        return layer_ops.decode(
            self._cell, self.recurrent_weight, u, self.bias, state, *gated_norm, backend=backend
        )

    def _project(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        """u (B, heads, T, gates, D / heads), a strided view."""
        B, T, _ = x.shape
        # One matrix product a head over all B * T rows; the result is read by strides, not transposed back.
        if B * T == 1:  # MLX would copy the strided view of a single row
            rows = x.reshape(self.num_heads, 1, -1)
        else:
            rows = x.reshape(B * T, self.num_heads, -1).swapaxes(0, 1)
        u = matrix_products.linear(self.input_proj, rows)
        u = u if bias is None else u + bias
        return u.reshape(self.num_heads, B, T, len(self._cell.gates), -1).swapaxes(0, 1)


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
        backend: str = "ops",
    ) -> tuple[mx.array, mx.array]:
        """`layer_ops.conv_silu` of x (B, T, D) behind its last K - 1 inputs, `window`; None for zeros."""
        if window is None:
            window = mx.zeros((x.shape[0], self.weight.shape[1] - 1, x.shape[2]), x.dtype)
        return layer_ops.conv_silu(x, window, self.weight.squeeze(-1), self.bias, spans, backend=backend)


class GatedConvMixer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        D = args.hidden_size
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.conv1d = CausalConv(D, args.conv_kernel)
        self.cell = RecurrentLayer(args.cell, D, D, args.num_heads, args.activations)
        self.norm = nn.RMSNorm(D, eps=args.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)

    def __call__(
        self,
        x: mx.array,
        cache: RecurrentCache,
        mask: mx.array | None,
        here: str,
        behind: str,
        **options: Any,
    ) -> mx.array:
        T = x.shape[1]
        main, gate = mx.split(matrix_products.linear(self.in_proj, x), 2, axis=-1)
        window = cache[1]
        x, cache[1] = self.conv1d(main, window, cache.spans(T), here)
        norm = gate, self.norm.weight, self.norm.eps
        if layer_ops.decodes(here, T, mask, options):
            y, cache[0] = self.cell.decode(x, cache[0], here, *norm)
        else:
            every = cache.stride(T)
            hidden, cache[0], *states = self.cell(x, cache[0], mask, return_states=every, **options)
            cache.keep(states, T, window, main)
            y = layer_ops.gated_norm(hidden, *norm, backend=behind)
        return matrix_products.linear(self.out_proj, y)


class PlainMixer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.cell = RecurrentLayer(
            args.cell, args.hidden_size, args.hidden_size, args.num_heads, args.activations
        )

    def __call__(
        self,
        x: mx.array,
        cache: RecurrentCache,
        mask: mx.array | None,
        here: str,
        behind: str,
        **options: Any,
    ) -> mx.array:
        T = x.shape[1]
        if layer_ops.decodes(here, T, mask, options):
            hidden, cache[0] = self.cell.decode(x, cache[0], here)
        else:
            every = cache.stride(T)
            hidden, cache[0], *states = self.cell(x, cache[0], mask, return_states=every, **options)
            cache.keep(states, T)
        return hidden


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        gated = args.mlp == "swiglu"
        if gated:
            self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x: mx.array, backend: str = "ops") -> mx.array:
        up = matrix_products.linear(self.up_proj, x)
        if "gate_proj" in self:
            y = layer_ops.swiglu(matrix_products.linear(self.gate_proj, x), up, backend=backend)
        else:
            y = nn.gelu(up)
        return matrix_products.linear(self.down_proj, y)


class Layer(nn.Module):
    def __init__(self, args: ModelArgs, last: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
        self.norm = norm(args.hidden_size, eps=args.norm_eps)
        self.mixer = GatedConvMixer(args) if args.mixer == "gated_conv" else PlainMixer(args)
        self.mlp_norm = norm(args.hidden_size, eps=args.norm_eps)
        self.mlp = MLP(args)
        if args.residual_scale:
            self.residual_scale = mx.ones(1)
        self._mlp_residual = args.mlp_residual
        self._last = last

    def __call__(self, x: mx.array, cache: RecurrentCache, mask: mx.array | None, **options: Any) -> mx.array:
        here = self.mixer.cell.backend(**options)  # what `options` may leave open
        # The CPU backend works at once. Who reads a prompt for its state alone, as generate_step does, never
        # asks for what stands behind the last recurrence, so that stays lazy.
        behind = "ops" if self._last and here == "cpu" else here
        mixed = self.mixer(_normed(self.norm, x, here), cache, mask, here, behind, **options)
        x = mixed + (self.residual_scale * x if "residual_scale" in self else x)
        y = self.mlp(_normed(self.mlp_norm, x, behind), behind)
        return x + y if self._mlp_residual else y


def _normed(norm: nn.RMSNorm | nn.LayerNorm, x: mx.array, backend: str) -> mx.array:
    if isinstance(norm, nn.RMSNorm):
        return layer_ops.rms_norm(x, norm.weight, norm.eps, backend=backend)
    return norm(x)


class PararnnModel(nn.Module):
    """Token ids to the last norm's output: everything but the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.max_position_embeddings is not None:
            self.embed_positions = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        count = args.num_hidden_layers
        self.layers = [Layer(args, last=i == count - 1) for i in range(count)]
        norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
        self.norm = norm(args.hidden_size, eps=args.norm_eps)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[RecurrentCache],
        input_embeddings: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        B, T, _ = x.shape
        for c in cache:
            c.open(B)
        if "embed_positions" in self:
            x = x + self._positions(cache[0], T)
        mask = cache[0].make_mask(T)
        y = None
        if layer_ops.plain_token(T, mask, options) and self.layers[0].mixer.cell.backend(**options) == "cpu":
            y = cpu_token.decode(self, x, cache)
        if y is None:
            for layer, c in zip(self.layers, cache, strict=True):
                x = layer(x, c, mask, **options)
            y = self.norm(x)
        for c in cache:
            c.advance(T)
        return y

    def _positions(self, cache: RecurrentCache, T: int) -> mx.array:
        spans = cache.spans(T) or [(0, T)] * cache.batch_size
        room = self.embed_positions.weight.shape[0]
        ends = [offset + end - begin for offset, (begin, end) in zip(cache.offsets, spans, strict=True)]
        if max(ends) > room:
            raise PararnnError(
                f"this model has {room} learned positions and token {max(ends)} of a sequence has none; "
                "shorten the prompt or generate fewer tokens"
            )
        first = mx.array([offset - begin for offset, (begin, _) in zip(cache.offsets, spans, strict=True)])
        return self.embed_positions(mx.clip(first[:, None] + mx.arange(T), 0, room - 1))


class Model(nn.Module):
    """The language model.

    Raises PararnnError, when called, if a sequence outgrows the learned positions of a model that has them.

    Attributes:
        recent_steps, snapshot_spacing: what new caches remember (`RecurrentCache.remember`), nothing by
            default. MLX-LM's speculative decoding makes its own caches and needs recent_steps in both models.
    """

    recent_steps = 0
    snapshot_spacing = 0

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
            options: for `recurrence`, such as method="sequential".
        """
        if cache is None:
            cache = self.make_cache(inputs.shape[0])
        out = self.model(inputs, cache, input_embeddings, **options)
        head = self.model.embed_tokens if self.args.tie_word_embeddings else self.lm_head
        return matrix_products.head(head, out, backend=self.layers[0].mixer.cell.backend(**options))

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    def make_cache(self, batch_size: int = 1) -> list[RecurrentCache]:
        """An empty state; it remembers what `recent_steps` and `snapshot_spacing` say."""
        caches = [RecurrentCache(batch_size) for _ in self.layers]
        for cache in caches:
            cache.remember(self.recent_steps, self.snapshot_spacing)
        return caches

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop a tied head that a file repeats."""
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def cast_predicate(self) -> Any:
        """False for what MLX-LM's `convert --dtype` must leave as it is."""
        return lambda path: not path.endswith("recurrent_weight")

    @property
    def quant_predicate(self) -> Any:
        """True for the matrices; the recurrence, norms and convolution stay float."""
        return lambda path, module: (
            isinstance(module, (nn.Linear, nn.Embedding, MultiLinear))
            and not (path.endswith("embed_positions"))
        )
