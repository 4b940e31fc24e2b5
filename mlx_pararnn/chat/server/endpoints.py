"""The server's paths, and what answers at each."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...errors import PararnnError
from .access import Access, error_response, read_json
from .engine import EngineStopped
from .messages import message, message_events, read_messages, write_event
from .metrics import Metrics
from .openapi import docs_page, openapi
from .page import chat_page
from .prompts import run_apart
from .responses import StoredResponses, read_responses, response, response_events
from .schema import ChatRequest, CompletionRequest, ImageRequest, Refused, TokenizeRequest, read_request
from .server_settings import Settings
from .service import Service

SECONDS_TO_ARRIVE = 60  # for a request's body
PING = 15  # seconds without a piece, after which a comment keeps the connection open
Result = TypeVar("Result")


def make_app(service: Service, settings: Settings, metrics: Metrics) -> Any:
    """The ASGI application."""
    endpoints = Endpoints(service, metrics)
    post = {
        "/v1/completions": endpoints.completions,
        "/v1/chat/completions": endpoints.chat_completions,
        "/chat/completions": endpoints.chat_completions,
        "/v1/responses": endpoints.responses,
        "/v1/responses/input_tokens": endpoints.count_input,
        "/v1/images/generations": endpoints.images,
        "/v1/messages": endpoints.messages,
        "/v1/messages/count_tokens": endpoints.count_messages,
        "/tokenize": endpoints.tokenize,
    }
    get = {
        "/": endpoints.page,
        "/v1/models": endpoints.models,
        "/v1/models/{name:path}": endpoints.model,
        "/v1/responses/{response_id}": endpoints.stored_response,
        "/health": endpoints.health,
        "/metrics": endpoints.metrics,
        "/openapi.json": endpoints.openapi,
        "/docs": endpoints.docs,
    }
    delete = {"/v1/responses/{response_id}": endpoints.delete_response}
    routes = []
    for method, answers in (("post", post), ("get", get), ("delete", delete)):
        for path, endpoint in answers.items():
            endpoints.paths.setdefault(path, []).append(method)
            routes.append(Route(path, endpoint, methods=[method.upper()]))
    handlers: dict[Any, Any] = {
        HTTPException: _http_error,
        Refused: _refused,
        EngineStopped: _stopped,
        PararnnError: _failed,
        ClientDisconnect: _left,
        Exception: _broken,
    }
    return Access(Starlette(routes=routes, exception_handlers=handlers), settings, metrics)


class Endpoints:
    """What is done at each path.

    Attributes:
        paths: every path and its methods, for the description at /openapi.json.
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.paths: dict[str, list[str]] = {}
        self._service, self._metrics = service, metrics
        self._responses = StoredResponses()

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        wanted = read_request(CompletionRequest, await self._body(request))
        if wanted.stream:
            return await stream(
                request, self._service.completion_events(wanted), _openai_event, b"data: [DONE]\n\n"
            )
        return await json_response(await while_connected(request, self._service.completion(wanted)))

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        wanted = read_request(ChatRequest, await self._body(request))
        if wanted.stream:
            return await stream(
                request, self._service.chat_events(wanted), _openai_event, b"data: [DONE]\n\n"
            )
        return await json_response(await while_connected(request, self._service.chat(wanted)))

    async def images(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        wanted = read_request(ImageRequest, await self._body(request))
        return JSONResponse(await while_connected(request, self._service.images(wanted)))

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages."""
        wanted = read_messages(await self._body(request))
        if wanted.stream:
            return await stream(request, message_events(self._service, wanted), write_event)
        return JSONResponse(await while_connected(request, message(self._service, wanted)))

    async def count_messages(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens."""
        prompt = await self._service.prompt(read_messages(await self._body(request)))
        return JSONResponse({"input_tokens": len(prompt.tokens)})

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        asked = read_responses(await self._body(request), self._responses)
        if asked[0].stream:
            return await stream(request, response_events(self._service, self._responses, *asked), write_event)
        return JSONResponse(await while_connected(request, response(self._service, self._responses, *asked)))

    async def count_input(self, request: Request) -> Response:
        """POST /v1/responses/input_tokens."""
        _, chat = read_responses(await self._body(request), self._responses)
        prompt = await self._service.prompt(chat)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt.tokens)})

    async def stored_response(self, request: Request) -> Response:
        """GET /v1/responses/ID."""
        return JSONResponse(self._responses.get(request.path_params["response_id"]).response)

    async def delete_response(self, request: Request) -> Response:
        """DELETE /v1/responses/ID."""
        response_id = request.path_params["response_id"]
        self._responses.remove(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        wanted = read_request(TokenizeRequest, await self._body(request))
        encode = self._service.engine.tokenizer.encode
        tokens = await run_apart(lambda: encode(wanted.text, add_special_tokens=wanted.special))
        return JSONResponse({"tokens": list(tokens), "count": len(tokens)})

    async def page(self, request: Request) -> Response:
        """GET /: the chat page."""
        text, policy = chat_page()
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._service.model_entry()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] != self._service.name:
            raise Refused(404, f"this server has one model, {self._service.name!r}", "model_not_found")
        return JSONResponse(self._service.model_entry())

    async def health(self, request: Request) -> Response:
        """GET /health."""
        if self._service.engine.refusing:
            raise Refused(503, "the server is stopping")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(openapi(self.paths))

    async def docs(self, request: Request) -> Response:
        """GET /docs."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
        return HTMLResponse(docs_page(openapi(self.paths)), headers={"Content-Security-Policy": policy})

    async def _body(self, request: Request) -> Any:
        if self._service.engine.refusing:
            raise Refused(503, "the server is stopping")
        return await read_json(request, SECONDS_TO_ARRIVE)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which ends with the client's connection."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.wait({answer, gone})


async def json_response(content: Any) -> Response:
    """An answer as JSON, made in another thread: log probabilities are megabytes."""
    return await asyncio.to_thread(JSONResponse, content)


async def stream(
    request: Request, events: AsyncGenerator[Any, None], write: Callable[[Any], bytes], end: bytes = b""
) -> StreamingResponse:
    """Server-sent events. What fails before the first of them is raised, and answered as any failure."""
    iterator = aiter(events)
    first = asyncio.ensure_future(anext(iterator, None))
    gone = asyncio.ensure_future(_disconnected(request))
    # A prompt may be read for long: from then on a comment now and then keeps the connection open.
    await asyncio.wait({first, gone}, timeout=PING, return_when=asyncio.FIRST_COMPLETED)
    left = gone.done()
    gone.cancel()
    if first.done():
        first.result()
    elif left:
        first.cancel()
        await asyncio.wait({first})
        raise ClientDisconnect

    async def content() -> AsyncIterator[bytes]:
        following: asyncio.Future[Any] = first
        async with aclosing(events):
            try:
                while True:
                    await asyncio.wait({following}, timeout=PING)
                    if not following.done():
                        yield b": keep-alive\n\n"
                        continue
                    event = following.result()
                    if event is None:
                        yield end
                        return
                    yield write(event)
                    following = asyncio.ensure_future(anext(iterator, None))
            except (Refused, PararnnError, EngineStopped) as error:
                status = getattr(error, "status", 500)
                yield b"data: " + error_response(Refused(status, str(error))).body + b"\n\n"
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.wait({following})

    return StreamingResponse(content(), media_type="text/event-stream")


def _openai_event(event: Any) -> bytes:
    text = json.dumps(event, ensure_ascii=False, allow_nan=False)
    return b"data: " + text.encode(errors="replace") + b"\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{error.detail}: {request.method} {request.url.path[:100]}"
    return error_response(Refused(error.status_code, said))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error_response(error)


async def _stopped(request: Request, error: Exception) -> Response:
    return error_response(Refused(503, str(error)))


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(Refused(500, str(error)))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(request: Request, error: Exception) -> Response:
    return error_response(Refused(500, f"the request failed ({type(error).__name__})"))
