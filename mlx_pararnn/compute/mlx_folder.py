"""MLX's compile folder on a CPU, made the user's own.

Where MLX compiles for a CPU (mx.compile: a model's SwiGLU, MLX-LM's samplers) it writes libraries under fixed
names into mlx/VERSION/cpu of the folder for temporary files, and loads what it finds there. In a folder that
all users share that is anybody's library. MLX asks for the folder anew at each compilation and has no setting
for it: mlx/backend/cpu/compiled.cpp.
"""

import ctypes
import logging
import os
import stat
import tempfile
from pathlib import Path

from ..errors import PararnnError
from .cpu_build import library_folder

logger = logging.getLogger(__name__)


def secure_mlx_folder() -> None:
    """Make sure that MLX loads compiled libraries out of a folder that this user alone can write.

    To be called before MLX first compiles. A folder that is the user's is left as it is, a missing one is
    made. Where it is, or could become, another user's, or is none at all, MLX is given another folder for
    temporary files: in C's environment alone, so that `tempfile` and `os.environ` stay what they are.
    """
    if not hasattr(os, "geteuid"):
        return
    # C++ takes the first that is set, be it to nothing.
    given = [os.environ[name] for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in os.environ]
    name = given[0] if given else "/tmp"
    temporary = Path(name)
    if name and temporary.is_dir() and (_only_ours(temporary) or _claimed(temporary)):
        return
    try:
        folder = library_folder()[0] / "mlx-temporary"
        folder.mkdir(mode=0o700, exist_ok=True)
        usable = _only_ours(folder)
    except (PararnnError, OSError):
        usable = False
    if not usable:
        folder = Path(tempfile.mkdtemp(prefix="mlx-pararnn-"))
    logger.info("%r is not this user's alone; MLX compiles in %s", name, folder)
    ctypes.CDLL(None).setenv(b"TMPDIR", os.fsencode(folder), 1)


def _claimed(temporary: Path) -> bool:
    """Whether mlx/ in a shared folder is this user's; it is made where it is missing."""
    try:
        found = temporary.stat()
        # without the sticky bit others could put a folder of theirs in the place of ours
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            return False
        top = temporary / "mlx"
        top.mkdir(mode=0o700, exist_ok=True)
        return all(map(_only_ours, (top, *top.glob("*"), *top.glob("*/cpu"), *top.glob("*/cpu/*.so"))))
    except OSError:
        return False


def _only_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return kind and found.st_uid == os.geteuid() and not found.st_mode & 0o022
