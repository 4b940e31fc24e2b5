"""What one update learns from, and how processes that train together share it.

Letters in shapes: B sequences, T tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol, cast

import mlx.core as mx
import numpy as np

from ..distributed import Group, share, share_arrays


class Batch(NamedTuple):
    """What one update learns from.

    Attributes:
        tokens: (B, T + 1), the inputs and, one further, the targets; B is a multiple of `accumulate`.
        mask: (B, T), which targets count; None for all.
            A weight other than 1 counts its loss so much.
        fresh: the rows begin anew; if False, each reads on from its row of the batch before.
        others: further arrays (B, ...) by name, for losses that take them.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None
    fresh: bool = True
    others: Mapping[str, np.ndarray] | None = None


class Resumable(Protocol):
    """Batches that can begin in the middle. Others are read from their beginning when a run is resumed."""

    def starting_at(self, batch: int) -> Iterator[Batch]:
        """The batches from number `batch` on."""


def batches_from(batches: Iterable[Batch] | Resumable, step: int) -> Iterator[Batch]:
    """The batches from number `step` on."""
    if hasattr(batches, "starting_at"):
        return cast(Resumable, batches).starting_at(step)
    return itertools.islice(iter(cast(Iterable[Batch], batches)), step, None)


def shared(batches: Iterator[Batch], group: Group | None) -> Iterator[Batch]:
    """Rank 0's batches on all ranks."""
    if group is None:
        yield from batches
        return
    while True:
        batch, arrays = next(batches, None), {}
        if batch is not None:
            arrays = {n: mx.array(a) for n, a in (batch.others or {}).items()}
            arrays["/tokens"] = mx.array(batch.tokens.astype(np.int32))
            if batch.mask is not None:
                arrays["/mask"] = mx.array(batch.mask.astype(np.float32))
        fresh = share(group, batch is not None and [batch.fresh])
        if not fresh:
            return
        others = {name: np.array(array) for name, array in share_arrays(group, arrays).items()}
        tokens, mask = others.pop("/tokens"), others.pop("/mask", None)
        yield Batch(tokens, mask, fresh[0], others)


def arrays_of(batch: Batch) -> dict[str, mx.array]:
    """What losses take: tokens, mask and others, by name."""
    mask = np.ones(batch.tokens[:, 1:].shape) if batch.mask is None else batch.mask
    return {
        **{name: mx.array(array) for name, array in (batch.others or {}).items()},
        "tokens": mx.array(batch.tokens.astype(np.int32)),
        "mask": mx.array(mask.astype(np.float32)),
    }


def targets(batch: Batch) -> int:
    """How many targets count."""
    return batch.tokens[:, 1:].size if batch.mask is None else int(np.count_nonzero(batch.mask))
