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
