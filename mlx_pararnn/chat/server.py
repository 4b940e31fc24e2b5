"""`mlx-pararnn serve`: MLX-LM's server with our prompt cache, for one model, with its doors closed.

MLX-LM generates (`ResponseGenerator`, batching all requests that can be) and speaks OpenAI's protocol
(`APIHandler`). What is added here: who may ask (the key, the host, the origin), how much may be asked for,
that nothing in a request makes the server load a file, open a connection or lose its generating thread
(`server_requests`), log probabilities and stop strings as OpenAI's clients expect them (`server_answers`),
and the page at `/`.
"""

import base64
import binascii
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import re
import signal
import socket
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
from mlx_lm.generate import make_text_state_machine
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator, _run_http_server
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import PararnnError
from ..generation import check_tokens, find_room
from ..loading import load
from ..model import Model
from .prompt_cache import SPACING, PromptCache
from .server_answers import Answer, chat_logprobs, completion_logprobs
from .server_requests import Refused, check_body, read_body

MAX_CONNECTIONS = 128
TIMEOUT = 60  # seconds for a request to arrive whole, and for each part of an answer to be taken


@dataclass(frozen=True)
class Settings:
    """What a server is told when it starts.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        api_key: what every request must carry; a must where the host is not this machine alone.
        max_tokens: the most that one answer may have.
        temperature, top_p, top_k, min_p: for requests that do not say.
        prompt_cache_bytes: for stored states.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    prompt_cache_bytes: int = 2**30


def serve(path: str | Path, settings: Settings, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve a model until Ctrl-C or SIGTERM; called from the main thread.

    Args:
        path: a model folder, or a repository on the Hugging Face hub.
        settings: where, for whom, how much.
        ready: called with the server's address once it answers.

    Raises:
        PararnnError: the model cannot be loaded, the address cannot be had or needs a key, or generation
            failed in a way that cannot be gone on from.
    """
    _check_address(settings)
    provider = Provider(path, settings)
    generator = Generator(provider, PromptCache(max_size=256, max_bytes=settings.prompt_cache_bytes))
    try:
        with _until_sigterm():
            provider.wait()
            _run(generator, settings, ready)
    except KeyboardInterrupt:  # before the HTTP loop had begun
        pass
    finally:
        generator.stop_and_join()
        _wait_for_end(generator._generation_thread)
    if generator.failure is not None:
        raise PararnnError(f"generation stopped: {generator.failure}") from generator.failure


def _run(generator: "Generator", settings: Settings, ready: Callable[[str], None]) -> None:
    class Server(_Server):
        def server_activate(self) -> None:
            super().server_activate()
            host, port = str(self.server_address[0]), self.server_address[1]
            name = f"[{host}]" if ":" in host else host
            ready(f"http://{name}:{port}")

    class SettledHandler(Handler):
        allowed = settings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mlx_lm.server is not recommended")  # our page says it
        try:
            _run_http_server(settings.host, settings.port, generator, Server, SettledHandler)
        except OSError as error:
            raise _cannot_listen(settings, error) from error


def _wait_for_end(thread: threading.Thread) -> None:
    """Until the system's thread is gone too, which `join` does not wait for.

    As it goes it drops what MLX compiled in it, and needs the interpreter for that: should the interpreter be
    ending by then, the process aborts.
    """
    task = Path(f"/proc/self/task/{thread.native_id}")
    if not task.parent.is_dir():  # not on Linux: it takes milliseconds
        time.sleep(0.5)
    deadline = time.monotonic() + 5
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@contextmanager
def _until_sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cannot_listen(settings: Settings, error: OSError) -> PararnnError:
    return PararnnError(
        f"cannot listen on {settings.host} port {settings.port} ({error.strerror or error}); choose another "
        "with --host or --port"
    )


