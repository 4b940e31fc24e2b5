"""A limit of the address space (`ulimit -v`): libraries that meet it end in ways that say nothing of it.

OpenBLAS's threads ask for memory again and again for ever, and no signal ends a process that waits for them;
MLX aborts; what Python loads fails with errors of its own. So the limit is looked at before MLX is loaded.
"""

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
