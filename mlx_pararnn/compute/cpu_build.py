"""Compiles C++ texts for this machine and keeps the libraries, in a folder of the user's own.

A library is kept by its text, flags and CPU, and by its own hash, which is checked before it is loaded. What
the package brings compiled (prebuilt.py) needs no compiler.
"""

import atexit
import ctypes
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import PararnnError
from ..process.watchdog import ending_signals
from . import prebuilt

logger = logging.getLogger(__name__)
_lock = threading.Lock()
_TOLD = "no-compiler.txt"


class BuildError(PararnnError):
    """No C++ compiler, a text it rejects, or no cache folder of the user's own; says which."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


class NoCacheError(BuildError):
    """The user has no home."""


def cache_folder() -> Path:
    """Where compiled libraries are kept: a folder of the user's own.

    Raises:
        NoCacheError: the user has no home.
    """
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mlx-pararnn"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-pararnn"
    except RuntimeError:
        raise NoCacheError("this user has no home folder to keep compiled kernels in; set HOME") from None


@cache
def compiler() -> str:
    """The C++ compiler: CXX where it is set, else c++, g++ or clang++.

    Raises:
        NoCompilerError: there is none.
    """
    if sys.platform == "darwin":
        # without Apple's command line tools /usr/bin/c++ would open a window that offers to install them
        try:
            has_tools = _run(["xcode-select", "-p"]).returncode == 0
        except OSError:
            has_tools = False
        if not has_tools:
            raise NoCompilerError("no C++ compiler; install one with: xcode-select --install")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NoCompilerError("no C++ compiler; install one, for example: apt install g++")


@cache
def _machine() -> str:
    """What the same text and flags may be compiled differently for: the CPU, and a compiler asked for by CXX.

    Not the compiler found: a library that is there is used on a machine that has none (any more).
    """
    asked_for = os.environ.get("CXX", "")
    if sys.platform == "darwin":
        name = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return asked_for + _run(name).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join([asked_for, platform.machine(), *(line for line in lines if line.startswith(wanted))])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a program says.

    Raises:
        KeyboardInterrupt: a signal has ended it, as Ctrl-C ends all that runs in a terminal: that says
            nothing about the machine. In the main thread Python raises it by itself.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    # by the signal, or in a shell's words
    if any(done.returncode in (-number, 128 + number) for number in ending_signals()):
        raise KeyboardInterrupt
    return done


def _flags() -> list[str]:
    return prebuilt.flags("-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")


def build(text: str, name: str, structs: tuple[type[ctypes.Structure], ...] = ()) -> ctypes.CDLL:
    """The library compiled from `text`: the package's own, or out of the cache folder, or built into it.

    Several threads and processes may ask at once: each builds under a name of its own and renames it. A file
    that is not what was built (cut short, zeroed, of another machine) is built again.

    Args:
        text: C++, complete.
        name: what the library is called, in its file's name and in errors.
        structs: those that the library's functions are given; PARARNN_STRUCT of metal/cpu.h declares them
            under the same names.

    Raises:
        BuildError: no compiler, a text it rejects, a cache folder that others can write, or a struct that
            Python and the text lay out differently.
        KeyboardInterrupt: the compiler was interrupted.
    """
    library = _built(text, name)
    for struct in structs:
        _check_layout(library, name, struct)
    return library


def invoke(function: Any, *arguments: Any) -> None:
    """Call a function of a library that computes; raises PararnnError where it had too little memory."""
    if function(*arguments):
        raise PararnnError(
            "too little memory for a computation on the CPU; use a smaller batch or a shorter prompt, or end "
            "other programs"
        )


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


def is_prebuilt(text: str) -> bool:
    """Whether `build` would take a library that the package brings."""
    return _prebuilt(text) is not None


def _prebuilt(text: str) -> ctypes.CDLL | None:
    """The package's own library, unless CXX asks for a compiler: what that makes is for exactly this CPU."""
    if shutil.which(os.environ.get("CXX", "")):
        return None
    try:
        path = prebuilt.find(text)
        return ctypes.CDLL(str(path)) if path else None
    except OSError:  # cannot be read, or nothing may be loaded from there
        return None


def _built(text: str, name: str) -> ctypes.CDLL:
    if library := _prebuilt(text):
        return library
    key = prebuilt.key_of(text, *_flags(), _machine())
    with _lock:
        folder, reason = library_folder()
        try:
            for path in sorted(folder.glob(f"{name}-{key}-*.so")):
                if library := _loaded(path):
                    return library
                path.unlink(missing_ok=True)  # damaged, or from another machine: built again
            compiler()  # without one it does not matter where it would write
            if reason:
                _say_where(reason, folder)
            return ctypes.CDLL(str(_compiled(text, name, key, folder)))
        except OSError as error:
            raise BuildError(f"{name} cannot be built in {folder}: {error.strerror or error}") from None


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library, if the file is what was built: a damaged one would end the process, now or later.

    Its name ends in its own hash, so that no second file could be lost or out of date.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return None
    if prebuilt.digest(path) != path.stem.rpartition("-")[2]:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compiled(text: str, name: str, key: str, folder: Path) -> Path:
    command = [compiler(), *_flags()]
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        source, built = Path(inside, f"{name}.cpp"), Path(inside, "built.so")
        source.write_text(text)
        logger.info("compiling %s for this CPU, once", name)
        done = _run([*command, "-o", str(built), str(source)])
        if done.returncode:
            complaint = next((x for x in done.stderr.splitlines() if "error" in x), "no reason given")
            raise BuildError(f"{compiler()} rejects {name}: {complaint}")
        with open(built, "rb+") as file:
            os.fchmod(file.fileno(), 0o700)
            os.fsync(file.fileno())  # a name must not outlive a loss of power that its bytes do not
        library = folder / f"{name}-{key}-{prebuilt.digest(built)}.so"
        os.replace(built, library)
        (folder / _TOLD).unlink(missing_ok=True)
        return library


def was_told_before(error: NoCompilerError) -> bool:
    """Whether the user was told so since something was last compiled; notes that it is told now."""
    try:
        with (library_folder()[0] / _TOLD).open("x") as file:
            file.write(f"{error}\n")
    except FileExistsError:
        return True
    except (BuildError, OSError):  # there is no place for a note
        return False
    return False


def library_folder() -> tuple[Path, str]:
    """`cache_folder`, made, and ""; or a folder among temporary files, and why it cannot be that one.

    Raises:
        BuildError: others can write to the cache folder.
    """
    try:
        folder = cache_folder()
        _make_private(folder)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder, ""
        reason = f"{folder} cannot be written"
    except NoCacheError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{folder} cannot be written: {error.strerror}"
    return _temporary_folder(reason), reason


@cache
def _say_where(reason: str, folder: Path) -> None:
    logger.warning("%s; compiled kernels are kept in %s", reason, folder)


@cache
def _temporary_folder(reason: str) -> Path:
    folder = Path(tempfile.gettempdir(), f"mlx-pararnn-{os.geteuid()}")
    try:
        _make_private(folder)
        if folder.is_symlink():
            raise BuildError(f"{folder} is a link")
    except (BuildError, OSError):  # someone else has made it
        try:
            folder = Path(tempfile.mkdtemp(prefix="mlx-pararnn-"))
        except OSError as error:
            raise BuildError(f"{reason}, and there is no folder for temporary files: {error}") from None
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make_private(folder: Path) -> None:
    """What is loaded from the folder runs: nobody else may have put it there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BuildError(
            f"{folder} can be written by other users, and what is kept there runs; make it yours alone "
            "(chown, chmod 700) or remove it"
        )
