"""A command in a terminal emulator: what a person sees on the screen, and types."""

import os
import pty
import re
import select
import struct
import sys
import termios
import time
from fcntl import ioctl

import pyte


class Terminal:
    """A command of `mlx-pararnn`, or another module, on a pseudo-terminal with a screen.

    Args:
        arguments: of the command line.
        module: that is run.
        output: a file that standard output goes to, as with `>`.
        columns, lines: of the screen; lines that leave it at the top are kept in `text` too.
        environment: variables besides the test's own.
    """

    def __init__(
        self, *arguments, module="mlx_pararnn.cli.app", output=None, columns=80, lines=24, **environment
    ):
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=1)
        self._stream = pyte.ByteStream(self._screen)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "xterm-256color", **environment})
            os.environ.pop("NO_COLOR", None)
            if output:
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            command = [sys.executable, "-m", module, *map(str, arguments)]
            os.execv(command[0], command)
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        vars(self._screen)["write_process_input"] = (
            self.type
        )  # the answers to what a program asks its terminal
        self.raw = b""

    def type(self, text):
        os.write(self.fd, text.encode())

    def paste(self, text):
        """As a terminal does it that knows bracketed paste."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    @property
    def text(self):
        """Everything on the screen and above it."""
        above = [
            "".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display])

    def wait_for(self, pattern, seconds=300):
        """Wait until the screen matches; returns the match."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text, re.M)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text}"
            if not self._read():
                break
        match = match or re.search(pattern, self.text, re.M)
        assert match, f"the command has ended without {pattern!r}: {self.text}"
        return match

    def exit_code(self, seconds=300):
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, f"it does not end: {self.text}"
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self):
        """Show what has been written; False once the command has ended."""
        if select.select([self.fd], [], [], 0.2)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                return False
            if not data:
                return False
            self.raw += data
            self._stream.feed(data)
        return True
