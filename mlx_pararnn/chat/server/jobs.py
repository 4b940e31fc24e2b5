"""A sequence to generate, from its request to the pieces that its client gets."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ...cache import RecurrentCache
from ...errors import PararnnError
from ...images.image_prompts import Seen, identity
from ...pocket.events import Call, Event, Finish, Text
from ...text.grammars import GrammarProcessor
from .text import AnswerText

LEAST_LOGPROB = -9999.0  # what OpenAI says for a token that cannot follow: JSON has no infinity
MOST_UNSENT, FEW_UNSENT = 256, 64  # pieces that wait for a slow client: above it is parked, below it goes on


@dataclass(frozen=True)
class TokenInfo:
    """A token with its log probability, the likeliest ones beside it, and where its text begins."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """What came of one step: text, its tokens where asked for, how the answer ended, calls of tools."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None
    calls: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: at most so many; 0 only scores the prompt.
        text: makes text of its tokens.
        sampler: log probabilities (B, V) to tokens (B,).
        processors: functions of the tokens so far and the logits (1, V).
        top_logprobs: so many likeliest tokens beside each; None for no log probabilities at all.
        score_prompt: whether the prompt's own log probabilities are wanted, in the first pieces.
        begin: where the answer begins in what its client is told, which may be told the prompt too.
        system_length: how much of the prompt other conversations begin with too; kept by itself.
        pictures: of each image in the prompt where its first token stands, and its pixels (S, S, 3), uint8.
        turn: begins what takes the place of the batch, by its events: a turn with tools, a drawing.
        cached_tokens, completion_tokens: counted on the way.
        tokens: what a row that goes on must have read: the prompt, and what was generated before it left.
        cache: the state of a beginning of `tokens`; None before the first.
        events: of the turn, once it has begun.
        share: tokens since it got its place.
        made, taken: pieces that were made, and that its client has taken.
        ended: whether its last piece was made.
    """

    prompt: list[int]
    max_tokens: int
    text: AnswerText
    sampler: Any
    processors: list[Any] = field(default_factory=list)
    top_logprobs: int | None = None
    score_prompt: bool = False
    begin: int = 0
    system_length: int = 0
    pictures: Sequence[tuple[int, np.ndarray]] = ()
    turn: Callable[[], Iterator[Event]] | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.prompt  # one list for all answers to a prompt; none of them changes it
        self.seen: list[Seen] = []
        self._identity: list[int] = []
        self.cache: list[RecurrentCache] | None = None
        self.events: Iterator[Event] | None = None
        self.share = self.made = self.taken = 0
        self.ended = self.parked = False
        self.unread: asyncio.Queue[Piece] = asyncio.Queue()
        self._failure: BaseException | None = None
        self._length = self._sent_length = self.begin  # characters that were made, and told
        self._unsent_tokens: list[TokenInfo] = []
        self._call: Call | None = None

    def look(self, seen: list[Seen]) -> None:
        """Take what the model reads of the prompt's images."""
        self.seen = seen
        self._identity = identity(self.prompt[: self.images_end], seen)

    @property
    def weight(self) -> int:
        """What it holds at most, in units of 16 bytes: its tokens, and what is told of them."""
        read = told = 0
        if self.top_logprobs is not None or self.score_prompt:
            told = 32 * (2 + (self.top_logprobs or 0))  # 700 bytes, and 460 for each of the likely ones
            read = told if self.score_prompt else 0
        return len(self.prompt) * (1 + read) + self.max_tokens * (1 + told)

    @property
    def read(self) -> int:
        """So many of `tokens` its state has read."""
        return self.cache[0].offset if self.cache else 0

    @property
    def images_end(self) -> int:
        """So much of the prompt is embedded with its images; 0 for none."""
        return self.seen[-1].end if self.seen else 0

    def key(self, tokens: list[int]) -> list[int]:
        """What the prompt cache knows `tokens` of this job by: two images are never the same."""
        return [*self._identity, *tokens[len(self._identity) :]][: len(tokens)]

    @property
    def is_too_far_ahead(self) -> bool:
        """Whether its client does not take what is there."""
        return self.made - self.taken > MOST_UNSENT

    @property
    def is_caught_up(self) -> bool:
        """Whether its client has taken most of what is there."""
        return self.made - self.taken < FEW_UNSENT

    def guarded(self, processor: Any) -> Any:
        """A logits processor whose failure is this job's and not the batch's.

        What it makes too large for the logits' format (a bias of 1e9 in float16) is the largest number there.
        """

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if self._failure is None:
                try:
                    return mx.minimum(processor(tokens, logits), mx.finfo(logits.dtype).max)
                except BaseException as error:
                    self._failure = error
            return logits

        return process

    def piece_of_token(
        self, token: int, logprobs: mx.array, finish_reason: str | None, is_end: bool
    ) -> tuple[Piece, bool]:
        """What a client gets of a token, and whether the answer ends with it.

        Args:
            token: the id.
            logprobs: of all tokens (V,).
            finish_reason: "length" where it is the last that is given, "stop" at an end token.
            is_end: whether it is an end token, which is not part of the text.
        """
        if self._failure is not None:
            raise self._failure
        text = ""
        if not is_end:
            if self.top_logprobs is not None:
                values = np.array(logprobs.astype(mx.float32))
                self._unsent_tokens.append(token_info(token, values, self.top_logprobs, self._length))
            text = self.text.add(token)
            self._length = self.begin + self.text.length
        grammars = [p for p in self.processors if isinstance(p, GrammarProcessor)]
        if self.text.stopped or any(grammar.finished for grammar in grammars):
            finish_reason = "stop"
        if finish_reason is not None and not self.text.stopped:
            text += self.text.finish()
            if self.text.stopped:
                finish_reason = "stop"
        self._sent_length += len(text)
        tokens = self._unsent_tokens
        if finish_reason is None or self.text.stopped:
            tokens = [info for info in tokens if info.offset < self._sent_length]
        self._unsent_tokens = self._unsent_tokens[len(tokens) :]
        return Piece(text, tokens, finish_reason), finish_reason is not None

    def piece_of_event(self, event: Event) -> Piece | None:
        """What a client gets of a turn's event: text, and the call that it is to run itself."""
        match event:
            case Text(text=text):
                return Piece(text)
            case Call():
                self._call = event
            case Finish(reason="tool_calls"):
                return Piece(calls=[self._call] if self._call else [], finish_reason="tool_calls")
            case Finish(reason=reason):
                return Piece(finish_reason="stop" if reason in ("stop", "lost") else "length")
        return None


def token_info(token: int, logprobs: np.ndarray, top: int, offset: int = 0) -> TokenInfo:
    """A token among log probabilities (V,); -inf is told as `LEAST_LOGPROB`.

    Raises:
        PararnnError: one of them is NaN.
    """
    if np.isnan(logprobs).any():
        raise PararnnError(
            "the model's logits have no log probabilities (NaN): its weights, or this request's biases and "
            "penalties, are out of range"
        )
    logprobs = np.maximum(logprobs, LEAST_LOGPROB)
    best: list[int] = []
    if top:
        best = np.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top].tolist()
        best.sort(key=lambda other: -logprobs[other])
    return TokenInfo(token, float(logprobs[token]), [(b, float(logprobs[b])) for b in best], offset)
