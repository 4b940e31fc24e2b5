"""From a listening socket to the application, and how it all ends: uvicorn, with limits for slow clients."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...distributed import world
from ...errors import LOST, PararnnError, is_lost
from ...process.watchdog import ending_signals, watched
from ..prompt_cache import PromptCache
from ..saved_prompts import SavedPromptCache
from .endpoints import make_app
from .engine import Engine, load_batch
from .metrics import Metrics
from .server_settings import Settings
from .service import Service
from .together import follow

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
TIMEOUT = 60  # seconds for a request's headers to arrive, and for a client to take what is sent
DRAIN = 3  # seconds that answers may go on after SIGTERM


def serve(path: str | Path, settings: Settings, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve a model until Ctrl-C, SIGTERM or SIGHUP; called from the main thread.

    Of the processes that mlx.launch started rank 0 serves, and the others compute with it until it ends.

    Args:
        path: a model folder, or a repository on the Hugging Face hub.
        settings: where, for whom, how much.
        ready: called with the server's address once it answers.

    Raises:
        PararnnError: the model cannot be loaded, the address cannot be had or needs a key, or generation
            failed in a way that cannot be gone on from, as where another process has ended.
    """
    if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        raise PararnnError("serve takes several processes of mlx.launch --backend ring or jaccl, not of MPI")
    group = world()
    sizes = {"max_size": 256, "max_bytes": settings.prompt_cache_bytes}
    folder = settings.prompt_cache_folder
    changes = settings.adapter_path, settings.initial_state, group
    if group is not None and folder is not None:
        raise PararnnError("states of several processes are not saved: leave out --prompt-cache-dir")
    if group is not None and group.rank():
        with watched(), _leaving_the_end_to_rank_0():
            follow(load_batch(path, PromptCache(**sizes), *changes).batch, group)
        return
    _check_address(settings)
    metrics = Metrics()
    prompts = PromptCache(**sizes) if folder is None else SavedPromptCache(folder, **sizes)
    with watched():
        engine = Engine(path, prompts, metrics, *changes)
        try:
            with _interrupting():
                engine.wait()
            _run(engine, path, settings, metrics, ready)
        except KeyboardInterrupt:  # before it served
            pass
        finally:
            engine.stop()
            ended = _wait_for_end(engine)
    if isinstance(engine.failure, PararnnError):
        raise engine.failure
    if engine.failure is not None and not isinstance(engine.failure, KeyboardInterrupt):
        said = LOST if is_lost(engine.failure) else f"generation stopped: {engine.failure}"
        raise PararnnError(said) from engine.failure
    if not ended:
        # Native code still runs in its thread, and MLX may not be used while the interpreter ends.
        logger.warning("what was being computed did not end; leaving it")
        sys.stderr.flush()
        os._exit(0)


