"""The image tokenizer and decoder in NumPy and float64, written from the equations, for single images.

Weights come as `tree_flatten(module.parameters())` names them.
"""

import numpy as np

Weights = dict[str, np.ndarray]
EPS = 1e-6


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(weights: Weights, x: np.ndarray, heads: int) -> np.ndarray:
    width = x.shape[1] // heads
    q, k, v = np.split(linear(weights, "qkv_proj", x), 3, axis=-1)
    out = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = q[:, own] @ k[:, own].T / np.sqrt(width)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, own] = shares / shares.sum(-1, keepdims=True) @ v[:, own]
    return linear(weights, "out_proj", out)


def mlp(weights: Weights, x: np.ndarray) -> np.ndarray:
    gated = silu(linear(weights, "gate_proj", x)) * linear(weights, "up_proj", x)
    return linear(weights, "down_proj", gated)


def patches(pixels: np.ndarray, side: int) -> np.ndarray:
    """(S, S, C) to (N, side * side * C): patch by patch, pixel by pixel."""
    size = len(pixels)
    return np.array(
        [
            pixels[y : y + side, x : x + side].ravel()
            for y in range(0, size, side)
            for x in range(0, size, side)
        ]
    )


def space_to_channel(x: np.ndarray, stride: int) -> np.ndarray:
    side = round(len(x) ** 0.5)
    return patches(x.reshape(side, side, -1), stride)


def encoder_layer(weights: Weights, x: np.ndarray, heads: int, shared: Weights | None = None) -> np.ndarray:
    own = part(weights, "attention.") if shared is None else shared
    x = x + attention(own, rms_norm(x, weights["norm.weight"]), heads)
    return x + mlp(part(weights, "mlp."), rms_norm(x, weights["mlp_norm.weight"]))


def encoder(weights: Weights, pixels: np.ndarray, patch: int, heads: int, layers: int) -> np.ndarray:
    x = linear(weights, "patch_proj", patches(pixels, patch)) + weights["positions"]
    shared = part(weights, "attention.") or None
    for number in range(layers):
        x = encoder_layer(part(weights, f"layers.{number}."), x, heads, shared)
    return rms_norm(x, weights["norm.weight"])


def adapter(weights: Weights, x: np.ndarray) -> np.ndarray:
    return linear(weights, "layers.2", gelu_tanh(linear(weights, "layers.0", x)))


def fsq(z: np.ndarray, levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, L) and tokens (N) of numbers (N, L), number by number."""
    codes = np.zeros_like(z)
    tokens = np.zeros(len(z), int)
    for row, numbers in enumerate(z):
        weight = 1
        for k, (number, count) in enumerate(zip(numbers, levels, strict=True)):
            half = (count - 1) * 1.001 / 2
            offset = 0 if count % 2 else 0.5
            place = np.round(np.tanh(number + np.arctanh(offset / half)) * half - offset)
            codes[row, k] = place / (count // 2)
            tokens[row] += weight * int(place + count // 2)
            weight *= count
    return codes, tokens


def modulated(x: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return layer_norm(x) * (1 + scale) + shift


def decoder_layer(
    weights: Weights, x: np.ndarray, time: np.ndarray, heads: int, shared: Weights | None = None
) -> np.ndarray:
    """time: (6, D)."""
    vectors = time + weights["modulation"]
    own = part(weights, "attention.") if shared is None else shared
    x = x + vectors[2] * attention(own, modulated(x, vectors[0], vectors[1]), heads)
    return x + vectors[5] * mlp(part(weights, "mlp."), modulated(x, vectors[3], vectors[4]))


def frequencies(time: float) -> np.ndarray:
    angles = [1000 * time * 10_000 ** (-k / 128) for k in range(128)]
    return np.array([*np.cos(angles), *np.sin(angles)])


def velocity(
    weights: Weights,
    pixels: np.ndarray,
    time: float,
    condition: np.ndarray | None,
    *,
    patch: int,
    heads: int,
    layers: int,
    tokens: int,
) -> np.ndarray:
    """The decoder's output (S, S, 3); condition (M, width), or None for none."""
    if condition is None:
        given = np.tile(weights["no_condition"], (tokens, 1))
    else:
        given = linear(weights, "condition_proj", condition)
    x = np.concatenate([given, linear(weights, "patch_proj", patches(pixels, patch))]) + weights["positions"]
    at = silu(linear(weights, "time_in", frequencies(time)))
    vectors = linear(weights, "time_out", at).reshape(6, -1)
    shared = part(weights, "attention.") or None
    for number in range(layers):
        x = decoder_layer(part(weights, f"layers.{number}."), x, vectors, heads, shared)
    shift, scale = np.split(linear(weights, "last_modulation", at), 2)
    y = linear(weights, "pixel_proj", modulated(x[tokens:], shift, scale))
    size, across = len(pixels), len(pixels) // patch
    out = np.zeros((size, size, 3))
    for number, values in enumerate(y):
        row, column = divmod(number, across)
        out[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = values.reshape(
            patch, patch, 3
        )
    return out
