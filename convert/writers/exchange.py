"""Two folders exchange their names in one step of the file system, so that neither name is ever missing."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100  # Linux: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2, RENAME_SWAP of macOS's renamex_np
# What a kernel or file system answers that cannot do it (NFS, exFAT, some FUSE file systems).
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange(a: Path, b: Path) -> bool:
    """Exchange `a` and `b`, both there, on one file system; False if the file system has no such operation.

    Raises:
        OSError: one is missing, or may not be renamed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        result = library.renamex_np(*map(ctypes.c_char_p, names), ctypes.c_uint(_EXCHANGE))
    elif sys.platform == "linux" and hasattr(library, "renameat2"):
        first, second = map(ctypes.c_char_p, names)
        result = library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_EXCHANGE))
    else:
        return False
    number = ctypes.get_errno() if result else 0
    if number in _UNSUPPORTED:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(b))
    return True