def _run(
    engine: Engine,
    path: str | Path,
    settings: Settings,
    metrics: Metrics,
    ready: Callable[[str], None],
) -> None:
    name = Path(path).resolve().name if Path(path).exists() else str(path)
    app = make_app(Service(engine, name, settings, metrics), settings, metrics)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=DRAIN + 1,
        headers=[("Server", "mlx-pararnn")],
        backlog=512,
    )
    server = _Server(config, engine)
    engine.on_failure = server.end
    # uvicorn takes them later; what a handler raises while asyncio starts is lost or ends in a traceback.
    with server.capture_signals(), _listening(settings) as listener:
        host, port = str(listener.getsockname()[0]), listener.getsockname()[1]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's, with our end: SIGINT ends all answers, SIGTERM and SIGHUP let them go on for a moment."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._signalled = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self._handle) for number in ending_signals()}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """From any thread, soon."""
        self.should_exit = True

    def _handle(self, number: int, frame: object) -> None:
        if self._signalled and number != signal.SIGHUP:  # which a closed terminal sends twice
            os._exit(128 + number)
        self._signalled = self.should_exit = True
        if number == signal.SIGINT:
            self._engine.stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN, self._engine.stop)
        self._engine.refusing = True
        await super().shutdown(sockets)


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which gives up on clients that are slow to ask or to take an answer."""

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take a connection; above the limit the oldest idle one makes room, or this one is refused."""
        super().connection_made(transport)
        self._since = time.monotonic()
        if len(self.connections) > MAX_CONNECTIONS:
            # One that has asked for nothing yet makes room, the oldest, so that slow ones do not take all.
            idle = [c for c in self.connections if isinstance(c, Protocol) and c.idle and c is not self]
            victim = min(idle, key=lambda c: c._since, default=self)
            if victim is self:
                self._refuse(
                    b"503 Service Unavailable\r\nRetry-After: 1", "all connections are taken; try again"
                )
            victim.transport.close()
        self._wait_for_request()

    @property
    def idle(self) -> bool:
        """Whether no request has arrived that is not answered."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Read on; a request that has arrived whole ends its deadline."""
        if self.idle:
            self._wait_for_request()
        super().data_received(data)
        if not self.idle and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers of the connection."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client reads too slowly: after `TIMEOUT` seconds the connection is cut."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait_for_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(TIMEOUT, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self.idle and not self.transport.is_closing():
            if self.conn.trailing_data[0]:  # of a request; one that asks for nothing expects no answer
                self._refuse(b"408 Request Timeout", f"the request did not arrive within {TIMEOUT} seconds")
            self.transport.close()

    def _refuse(self, status: bytes, message: str) -> None:
        """Answer before there is a request; the connection is then closed."""
        body = json.dumps({"error": {"message": message, "code": None}}).encode()
        self.transport.write(
            b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (status, len(body), body)
        )


@contextlib.contextmanager
def _leaving_the_end_to_rank_0() -> Iterator[None]:
    """SIGTERM and SIGHUP, which may come to all at once, leave rank 0 the seconds that the watchdog gives."""
    before = {number: signal.signal(number, lambda *_: None) for number in ending_signals()[1:]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interrupting() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ending_signals()[1:]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_end(engine: Engine) -> bool:
    """Until the engine's thread is gone, which takes one step; False where it does not end.

    The system's thread too, which `join` does not wait for: as it goes it drops what MLX compiled in it, and
    needs the interpreter for that. Should the interpreter be ending by then, the process aborts.
    """
    thread = engine.thread
    deadline = time.monotonic() + 2
    thread.join(2)
    task = Path(f"/proc/self/task/{thread.native_id}")
    if not task.parent.is_dir():  # not on Linux: it takes milliseconds
        time.sleep(0.5)
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not thread.is_alive() and not task.exists()


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family, _, _, _, address = _addresses(settings)[0]
    # TCP by name: else asyncio leaves Nagle's algorithm on, and a short answer's second packet waits 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise PararnnError(
                f"cannot listen on {settings.host} port {settings.port} ({error.strerror or error}); choose "
                "another with --host or --port"
            ) from error
        listener.listen(512)
        yield listener


def _check_address(settings: Settings) -> None:
    """Before the model is loaded: may we listen there, and can we?"""
    addresses = [str(info[4][0]).partition("%")[0] for info in _addresses(settings)]
    if settings.api_key is None and not all(ipaddress.ip_address(a).is_loopback for a in addresses):
        raise PararnnError(
            f"host {settings.host} can be reached from other machines: give a key that every request must "
            "carry, with --api-key or MLX_PARARNN_API_KEY"
        )
    if settings.api_key is not None and not re.fullmatch(r"[!-~]+", settings.api_key):
        raise PararnnError("the API key must be printable ASCII without spaces, and not empty")
    with _listening(settings):
        pass


def _addresses(settings: Settings) -> list[Any]:
    try:
        return socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise PararnnError(f"no such host here: {settings.host!r} ({error.strerror or error})") from error
