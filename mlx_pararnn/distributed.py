"""Processes that compute together, on one machine or several, as mlx.launch starts them.

Each runs the same command. Rank 0 reads, writes and decides; what it knows it tells the others here.
"""

import json
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from .errors import LOST, PararnnError

Group = mx.distributed.Group

SECONDS = 5.0  # that a process has to end by itself when another has, and MLX to answer
_streams: list[mx.Stream] = []  # what waits for other processes: one of each thread that computes with them


@lru_cache(maxsize=1)
def world() -> Group | None:
    """All processes that mlx.launch started; None for one alone.

    Once another has ended, this one ends too, with exit code 1, if MLX waits for it for ever.

    Raises:
        PararnnError: this process was started as one of several and cannot reach the others.
    """
    if "MLX_RANK" not in os.environ or _hostfile_is_blank():
        return None
    before = _sockets()
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise PararnnError(
            f"the other processes cannot be reached ({str(error).splitlines()[0]}); see the addresses in the "
            "hostfile, and whether their ports are free"
        ) from error
    if group.size() == 1 and os.environ["MLX_RANK"] != "0":
        raise PararnnError(
            f"this is rank {os.environ['MLX_RANK']} and MLX finds no other process; start all of them with "
            "mlx.launch --backend ring or jaccl"
        )
    if group.size() == 1:
        return None
    _note_stream()
    if connections := _sockets() - before:
        threading.Thread(target=_end_if_stuck, args=(connections, group.rank()), daemon=True).start()
    return group


def _sockets() -> set[int]:
    """This process's file descriptors that are sockets."""
    found = set()
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the folder's own is closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found


def _note_stream() -> None:
    """Collectives are computed by the CPU's stream of the thread that asks for them."""
    stream = mx.default_stream(mx.cpu)
    if stream not in _streams:
        _streams.append(stream)


def _end_if_stuck(connections: set[int], rank: int) -> None:
    """Ends the process where another has, and a stream of MLX has waited ever since.

    A ring's collective raises an error when its connection breaks, but the next that was asked for before
    waits for a thread that is no more (MLX 0.32).
    """
    closed = getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN | closed)
    broken = closed | select.POLLHUP | select.POLLERR | select.POLLNVAL
    while not any(seen & broken for _, seen in poll.poll(0)):
        time.sleep(0.5)
    while True:
        time.sleep(SECONDS)
        for stream in list(_streams):
            waiting = threading.Thread(target=_wait_for, args=(stream,), daemon=True)
            waiting.start()
            waiting.join(SECONDS)
            if waiting.is_alive():
                print(f"rank {rank}: error: {LOST}", file=sys.__stderr__, flush=True)
                os._exit(1)


def _wait_for(stream: mx.Stream) -> None:
    with suppress(Exception):  # of what was computed
        mx.synchronize(stream)


def _hostfile_is_blank() -> bool:
    """As mlx.launch writes it for a single process, and MLX refuses to read it."""
    file = os.environ.get("MLX_HOSTFILE", "")
    return bool(file) and Path(file).is_file() and not Path(file).read_text(encoding="utf-8").strip()


def share(group: Group, value: Any = None) -> Any:
    """What rank 0 gives, which JSON can write, on all ranks; the others' `value` is not looked at.

    Raises:
        PararnnError: what arrived is none: rank 0 ended while it sent.
    """
    _note_stream()
    text = json.dumps(value).encode() if group.rank() == 0 else b""
    length = cast(int, mx.distributed.all_sum(mx.array(len(text)), group=group).item())
    own = mx.array(np.frombuffer(text, np.uint8)) if text else mx.zeros(length, mx.uint8)
    try:
        return json.loads(np.array(mx.distributed.all_sum(own, group=group)).tobytes())
    except ValueError as error:
        raise PararnnError(LOST) from error


def share_arrays(group: Group, arrays: dict[str, mx.array] | None = None) -> dict[str, mx.array]:
    """The arrays that rank 0 gives, by name, on all ranks, bit for bit."""
    given = arrays if arrays is not None and group.rank() == 0 else {}
    kinds = {name: (array.shape, str(array.dtype).removeprefix("mlx.core.")) for name, array in given.items()}
    shared = {}
    for name, (shape, dtype) in share(group, kinds).items():
        kind = getattr(mx, dtype)
        own = given[name] if name in given else mx.zeros(shape, kind)
        # as bytes: the sum of minus zero and zero has another bit
        total = mx.distributed.all_sum(own.reshape(-1).view(mx.uint8), group=group)
        shared[name] = total.view(kind).reshape(shape)
        mx.eval(shared[name])
    return shared


def any_rank(group: Group, own: bool) -> bool:
    """Whether it is true on one of the ranks; all have to ask."""
    return bool(mx.distributed.all_sum(mx.array(int(own)), group=group).item())


def all_numbers(group: Group, own: int) -> list[int]:
    """A number of each rank, on all of them."""
    numbers = mx.distributed.all_gather(mx.array([own], mx.int64), group=group)
    return cast(list[int], numbers.tolist())


def all_lists(group: Group, own: list[int]) -> list[list[int]]:
    """The numbers of each rank, none of them negative, on all of them.

    Raises:
        PararnnError: another process has ended.
    """
    lengths = all_numbers(group, len(own))
    most = max(lengths)
    if min(lengths) < 0 or most > 2**20:  # MLX may give anything where one has ended
        raise PararnnError(LOST)
    if not most:
        return [[] for _ in range(group.size())]
    padded = mx.array([own + [-1] * (most - len(own))], mx.int64)
    lists = cast(list[list[int]], mx.distributed.all_gather(padded, group=group).tolist())
    return [[number for number in numbers if number >= 0] for numbers in lists]


def meet(group: Group, number: int, problem: str | None = None) -> None:
    """Go on once all have come here, with the same number, which is not 0, and without a problem.

    Raises:
        PararnnError: the own problem; or another process has one, or has ended.
    """
    for sent in (number, -number):  # MLX may give anything where one has ended, what was sent last too
        numbers = all_numbers(group, sent if problem is None else 0)
        if problem is not None:
            raise PararnnError(problem)
        if any(other != sent for other in numbers):
            raise PararnnError(LOST)


def rank_0_samples(
    group: Group | None, sampler: Callable[[mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """A sampler whose tokens are rank 0's on all ranks, log probabilities (B, V) to tokens (B,)."""
    if group is None:
        return sampler

    def sample(logprobs: mx.array) -> mx.array:
        if group.rank() == 0:
            own = sampler(logprobs).astype(mx.uint32)
        else:  # after what the logits took, as in rank 0: all have to send in one order
            own = mx.depends(mx.zeros(logprobs.shape[:-1], mx.uint32), logprobs)
        return mx.distributed.all_sum(own, group=group)

    return sample
