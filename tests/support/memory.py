"""Memory: of MLX's arrays, without the garbage of the tests that ran before, and of a process."""

import gc
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import mlx.core as mx


def active_memory() -> int:
    """Bytes. Arrays in reference cycles would else be freed at any time, between two measurements too."""
    mx.synchronize()
    gc.collect()
    return int(mx.get_active_memory())


def anonymous_memory(process: int | str = "self") -> int:
    """Bytes of a process that are its own, not of files; Linux only."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
    return 1024 * kilobytes


def peak_anonymous_memory(process: Popen) -> int:
    """The same at its most until the process ends."""
    peak = 0
    while process.poll() is None:
        with suppress(OSError, ValueError):  # it is ending
            peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.005)
    return peak
