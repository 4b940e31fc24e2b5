"""Memory that is freed stays with the process: what training on a CPU needs on Linux.

glibc gives a large array back to the system when it is freed, and the next one comes anew, in pages of 4 KB
that the system clears at their first use. A training step takes and frees all that it computes on, each time;
for a small model that was 40% of the step.
"""

import ctypes
import os
import sys
from functools import cache

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees, for its next arrays; once a process.

    The process then stays as large as it was at its largest. What the user has set in MALLOC_* or
    GLIBC_TUNABLES stays as it is.

    Returns:
        Whether it was set: False on other systems, and for other C libraries.
    """
    asked = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform != "linux" or asked:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # older versions take no more than 32 MB for the second
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST)) and any(
        mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST, 1 << 25)
    )
