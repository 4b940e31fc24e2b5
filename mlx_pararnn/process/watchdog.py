"""A signal ends the process in time, whatever native code does."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SECONDS = 4.0  # from a signal to the end, which leaves room below five for a busy machine

# Bytes besides the numbers of signals.
_HEARD, _COMPUTING = 255, 254

# What a helper process runs. Python's own handlers wait for the interpreter, which native code can hold for
# ever; the byte that a signal writes into this pipe does not.
_HELPER = f"""
import os, select, signal, sys, time
process, seconds = int(sys.argv[1]), float(sys.argv[2])
end, asked, computing = None, False, False
while True:
    wait = None if end is None else max(0, end - time.monotonic())
    if not select.select([0], [], [], wait)[0]:
        os.kill(process, signal.SIGKILL)
        break
    byte = os.read(0, 1)
    if not byte:
        break
    if byte[0] == {_HEARD}:
        end, asked = None, False
    elif byte[0] == {_COMPUTING}:
        computing = True
    elif byte[0] in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if asked:
            end = time.monotonic() + 0.5
        elif not (computing and byte[0] == signal.SIGINT):
            end = time.monotonic() + seconds
        asked = True
"""


def ending_signals() -> tuple[signal.Signals, ...]:
    """What ends a command: Ctrl-C, SIGTERM, and a terminal that is closed, unless nohup says otherwise."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Watchdog:
    """What the process tells its watchdog."""

    def __init__(self, pipe: int | None) -> None:
        self._pipe = pipe

    def heard(self) -> None:
        """A handler has run, and the process does not end."""
        self._write(_HEARD)

    def computing(self) -> None:
        """A step of the model may take long and loses a conversation: only a second Ctrl-C ends it."""
        self._write(_COMPUTING)

    def _write(self, byte: int) -> None:
        if self._pipe is not None:
            with suppress(OSError):
                os.write(self._pipe, bytes([byte]))


@contextmanager
def watched(seconds: float = SECONDS) -> Iterator[Watchdog]:
    """In this block SIGINT, SIGTERM and SIGHUP end the process in `seconds`; a second one at once.

    Unless a handler says that it has the signal. Outside of the main thread nothing is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Watchdog(None)
        return
    import subprocess  # slow, and every command line imports this file

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, "-I", "-S", "-c", _HELPER, str(os.getpid()), str(seconds)]
    try:
        helper = subprocess.Popen(
            command,
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:  # no more processes: do without
        os.close(writer)
        yield Watchdog(None)
        return
    finally:
        os.close(reader)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield Watchdog(writer)
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        helper.wait()
