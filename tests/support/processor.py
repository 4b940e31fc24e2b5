"""What this machine's processor has."""

import re
from pathlib import Path


def has_vnni() -> bool:
    """Whether its instructions count AVX-512 VNNI, by Linux."""
    about = Path("/proc/cpuinfo")
    return about.exists() and bool(re.search(r"\bavx512_vnni\b", about.read_text()))
