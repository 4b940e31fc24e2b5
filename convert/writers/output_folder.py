"""A folder that appears whole or not at all: filled beside its place, then renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_files import TOKENIZER_FILES

from ..readers.forms import COREML_FILE, COREML_PACKAGE, COREML_REFERENCE, read_json_object
from ..readers.wording import shown

MODEL_FILE = "pararnn.py"
# What a conversion may write.
_OURS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    MODEL_FILE,
    *TOKENIZER_FILES,
)
_OURS_IN_COREML = (COREML_PACKAGE, COREML_FILE, COREML_REFERENCE, *TOKENIZER_FILES)


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
    created = _make_parents(out.parent)
    partial = out.parent / f".{out.name}-{os.urandom(4).hex()}.partial"
    try:
        _make_folder(partial)
        _check_room(out, nbytes)
        yield partial
        _put_in_place(partial, out)
        created = []
    except OSError as error:
        raise PararnnError(
            f"{out}: it could not be written ({error.strerror}); make room, or choose another output folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()


def check_output(out: Path, force: bool, keep: Path) -> None:
    """Raise what can be known before the work begins."""
    if keep.is_dir() and not _same(out, keep) and _inside(out, keep):
        raise PararnnError(
            f"{out}: lies inside the checkpoint's own folder {keep}; choose an output folder outside"
        )
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise PararnnError(f"{out}: already exists and is not a folder; choose another output folder")
    if not any(out.iterdir()):
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
    if (read_json_object(out / COREML_FILE) or {}).get("format") == "pararnn-coreml":
        ours = _OURS_IN_COREML
    else:
        config = read_json_object(out / "config.json") or {}
        if config.get("model_type") not in ("pararnn", "pararnn_cell"):
            return "config.json of another kind" if config else next(out.iterdir()).name
    for entry in sorted(out.iterdir()):
        is_folder = entry.is_dir() and entry.name != COREML_PACKAGE
        if is_folder or not any(fnmatch(entry.name, pattern) for pattern in ours):
            return entry.name
    return None


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
            _make_folder(folder)
        except BaseException:
            for made in reversed(created):
                made.rmdir()
            raise
        created.append(folder)
    return created


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise PararnnError(
            f"{folder.parent}: cannot write there ({error.strerror}); choose another output folder"
        ) from error


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        partial.rename(out)
        return
    old = partial.with_suffix(".old")
    try:
        out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
