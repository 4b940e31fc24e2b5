"""Writes a model's weights as safetensors, piece by piece: one file, or several with an index as MLX-LM does.

The libraries' writers hold everything they write. Here every header is known from shapes, and each piece goes
to its place in the file as it comes; threads make the next pieces and write those that are made.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.files import weights_digest

from ..readers.dtypes import STORED_AS, Array

# Threads that make pieces and write them: while one waits for the file, which takes one writer at a time,
# others convert. More gain little.
_WORKERS = min(8, os.cpu_count() or 1)
MAX_SHARD_BYTES = 5 << 30  # as MLX-LM's
_FILE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * STORED_AS[self.dtype].itemsize


@dataclass(frozen=True)
class Job:
    """Tensors that are made together from one source.

    What `pieces` yields gives the next numbers of each entry, in C order; it is called on other threads.
    """

    entries: tuple[Entry, ...]
    pieces: Callable[[], Iterable[Callable[[], Sequence[Array]]]]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(entry.nbytes for entry in self.entries)


def write_model(
    folder: Path, jobs: Sequence[Job], parameters: int, written: Callable[[int], None]
) -> list[Path]:
    """Write all jobs' tensors into `folder`; `written(n)` is called after every n bytes of them.

    Args:
        parameters: how many numbers the model has, for the index.

    Returns:
        The files with weights: model.safetensors, or shards of MAX_SHARD_BYTES, which come with an index.
    """
    shards = _shards(jobs)
    names = [_FILE] if len(shards) == 1 else _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, written)
    if len(shards) > 1:
        weight_map = {
            entry.name: name
            for name, shard in zip(names, shards, strict=True)
            for job in shard
            for entry in job.entries
        }
        index = {
            "metadata": {"total_size": sum(job.nbytes for job in jobs), "total_parameters": parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / f"{_FILE}.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _shards(jobs: Sequence[Job]) -> list[list[Job]]:
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_file(path: Path, jobs: list[Job], written: Callable[[int], None]) -> None:
    # The widest numbers first, as the reference implementation orders them: every tensor is then aligned.
    entries = sorted(
        (entry for job in jobs for entry in job.entries),
        key=lambda entry: (-STORED_AS[entry.dtype].itemsize, entry.name),
    )
    digests = {entry.name: hashlib.sha256() for entry in entries}
    cursors, position = {}, len(_header(entries, digests))
    for entry in entries:
        cursors[entry.name] = position
        position += entry.nbytes
    ends = {entry.name: cursors[entry.name] + entry.nbytes for entry in entries}
    with open(path, "wb", buffering=0) as file, _weight_threads() as workers:
        writing: deque[Future[int]] = deque()
        for job, piece in _made_ahead(jobs, workers):
            for entry, numbers in zip(job.entries, piece, strict=True):
                array = np.ascontiguousarray(numbers, STORED_AS[entry.dtype]).reshape(-1)
                writing.append(workers.submit(_put, file.fileno(), cursors[entry.name], array))
                digests[entry.name].update(array.data)
                cursors[entry.name] += array.nbytes
            while len(writing) > _WORKERS:
                written(writing.popleft().result())
        for future in writing:
            written(future.result())
        _put(file.fileno(), 0, np.frombuffer(_header(entries, digests), np.uint8))
    if cursors != ends:
        wrong = next(name for name in ends if cursors[name] != ends[name])
        raise ValueError(f"{wrong}: not as many bytes were written as announced")


def _header(entries: Sequence[Entry], digests: Mapping[str, Any]) -> bytes:
    """The file up to its first tensor; its length does not depend on the digests."""
    noted = weights_digest.combined({name: digest.digest() for name, digest in digests.items()})
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", weights_digest.KEY: noted}}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        position += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _put(file: int, position: int, numbers: Array) -> int:
    buffer = numbers.data.cast("B")
    while buffer:
        count = os.pwrite(file, buffer, position)
        position += count
        buffer = buffer[count:]
    return numbers.nbytes


def _made_ahead(jobs: Iterable[Job], workers: ThreadPoolExecutor) -> Iterator[tuple[Job, Sequence[Array]]]:
    """What every piece of every job gives, in order; `workers` make the next ones meanwhile."""
    pieces = ((job, piece) for job in jobs for piece in job.pieces())
    ahead: deque[tuple[Job, Future[Sequence[Array]]]] = deque()
    while True:
        ahead.extend((job, workers.submit(piece)) for job, piece in islice(pieces, 1 + _WORKERS - len(ahead)))
        if not ahead:
            return
        job, piece = ahead.popleft()
        yield job, piece.result()


@contextmanager
def _weight_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that make and write pieces; what they have not begun when an error comes, they never do."""
    workers = ThreadPoolExecutor(_WORKERS, "weights")
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)
