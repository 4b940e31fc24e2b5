"""Raising in a thread what did not happen there."""

import ctypes
import threading


class Interrupted(BaseException):
    """Raised inside a thread by `interrupt`."""


def interrupt(thread: threading.Thread, kind: type[BaseException] = Interrupted) -> None:
    """Raise an exception of this class in a thread at its next step of Python; native code runs on."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(kind))
