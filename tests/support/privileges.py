"""What only root may do, done as root or through sudo, for tests that begin with it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ANOTHER = 65534  # a user that is never this one


def as_root() -> list[str]:
    """What a command begins with that only root may run; where sudo would ask for a password it fails."""
    return [] if os.geteuid() == 0 or not shutil.which("sudo") else ["sudo", "-n"]


@contextmanager
def given_away(path: Path) -> Iterator[None]:
    """A file, or a folder with all that is in it, is another user's meanwhile; else the test is skipped."""
    if subprocess.run(_chown(ANOTHER, ANOTHER, path), capture_output=True, check=False).returncode:
        pytest.skip("needs to give files away")
    try:
        yield
    finally:  # what is there still can be removed then
        subprocess.run(_chown(os.geteuid(), os.getegid(), path), capture_output=True, check=False)


def _chown(user: int, group: int, path: Path) -> list[str]:
    return [*as_root(), "chown", "-R", f"{user}:{group}", str(path)]
