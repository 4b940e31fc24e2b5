"""Greedy tokens, and when two runs of them are equal."""

import mlx.core as mx
from mlx_lm.generate import generate_step


def greedy(model, tokens, n, cache=None):
    steps = generate_step(mx.array(tokens), model, max_tokens=n, prompt_cache=cache)
    return [token for token, _ in steps]


def same_until_a_near_tie(model, prompt, a, b):
    """Equal for tokens: the same until a step whose two best logits are within 1e-3."""
    for n, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            best = mx.sort(model(mx.array([prompt + a[:n]]))[0, -1])[-2:]
            return bool((best[1] - best[0] < 1e-3).item())
    return True
