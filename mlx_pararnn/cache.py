"""The recurrent state as MLX-LM's generators want it: fixed size, batched, saved like a KV cache, rewound."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from .errors import PararnnError

# How many steps back a state remembers while it is speculated on.
RECENT_STEPS = 8
# Snapshots of each interval that are kept; further back the next wider interval takes over.
SNAPSHOTS_PER_INTERVAL = 4
# The widest interval, in spacings; what lies before its snapshots is dropped, so their number is bounded.
WIDEST_INTERVAL = 2**15

# One row's recurrent state (1, slots, D) and convolution inputs (1, conv_kernel - 1, D).
Kept: TypeAlias = tuple[mx.array | None, mx.array | None]


class RecurrentCache(mlx_lm_cache.ArraysCache):
    """One layer's memory of B sequences: two arrays whose size never changes, and how far each row has read.

    `cache[0]` is the recurrent state (B, slots, D), float32; `cache[1]` the convolution's last inputs
    (B, conv_kernel - 1, D), or None where the layer has no convolution. Both are None before the first token.

    The rows' offsets, and the padding of the piece that comes next, are Python integers: learned positions
    and the end of a row's room are known without asking the device.

    A state cannot forget, so going back means having kept an earlier one. By default none is, and the cache
    is not trimmable, like every recurrent cache of MLX-LM. `remember` makes it keep

    * the states of the last `recent` steps, for speculative decoding; the cache is trimmable then;
    * snapshots, dense near the end and sparser further back: for each interval of `spacing` times a power of
      two tokens, the states after its last four multiples. Whoever goes back d tokens finds one less than
      max(spacing, 2 d / 3) before that, and each doubling of the length adds two.

    Rows that join or leave a batch lose their last steps; snapshots go with their row.
    """

    # What `from_state`, which skips __init__, leaves as it is: a state from a file remembers nothing.
    recent = 0
    spacing = 0
    initial: mx.array | None = None  # (slots, D), a learned state before the first token; None for zeros

    def __init__(self, batch_size: int = 1, left_padding: Sequence[int] | None = None) -> None:
        super().__init__(size=2)
        self.cache: list[Any]
        self.row_padding: list[int] | None = list(left_padding) if left_padding else None
        self.row_lengths: list[int] | None = None
        self.offsets = [0] * (len(left_padding) if left_padding else batch_size)
        self.kept: list[dict[int, Kept]] = [{} for _ in self.offsets]  # of each row, by tokens read

    @property
    def batch_size(self) -> int:
        """Rows, B."""
        return len(self.offsets)

    @property
    def offset(self) -> int:
        """Tokens read so far, by the row that has read most."""
        return max(self.offsets)

    def size(self) -> int:
        """Tokens read so far, as MLX-LM asks for it."""
        return self.offset

    def open(self, batch_size: int) -> None:
        """Make an empty cache one of `batch_size` rows; MLX-LM does not say how many when it makes one."""
        if self.empty() and len(self.offsets) == 1:
            self.offsets *= batch_size
            self.kept = [{} for _ in self.offsets]
        if self.initial is not None and self.cache[0] is None:
            rows = (self.batch_size, *self.initial.shape)
            self.cache[0] = mx.contiguous(mx.broadcast_to(self.initial, rows))

    def spans(self, n: int) -> list[tuple[int, int]] | None:
        """Where the real tokens of the next n stand, (begin, end) a row; None if all are real."""
        if self.finalized:
            return None
        begins = [min(max(p, 0), n) for p in self.row_padding or [0] * self.batch_size]
        ends = [min(max(e, 0), n) for e in self.row_lengths or [n] * self.batch_size]
        if all(b == 0 for b in begins) and all(e == n for e in ends):
            return None
        return [(b, max(b, e)) for b, e in zip(begins, ends, strict=True)]

    def make_mask(self, N: int) -> mx.array | None:
        """(B, N), True at real tokens; None if all are."""
        spans = self.spans(N)
        if spans is None:
            return None
        begin, end = (mx.array(side)[:, None] for side in zip(*spans, strict=True))
        steps = mx.arange(N)
        return (steps >= begin) & (steps < end)

    def offsets_after(self, n: int) -> list[int]:
        """Tokens that each row has read after the next n, padding excepted."""
        spans = self.spans(n) or [(0, n)] * self.batch_size
        return [o + end - begin for o, (begin, end) in zip(self.offsets, spans, strict=True)]

    def next_positions(self, n: int) -> mx.array:
        """(B, n), how many tokens of its row stand before each of the next n; of padding any number."""
        spans = self.spans(n) or [(0, n)] * self.batch_size
        first = mx.array([offset - begin for offset, (begin, _) in zip(self.offsets, spans, strict=True)])
        return first[:, None] + mx.arange(n)

    def advance(self, N: int) -> None:
        """Count N more positions, padding excepted, and keep the state if it is one to remember."""
        self.offsets = self.offsets_after(N)
        if self.row_padding is not None:
            self.row_padding = [p - N for p in self.row_padding]
        if self.row_lengths is not None:
            self.row_lengths = [length - N for length in self.row_lengths]
        self._keep_current()
        if N > 1:
            self._drop_unwanted()

    def prepare(self, lengths: Any = None, **padding: Any) -> None:
        """Announce padding in the tokens to come.

        Args:
            lengths: each row's real tokens, the rest of the row being padding on its right.
            padding: `left_padding`, each row's padding on its left; `right_padding`, which MLX-LM gives
                beside `lengths` and which follows from it.

        Raises:
            ValueError: `right_padding` without `lengths`.
        """
        if lengths is None and padding.get("right_padding") is not None:
            raise ValueError("right_padding needs lengths")
        if lengths is not None:
            self.row_lengths = [int(length) for length in lengths]
        if padding.get("left_padding") is not None:
            self.row_padding = [int(n) for n in padding["left_padding"]]

    @property
    def finalized(self) -> bool:
        """False while padding is announced for tokens that have not come."""
        return self.row_padding is None and self.row_lengths is None

    def finalize(self) -> None:
        """Forget the padding that was announced: the tokens have come."""
        self.row_padding = self.row_lengths = None

    @property
    def state(self) -> tuple[Any, ...]:
        """What MLX-LM saves and evaluates: the arrays, tokens read a row, padding and lengths."""
        return self.cache, self.offsets, self.row_padding, self.row_lengths

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        cache, offsets, self.row_padding, self.row_lengths = value
        self.cache, self.offsets = list(cache), list(offsets)
        self.kept = [{} for _ in self.offsets]

    @property
    def state_nbytes(self) -> int:
        """Bytes of the current state alone."""
        return sum(c.nbytes for c in self.cache if c is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the current state and of all that is remembered."""
        arrays = [a for row in self.kept for kept in row.values() for a in kept] + self.cache
        return sum(a.nbytes for a in {id(a): a for a in arrays if a is not None}.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecurrentCache":
        twin = RecurrentCache.from_state(self.state)
        twin.cache = [None if c is None else mx.array(c) for c in self.cache]
        twin.recent, twin.spacing = self.recent, self.spacing
        twin.kept = [dict(row) for row in self.kept]  # nobody writes into a kept array
        return twin

    def remember(self, recent: int = 0, spacing: int = 0) -> None:
        """Keep states from now on; what was kept so far and is not asked for any more is dropped.

        Args:
            recent: keep those of so many last steps.
            spacing: keep snapshots, at the densest so many tokens apart; 0 for none.
        """
        self.recent, self.spacing = recent, spacing
        self._keep_current()
        self._drop_unwanted()

    def positions(self, row: int = 0) -> list[int]:
        """The lengths in tokens that a row can be rewound to, in ascending order; its own is the last."""
        return sorted({0, *self.kept[row], self.offsets[row]})

    def rewind(self, n: int | Sequence[int]) -> None:
        """Go back to the state before the last n tokens, the very one that was computed then.

        Args:
            n: of all rows, or of each row.

        Raises:
            PararnnError: some row has not kept it, or padding is pending. Nothing is changed then.
        """
        steps = [n] * self.batch_size if isinstance(n, int) else list(n)
        if not any(steps):
            return
        targets = [offset - step for offset, step in zip(self.offsets, steps, strict=True)]
        at_start = not any(targets)
        for row, (step, target) in enumerate(zip(steps, targets, strict=True)):
            known = at_start or step == 0 or target in self.kept[row]
            if step < 0 or not self.finalized or not known:
                raise PararnnError(
                    f"the state cannot go back by {step} tokens: of {self.offsets[row]} that were read it "
                    f"can return to {self.positions(row)}; RecurrentCache.remember makes it keep more"
                )
        if at_start:
            self.cache = [None, None]
        else:
            rows = [
                self.kept[row][target] if step else tuple(self._row(row))
                for row, (step, target) in enumerate(zip(steps, targets, strict=True))
            ]
            parts: list[Any] = [list(part) for part in zip(*rows, strict=True)]
            self.cache = [
                None if part[0] is None else part[0] if len(part) == 1 else mx.concatenate(part)
                for part in parts
            ]
        self.offsets = targets
        for target, kept in zip(targets, self.kept, strict=True):
            for position in [p for p in kept if p > target]:
                del kept[position]

    def is_trimmable(self) -> bool:
        """True while the last steps are remembered: what speculative decoding asks for."""
        return self.recent > 0

    def trim(self, n: int) -> int:
        """`rewind`, by MLX-LM's name. MLX-LM does not look at what comes back, so a failure raises."""
        self.rewind(n)
        return n

    def stride(self, n: int) -> int:
        """The `return_states` for `recurrence` that hits all states to keep in the next n tokens, or 0."""
        if n == 1 or not (self.recent or self.spacing):
            return 0
        return math.gcd(*(step for steps in self._steps(n) for step in steps))

    def keep(
        self,
        states: Sequence[mx.array],
        n: int,
        window: mx.array | None = None,
        inputs: mx.array | None = None,
    ) -> None:
        """Remember states from inside the next n tokens; a layer calls it before `advance`.

        Args:
            states: what `recurrence` gave for `stride(n)`: nothing, or one array (B, n // stride, slots, D).
            n: tokens in the piece.
            window: (B, conv_kernel - 1, D), the convolution's last inputs before the piece; None for zeros.
            inputs: (B, n, D), its inputs in the piece; None where the layer has no convolution.
        """
        if not states:
            return
        every, length = self.stride(n), 0
        if inputs is not None:
            length = self.cache[1].shape[1]
            if window is None:
                window = mx.zeros((inputs.shape[0], length, inputs.shape[2]), inputs.dtype)
            inputs = mx.concatenate([window, inputs], axis=1)
        fresh = []
        for row, steps in enumerate(self._steps(n)):
            for step in steps:
                # Gathered, not sliced: a view would hold on to the memory of the whole piece.
                state = states[0][row][mx.array([step // every - 1])]
                last = None if inputs is None else inputs[row][mx.arange(step, step + length)][None]
                self.kept[row][self.offsets[row] + step] = state, last
                fresh += [state, last]
        mx.async_eval([array for array in fresh if array is not None])

    def _steps(self, n: int) -> list[list[int]]:
        """Of each row, after how many of the next n tokens, but not all, there is a state to keep."""
        result = []
        for offset, (begin, end) in zip(
            self.offsets, self.spans(n) or [(0, n)] * self.batch_size, strict=True
        ):
            now = offset + end
            positions = set(range(max(offset + 1, now - self.recent), now))
            if self.spacing:
                first = offset - offset % self.spacing + self.spacing
                positions |= {p for p in range(first, now, self.spacing) if self._wanted(p, now)}
            result.append(sorted(p - offset for p in positions) if begin == 0 else [])  # padding on the left
        return result

    def _wanted(self, position: int, now: int) -> bool:
        """Whether a row that has read `now` tokens remembers its state after `position`."""
        if self.recent and position >= now - self.recent:
            return True
        if not self.spacing or position % self.spacing:
            return False
        count = position // self.spacing
        interval = self.spacing * min(count & -count, WIDEST_INTERVAL)
        return position > now - now % self.spacing - SNAPSHOTS_PER_INTERVAL * interval

    def _keep_current(self) -> None:
        rows = [row for row, offset in enumerate(self.offsets) if offset and self._wanted(offset, offset)]
        if not rows:
            return
        for row in rows:
            state, window = self._row(row)
            self.kept[row][self.offsets[row]] = state, window
            if self.batch_size > 1:
                mx.async_eval([array for array in (state, window) if array is not None])
        self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        for kept, now in zip(self.kept, self.offsets, strict=True):
            for position in [p for p in kept if not self._wanted(p, now)]:
                del kept[position]

    def _row(self, row: int) -> list[Any]:
        """A row's arrays; a copy where there are several, which does not hold on to the others' memory."""
        if self.batch_size == 1:
            return list(self.cache)
        return [None if c is None else c[mx.array([row])] for c in self.cache]

    def _only_snapshots(self) -> None:
        self.recent = 0
        self._drop_unwanted()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        rows = [int(index) for index in batch_indices]
        index = mx.array(rows, dtype=mx.int32)
        self.cache = [None if c is None else c[index] for c in self.cache]
        self.offsets = [self.offsets[r] for r in rows]
        self.kept = [self.kept[r] for r in rows]
        self._only_snapshots()
        if self.row_padding is not None:
            self.row_padding = [self.row_padding[r] for r in rows]
        if self.row_lengths is not None:
            self.row_lengths = [self.row_lengths[r] for r in rows]

    def extend(self, other: "RecurrentCache") -> None:
        """Add the other cache's rows after this one's.

        Raises:
            ValueError: padding is pending in one of the two.
        """
        if not (self.finalized and other.finalized):
            raise ValueError("rows can only join between pieces of a prompt, not while padding is pending")
        rows = self.batch_size, other.batch_size
        for part in (self, other):
            part.open(part.batch_size)  # rows that have not begun have their learned state
        self.cache = [_concatenate(a, b, *rows) for a, b in zip(self.cache, other.cache, strict=True)]
        self.offsets = self.offsets + other.offsets
        self.kept = self.kept + [dict(row) for row in other.kept]
        self.spacing = self.spacing or other.spacing
        self._only_snapshots()

    def extract(self, idx: int) -> "RecurrentCache":
        """One row as a cache of its own."""
        row = RecurrentCache()
        row.cache, row.initial = self._row(idx), self.initial
        row.offsets = [self.offsets[idx]]
        row.kept = [dict(self.kept[idx])]
        row.spacing = self.spacing
        row._only_snapshots()
        return row

    def at(self, position: int) -> "RecurrentCache":
        """A new cache: this one's only row after `position` tokens, one of `positions()`."""
        row = self.extract(0)
        row.rewind(row.offset - position)
        return row

    @classmethod
    def merge(cls, caches: Sequence["RecurrentCache"]) -> "RecurrentCache":
        """The first rows of several caches as one cache."""
        merged = caches[0].extract(0)
        for other in caches[1:]:
            merged.extend(other)
        return merged


def held_arrays(caches: Iterable[RecurrentCache]) -> list[mx.array]:
    """The arrays of several layers' caches, those that are there."""
    return [array for c in caches for array in c.cache if array is not None]


def _concatenate(a: mx.array | None, b: mx.array | None, rows_a: int, rows_b: int) -> Any:
    """Rows of a, then of b; None stands for rows of zeros."""
    like = b if a is None else a
    if like is None:
        return None
    return mx.concatenate(
        [
            mx.zeros((rows, *like.shape[1:]), like.dtype) if part is None else part
            for part, rows in ((a, rows_a), (b, rows_b))
        ]
    )


vars(mlx_lm_cache)["RecurrentCache"] = RecurrentCache  # where mlx_lm's load_prompt_cache looks classes up
