"""Who may ask, and how much they may send: what stands before every request."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import math
import re
import time
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .schema import Refused
from .server_settings import Settings

logger = logging.getLogger(__name__)

MAX_BODY = 4 * 2**20  # bytes of a request
MAX_REQUESTS = 256  # that are answered at a time
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class Access:
    """ASGI middleware: key, Host, Origin, how many at a time, and CORS for origins allowed by name."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        _to_origin_form(scope)
        headers = Headers(scope=scope)
        scope["path"] = scope["path"].rstrip("/") or "/"
        cors = self._cors(headers)
        status, begin = 500, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({**HEADERS, **cors})
            await send(message)

        try:
            if cors and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                response: Response | None = Response(status_code=204)  # a preflight carries no key
            else:
                response = self._refusal(headers)
            if response is not None:
                return await response(scope, receive, send_with_headers)
            if self._active >= MAX_REQUESTS:
                refused = Refused(503, f"{MAX_REQUESTS} requests are being answered; try again in a moment")
                return await error_response(refused)(scope, receive, send_with_headers)
            self._active += 1
            try:
                return await self._app(scope, receive, send_with_headers)
            finally:
                self._active -= 1
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            seconds = time.monotonic() - begin
            path = quote(scope["path"][:100], errors="replace")  # on one line whatever it holds
            logger.info("%s %s: %d in %.2f s", scope["method"], path, status, seconds)

    def _refusal(self, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        allowed = self._settings.allowed_origins
        if self._settings.api_key is not None:
            if not _has_key(headers, self._settings.api_key):
                return error_response(Refused(401, "a valid API key is needed", "invalid_api_key"))
        elif not _is_loopback(host) and _name(host) not in allowed and host not in allowed:
            # Another site's name that was made to point here.
            return error_response(
                Refused(
                    403,
                    f"this server is reached as localhost, not as {host[:100]!r}; to allow the name start it "
                    f"with --allow-origin {_name(host)[:100] or 'NAME'}",
                )
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and not self._is_allowed(origin):
            return error_response(
                Refused(
                    403,
                    "pages of other sites may not use this server; to allow one start it with "
                    f"--allow-origin {origin[:100]}",
                )
            )
        return None

    def _is_allowed(self, origin: str) -> bool:
        return origin != "null" and origin in self._settings.allowed_origins

    def _cors(self, headers: Headers) -> dict[str, str]:
        origin = headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
            "Access-Control-Allow-Private-Network": "true",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }


def error_response(refused: Refused) -> Response:
    """OpenAI's form of an error; the connection ends, for what is still being sent is not read."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {"message": str(refused), "type": kind, "param": None, "code": refused.code}
    headers = {"Connection": "close"}
    if refused.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="mlx-pararnn"'
    if refused.status == 503:
        headers["Retry-After"] = "1"
    # Anthropic's clients look for "type" beside it.
    return JSONResponse({"type": "error", "error": error}, refused.status, headers)


async def read_json(request: Request, seconds: float) -> Any:
    """The JSON that a client sends.

    Raises:
        Refused: it is too large, too slow or no JSON.
    """
    body = bytearray()
    too_large = int(request.headers.get("content-length", 0)) > MAX_BODY
    try:
        async with asyncio.timeout(seconds):
            size = 0
            async for part in request.stream():
                size += len(part)
                too_large = too_large or size > MAX_BODY
                if not too_large:
                    body += part
                elif size > 8 * MAX_BODY:
                    break  # so much is thrown away, for a client that still sends would not see the answer
    except TimeoutError:
        raise Refused(408, f"the request took more than {seconds:g} seconds to arrive") from None
    if too_large:
        raise Refused(413, f"the request is too large; {MAX_BODY} bytes are the limit")
    try:
        return json.loads(body, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON ({error})") from None


def _number(text: str) -> float:
    """A number of a request, which may be told again: Python reads and writes NaN, JSON has none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number of JSON's")
    return number


def _to_origin_form(scope: Scope) -> None:
    """Take a target as a proxy is sent it, `GET http://name/path`: that name counts, not the Host header.

    RFC 9112, 3.2.2.
    """
    match = re.fullmatch(rb"https?://([^/]*)(/.*)?", scope["raw_path"], re.IGNORECASE | re.DOTALL)
    if match is not None:
        scope["raw_path"] = match[2] or b"/"
        scope["path"] = unquote(scope["raw_path"].decode("latin-1"))
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [*others, (b"host", match[1])]


def _has_key(headers: Headers, key: str) -> bool:
    """The key as clients of OpenAI or Anthropic send it, or as the password a browser asks for."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if "x-api-key" in headers:
        value = headers["x-api-key"]
    elif scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.strip().encode(), key.encode())


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine by a name that no other site can have."""
    name = _name(host)
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
