"""A folder that appears whole or not at all: filled beside its place, then renamed into it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_pararnn.errors import PararnnError


@contextmanager
def whole_or_nothing(out: Path, force: bool, keep: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; it becomes `out` if the body ends well, and goes if it does not.

    With `force` an existing model folder is replaced, after the new one is complete; never one that holds
    `keep` (what is being converted).

    Raises:
        PararnnError: `out` exists and may not be replaced, or its parent cannot be written to.
    """
    check_output(out, force, keep)
    out = _absolute(out)
    created = _make_parents(out.parent)
    partial = out.parent / f".{out.name}-{secrets.token_hex(4)}.partial"
    try:
        _make_folder(partial)
        yield partial
        _put_in_place(partial, out)
        created = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()


def check_output(out: Path, force: bool, keep: Path) -> None:
    """Raise what can be known before the work begins."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise PararnnError(
            f"{out}: already exists; choose another output folder or pass --force to replace it"
        )
    if out.is_symlink() or not out.is_dir():
        raise PararnnError(f"{out}: is not a folder, so --force does not replace it")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise PararnnError(f"{out}: is not a model folder (no config.json), so --force does not replace it")
    if keep.resolve().is_relative_to(out.resolve()):
        raise PararnnError(
            f"{out}: holds the checkpoint that is being converted, so --force does not replace it"
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
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_suffix(".old")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
