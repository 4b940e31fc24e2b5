"""What comes next in a text that is being typed, at each keystroke; the state goes along with the text."""

import codecs
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import islice
from math import inf, prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import RecurrentCache, held_arrays
from .errors import PararnnError
from .files.hub import COMPLETION
from .generation import check_text
from .loading import load
from .model import Model
from .text.byte_vocabulary import ByteVocabulary

WINDOW = 2000  # tokens that are read of a text, where nothing of it was read before
MAX_TOKENS = 32
MIN_PROBABILITY = 0.3
BLANKS = " \t\r\n"  # with which no completion ends

BYTES_A_TOKEN = 4  # of a text whose tokens are not known yet, at most
READ_STEP = 512  # tokens that are read at once
RECENT = 64  # last steps whose states are kept, and beyond them
SPACING = 16  # snapshots, at the densest so far apart (`RecurrentCache.remember`)
UNSETTLED = 8  # words before a change that are made into tokens again: it can join or divide the last few
HEALED = 8  # tokens at the end of a text that are taken back, at most
EXPANSIONS = 16  # ways to spell their text that are followed
NEGLIGIBLE = 0.01  # the share of all ways that need not be followed
MOST_STEPS = 64  # states after the text's, tried or suggested, that are kept

Spelling: TypeAlias = tuple[int, ...]


class Piece(NamedTuple):
    """Some characters of a completion.

    Attributes:
        text: of one token, or of several: that make up a character, or blanks and what comes after them.
        probability: that they come, after all before them.
    """

    text: str
    probability: float


