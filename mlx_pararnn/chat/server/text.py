"""From tokens to the text of an answer, as far as it is certain, and not past a stop string."""

from collections.abc import Sequence
from typing import Any

from ...detokenizer import StopMatcher


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
        self._words = [word for word in stop if word]
        self._recent = ""  # long enough to hold any stop string
        self.length = 0

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that has come."""
        found = [(self._recent.find(word) + len(word), -len(word), word) for word in self._words]
        ends = [end for end in found if end[2] in self._recent]
        return min(ends)[2] if self.stopped and ends else None

    def add(self, token: int) -> str:
        """What is certain of the text after one more token, and was not before."""
        self._detokenizer.add_token(token)
        return self._certain()

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        self._detokenizer.finalize()
        return self._certain() + self._stop.flush()

    def _certain(self) -> str:
        piece = self._detokenizer.last_segment
        self.length += len(piece)
        if self._words and not self.stopped:
            longest = max(map(len, self._words))
            self._recent = self._recent[-longest:] + piece
        return self._stop.add(piece)
