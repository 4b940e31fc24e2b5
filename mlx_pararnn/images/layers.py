"""What the encoder and the decoder are made of: patches, attention over all of them, an MLP.

Letters in shapes: B images, N patches or tokens, D channels, P the side of a patch, C channels of an image.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..compute import layer_ops
from ..compute.matrix_products import linear
from .config import TransformerArgs

EPS = 1e-6


def patches(pixels: mx.array, side: int) -> mx.array:
    """Pixels (B, H, W, C) to patches (B, N, side * side * C), row by row."""
    B, H, W, C = pixels.shape
    x = pixels.reshape(B, H // side, side, W // side, side, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, side * side * C)


def pixels_of(x: mx.array, side: int, size: int) -> mx.array:
    """`patches` undone for square images: (B, N, side * side * C) to (B, size, size, C)."""
    B, across = x.shape[0], size // side
    x = x.reshape(B, across, across, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, size, size, -1)


def space_to_channel(x: mx.array, stride: int) -> mx.array:
    """Features of patches (B, N, D), N a square, to tokens (B, N / stride^2, stride^2 * D)."""
    B, N, D = x.shape
    side = round(N**0.5)
    return patches(x.reshape(B, side, side, D), stride)


class Attention(nn.Module):
    """Every patch attends to every one: x (B, N, D) to (B, N, D)."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self._heads = heads

    def __call__(self, x: mx.array) -> mx.array:
        """Softmax attention with scale 1 / sqrt(D / heads)."""
        B, N, D = x.shape
        width = D // self._heads
        qkv = linear(self.qkv_proj, x).reshape(B, N, 3, self._heads, width).transpose(2, 0, 3, 1, 4)
        y = mx.fast.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=width**-0.5)
        return linear(self.out_proj, y.transpose(0, 2, 1, 3).reshape(B, N, D))


class MLP(nn.Module):
    """SwiGLU: x (B, N, D) to (B, N, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array, backend: str) -> mx.array:
        """`backend`: `choose_elementwise`'s."""
        y = layer_ops.swiglu(linear(self.gate_proj, x), linear(self.up_proj, x), backend=backend)
        return linear(self.down_proj, y)


class EncoderLayer(nn.Module):
    """Norm, attention, residual; norm, MLP, residual: (B, N, D) -> (B, N, D)."""

    def __init__(self, args: TransformerArgs) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(args.hidden_size, eps=EPS)
        if not args.share_attention:
            self.attention = Attention(args.hidden_size, args.heads)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, eps=EPS)
        self.mlp = MLP(args.hidden_size, args.intermediate_size)

    def __call__(self, x: mx.array, shared: Attention | None, backend: str) -> mx.array:
        """`shared`: the attention of all layers, where they share one."""
        attention = self.attention if shared is None else shared
        x = x + attention(layer_ops.rms_norm(x, self.norm.weight, EPS, backend=backend))
        y = layer_ops.rms_norm(x, self.mlp_norm.weight, EPS, backend=backend)
        return x + self.mlp(y, backend)


def adapter(width: int, hidden_size: int, output_size: int) -> nn.Sequential:
    """An MLP of two matrices with GELU (the tanh one) between them."""
    layers: list[Any] = [nn.Linear(width, hidden_size), nn.gelu_approx, nn.Linear(hidden_size, output_size)]
    return nn.Sequential(*layers)
