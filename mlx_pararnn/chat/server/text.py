"""From tokens to the text of an answer, as far as it is certain, and not past a stop string."""

from collections.abc import Sequence
from typing import Any

from ...text.detokenizer import StopMatcher


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
        """Whether a stop string has come."""
        return self._stop.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that has come."""
        return self._stop.found

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
        return self._stop.add(piece)