def _check_address(settings: Settings) -> None:
    """Before the model is loaded: may we listen there, and can we?"""
    try:
        infos = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise PararnnError(f"no such host here: {settings.host!r} ({error.strerror or error})") from error
    addresses = [str(info[4][0]).partition("%")[0] for info in infos]
    if settings.api_key is None and not all(ipaddress.ip_address(a).is_loopback for a in addresses):
        raise PararnnError(
            f"host {settings.host} can be reached from other machines: give a key that every request must "
            "carry, with --api-key or MLX_PARARNN_API_KEY"
        )
    if settings.api_key is not None and not re.fullmatch(r"[!-~]+", settings.api_key):
        raise PararnnError("the API key must be printable ASCII without spaces, and not empty")
    family, _, _, _, address = infos[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise _cannot_listen(settings, error) from error


class Provider(ModelProvider):
    """Loads the one model there is, by our own loader: no Python of the folder is run."""

    # As MLX-LM leaves them they are None until the model is loaded.
    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.name = Path(path).resolve().name if Path(path).exists() else str(path)
        self.state_nbytes = 0
        self._path = path
        self._loaded = threading.Event()
        self._error: Exception | None = None
        super().__init__(
            Namespace(
                model=self.name,
                adapter_path=None,
                draft_model=None,
                num_draft_tokens=0,
                trust_remote_code=False,
                chat_template="",
                chat_template_args={},
                use_default_chat_template=False,
                pipeline=False,
                allowed_origins=[],
                max_tokens=min(512, settings.max_tokens),
                temp=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                min_p=settings.min_p,
                decode_concurrency=32,
                prompt_concurrency=8,
                prefill_step_size=2048,
                prompt_cache_bytes=settings.prompt_cache_bytes,
                kv_bits=None,
                kv_group_size=64,
                quantized_kv_start=0,
            )
        )

    def load_default(self) -> None:
        """Called in the generating thread; `wait` tells the main one how it went."""
        try:
            super().load_default()
        except Exception as error:
            self._error = error
        self._loaded.set()

    def wait(self) -> None:
        """Until the model is loaded; raises what loading it raised."""
        while not self._loaded.wait(0.1):  # in turns: a plain wait does not see Ctrl-C everywhere
            pass
        if self._error is not None:
            raise self._error

    def _load(self, model_path: str, adapter_path: None = None, draft_model_path: None = None) -> None:
        model, tokenizer = load(self._path)
        model.snapshot_spacing = SPACING
        probe = model.make_cache()
        mx.eval(model(mx.array([[0]]), cache=probe))
        self.state_nbytes = sum(layer.state_nbytes for layer in probe)
        self.model, self.tokenizer = model, tokenizer
        self.model_key = (model_path, adapter_path, draft_model_path)
        self.is_batchable = True
        if self.cli_args.top_k >= model.args.vocab_size:
            self.cli_args.top_k = 0


class Generator(ResponseGenerator):
    """MLX-LM's, which one bad request would end: whatever can fail in its thread is looked at here first."""

    model_provider: Provider
    failure: Exception | None = None

    def _run_generate(self) -> None:
        try:
            self._generate()
        except Exception as error:
            self.failure, self._generation_failed = error, True
            signal.raise_signal(signal.SIGTERM)  # ends the HTTP loop in the main thread

    def _tokenize(self, tokenizer: TokenizerWrapper, request: Any, args: Any) -> Any:
        result = super()._tokenize(tokenizer, request, args)
        model: Model = self.model_provider.model
        prompt = result[0]
        check_tokens(prompt, model.args.vocab_size)
        room = find_room(model, len(prompt))
        if room is not None:
            args.max_tokens = min(args.max_tokens, room)
        return result

    def _serve_single(self, request: Any, stream: Any) -> None:
        queue, *rest = request
        super()._serve_single((_WatchedQueue(queue, self), *rest), stream)

    def _make_state_machine(self, model_key: Any, tokenizer: TokenizerWrapper, stop_words: Any) -> Any:
        # Stop strings that fall on tokens end generation at once; `Answer` finds them in the text, wherever.
        stop_sequences, _ = super()._make_state_machine(model_key, tokenizer, stop_words)
        return stop_sequences, make_text_state_machine(tokenizer)


class _WatchedQueue:
    """The queue of a request that is answered by itself. MLX-LM would read its prompt to the end, and answer,
    though the server is to stop, and read it though the client has left.
    """

    def __init__(self, queue: Any, generator: Generator) -> None:
        self._queue, self._generator = queue, generator
        self._context: Any = None

    def put(self, item: Any) -> None:
        """What a handler is to get: the context, then how much is read, responses, None or an exception."""
        self._queue.put(item)
        if item is None or isinstance(item, Exception):
            return
        self._context = self._context or item
        if self._generator._stop or self._context._should_stop:
            raise ConnectionAbortedError("nobody waits for this answer")  # MLX-LM puts it into the queue


class Handler(APIHandler):
    """One request. `allowed` is set by the server that makes the class."""

    allowed: Settings
    response_generator: Any
    timeout = TIMEOUT
    server_version = "mlx-pararnn"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Arriving(self.connection, self.timeout))

    def parse_request(self) -> bool:
        """Every request, whatever it asks for, passes here."""
        if not super().parse_request():
            return False
        try:
            self._check_sender()
        except Refused as refused:
            self._refuse(refused)
            return False
        return True

    def _check_sender(self) -> None:
        host = self.headers.get("Host", "")
        if self.allowed.api_key is not None:
            if not self._has_key(self.allowed.api_key):
                raise Refused(401, "a valid API key is needed", "invalid_api_key")
        elif not _is_loopback(host):  # another site's name that was made to point here
            raise Refused(403, f"this server is reached as localhost, not as {host[:100]!r}")
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "pages of other sites may not use this server")

    def _has_key(self, key: str) -> bool:
        """The key as OpenAI's clients send it, or as the password a browser asks for."""
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(value.strip().encode(), key.encode())

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            self._send(200, PAGE, "text/html; charset=utf-8", {"Content-Security-Policy": _page_policy()})
        elif path in ("/v1/models", f"/v1/models/{self._provider.name}"):
            model = self._model_entry()
            listed = {"object": "list", "data": [model]}
            self._send_json(200, listed if path == "/v1/models" else model)
        elif path == "/health":
            self.handle_health_check()
        else:
            self._refuse(Refused(404, f"nothing at {path[:100]}"))

    def do_POST(self) -> None:
        if not self.response_generator.generation_available():
            return self._refuse(Refused(503, "the server is stopping"))
        try:
            body = read_body(self.rfile, self.headers.get("Content-Length", ""))
            check_body(
                body,
                chat=urlsplit(self.path).path.endswith("/chat/completions"),
                model=self._provider.name,
                vocab_size=self._provider.model.args.vocab_size,
                max_tokens=self.allowed.max_tokens,
            )
        except TimeoutError:
            return self._refuse(Refused(408, f"the request took more than {self.timeout} seconds to arrive"))
        except Refused as refused:
            return self._refuse(refused)
        raw = json.dumps(body).encode()
        self.rfile = io.BytesIO(raw)
        self.headers.replace_header("Content-Length", str(len(raw)))
        try:
            super().do_POST()
        except Refused as refused:
            self._refuse(refused)
        return None

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        self.response_generator = self._answer = Answer(self.response_generator, stop_words)
        super().handle_completion(request, stop_words)

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response: dict[str, Any] = super().generate_response(*args, **kwargs)
        pending, self._answer.pending = self._answer.pending, []
        choice = response["choices"][0]
        choice.pop("logprobs", None)  # MLX-LM's lack the tokens, and are not streamed
        if self.logprobs:
            style = completion_logprobs if self.object_type == "text_completion" else chat_logprobs
            choice["logprobs"] = style(self._provider.tokenizer, pending)
        return response

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # Where MLX-LM is about to report an exception: it says "not found" of all that is wrong with a
        # prompt, and in a form that OpenAI's clients do not read.
        error = sys.exc_info()[1]
        if error is not None:
            here = self.response_generator.generation_available()
            raise Refused(400 if here else 503, str(error) or type(error).__name__) from error
        super()._set_completion_headers(status_code)

    @property
    def _provider(self) -> Provider:
        return self.response_generator.model_provider  # type: ignore[no-any-return]  # MLX-LM has no types

    def _model_entry(self) -> dict[str, Any]:
        provider = self._provider
        return {
            "id": provider.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx-pararnn",
            # What the page shows.
            "state_bytes": provider.state_nbytes,
            "has_chat_template": bool(provider.tokenizer.has_chat_template),
            "max_tokens": self.allowed.max_tokens,
            "temperature": self.allowed.temperature,
        }

    def _refuse(self, refused: Refused) -> None:
        # What a refused request still sends is not read: the connection ends here.
        self.close_connection = True
        error = {"message": str(refused), "type": "invalid_request_error", "code": refused.code}
        headers = {"WWW-Authenticate": 'Basic realm="mlx-pararnn"'} if refused.status == 401 else {}
        self._send_json(refused.status, {"error": error}, headers)

    def _send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        logging.info("%s %s", self.address_string(), format % args)


class _Arriving(io.RawIOBase):
    """What a client sends, as long as all of it comes in time: a byte now and then must not hold a place."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request has not arrived in time")
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._seconds)  # for the answer


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait to be taken; socketserver's 5 turn clients away
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):  # those are clients that left
            logging.error("a request failed: %s: %s", type(error).__name__, error)


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine by a name that no other site can have."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


PAGE = files(__package__).joinpath("page.html").read_bytes()


def _page_policy() -> str:
    """The page's own script, by its hash, and connections to this server; nothing else."""
    (script,) = re.findall(rb"<script>(.*?)</script>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
