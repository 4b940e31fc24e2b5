"""Compiles C++ texts for this machine and keeps the libraries, in a folder of the user's own.

A library is kept by its text, flags, compiler and CPU.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

from ..errors import PararnnError

_lock = threading.Lock()


class BuildError(PararnnError):
    """No C++ compiler, a text it rejects, or no cache folder of the user's own; says which."""


def cache_folder() -> Path:
    """Where compiled libraries are kept: a folder of the user's own.

    Raises:
        BuildError: the user has no home.
    """
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mlx-pararnn"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-pararnn"
    except RuntimeError:
        raise BuildError("this user has no home folder to keep compiled kernels in; set HOME") from None


@cache
def compiler() -> str:
    """The C++ compiler: CXX where it is set, else c++, g++ or clang++.

    Raises:
        BuildError: there is none.
    """
    if sys.platform == "darwin":
        # without Apple's command line tools /usr/bin/c++ would open a window that offers to install them
        if subprocess.run(["xcode-select", "-p"], capture_output=True).returncode:
            raise BuildError("no C++ compiler; install one with: xcode-select --install")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler; install one, for example: apt install g++")


@cache
def _machine() -> str:
    """What the same text and flags may be compiled differently for: compiler and CPU."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return version + subprocess.run(asked, capture_output=True, text=True).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return version + "\n".join(line for line in lines if line.startswith(wanted))


def _flags() -> list[str]:
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return ["-std=c++17", "-O3", tune, "-fno-math-errno", "-shared", "-fPIC", "-pthread"]


def build(text: str, name: str, structs: tuple[type[ctypes.Structure], ...] = ()) -> ctypes.CDLL:
    """The library compiled from `text`, out of the cache folder or built into it.

    Several threads and processes may ask at once: each builds under a name of its own and renames it.

    Args:
        text: C++, complete.
        name: what the library is called, in its file's name and in errors.
        structs: those that the library's functions are given; PARARNN_STRUCT of metal/cpu.h declares them
            under the same names.

    Raises:
        BuildError: no compiler, a text it rejects, a folder that cannot be written or that others can, or a
            struct that Python and the text lay out differently.
    """
    library = _built(text, name)
    for struct in structs:
        _check_layout(library, name, struct)
    return library


class _LayoutEntry(ctypes.Structure):
    """struct LayoutEntry of metal/cpu.h."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64))


def _check_layout(library: ctypes.CDLL, name: str, struct: type[ctypes.Structure]) -> None:
    table = library[f"pararnn_layout_{struct.__name__}"]
    table.restype = ctypes.POINTER(_LayoutEntry)
    native: dict[str, tuple[int, int]] = {}
    for entry in table():
        if entry.name is None:
            native["the whole"] = 0, entry.size
            break
        native[entry.name.decode()] = entry.offset, entry.size
    fields = [(field[0], getattr(struct, field[0])) for field in struct._fields_]
    here = {field: (place.offset, place.size) for field, place in fields}
    here["the whole"] = 0, ctypes.sizeof(struct)
    if here != native:
        wrong = next(f for f in {**native, **here} if here.get(f) != native.get(f))
        raise BuildError(
            f"struct {struct.__name__} of {name} has {wrong!r} at {native.get(wrong, 'no place')} (offset, "
            f"size) in C++ and at {here.get(wrong, 'no place')} in Python; install mlx-pararnn again"
        )


def _built(text: str, name: str) -> ctypes.CDLL:
    key = hashlib.sha256("\0".join([text, *_flags(), compiler(), _machine()]).encode()).hexdigest()[:20]
    library = cache_folder() / f"{name}-{key}.so"
    with _lock:
        try:
            _make_private(library.parent)
            if library.exists():
                try:
                    return ctypes.CDLL(str(library))
                except OSError:
                    pass  # damaged: built again
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                source, built = Path(folder, f"{name}.cpp"), Path(folder, "built.so")
                source.write_text(text)
                if sys.stderr.isatty():
                    print(f"compiling {name} for this CPU, once", file=sys.stderr)
                command = [compiler(), *_flags(), "-o", str(built), str(source)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    complaint = next((x for x in done.stderr.splitlines() if "error" in x), "no reason given")
                    raise BuildError(f"{compiler()} rejects {name}: {complaint}")
                os.replace(built, library)
        except OSError as error:
            raise BuildError(f"{library.parent} cannot be written: {error.strerror}") from None
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(f"{library} cannot be loaded: {error}") from None


def _make_private(folder: Path) -> None:
    """What is loaded from the folder runs: nobody else may have put it there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BuildError(
            f"{folder} can be written by other users, and what is kept there runs; make it yours alone "
            "(chown, chmod 700) or remove it"
        )
