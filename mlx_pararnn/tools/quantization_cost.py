"""What quantization cost a model: its predictions on a text beside those of the original weights."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..blocks import Layer
from ..cache import RecurrentCache
from ..compute import matrix_products
from ..errors import PararnnError
from ..loading import load_tokenizer
from ..model import Model, PararnnModel
from ..model_config import ModelArgs
from .sample_text import SAMPLE_TEXT

Array = NDArray[np.float32]

# config.json's field for it.
FIELD = "quantization_cost"
_MOST_TOKENS = 512
_MOST_LOGITS = 1 << 26  # of all tokens: 256 MB of float32
_AT_ONCE = 64  # tokens whose logits are held at a time


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


def quantization_cost(logits: Iterable[mx.array], original: Array, tokens: list[int], is_text: bool) -> Cost:
    """Compare what a quantized model predicts with what the original weights do.

    Args:
        logits: (n, V) the quantized model's after n tokens, in pieces, of all tokens but the last.
        original: (T - 1, V) those of the weights that were quantized.
        tokens, is_text: T token ids, as `bundled_tokens` gives them.
    """
    kl = loss = original_loss = 0.0
    same = begin = 0
    for piece in logits:
        end = begin + piece.shape[0]
        ours, theirs = _log_probs(piece), _log_probs(mx.array(original[begin:end]))
        following = mx.array(tokens[begin + 1 : end + 1])[:, None]
        kl += _divergence(ours, theirs) * (end - begin)
        same += cast(int, (mx.argmax(ours, axis=-1) == mx.argmax(theirs, axis=-1)).sum().item())
        loss -= cast(float, mx.take_along_axis(ours, following, axis=-1).sum().item())
        original_loss -= cast(float, mx.take_along_axis(theirs, following, axis=-1).sum().item())
        begin = end
    if not is_text:
        return Cost(kl / begin, same, begin)
    return Cost(kl / begin, same, begin, _perplexity(loss / begin), _perplexity(original_loss / begin))


def model_logits(model: Model, tokens: list[int]) -> Iterator[mx.array]:
    """The logits (n, V) after each of the tokens, in pieces.

    The model's layers are taken out of it: one that was loaded with `lazy` has one of them in memory at a
    time, and none in the end.
    """
    ids = mx.array([tokens])
    x = model.model.embed_tokens(ids)
    if model.args.max_position_embeddings is not None:
        x += model.model.embed_positions(mx.arange(len(tokens)))
    layers = model.model.layers
    hidden = run_layers(model.args, [partial(layers.pop, 0)] * len(layers), x, model.model.norm)
    head = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head
    for begin in range(0, len(tokens), _AT_ONCE):
        yield matrix_products.head(head, hidden[:, begin : begin + _AT_ONCE])[0]


def run_layers(
    args: ModelArgs, layers: Iterable[Callable[[], Layer]], x: mx.array, norm: nn.Module
) -> mx.array:
    """Embedded tokens (1, T, D) to the last norm's output (1, T, D), with one layer in memory at a time.

    Args:
        args: the model's.
        layers: each gives a layer, when the one before it is no longer needed.
        x: (1, T, D) the embedded tokens.
        norm: the last norm.
    """
    one: Any = PararnnModel(replace(args, num_hidden_layers=1, vocab_size=1, max_position_embeddings=None))
    one.norm = nn.Identity()
    for load in layers:
        one.layers[0] = nn.Identity()
        mx.clear_cache()
        one.layers[0] = load()
        cache = RecurrentCache(1)
        cache.initial = one.layers[0].mixer.cell.get("initial_state")
        x = one(mx.zeros(x.shape[:2], mx.int32), [cache], input_embeddings=x, output_wanted=True)
        mx.eval(x)
    return cast(mx.array, norm(x))


def divergence(logits: mx.array, original: mx.array) -> float:
    """KL divergence of what `logits` (..., V) predict from what the original's do: nats, mean over tokens."""
    return _divergence(_log_probs(logits), _log_probs(original))


def _divergence(ours: mx.array, theirs: mx.array) -> float:
    """The same of log probabilities."""
    return max(0.0, cast(float, (mx.exp(theirs) * (theirs - ours)).sum(axis=-1).mean().item()))


def bundled_tokens(folder: Path, args: ModelArgs, config: dict[str, Any]) -> tuple[list[int], bool]:
    """The bundled text for `quantization_cost`: what `sample_tokens` gives, but not all of it.

    As many tokens as a model with learned positions takes, and as their logits fit into 256 MB.

    Raises PararnnError for a model of one position, which predicts nothing that could be compared.
    """
    tokens, is_text = sample_tokens(SAMPLE_TEXT, folder, args, config)
    most = max(2, min(_MOST_TOKENS, _MOST_LOGITS // args.vocab_size))
    tokens = tokens[: min(most, args.max_position_embeddings or most)]
    if len(tokens) < 2:
        raise PararnnError(f"{folder}: a model of one position predicts nothing that could be compared")
    return tokens, is_text


def sample_tokens(text: str, folder: Path, args: ModelArgs, config: dict[str, Any]) -> tuple[list[int], bool]:
    """The text's tokens and True; without a tokenizer its bytes as token ids, and False."""
    try:
        return list(load_tokenizer(folder, config).encode(text)), True
    except PararnnError:  # a model of ids only
        return [byte % args.vocab_size for byte in text.encode()], False


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
