"""Ending a thread that runs somebody else's Python for too long."""

import ctypes
import threading


class Interrupted(BaseException):
    """Raised inside a thread by `interrupt`."""


def interrupt(thread: threading.Thread) -> None:
    """Raise `Interrupted` in a thread at its next step of Python; native code that it is in runs on."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted)
        )
