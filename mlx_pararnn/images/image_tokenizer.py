"""The hybrid tokenizer: one vision encoder, and two adapters on the same features.

The continuous one gives embeddings for a language model to read; the discrete one gives tokens for it to
write, and their embeddings in the same space (MANZANO, arXiv 2509.16197, section 3.1).

Letters in shapes: B images, S pixels on a side, N tokens, F features of a token, L numbers in a code, D the
width of the language model.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from ..compute import layer_ops
from ..compute.choice import choose_elementwise
from ..compute.matrix_products import linear
from ..compute.module_arrays import named_arrays
from .config import ImageArgs, TransformerArgs
from .layers import EPS, Attention, EncoderLayer, adapter, patches, space_to_channel


class VisionEncoder(nn.Module):
    """A vision transformer: pixels (B, S, S, 3) from -1 to 1 to features of patches (B, N, hidden_size)."""

    def __init__(self, args: TransformerArgs, size: int) -> None:
        super().__init__()
        self.patch_proj = nn.Linear(3 * args.patch**2, args.hidden_size)
        self.positions = 0.02 * mx.random.normal(((size // args.patch) ** 2, args.hidden_size))
        if args.share_attention:
            self.attention = Attention(args.hidden_size, args.heads)
        self.layers = [EncoderLayer(args) for _ in range(args.layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=EPS)
        self._patch = args.patch

    def __call__(self, pixels: mx.array) -> mx.array:
        """Features of the patches, row by row."""
        x = linear(self.patch_proj, patches(pixels, self._patch)) + self.positions
        backend = choose_elementwise(x.size, lambda: [x, *(w for _, w in named_arrays(self.parameters()))])
        for layer in self.layers:
            x = layer(x, self.get("attention"), backend)
        return layer_ops.rms_norm(x, self.norm.weight, EPS, backend=backend)


class FiniteScalarQuantizer:
    """FSQ (arXiv 2309.15505): each number of a code is rounded to one of its few levels.

    Without parameters. A code's numbers are multiples of 1 / (levels // 2) from -1 on; its token is their
    place in the grid, the first number counting fastest.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        self.levels = levels
        counts = mx.array(levels, mx.float32)
        self._half = (counts - 1) * (1 + 1e-3) / 2
        self._offset = mx.array([0.0 if n % 2 else 0.5 for n in levels])
        self._shift = mx.array(
            [0.0 if n % 2 else math.atanh(0.5 / ((n - 1) * (1 + 1e-3) / 2)) for n in levels]
        )
        self._width = mx.array([n // 2 for n in levels], mx.float32)
        self._basis = mx.array([math.prod(levels[:k]) for k in range(len(levels))], mx.int32)

    def __call__(self, z: mx.array) -> mx.array:
        """Numbers (..., L) to codes (..., L); the gradient passes the rounding as if it were not there."""
        bounded = mx.tanh(z.astype(mx.float32) + self._shift) * self._half - self._offset
        return (bounded + mx.stop_gradient(mx.round(bounded) - bounded)) / self._width

    def tokens(self, codes: mx.array) -> mx.array:
        """Codes (..., L) to tokens (...), from 0 on."""
        places = mx.round(codes * self._width + self._width).astype(mx.int32)
        return (places * self._basis).sum(axis=-1)

    def codes(self, tokens: mx.array) -> mx.array:
        """Tokens (...) to codes (..., L)."""
        places = (tokens[..., None].astype(mx.int32) // self._basis) % mx.array(self.levels, mx.int32)
        return (places.astype(mx.float32) - self._width) / self._width


class HybridTokenizer(nn.Module):
    """Images to embeddings that a language model reads, and to tokens that it writes.

    Args:
        args: the sizes.
        width: of the language model (D).
    """

    def __init__(self, args: ImageArgs, width: int) -> None:
        super().__init__()
        features = args.encoder.hidden_size * args.stride**2
        self.encoder = VisionEncoder(args.encoder, args.size)
        self.continuous = adapter(features, width, width)
        self.code_proj = nn.Linear(features, len(args.levels))
        self.discrete = adapter(len(args.levels), width, width)
        self._stride = args.stride
        self.quantizer = FiniteScalarQuantizer(args.levels)

    def features(self, pixels: mx.array) -> mx.array:
        """Pixels (B, S, S, 3) from -1 to 1 to the features (B, N, F) that both adapters take."""
        return space_to_channel(self.encoder(pixels), self._stride)

    def read(self, features: mx.array) -> mx.array:
        """Features (B, N, F) to continuous embeddings (B, N, D)."""
        return _apply(self.continuous, features)

    def encode(self, features: mx.array) -> mx.array:
        """Features (B, N, F) to discrete codes (B, N, L), differentiable."""
        return self.quantizer(linear(self.code_proj, features))

    def embed_codes(self, codes: mx.array) -> mx.array:
        """Codes (B, N, L) to their embeddings (B, N, D)."""
        return _apply(self.discrete, codes)

    def tokens(self, pixels: mx.array) -> mx.array:
        """Pixels (B, S, S, 3) to discrete tokens (B, N), from 0 on."""
        return self.quantizer.tokens(self.encode(self.features(pixels)))

    def embed(self, tokens: mx.array) -> mx.array:
        """Discrete tokens (B, N) to their embeddings (B, N, D)."""
        return self.embed_codes(self.quantizer.codes(tokens))


def _apply(layers: nn.Sequential, x: mx.array) -> mx.array:
    for layer in layers.layers:
        x = linear(layer, x) if isinstance(layer, nn.Module) else layer(x)
    return x
