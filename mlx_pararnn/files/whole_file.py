"""Files that are there whole, old or new, whatever ends the process or the machine."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Give `path` new content: at any time there is the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot do it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