@dataclass(frozen=True)
class Completion:
    """What comes next.

    Attributes:
        pieces: its text, in the pieces in which it was found.
        read: tokens that the model has read for it.
    """

    pieces: tuple[Piece, ...]
    read: int

    @property
    def text(self) -> str:
        """What comes after the prefix; "" where nothing is likely enough."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def probability(self) -> float:
        """That all of the text comes."""
        return prod(piece.probability for piece in self.pieces)


class Step(NamedTuple):
    """A model after some tokens.

    Attributes:
        states: each layer's state and convolution inputs.
        probabilities: (V,), of the next token.
    """

    states: list[tuple[mx.array | None, mx.array | None]]
    probabilities: np.ndarray


def complete(
    prefix: str,
    model: str | Path | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    max_lines: int = 1,
    min_probability: float = MIN_PROBABILITY,
) -> str:
    """What comes next in a text, up to the end of its line and as far as it is likely.

    Call it again whenever the text has changed: what the model has read and still stands there is not read
    again.

    Args:
        prefix: the text before the cursor.
        model: a folder or a name on the Hugging Face hub; None for the model that comes with the package.
        max_tokens, max_lines, min_probability: as `Completer.complete` has them.

    Raises:
        PararnnError: as `Completer` and its `complete`.
    """
    with _one_at_a_time:
        found = _completer(str(model or COMPLETION)).complete(
            prefix, max_tokens=max_tokens, max_lines=max_lines, min_probability=min_probability
        )
    return found.text


_one_at_a_time = Lock()


@lru_cache(maxsize=1)
def _completer(model: str) -> "Completer":
    return Completer(*load(model))


class Completer:
    """Completes a text that is being typed; one for each text, and one thread at a time.

    It keeps the states after the text's tokens, as `RecurrentCache` remembers them, and after those that it
    tried or suggested last. Where the text has grown, shrunk or changed, the state goes back to the last
    that stands, and what is new is read: a token where a character was typed or taken back, none where a
    suggestion was accepted.

    A text may end within a token: its last word is taken back, eight tokens of it at most, and all ways to
    spell it are followed together with what may come after it. Else "retu" would be two tokens after which
    "rn" has never come.

    Args:
        model: the model.
        tokenizer: its tokenizer, byte-level.
        window: tokens at the end of a text that are read first. What is typed after them is added to that;
            where most of the text is another, it begins anew.

    Attributes:
        begin: where in the text's UTF-8 begins what is read.
        tokens: those of it, after the token that goes before a text.

    Raises:
        PararnnError: the tokenizer does not fit; the model has hardly any learned positions.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper, *, window: int = WINDOW) -> None:
        self._model = model
        self._vocabulary = ByteVocabulary(tokenizer, model.args.vocab_size)
        positions = model.args.max_position_embeddings
        if positions is not None and positions < 8 * EXPANSIONS:
            raise PararnnError(f"a model of {positions} learned positions has no room to complete a text")
        if window < 1:
            raise PararnnError("window must be at least 1")
        self._positions = inf if positions is None else positions
        self._window = int(min(window, self._positions // 2))
        self._always = self._vocabulary.beginning
        end = tokenizer.eos_token_id
        self._opening = self._always or ([] if end is None else [end])  # in training it is before each text
        self._reset()

    def _reset(self) -> None:
        self._text = b""  # UTF-8
        self.begin = 0  # what is read of it
        self.tokens: list[int] = []
        self._words: list[tuple[int, int]] = []  # where they begin, in bytes of the text and in tokens
        self._cache = self._model.make_cache()
        self._read = 0  # tokens that it has read
        self._steps: dict[Spelling, Step] = {}  # after those and some more
        self._count = 0

    def complete(
        self,
        prefix: str,
        *,
        max_tokens: int = MAX_TOKENS,
        max_lines: int = 1,
        min_probability: float = MIN_PROBABILITY,
    ) -> Completion:
        """What comes after `prefix`, the text before the cursor.

        The likeliest token is added as long as all of them together are likely enough. Blanks and
        line breaks at the end are left out, since nobody sees them, and the next token may begin with
        another blank: an indentation is "   " and " return".

        Args:
            prefix: the text.
            max_tokens: after the word that the prefix ends within, at most.
            max_lines: lines, the prefix's last one among them; the last line's break is left out.
            min_probability: of all that is added, at least; 0 goes on to the end of the lines.

        Raises:
            PararnnError: the prefix is no str, or holds lone surrogates; a number is out of range.
        """
        if not isinstance(prefix, str):
            raise PararnnError(f"a text to complete is a str, not {type(prefix).__name__}")
        check_text(prefix)
        if max_tokens < 1 or max_lines < 1 or not 0 <= min_probability <= 1:
            raise PararnnError("max_tokens and max_lines must be at least 1, min_probability from 0 to 1")
        before = self._count
        try:
            same = self._follow(prefix.encode())
            pieces = self._pieces(same, max_tokens, max_lines, min_probability) if self.tokens else []
        except BaseException:  # of an interrupt too: the layers may have read differently much
            self._reset()
            raise
        return Completion(tuple(pieces), self._count - before)

    def _follow(self, text: bytes) -> int:
        """Take `text` in place of the one before; returns how many tokens the two have in common."""
        common = _common_prefix(self._text, text)
        settled = max(0, bisect_right(self._words, (common, inf)) - UNSETTLED)
        if not self._words or common < self.begin:
            return self._begin_anew(text)
        begin, index = self._words[settled]
        if len(text) - begin > BYTES_A_TOKEN * self._window:
            return self._begin_anew(text)
        fresh, words = self._vocabulary.encode(text[begin:])
        if index + len(fresh) > 3 / 4 * self._positions:
            return self._begin_anew(text)
        same = index + _common_prefix(self.tokens[index:], fresh)
        self._text = text
        self.tokens[index:] = fresh
        self._words[settled:] = [(begin + place, index + count) for place, count in words]
        return same

    def _begin_anew(self, text: bytes) -> int:
        count = self._count
        self._reset()
        self._count = count
        begin = max(0, len(text) - BYTES_A_TOKEN * self._window)
        if begin:
            line = text.find(b"\n", begin, (begin + len(text)) // 2)
            begin = line if line >= 0 else begin
            while text[begin] & 0xC0 == 0x80:  # inside a character
                begin += 1
        tokens, words = self._vocabulary.encode(text[begin:])
        first = max(0, len(tokens) - self._window)
        words = [word for word in words if word[1] >= first]
        if not words or words[0][1] - first > self._window // 2:  # the window begins within a long word
            lengths = [len(self._vocabulary.bytes[token]) for token in tokens]
            place = sum(lengths[:first])
            while first < len(tokens) and text[begin + place] & 0xC0 == 0x80:
                place, first = place + lengths[first], first + 1
            words.insert(0, (place, first))
        place, first = words[0]
        opening = self._always if begin + place else self._opening
        self._text, self.begin = text, begin + place
        self.tokens = opening + tokens[first:]
        self._words = [(begin + place, index - first + len(opening)) for place, index in words]
        return 0

    def _pieces(self, same: int, max_tokens: int, max_lines: int, min_probability: float) -> list[Piece]:
        end = len(self.tokens)
        base = max(self._words[-1][1] if self._words else end, end - HEALED, 1)
        self._go_to(base, same)
        decoder = codecs.getincrementaldecoder("utf-8")()
        pieces: list[Piece] = []
        whole = probability = 1.0  # of the pieces, and of what comes after them
        blanks = ""  # after the pieces
        most = int(min(max_tokens, self._positions // 8))
        for added, likely in islice(self._added(self.tokens[base:]), most + 1):
            probability *= likely
            if not whole * probability >= min_probability:
                break
            try:
                text = decoder.decode(added)
            except UnicodeDecodeError:
                break
            kept, max_lines = _lines(text, max_lines)
            if piece := (blanks + kept).rstrip(BLANKS):
                pieces.append(Piece(piece, probability))
                whole, probability = whole * probability, 1.0
            blanks = (blanks + kept)[len(piece) :]
            if not max_lines:
                break
        return pieces

    def _go_to(self, base: int, same: int) -> None:
        """Bring the state after the first `base` tokens, of which it may have read the first `same`."""
        if self._read > min(base, same):
            place = max(p for p in self._cache[0].positions() if p <= min(base - 1, same))
            for layer in self._cache:
                layer.rewind(self._read - place)
            self._read, self._steps = place, {}
        path: Spelling = ()
        while self._read < base and (step := self._steps.get((*path, self.tokens[self._read]))):
            path = (*path, self.tokens[self._read])
            for layer, arrays in zip(self._cache, step.states, strict=True):
                layer[0], layer[1] = arrays
                layer.advance(1)
            self._read += 1
        known = len(path)
        self._steps = {p[known:]: step for p, step in self._steps.items() if p[:known] == path}
        while self._read < base:
            count = min(READ_STEP, base - 1 - self._read) or 1  # the last token by itself
            for layer in self._cache:
                layer.remember(RECENT if count <= RECENT else 0, SPACING)
            tokens = self.tokens[self._read : self._read + count]
            logits = self._model(mx.array([tokens]), cache=self._cache)
            mx.eval(held_arrays(self._cache))
            self._count += count
            self._read += count
            if self._read == base:
                self._steps = {(): _step(self._cache, logits)}

    def _added(self, tail: list[int]) -> Iterator[tuple[bytes, float]]:
        """The bytes of each token after the text, and its probability; the first makes up for the tail."""
        path, added, probability = self._heal(tail)
        yield added, probability
        while True:
            probabilities = self._after(path).probabilities
            token = int(np.argmax(probabilities))
            if not self._vocabulary.bytes[token]:
                return
            yield self._vocabulary.bytes[token], float(probabilities[token])
            path = (*path, token)

    def _heal(self, tail: list[int]) -> tuple[Spelling, bytes, float]:
        """The likeliest tokens whose bytes begin with those of `tail`, and their bytes after these.

        Their probability is that among all tokens which begin so. The tail's own are followed first, then
        whatever is likeliest, until little is left.
        """
        names = self._vocabulary.bytes
        text = b"".join(names[token] for token in tail)
        if not text:
            return (), b"", 1.0
        own = {tuple(tail[:count]) for count in range(len(tail))}
        waiting: list[tuple[bool, float, Spelling]] = [
            (False, -1.0, ())
        ]  # probabilities, negative: a heap's order
        best: tuple[float, Spelling, bytes] = (-1.0, (), b"")
        mass = 0.0
        for _ in range(EXPANSIONS):
            if not waiting or (waiting[0][0] and -sum(entry[1] for entry in waiting) < NEGLIGIBLE * mass):
                break
            _, negative, path = heappop(waiting)
            rest = text[sum(len(names[token]) for token in path) :]
            probabilities = self._after(path).probabilities
            covering = self._vocabulary.beginning_with(rest)
            if len(covering):
                reached = -negative * probabilities[covering]
                mass += float(reached.sum())
                likeliest = int(np.argmax(reached))
                token = int(covering[likeliest])
                best = max(best, (float(reached[likeliest]), (*path, token), names[token][len(rest) :]))
            for token in self._vocabulary.within(rest):
                longer = (*path, token)
                heappush(waiting, (longer not in own, negative * float(probabilities[token]), longer))
        probability, path, added = best
        return path, added, probability / mass if mass else 0.0

    def _after(self, path: Spelling) -> Step:
        """After the tokens that the state has read, and those of `path`."""
        step = self._steps.get(path)
        if step is None:
            before = self._after(path[:-1])
            caches = self._model.make_cache()
            for cache, arrays in zip(caches, before.states, strict=True):
                cache.state = list(arrays), [self._read + len(path) - 1], None, None
            logits = self._model(mx.array([path[-1:]]), cache=caches)
            self._count += 1
            if len(self._steps) >= MOST_STEPS:
                self._steps = {(): self._steps[()]}
            step = self._steps[path] = _step(caches, logits)
        return step


def _step(caches: list[RecurrentCache], logits: mx.array) -> Step:
    """After the last token; logits (1, T, V)."""
    scores = np.array(logits[0, -1].astype(mx.float32)).astype(np.float64)
    weights = np.exp(scores - scores.max())
    return Step([(cache[0], cache[1]) for cache in caches], weights / weights.sum())


def _lines(text: str, lines: int) -> tuple[str, int]:
    """What of a text lies in so many lines, and how many of them are left; 0 where the last has ended."""
    for place, character in enumerate(text):
        if lines == 1 and character in "\r\n":
            return text[:place], 0
        lines -= character == "\n"
    return text, lines


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first `low` are, the first `high` are not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
