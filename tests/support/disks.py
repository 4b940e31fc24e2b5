"""A disk of its own for a test, that can be full or read-only."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.privileges import as_root


class Disk:
    """A small file system at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes."""
        room = os.statvfs(self.path)
        self._filler.write_bytes(bytes(max(room.f_bavail * room.f_bsize - left, 0)))

    def make_room(self) -> None:
        """Undo `fill`."""
        self._filler.unlink()

    def allow_writing(self, allowed: bool) -> None:
        """Whether anybody may write, root too."""
        how = f"remount,{'rw' if allowed else 'ro'}"
        subprocess.run([*as_root(), "mount", "-o", how, self.path], check=True)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A file system of that size, of this user's; the test is skipped where nobody may mount it."""
    path.mkdir()
    options = f"size={size},uid={os.geteuid()},gid={os.getegid()}"
    mount = [*as_root(), "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    try:
        yield Disk(path)
    finally:
        subprocess.run([*as_root(), "umount", path], check=True)
