"""Pointer memory: a message that a model can read again, token by token, at any length.

The pointer tool of arXiv 2510.14826. A model's own state has a constant size; what does not fit stays in this
memory, which the model reads through pointers that it moves itself.
"""

from collections.abc import Iterable

POINTERS = 4


class PointerMemory:
    """The entries of a turn and the pointers into it.

    An entry is a token id. At the start the memory holds the message with the tokens around it; what the
    model thinks and answers is appended. Pointers are numbered from 1 and start at entry 0. They may stand
    outside the memory, where they read `edge`, but move no further than one entry beyond its ends.

    Args:
        entries: token ids at the start of the turn.
        edge: the token id that a read outside the memory gives.
        pointers: how many pointers there are.
    """

    def __init__(self, entries: Iterable[int], edge: int, pointers: int = POINTERS) -> None:
        self.entries = list(entries)
        self.edge = edge
        self.positions = [0] * pointers

    def append(self, token: int) -> None:
        """Add an entry at the end; pointers stay where they are."""
        self.entries.append(token)

    def read(self, pointer: int) -> int:
        """The entry under a pointer, or `edge` outside the memory."""
        at = self.positions[self._index(pointer)]
        return self.entries[at] if 0 <= at < len(self.entries) else self.edge

    def move(self, pointer: int, step: int) -> None:
        """Move a pointer by one entry: `step` is 1 (right) or -1 (left)."""
        index = self._index(pointer)
        self.positions[index] = max(-1, min(len(self.entries), self.positions[index] + step))

    def jump_to_last(self, pointer: int) -> None:
        """Put a pointer on the last entry."""
        self.positions[self._index(pointer)] = len(self.entries) - 1

    def _index(self, pointer: int) -> int:
        if not 1 <= pointer <= len(self.positions):
            raise IndexError(f"there is no pointer {pointer}; they are numbered 1 to {len(self.positions)}")
        return pointer - 1
