"""Checkpoints of a run: each a folder that is there whole or not at all, whenever the machine stops."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import PararnnError
from ..files.whole_file import to_disk

_NAME = re.compile(r"\d{8}")
_ARRAYS, _STATE = "arrays.safetensors", "state.json"


def save(
    folder: Path,
    step: int,
    arrays: dict[str, mx.array],
    state: dict[str, Any],
    keep: int,
    written: Callable[[], object] = lambda: None,
) -> Path:
    """Write the checkpoint of `step` into `folder`, and delete all but the newest `keep`.

    It is written beside its place, brought to the disk, and renamed; one that is there stays as it is.
    `written` is called before older ones are deleted.

    Raises:
        PararnnError: it could not be written; the older checkpoints are untouched then.
    """
    place, partial = folder / f"{step:08d}", folder / f"{step:08d}.partial"
    if place.is_dir():
        written()
        return place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        mx.save_safetensors(str(partial / _ARRAYS), arrays)
        (partial / _STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        for path in (partial / _ARRAYS, partial / _STATE, partial):
            to_disk(path)
        partial.rename(place)
        to_disk(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError)):  # Ctrl-C, say
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise PararnnError(
            f"{place}: the checkpoint could not be written ({reason}); make room, and continue with --resume"
        ) from error
    written()
    for old in steps(folder)[:-keep]:
        with suppress(OSError):
            delete(folder, old)
    return place


def load(folder: Path, step: int | None = None) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
    """The arrays and the state of the newest checkpoint, or that of `step`; None where there is none.

    Raises:
        PararnnError: it cannot be read.
    """
    for left_over in folder.glob("*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    found = steps(folder)
    if not found:
        return None
    step = found[-1] if step is None else step
    place = folder / f"{step:08d}"
    with _explained_reading(place):
        arrays = mx.load(str(place / _ARRAYS))
        mx.eval(arrays)
    return arrays, state_of(folder, step)  # type: ignore[return-value]


def state_of(folder: Path, step: int) -> dict[str, Any]:
    """What the checkpoint of `step` holds beside its arrays.

    Raises:
        PararnnError: it cannot be read.
    """
    place = folder / f"{step:08d}"
    with _explained_reading(place):
        return json.loads((place / _STATE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def delete(folder: Path, step: int) -> None:
    """The checkpoint of `step` is there no more; whenever the machine stops, it is not there in part.

    Raises:
        OSError: it cannot be deleted.
    """
    partial = folder / f"{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (folder / f"{step:08d}").rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def set_aside(folder: Path, step: int) -> Path:
    """The checkpoint of `step` under a name by which it is none; raises OSError as `delete`."""
    aside = folder / f"{step:08d}.aside"
    shutil.rmtree(aside, ignore_errors=True)
    return (folder / f"{step:08d}").rename(aside)


@contextmanager
def _explained_reading(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise PararnnError(
            f"{place} cannot be read ({' '.join(str(error).split())}); delete that folder, and --resume "
            "continues from the checkpoint before it"
        ) from error


def steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, in order."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _NAME.fullmatch(name))
