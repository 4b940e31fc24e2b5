"""What quantization cost a model: its predictions on a text beside those of the original weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..errors import PararnnError
from ..loading import load_tokenizer
from ..model import Model
from .sample_text import SAMPLE_TEXT

# config.json's field for it.
FIELD = "quantization_cost"
_MOST_TOKENS = 1024
_AT_ONCE = 128  # tokens whose logits are held at a time


@dataclass(frozen=True)
class Cost:
    """How a quantized model's predictions of a text differ from the original's.

    Attributes:
        kl: KL divergence from the original's distributions, the mean over tokens, in nats.
        same: of how many tokens the likeliest successor is the same.
        tokens: how many were predicted.
        perplexity, original_perplexity: of the text; None for a model without a tokenizer, which has no text.
    """

    kl: float
    same: int
    tokens: int
    perplexity: float | None = None
    original_perplexity: float | None = None

    def sentence(self) -> str:
        """What a user is told."""
        same = f"{self.same} of {self.tokens} likeliest tokens the same"
        kl = f"KL divergence {self.kl:.2g} nats a token, {same}"
        if self.perplexity is None or self.original_perplexity is None:
            return f"on {self.tokens + 1} token ids (there is no tokenizer): {kl}"
        change = 100 * (self.perplexity / self.original_perplexity - 1)
        return (
            f"on a bundled text: perplexity {self.perplexity:.4g} instead of {self.original_perplexity:.4g} "
            f"({change:+.1f} %), {kl}"
        )


def quantization_cost(model: Model, original: Model, folder: Path, config: dict[str, Any]) -> Cost:
    """Compare `model` with `original` on the bundled text, or on token ids where `folder` has no tokenizer.

    Args:
        model, original: the quantized model, and the same model with the weights that were quantized.
        folder: the quantized model's, for its tokenizer.
        config: its config.json.
    """
    tokens, is_text = sample_tokens(SAMPLE_TEXT, folder, model, config)
    tokens = tokens[: min(_MOST_TOKENS, model.args.max_position_embeddings or _MOST_TOKENS)]
    if len(tokens) < 2:
        raise PararnnError(f"{folder}: a model of one position predicts nothing that could be compared")
    caches = model.make_cache(), original.make_cache()
    kl = loss = original_loss = 0.0
    same = 0
    for begin in range(0, len(tokens) - 1, _AT_ONCE):
        end = min(begin + _AT_ONCE, len(tokens) - 1)
        inputs = mx.array([tokens[begin:end]])
        following = mx.array([tokens[begin + 1 : end + 1]])[..., None]
        ours, theirs = (
            _log_probs(m(inputs, cache=c)) for m, c in zip((model, original), caches, strict=True)
        )
        kl += _divergence(ours, theirs) * (end - begin)
        same += cast(int, (mx.argmax(ours, axis=-1) == mx.argmax(theirs, axis=-1)).sum().item())
        loss -= cast(float, mx.take_along_axis(ours, following, axis=-1).sum().item())
        original_loss -= cast(float, mx.take_along_axis(theirs, following, axis=-1).sum().item())
    count = len(tokens) - 1
    if not is_text:
        return Cost(kl / count, same, count)
    return Cost(kl / count, same, count, _perplexity(loss / count), _perplexity(original_loss / count))


def divergence(logits: mx.array, original: mx.array) -> float:
    """KL divergence of what `logits` (..., V) predict from what the original's do: nats, mean over tokens."""
    return _divergence(_log_probs(logits), _log_probs(original))


def _divergence(ours: mx.array, theirs: mx.array) -> float:
    """The same of log probabilities."""
    return max(0.0, cast(float, (mx.exp(theirs) * (theirs - ours)).sum(axis=-1).mean().item()))


def sample_tokens(text: str, folder: Path, model: Model, config: dict[str, Any]) -> tuple[list[int], bool]:
    """The text's tokens and True; without a tokenizer its bytes as token ids, and False."""
    try:
        return list(load_tokenizer(folder, config).encode(text)), True
    except PararnnError:  # a model of ids only
        return [byte % model.args.vocab_size for byte in text.encode()], False


def noted_cost(config: dict[str, Any]) -> Cost | None:
    """The cost that `convert` wrote into config.json; None where it says nothing that can be used."""
    try:
        cost = Cost(**config[FIELD])
        cost.sentence()
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return cost


def _log_probs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
