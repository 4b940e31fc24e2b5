"""ParaRNN language models (arXiv 2510.21450) as one file for MLX-LM, `mlx_lm/models/pararnn.py`.

Plain MLX ops and MLX-LM's own cache, nothing else: prompts are read step by step. It loads the folders that
`mlx-pararnn convert` writes. Without: other activations than the cells' own, learned positions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import BaseModelArgs, create_ssm_mask
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.mla import MultiLinear


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
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

    def __post_init__(self):
        if self.cell not in CELLS:
            raise ValueError(f"Unknown cell {self.cell}, choose one of {', '.join(CELLS)}.")
        if self.max_position_embeddings is not None:
            raise ValueError("Learned positions are not supported.")
        if self.activations:
            raise ValueError("Only the cells' own activations are supported.")


def gru_step(state, u, a):
    (h,) = state
    z = mx.sigmoid(a[0] * h + u[0])
    r = mx.sigmoid(a[1] * h + u[1])
    n = mx.tanh(a[2] * (h * r) + u[2])
    return (z * n + (1 - z) * h,)


def lstm_step(state, u, a):
    c, h = state
    f = mx.sigmoid(a[0] * h + u[0] + a[3] * c)
    n = mx.tanh(a[2] * h + u[2])
    c = f * c + (1 - f) * n
    o = mx.sigmoid(a[1] * h + u[1] + a[4] * c)
    return c, o * mx.tanh(c)


def nlru_step(state, u, a):
    (h,) = state
    z = mx.sigmoid(u[0])
    return (z * h + (1 - z) * mx.tanh(u[1] + a[0] * h),)


def slstm_step(state, u, a):
    c, n, m, h = state
    i, f, z, o = (u[k] + a[k] * h for k in range(4))
    stabilizer = mx.maximum(f + m, i)
    i = mx.exp(i - stabilizer)
    f = mx.exp(f + m - stabilizer)
    n = f * n + i
    c = f * c + i * mx.tanh(z)
    return c, n, stabilizer, mx.sigmoid(o) * c / (n + 1e-6)


# Step, gates, state arrays (the last is the output), rows of recurrent_weight.
CELLS = {
    "gru": (gru_step, 3, 1, 3),
    "lstm": (lstm_step, 3, 2, 5),
    "nlru": (nlru_step, 2, 1, 1),
    "slstm": (slstm_step, 4, 4, 4),
}


class RecurrentLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D, heads = args.hidden_size, args.num_heads
        self._step, self._gates, self._slots, rows = CELLS[args.cell]
        self.num_heads = heads
        self.input_proj = MultiLinear(D // heads, self._gates * D // heads, heads)
        self.bias = mx.zeros((heads, self._gates * D // heads))
        self.recurrent_weight = mx.zeros((rows, D))

    def __call__(self, x, state=None, mask=None):
        B, T, D = x.shape
        heads = x.reshape(B, T, self.num_heads, -1).swapaxes(1, 2)
        u = self.input_proj(heads) + self.bias[:, None]
        u = u.reshape(B, self.num_heads, T, self._gates, -1).transpose(3, 2, 0, 1, 4)
        u = u.reshape(self._gates, T, B, D).astype(mx.float32)
        weight = self.recurrent_weight.astype(mx.float32)
        if state is None:
            state = mx.zeros((B, self._slots, D))
        state = [state[:, slot] for slot in range(self._slots)]
        outputs = []
        for t in range(T):
            new = self._step(state, u[:, t], weight)
            if mask is not None:
                keep = mask[:, t, None]
                new = [mx.where(keep, after, before) for after, before in zip(new, state, strict=True)]
            state = new
            outputs.append(state[-1])
        return mx.stack(outputs, axis=1).astype(x.dtype), mx.stack(state, axis=1)


class GatedConvMixer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D = args.hidden_size
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.conv1d = nn.Conv1d(D, D, args.conv_kernel, groups=D)
        self.cell = RecurrentLayer(args)
        self.norm = nn.RMSNorm(D, eps=args.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)

    def _conv(self, x, mask, cache):
        B, T, D = x.shape
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        window = None if cache is None else cache[1]
        n_keep = self.conv1d.weight.shape[1] - 1
        if window is None:
            window = mx.zeros((B, n_keep, D), dtype=x.dtype)
        padded = mx.concatenate([window, x], axis=1)
        if cache is not None:
            if cache.lengths is None:
                cache[1] = padded[:, T:]
            else:
                ends = mx.clip(cache.lengths, 0, T)
                steps = ends[:, None] + mx.arange(n_keep)
                cache[1] = mx.take_along_axis(padded, steps[..., None], axis=1)
        return nn.silu(self.conv1d(padded))

    def __call__(self, x, mask=None, cache=None):
        x, gate = mx.split(self.in_proj(x), 2, axis=-1)
        x = self._conv(x, mask, cache)
        h, state = self.cell(x, None if cache is None else cache[0], mask)
        if cache is not None:
            cache[0] = state
        return self.out_proj(swiglu(gate, self.norm(h)))


class PlainMixer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.cell = RecurrentLayer(args)

    def __call__(self, x, mask=None, cache=None):
        h, state = self.cell(x, None if cache is None else cache[0], mask)
        if cache is not None:
            cache[0] = state
        return h


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        D, width = args.hidden_size, args.intermediate_size
        if args.mlp == "swiglu":
            self.gate_proj = nn.Linear(D, width, bias=args.mlp_bias)
        self.up_proj = nn.Linear(D, width, bias=args.mlp_bias)
        self.down_proj = nn.Linear(width, D, bias=args.mlp_bias)

    def __call__(self, x):
        if "gate_proj" in self:
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(nn.gelu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        norm = partial(nn.RMSNorm if args.norm == "rms" else nn.LayerNorm, eps=args.norm_eps)
        self.norm = norm(args.hidden_size)
        self.mixer = GatedConvMixer(args) if args.mixer == "gated_conv" else PlainMixer(args)
        self.mlp_norm = norm(args.hidden_size)
        self.mlp = MLP(args)
        if args.residual_scale:
            self.residual_scale = mx.ones(1)
        self._mlp_residual = args.mlp_residual

    def __call__(self, x, mask=None, cache=None):
        residual = self.residual_scale * x if "residual_scale" in self else x
        x = residual + self.mixer(self.norm(x), mask, cache)
        y = self.mlp(self.mlp_norm(x))
        return x + y if self._mlp_residual else y


class PararnnModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]
        norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
        self.norm = norm(args.hidden_size, eps=args.norm_eps)

    def __call__(self, inputs, cache=None, input_embeddings=None):
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if cache is None:
            cache = [None] * len(self.layers)
        mask = create_ssm_mask(x, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            x = layer(x, mask, c)
            if c is not None:
                c.advance(x.shape[1])
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = PararnnModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: Any | None = None,
        input_embeddings: mx.array | None = None,
    ):
        out = self.model(inputs, cache, input_embeddings)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(out)
        return self.lm_head(out)

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        size = 2 if self.args.mixer == "gated_conv" else 1
        return [ArraysCache(size) for _ in self.layers]

    def sanitize(self, weights):
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def cast_predicate(self):
        return lambda path: not path.endswith("recurrent_weight")

    @property
    def quant_predicate(self):
        return lambda path, module: isinstance(module, (nn.Linear, nn.Embedding, MultiLinear))
