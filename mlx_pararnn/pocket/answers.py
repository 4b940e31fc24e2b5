"""Answers by a model that uses tools: events as they happen, or the text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache import RecurrentCache
from ..errors import PararnnError
from ..files.hub import BUNDLED
from ..generation import find_room
from ..model import Model
from ..text.grammars import Grammars
from . import misread
from .assistant import Assistant
from .events import Event, Finish, Text
from .functions import Functions
from .loop import Limits, run_turn
from .protocol import Protocol, find_protocol

PIECE = 512  # tokens of a message or result that are read at once
# Characters of the bundled model's longest message: two numbers with as many digits as an answer may have
# tokens, and words.
MOST_CHARACTERS = 10_000


def stream_answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    message: str,
    *,
    functions: Functions | Iterable[Callable[..., Any]] | None = None,
    limits: Limits | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    cache: list[RecurrentCache] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    prefill_step_size: int = PIECE,
) -> Iterator[Event]:
    """Answer a message with a model that uses tools: everything that happens, as it happens.

    Args:
        model, tokenizer: a model whose tokenizer has the tokens of the protocol (`protocol`).
        message: what the user says; text only, whatever it looks like.
        functions: those that the model may call; without it those of an `Assistant` that remembers nothing.
        limits: where the turn ends in any case.
        sampler, cache, progress, prefill_step_size: for `ModelTokens`; a cache that has read earlier turns is
            read on.

    Raises:
        PararnnError: the model does not speak the protocol, or does not take the message (`check_message`).
    """
    protocol = require_protocol(tokenizer)
    check_message(tokenizer, message)
    prefix = protocol.render_message(message)
    limits = limits or Limits()
    source = ModelTokens(model, sampler, cache, progress, prefill_step_size)
    earlier = source.cache[0].offset
    room = find_room(model, earlier + bool(earlier) + len(prefix))
    if functions is None:
        functions = assistant_functions(Assistant(rings=False, keeps=False))
    if earlier:  # the turn before ended with a token that was made, and not read
        source.read([protocol.end])
    return run_turn(
        protocol,
        source,
        prefix,
        functions if isinstance(functions, Functions) else Functions(functions),
        limits if room is None else replace(limits, steps=min(limits.steps, room)),
        grammars=Grammars(tokenizer, model.args.vocab_size),
    )


def answer(model: Model, tokenizer: TokenizerWrapper, message: str, **options: Any) -> str:
    """The text of the answer that `stream_answer` gives, in one piece; same arguments.

    Raises:
        PararnnError: as there, and where a limit has ended the answer before it was whole.
    """
    text = ""
    for event in stream_answer(model, tokenizer, message, **options):
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Finish) and event.reason in ("length", "steps", "time"):
            raise PararnnError(
                f"the answer is not whole: it has reached its limit ({event.reason}); give more with "
                "limits=Limits(...), or read what there is of it from stream_answer"
            )
    return text


def check_message(tokenizer: TokenizerWrapper, message: str) -> None:
    """Raise PararnnError for a message that is no text, empty, or longer than the bundled model answers."""
    if not isinstance(message, str):
        raise PararnnError(f"the message must be a text (str), and this is of type {type(message).__name__}")
    if not message:
        raise PararnnError("the message is empty; write what the model should answer")
    if len(message) > MOST_CHARACTERS and Path(tokenizer.name_or_path) == BUNDLED:
        raise PararnnError(
            f"the bundled model answers messages of at most {MOST_CHARACTERS:,} characters, and this one has "
            f"{len(message):,}; a long text is continued by a model of yours: mlx-pararnn generate MODEL"
        )


def assistant_functions(assistant: Assistant) -> Functions:
    """The functions of an `Assistant`, with the rules for what models misread."""

    def instead(message: str, function: str, arguments: str) -> str | None:
        rules = misread.instead, assistant.instead
        return next(filter(None, (rule(message, function, arguments) for rule in rules)), None)

    return Functions(
        assistant.functions(),
        known=True,
        instead=instead,
        check_answer=misread.check_answer,
    )


def require_protocol(tokenizer: TokenizerWrapper) -> Protocol:
    """The protocol of a model; raises PararnnError where it has none."""
    protocol = find_protocol(tokenizer)
    if protocol is None:
        raise PararnnError(
            f"the model in {tokenizer.name_or_path} does not use tools: its tokenizer lacks the tokens for "
            "them (docs/tools.md); use mlx_pararnn.generate"
        )
    return protocol


class ModelTokens:
    """A model as a source of tokens.

    Args:
        model: the model.
        sampler: MLX-LM's, log probabilities (1, V) to a token; without it the likeliest is taken.
        cache: where the state is kept; a new one if left out.
        progress: called with how many tokens of a message or result have been read, and of how many.
        prefill_step_size: at most so many of them are read at once, and never more than `PIECE`.
    """

    def __init__(
        self,
        model: Model,
        sampler: Callable[[mx.array], mx.array] | None = None,
        cache: list[RecurrentCache] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        prefill_step_size: int = PIECE,
    ) -> None:
        self.vocab_size = model.args.vocab_size
        self.cache = model.make_cache() if cache is None else cache
        self._model, self._sampler, self._progress = model, sampler, progress
        self._piece = min(PIECE, prefill_step_size)
        self._logits: mx.array | None = None  # (1, T, V)

    def read(self, tokens: Sequence[int]) -> None:
        """Read these tokens; the logits after the last are kept for `choose`."""
        for begin in range(0, len(tokens), self._piece):
            piece = mx.array([tokens[begin : begin + self._piece]])
            self._logits = self._model(piece, cache=self.cache)
            if len(tokens) > 1:
                mx.eval([layer.state for layer in self.cache])
                self._progress(min(begin + self._piece, len(tokens)), len(tokens))

    def choose(self, allowed: np.ndarray) -> int:
        """The next token among the allowed ones; `allowed` (V,) holds booleans."""
        assert self._logits is not None
        logits = self._logits[:, -1:] if self._logits.shape[1] > 1 else self._logits
        if self._sampler is None:
            # NumPy reads them where they stand; an operation of MLX's more would take longer than the token.
            numbers = np.array(logits.astype(mx.float32) if logits.dtype == mx.bfloat16 else logits)[0, 0]
            return int(np.where(allowed, numbers, -np.inf).argmax())
        logits = mx.where(mx.array(allowed), logits[:, 0].astype(mx.float32), -mx.inf)
        token = self._sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        return cast(int, token.item())
