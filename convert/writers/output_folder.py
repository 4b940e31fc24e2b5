"""A folder that appears whole or not at all: filled beside its place, then renamed into it.

While it is filled it is `.OUT-<random>.partial`, locked by the process that fills it. One that nobody holds
locked is left over from a process that was killed; the next conversion into OUT removes it.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import TOKENIZER_FILES

from ..readers.forms import (
    PACKAGE_FILE,
    PACKAGE_KINDS,
    PACKAGE_REFERENCE,
    package_kind,
    read_json_object,
)
from ..readers.wording import shown
from .exchange import exchange

MODEL_FILE = "pararnn.py"
# What a conversion may write.
_OURS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "images.safetensors",
    "README.md",
    MODEL_FILE,
    ".partial.*",  # what `whole_file` leaves if it is killed
    *TOKENIZER_FILES,
)
_OURS_BESIDE_A_PACKAGE = (PACKAGE_FILE, PACKAGE_REFERENCE, *TOKENIZER_FILES)
_RUN = "run.json"  # what training/run.py writes before the folder has its name
MLX_PART = "mlx"  # the MLX model that is made on the way to a package


@contextmanager
def whole_or_nothing(out: Path, force: bool, keep: Path, nbytes: int) -> Iterator[Path]:
    """Yield an empty folder beside `out`; it becomes `out` if the body ends well, and goes if it does not.

    With `force` an existing model folder is replaced, after the new one is complete; never one that holds
    `keep` (what is being converted). `nbytes` is how much will be written at least.

    Raises:
        PararnnError: `out` exists and may not be replaced, its parent cannot be written to, or there is not
            enough room, found out before or while the body writes.
    """
    check_output(out, force, keep)
    out = _absolute(out)
    if _finish_killed_runs(out):
        check_output(out, force, keep)
    created = _make_parents(out.parent)
    partial, lock = _locked_folder(out)
    try:
        _check_room(out, nbytes)
        yield partial
        _put_in_place(partial, out, force)
        created = []
    except OSError as error:
        raise PararnnError(
            f"{out}: it could not be written ({error.strerror}); make room, or choose another output folder"
        ) from error
    finally:
        if _is_locked_by(partial, lock):  # and is not what stood in `out`
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()


def check_output(out: Path, force: bool, keep: Path) -> None:
    """Raise what can be known before the work begins."""
    try:
        str(_absolute(out)).encode()
    except UnicodeEncodeError:
        raise PararnnError(
            f"{shown(str(out))}: a folder in this path has a name that is not UTF-8, and MLX loads nothing "
            "from there; choose another output folder"
        ) from None
    for kind in PACKAGE_KINDS:
        if out.suffix == (suffix := Path(kind.name).suffix):
            raise PararnnError(
                f"{out}: OUT is a folder, which holds {kind.name} and what belongs to it for {kind.title}; "
                f"give it a name without {suffix}, such as {out.with_suffix('')}"
            )
    if keep.is_dir() and not _same(out, keep) and _inside(out, keep):
        raise PararnnError(
            f"{out}: lies inside the checkpoint's own folder {keep}; choose an output folder outside"
        )
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise PararnnError(f"{out}: already exists and is not a folder; choose another output folder")
    if not _visible(out):
        return
    if _same(keep, out) or _inside(keep, out):
        raise PararnnError(
            f"{out}: holds the checkpoint that is being converted; choose another output folder"
        )
    foreign = _foreign(out)
    if foreign:
        raise PararnnError(
            f"{out}: already exists and holds {shown(foreign)}, which no conversion wrote; choose another "
            "output folder"
        )
    if not force:
        raise PararnnError(
            f"{out}: already exists; choose another output folder or pass --force to replace it"
        )


def _foreign(out: Path) -> str | None:
    """The name of something in `out` that is not part of a converted model; None if there is nothing."""
    ours: tuple[str, ...] = _OURS
    kind = package_kind(out)
    if kind:
        ours = (kind.name, *_OURS_BESIDE_A_PACKAGE)
    else:
        config = read_json_object(out / "config.json") or {}
        if config.get("model_type") not in ("pararnn", "pararnn_cell"):
            return "config.json of another kind" if config else _visible(out)[0].name
    for entry in _visible(out):
        is_folder = entry.is_dir() and not (kind and entry.name == kind.name)
        if is_folder or not any(fnmatch(entry.name, pattern) for pattern in ours):
            return entry.name
    return None


def _visible(folder: Path) -> list[Path]:
    """What is in `folder`, but for what macOS and file managers put everywhere, hidden."""
    return sorted(
        path for path in folder.iterdir() if path.name != ".DS_Store" and not path.name.startswith("._")
    )


def _same(a: Path, b: Path) -> bool:
    """The same file or folder, whatever the two spell: some file systems do not tell case apart."""
    return a.exists() and b.exists() and os.path.samefile(a, b)


def _inside(path: Path, folder: Path) -> bool:
    return any(_same(parent, folder) for parent in path.resolve().parents)


def _check_room(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise PararnnError(
            f"{out}: the model takes {nbytes / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left; make "
            "room, or choose another output folder"
        )


def _absolute(out: Path) -> Path:
    return Path(os.path.abspath(out))


def _make_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    if not parent.is_dir():
        raise PararnnError(
            f"{parent}: is not a folder, so nothing can be written inside; choose another output folder"
        )
    created: list[Path] = []
    for folder in reversed(missing):
        try:
            folder.mkdir()
        except FileExistsError:  # another process makes the same parents
            continue
        except OSError as error:
            for made in reversed(created):
                made.rmdir()
            raise _unwritable(folder.parent, error) from error
        created.append(folder)
    return created


def _unwritable(folder: Path, error: OSError) -> PararnnError:
    return PararnnError(f"{folder}: cannot write there ({error.strerror}); choose another output folder")


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, and the file descriptor that holds its lock."""
    while True:
        partial = out.parent / f".{out.name}-{os.urandom(4).hex()}.partial"
        try:
            partial.mkdir()
        except OSError as error:
            raise _unwritable(out.parent, error) from error
        lock = _lock(partial)
        if lock is not None and _is_locked_by(partial, lock):
            return partial, lock
        if lock is not None:  # another process took it for a left-over before it was locked
            os.close(lock)


