"""How many of the machine's cores a process may use; without MLX, before which OpenBLAS is loaded."""

import os
import subprocess
from functools import lru_cache
from pathlib import Path


def threads() -> int:
    """Threads that a large call uses: OMP_NUM_THREADS where it is set, else one a core of this process.

    Not those of efficiency, which would make the others wait, and no more than a container's quota allows.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = _performance_cores() or os.cpu_count() or 1
    return min(cores, _quota() or cores)


@lru_cache(maxsize=1)
def _performance_cores() -> int:
    """Of a Mac with two kinds of cores; 0 where the system does not say."""
    try:
        asked = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0


@lru_cache(maxsize=1)
def _quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that Linux's control groups (version 2) give this process, at least 1; 0 without a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return 0
    inside = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    limits = []
    for folder in (groups / inside, *(groups / inside).parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            limits.append(max(1, -(-int(quota) // int(period))))
        except (OSError, ValueError, ZeroDivisionError):
            pass  # no such file, or "max"
    return min(limits, default=0)


class Team:
    """How many threads share a call that is made again and again: as many as were fastest lately.

    On a machine with other work a thread waits for a core, and where they meet all others wait for it: then
    fewer are faster. So all, half, a quarter and so on are tried: soon after the first call and after a
    change, when calls become slower, and else more and more seldom. A trial ends as soon as it has taken
    longer.
    """

    CALLS = 8  # of which the times are compared
    SOON, SELDOM = 64, 1024  # calls from one round of trials to the next

    def __init__(self) -> None:
        self._most = 0

    def size(self, most: int) -> int:
        """Of the next call, at most so many."""
        if most != self._most:
            self._most = self._usual = self._now = most
            self._sizes = sorted(
                {-(-most // 2**halved) for halved in range(most.bit_length() + 1)}, reverse=True
            )
            self._round = iter(self._sizes[:0])  # still to be tried
            self._pause, self._left = self.SOON, 2 * self.CALLS
            self._seconds, self._calls = 0.0, 0  # so far, of CALLS
            self._mean, self._limit = 0.0, float("inf")  # of a usual call, and what would be slower
        return self._now

    def took(self, seconds: float) -> None:
        """That call's time."""
        self._seconds, self._calls = self._seconds + seconds, self._calls + 1
        trial = self._now != self._usual
        if trial and self._seconds > 0.95 * self.CALLS * self._mean:
            self._next()
        elif self._calls == self.CALLS:
            self._mean = self._seconds / self.CALLS
            if trial:
                self._usual, self._limit = self._now, 1.5 * self._mean
                self._left = self._pause = self.SOON
            else:
                self._left -= self.CALLS
                if self._left <= 0 or self._mean > self._limit:
                    self._begin_round()
            self._next()

    def _begin_round(self) -> None:
        self._round = iter([size for size in self._sizes if size != self._usual])
        if self._mean > self._limit:
            self._pause = self.SOON
        self._left, self._pause = self._pause, min(4 * self._pause, self.SELDOM)
        self._limit = 1.5 * self._mean

    def _next(self) -> None:
        self._now = next(self._round, self._usual)
        self._seconds, self._calls = 0.0, 0
