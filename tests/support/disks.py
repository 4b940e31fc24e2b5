"""A disk of its own for a test, that can be full or read-only."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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
        subprocess.run(["mount", "-o", how, self.path], check=True)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A file system of that size; only root can mount one, and others skip the test."""
    path.mkdir()
    mounted = os.geteuid() == 0 and sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("needs to mount a tmpfs")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", path], check=True)
