"""Several processes that compute together on this machine, as mlx.launch starts them."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PATIENCE = 400  # seconds until processes that wait for each other are ended


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def port_and_next() -> int:
    """A port that nobody listens on, nor on the one after it, which mlx.launch takes too."""
    while True:
        (port,) = free_ports(1)
        with socket.socket() as after, suppress(OSError, OverflowError):
            after.bind(("127.0.0.1", port + 1))
            return port


@contextmanager
def ranks(count: int, folder: Path, *arguments: object) -> Iterator[list[subprocess.Popen]]:
    """`python *arguments` in `count` processes with a ring over loopback; they end with this context.

    Args:
        folder: where their hostfile and what they write to stdout and stderr goes (see `said`).
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    started: list[subprocess.Popen] = []
    with ExitStack() as stack:
        try:
            for rank in range(count):
                out, err = (stack.enter_context(open(folder / f"{name}-{rank}", "w")) for name in STREAMS)
                environment = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                started.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, arguments)],
                        stdin=subprocess.PIPE,
                        stdout=out,
                        stderr=err,
                        text=True,
                        env=environment,
                        preexec_fn=_end_with_parent,
                    )
                )
            yield started
        finally:
            for process in started:
                process.kill()
                process.communicate()


STREAMS = ("stdout", "stderr")


def run_ranks(count: int, folder: Path, *arguments: object) -> list[str]:
    """What each wrote to stdout, once all have ended well."""
    with ranks(count, folder, *arguments) as processes:
        codes = [process.wait(PATIENCE) for process in processes]
    assert codes == [0] * count, [said(folder, rank, "stderr")[-2000:] for rank in range(count)]
    return [said(folder, rank) for rank in range(count)]


def said(folder: Path, rank: int, stream: str = "stdout") -> str:
    """What a rank has written so far."""
    return (folder / f"{stream}-{rank}").read_text()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left when a test is killed
