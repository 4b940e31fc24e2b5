"""From tokens to the text of an answer, as far as it is certain, and not past a stop string."""

from collections.abc import Sequence
from typing import Any


class AnswerText:
    """The text of one answer.

    Args:
        detokenizer: fresh; `add_token`, `finalize` and `last_segment` of MLX-LM's streaming detokenizers.
        stop: strings that end the text and are not part of it.

    Attributes:
        stopped: whether a stop string has come.
        length: characters so far, those of a stop string too.
    """

    def __init__(self, detokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stop)
        self.length = 0

    @property
    def stopped(self) -> bool:
        return self._stop.found

    def add(self, token: int) -> str:
        """What is certain of the text after one more token, and was not before."""
        self._detokenizer.add_token(token)
        return self._certain()

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        self._detokenizer.finalize()
        return self._certain() + self._stop.finish()

    def _certain(self) -> str:
        piece = self._detokenizer.last_segment
        self.length += len(piece)
        return self._stop.add(piece)


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, however it is cut.

    The stop string that is complete first ends the text; of several that end at the same place the longest.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._held = ""  # may be the beginning of a stop string
        self.found = False

    def add(self, piece: str) -> str:
        """The text that is known not to be part of a stop string."""
        if self.found:
            return ""
        if not self._words:
            return piece
        text = self._held + piece
        places = [(text.find(word), len(word)) for word in self._words]
        ends = [(start + length, start) for start, length in places if start >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max(_overlap(text, word) for word in self._words)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that `word` begins with, and is longer than."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
