"""Does an export fit into this machine's memory?"""

import os
import re
from pathlib import Path

from mlx_pararnn.errors import PararnnError

# Bytes a parameter: the MLX model in float32 beside the package's weights, and copies of the largest matrix.
PER_PARAMETER = 9
OVERHEAD = 500_000_000  # Python, MLX, coremltools and the program's operations


def check_memory(parameters: int, title: str) -> None:
    """Raise PararnnError if a model of so many parameters does not fit; `title` is what it is exported to."""
    needed, free = PER_PARAMETER * parameters + OVERHEAD, available_memory()
    if needed > free:
        raise PararnnError(
            f"exporting {parameters:,} parameters to {title} needs about {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; close other programs, or export on a larger machine"
        )


def available_memory() -> int:
    """Bytes that new programs can have; all there is, where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(re.findall(r"MemAvailable:\s+(\d+)", text)[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
