"""The image decoder: a diffusion transformer that learns a flow from noise to pixels (arXiv 2210.02747).

Embeddings of discrete tokens stand before the noisy patches in one sequence, and all layers share what the
time does to them (DiT-Air, arXiv 2503.10618). At time t an image is (1 - t) noise + t pixels; the network
gives its velocity, pixels - noise.

Letters in shapes: B images, S pixels on a side, M tokens of the condition, N patches, D channels.
"""

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..compute.choice import choose_elementwise
from ..compute.matrix_products import linear
from ..compute.module_arrays import named_arrays
from .config import ImageArgs, TransformerArgs
from .layers import EPS, MLP, Attention, patches, pixels_of

_FREQUENCIES = 128


class DecoderLayer(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the time: (B, M + N, D) -> (B, M + N, D).

    Weights beside those: `modulation` (6, D), what this layer adds to the six vectors that all share.
    """

    def __init__(self, args: TransformerArgs) -> None:
        super().__init__()
        if not args.share_attention:
            self.attention = Attention(args.hidden_size, args.heads)
        self.mlp = MLP(args.hidden_size, args.intermediate_size)
        self.modulation = mx.zeros((6, args.hidden_size))

    def __call__(self, x: mx.array, time: mx.array, shared: Attention | None, backend: str) -> mx.array:
        """`time`: (B, 6, D); `shared`: the attention of all layers, where they share one."""
        attention = self.attention if shared is None else shared
        vectors = time + self.modulation
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (vectors[:, k, None] for k in range(6))
        x = x + gate * attention(modulated(x, shift, scale))
        return x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale), backend)


class ImageDecoder(nn.Module):
    """The velocity of noisy pixels under a condition.

    Args:
        args: the sizes, with a decoder among them.
        width: of the condition's embeddings.
    """

    def __init__(self, args: ImageArgs, width: int) -> None:
        super().__init__()
        own = args.decoder
        assert own is not None
        D, across = own.hidden_size, args.size // own.patch
        self.patch_proj = nn.Linear(3 * own.patch**2, D)
        self.positions = 0.02 * mx.random.normal((args.tokens + across**2, D))
        self.condition_proj = nn.Linear(width, D)
        self.no_condition = mx.zeros(D)
        self.time_in = nn.Linear(2 * _FREQUENCIES, D)
        self.time_out = nn.Linear(D, 6 * D)
        if own.share_attention:
            self.attention = Attention(D, own.heads)
        self.layers = [DecoderLayer(own) for _ in range(own.layers)]
        self.last_modulation = nn.Linear(D, 2 * D)
        self.pixel_proj = nn.Linear(D, 3 * own.patch**2)
        for last in (
            self.time_out,
            self.last_modulation,
            self.pixel_proj,
        ):  # each layer adds nothing at first
            last.update(tree_map(mx.zeros_like, last.parameters()))
        self._patch, self._size = own.patch, args.size

    def __call__(
        self, pixels: mx.array, time: mx.array, condition: mx.array, kept: mx.array | None = None
    ) -> mx.array:
        """The velocity (B, S, S, 3).

        Args:
            pixels: (B, S, S, 3), noisy.
            time: (B,), from 0, noise, to 1.
            condition: (B, M, width), embeddings of discrete tokens.
            kept: (B,), True where the condition is told; None for all.
        """
        given = linear(self.condition_proj, condition)
        if kept is not None:
            given = mx.where(kept[:, None, None], given, self.no_condition)
        M = given.shape[1]
        x = mx.concatenate([given, linear(self.patch_proj, patches(pixels, self._patch))], axis=1)
        x = x + self.positions
        at = nn.silu(linear(self.time_in, frequencies(time)))
        shared = linear(self.time_out, at).reshape(-1, 6, x.shape[-1])
        backend = choose_elementwise(
            x.size, lambda: [x, time, *(w for _, w in named_arrays(self.parameters()))]
        )
        for layer in self.layers:
            x = layer(x, shared, self.get("attention"), backend)
        shift, scale = mx.split(linear(self.last_modulation, at)[:, None], 2, axis=-1)
        y = linear(self.pixel_proj, modulated(x[:, M:], shift, scale))
        return pixels_of(y, self._patch, self._size)

    def sample(
        self,
        condition: mx.array,
        noise: mx.array,
        steps: int,
        guidance: float = 1.0,
        progress: Callable[[int, int, mx.array], None] = lambda done, total, pixels: None,
    ) -> mx.array:
        """Pixels (B, S, S, 3) from noise of that shape, by Euler's method with steps of one length.

        Args:
            condition: (B, M, width).
            noise: normal numbers.
            steps: how many.
            guidance: the velocity is that without a condition plus `guidance` times what the condition adds
                (arXiv 2207.12598); 1 is the model's own, and takes half the time.
            progress: called after each step with the steps done, their number and the pixels so far.
        """
        pixels = noise
        for done, pixels in enumerate(self.sampled(condition, noise, steps, guidance), 1):
            progress(done, steps, pixels)
        return pixels

    def sampled(
        self, condition: mx.array, noise: mx.array, steps: int, guidance: float = 1.0
    ) -> Iterator[mx.array]:
        """`sample`, step by step: the pixels after each."""
        B = condition.shape[0]
        x, guided = noise, guidance != 1
        kept = mx.arange(2 * B) < B
        for step in range(steps):
            time = mx.full((2 * B if guided else B,), step / steps)
            if guided:
                both = mx.concatenate([x, x]), time, mx.concatenate([condition, condition])
                told, untold = mx.split(self(*both, kept), 2)
                velocity = untold + guidance * (told - untold)
            else:
                velocity = self(x, time, condition)
            x = x + velocity / steps
            mx.eval(x)
            yield x


def flow_losses(
    decoder: ImageDecoder,
    pixels: mx.array,
    condition: mx.array,
    noise: mx.array,
    time: mx.array,
    kept: mx.array | None = None,
) -> mx.array:
    """For each image the mean squared error of the velocity at its time: (B,).

    Args:
        pixels, noise: (B, S, S, 3).
        condition, time, kept: `ImageDecoder`'s.
    """
    t = time[:, None, None, None]
    velocity = decoder((1 - t) * noise + t * pixels, time, condition, kept)
    return ((velocity - (pixels - noise)) ** 2).mean(axis=(1, 2, 3))


def frequencies(time: mx.array) -> mx.array:
    """Cosines and sines (B, 256) of times (B,) from 0 to 1, as of 1,000 steps."""
    rates = mx.exp(-math.log(10_000) * mx.arange(_FREQUENCIES) / _FREQUENCIES)
    angles = 1000 * time[:, None] * rates
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def modulated(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Layer norm without weights, then `shift` and 1 + `scale`, (B, 1, D)."""
    return mx.fast.layer_norm(x, None, None, EPS) * (1 + scale) + shift
