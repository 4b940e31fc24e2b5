"""Libraries of the CPU backend that came with the package, compiled: a platform wheel has them.

.ci/platform_wheel.py puts them there; a checkout has none. Each is known by what it was compiled from: the
hash of its text and flags stands in its name, so that one of another version or processor is never taken.
"""

import ctypes
import hashlib
import platform
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "prebuilt"
# The processors that a wheel of a platform has libraries for, as flags of GCC and Clang, the best first.
PROCESSORS: dict[tuple[str, str], tuple[str, ...]] = {
    ("linux", "x86_64"): ("-march=x86-64-v4", "-march=x86-64-v3", "-march=x86-64-v2"),
    ("linux", "aarch64"): ("-march=armv8-a",),
    ("darwin", "arm64"): ("-mcpu=apple-m1",),
}
ANY_X86_64 = "-march=x86-64"  # on which the library runs that tells the levels apart


def flags(processor: str) -> list[str]:
    """How a text of metal/ is compiled, for a wheel and at first use."""
    return ["-std=c++17", "-O3", processor, "-fno-math-errno", "-shared", "-fPIC", "-pthread"]


def key_of(*made_from: str) -> str:
    """What a library is known by: the hash of its text, its flags and whatever else it depends on."""
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:20]


def digest(path: Path) -> str:
    """The hash of a library itself, in which its name ends: a damaged one would end the process."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def level_text() -> str:
    """The C++ text of the library that tells the levels of x86-64 apart."""
    return files("mlx_pararnn.metal").joinpath("x86_64_level.cpp").read_text()


def find(text: str) -> Path | None:
    """The library compiled from `text` for the best processor that this one is; None if there is none."""
    return next((path for processor in processors() if (path := _found(text, processor))), None)


@cache
def processors() -> Sequence[str]:
    """Those of `PROCESSORS` whose instructions this one has, the best first; none without libraries."""
    if not FOLDER.is_dir():
        return ()
    known = PROCESSORS.get((sys.platform, platform.machine()), ())
    if platform.machine() == "x86_64":
        path = _found(level_text(), ANY_X86_64)
        level = ctypes.CDLL(str(path)).x86_64_level() if path else 0
        known = tuple(processor for processor in known if int(processor[-1]) <= level)
    return known


def _found(text: str, processor: str) -> Path | None:
    paths = FOLDER.glob(f"*-{key_of(text, *flags(processor))}-*.so")
    return next((path for path in paths if digest(path) == path.stem.rpartition("-")[2]), None)
