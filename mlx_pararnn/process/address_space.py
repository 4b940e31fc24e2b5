"""A limit of the address space (`ulimit -v`): libraries that meet it end in ways that say nothing of it.

OpenBLAS's threads ask for memory again and again for ever, and no signal ends a process that waits for them;
MLX ends the process; what Python loads fails with errors of its own. So the limit is looked at before MLX is
loaded, and before much memory is asked for.
"""

import os
import sys

from ..errors import PararnnError

LEAST = 4 << 30  # bytes that MLX, OpenBLAS and what MLX-LM imports reserve at most, on two cores 2.2 GB


def limit() -> int | None:
    """The most bytes of addresses that this process may have; None where there is no limit."""
    if sys.platform != "linux":  # macOS takes the limit and does not keep it
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def check_room(nbytes: int, what: str, advice: str, reusable: int = 0) -> None:
    """Raise a PararnnError if there is a limit that `nbytes` more would exceed: MLX would end the process.

    Args:
        what: takes them; a subject for the sentence.
        advice: what to do, beside raising the limit.
        reusable: bytes that MLX holds and would use again.
    """
    most = limit()
    if most is None:
        return
    with open("/proc/self/statm") as statm:
        left = most - int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + reusable
    if nbytes > left:
        raise PararnnError(
            f"{what} about {nbytes / 1e6:.0f} MB, and the address space, which is limited (ulimit -v "
            f"{most >> 10}), has {max(left, 0) / 1e6:.0f} MB left; {advice} or raise the limit"
        )


def check_address_space() -> None:
    """Raise a PararnnError if MLX would not find the room that it needs."""
    said = too_small()
    if said:
        raise PararnnError(said)


def too_small() -> str | None:
    """The sentence about a limit below `LEAST`; None where there is no such limit."""
    most = limit()
    if most is None or most >= LEAST:
        return None
    return (
        f"the address space is limited to {most / 1e6:.0f} MB (ulimit -v {most >> 10}), which is too little: "
        f"MLX and its libraries need {LEAST / 1e9:.1f} GB; raise the limit, for example with ulimit -v "
        f"{LEAST >> 10}"
    )
