"""Files that are there whole, old or new, whatever ends the process or the machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`, of the same ending, to write to; it becomes `path` if the body ends well.

    At any time `path` has its old content or the new one. If the body fails, what it wrote is deleted.
    """
    partial = path.with_name(f".partial.{path.name}")
    try:
        yield partial
        to_disk(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # it is not there, or nothing can be changed there any more
            partial.unlink()
        raise
    to_disk(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Give `path` this content: at any time there is the old or the new one."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot do it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