def _lock(folder: Path, *, surely: bool = False) -> int | None:
    """A file descriptor that keeps `folder` locked until it is closed; None if another process has it.

    Where the file system has no such locks, the descriptor comes without one, or with `surely` not at all.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if surely or isinstance(error, BlockingIOError):
            os.close(descriptor)
            return None
    return descriptor


def _is_locked_by(folder: Path, lock: int) -> bool:
    """Whether that name still belongs to the folder that was locked."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(lock))
    except OSError:
        return False


def _finish_killed_runs(out: Path) -> bool:
    """Remove what killed conversions into `out` left beside it; whether `out`, moved aside, was put back."""
    put_back = False
    pattern = re.compile(rf"\.{re.escape(out.name)}-[0-9a-f]{{8}}\.(partial|old)")
    with suppress(OSError):  # a parent that is not there yet, or cannot be listed
        for folder in list(out.parent.iterdir()):
            match = pattern.fullmatch(folder.name)
            lock = _lock(folder, surely=True) if match else None
            if match is None or lock is None:
                continue
            if match[1] == "old" and not out.exists():
                folder.rename(out)
                put_back = True
            elif all(_may_be_ours(path.name) for path in _visible(folder)):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    return put_back


def _may_be_ours(name: str) -> bool:
    packages = (kind.name for kind in PACKAGE_KINDS)
    ours = (*_OURS, *packages, *_OURS_BESIDE_A_PACKAGE, MLX_PART, f".{MLX_PART}-*.partial", _RUN)
    return any(fnmatch(name, pattern) for pattern in ours)


def _put_in_place(partial: Path, out: Path, force: bool) -> None:
    """Give `partial` the name `out`, and delete what had it: nothing but what may be replaced."""
    try:
        partial.rename(out)  # a folder takes the place of nothing and of an empty folder, and of no other
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    if not out.is_dir() or out.is_symlink() or (_visible(out) and not force):
        raise _written_meanwhile(out)
    old = partial
    if not exchange(partial, out):
        old = partial.with_suffix(".old")
        out.rename(old)
    try:
        if old != partial:
            partial.rename(out)
        # Looked at again, now that nobody finds it under its name and puts something there.
        if _visible(old) and not (force and _is_replaceable(old)):
            raise _written_meanwhile(out)
    except BaseException:
        if old == partial:
            exchange(partial, out)
        else:
            if out.exists():
                out.rename(partial)
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_replaceable(folder: Path) -> bool:
    try:
        return _foreign(folder) is None
    except PararnnError:  # a file of ours that cannot be parsed
        return False


def _written_meanwhile(out: Path) -> PararnnError:
    return PararnnError(
        f"{out}: something else was written there during the conversion and is kept; choose another output "
        "folder"
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as the configuration files of a folder are written."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
