"""OpenAI's /v1/responses: brought into the form of a chat, its answer into items and events, and kept."""

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from .choices import chat_logprobs
from .schema import ChatRequest, Refused, Request, ResponsesRequest, read_request
from .service import Conversation, Event, Service

MOST_STORED = 1000  # responses that can be gone on from
MOST_STORED_BYTES = 64 * 2**20  # of their conversations
LOGPROBS = "message.output_text.logprobs"
# What a chat's fields are called here, for the sentences that refuse them.
FIELDS = {"messages": "input", "response_format": "text.format", "tool_calls": "function_call"}


@dataclass(frozen=True)
class Stored:
    """A response that can be gone on from: the conversation's messages, and what the client was told."""

    messages: list[dict[str, Any]]
    response: Event


class StoredResponses:
    """The last responses, by their ids, as JSON; what was used longest ago goes first."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, str] = OrderedDict()
        self._nbytes = 0

    def get(self, response_id: str) -> Stored:
        """Raises Refused where there is none of that id, or none any more."""
        self._check(response_id)
        self._stored.move_to_end(response_id)
        return Stored(*json.loads(self._stored[response_id]))

    def add(self, messages: list[dict[str, Any]], response: Event) -> None:
        """Keep a response with the conversation that it ends."""
        self._stored[response["id"]] = text = json.dumps([messages, response])
        self._nbytes += len(text)
        while len(self._stored) > MOST_STORED or self._nbytes > MOST_STORED_BYTES:
            self.remove(next(iter(self._stored)))

    def remove(self, response_id: str) -> None:
        """Raises Refused where there is none of that id."""
        self._check(response_id)
        self._nbytes -= len(self._stored.pop(response_id))

    def _check(self, response_id: str) -> None:
        if response_id not in self._stored:
            raise Refused(404, f"there is no response {response_id[:100]!r} here", "response_not_found")


def read_responses(body: Any, stored: StoredResponses) -> tuple[ResponsesRequest, ChatRequest]:
    """A request to /v1/responses, and the chat that it is, earlier messages included.

    Raises:
        Refused: it asks for what is not taken; the sentence names the field.
    """
    request = read_request(ResponsesRequest, body)
    said = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    earlier = stored.get(request.previous_response_id).messages if request.previous_response_id else []
    chat = request.model_dump(include=set(Request.model_fields), exclude_unset=True)
    chat["messages"] = _messages(said, earlier)
    if request.instructions:
        chat["messages"] = [{"role": "system", "content": request.instructions}, *chat["messages"]]
    chat["response_format"] = request.text.get("format")
    chat["tools"] = [_tool(tool) for tool in request.tools]
    choice = request.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise Refused(400, f"tool_choice of type {str(choice.get('type'))[:60]!r} is not taken")
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    chat |= {"tool_choice": choice, "parallel_tool_calls": request.parallel_tool_calls}
    chat["chat_template_kwargs"] = request.chat_template_kwargs
    if LOGPROBS in request.include or request.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    try:
        return request, read_request(ChatRequest, chat)
    except Refused as refused:
        sentence = str(refused)
        for name, ours in FIELDS.items():
            sentence = sentence.replace(name, ours)
        raise Refused(refused.status, sentence, refused.code) from None


async def response(service: Service, stored: StoredResponses, *requests: Any) -> Event:
    """The whole answer."""
    async with aclosing(response_events(service, stored, *requests)) as events:
        async for event in events:
            last = event
    return dict(last["response"])


async def response_events(
    service: Service, stored: StoredResponses, request: ResponsesRequest, chat: ChatRequest
) -> AsyncGenerator[Event, None]:
    """The same as OpenAI's events, the last of which holds the whole answer."""
    conversation = await service.converse(chat)
    service.weigh(conversation.jobs)  # a refusal has a status of its own only before the first event
    head = _head(service, request)
    output = _Output()
    yield output.event("response.created", response=head)
    yield output.event("response.in_progress", response=head)
    reason = None
    async with aclosing(service.parts(conversation)) as parts:
        async for _, part, piece, ended in parts:
            reason = ended or reason
            logprobs = chat_logprobs(service.texts, piece.tokens)["content"]
            if part.reasoning:
                for event in output.add_text("reasoning", part.reasoning, []):
                    yield event
            if part.content or logprobs:
                for event in output.add_text("message", part.content, logprobs):
                    yield event
            for call in part.calls:
                for event in output.add_call(call):
                    yield event
    cut = reason == "length"
    for event in output.end("incomplete" if cut else "completed"):
        yield event
    done = {
        **head,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output.items,
        "usage": _usage(service, conversation, output.items),
    }
    if request.store:
        said = chat.messages[bool(request.instructions) :]
        stored.add(_messages(output.items, said), done)
    yield output.event(f"response.{done['status']}", response=done)


class _Output:
    """The items of an answer as they grow, and the events that tell of it.

    Attributes:
        items: those that are complete.
    """

    def __init__(self) -> None:
        self.items: list[Event] = []
        self._open: Event | None = None  # the item that grows: one part of text
        self._part: Event = {}
        self._sent = 0

    def event(self, kind: str, **fields: Any) -> Event:
        """An event with its number."""
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **fields}

    def add_text(self, kind: str, text: str, logprobs: list[Event]) -> Iterator[Event]:
        """More of a message or of a reasoning."""
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        assert self._open is not None
        self._part["text"] += text
        if kind == "message":
            self._part["logprobs"] += logprobs
            yield self.event("response.output_text.delta", **self._place, delta=text, logprobs=logprobs)
        else:
            yield self.event("response.reasoning_text.delta", **self._place, delta=text)

    def add_call(self, call: Event) -> Iterator[Event]:
        """A whole call of a tool."""
        yield from self._close("completed")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"id": _new_id("fc"), "type": "function_call", "call_id": call["id"], "name": name}
        place = {"item_id": item["id"], "output_index": len(self.items)}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self.event("response.output_item.added", output_index=len(self.items), item=begun)
        yield self.event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self.event("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        yield self._finish({**item, "arguments": arguments, "status": "completed"})

    def end(self, status: str) -> Iterator[Event]:
        """Nothing follows; an answer without anything in it is an empty message."""
        if self._open is None and not self.items:
            yield from self._begin("message")
        yield from self._close(status)

    @property
    def _place(self) -> Event:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.items), "content_index": 0}

    def _begin(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            self._open = {"id": _new_id("msg"), "type": kind, "role": "assistant"}
            self._part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            self._open = {"id": _new_id("rs"), "type": kind, "summary": []}
            self._part = {"type": "reasoning_text", "text": ""}
        item = {**self._open, "content": [], "status": "in_progress"}
        yield self.event("response.output_item.added", output_index=len(self.items), item=item)
        part = {name: value if isinstance(value, str) else [] for name, value in self._part.items()}
        yield self.event("response.content_part.added", **self._place, part=part)

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        text = self._part["text"]
        if self._open["type"] == "message":
            logprobs = self._part["logprobs"]
            yield self.event("response.output_text.done", **self._place, text=text, logprobs=logprobs)
        else:
            yield self.event("response.reasoning_text.done", **self._place, text=text)
        yield self.event("response.content_part.done", **self._place, part=self._part)
        item = {**self._open, "content": [self._part], "status": status}
        self._open = None
        yield self._finish(item)

    def _finish(self, item: Event) -> Event:
        self.items.append(item)
        return self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)


def _messages(items: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation's messages with some items after them; calls stand in the message before them."""
    messages = list(earlier)
    for item in items:
        kind = item.get("type") or "message"
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", []), call]}
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            messages.append(result)
        elif kind != "reasoning":  # that of earlier answers is not read again
            raise Refused(400, f"input has an item of type {str(kind)[:60]!r}, which is not taken")
    return messages


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = str(tool.get("type"))[:60]
    if kind != "function":
        raise Refused(400, f"tools of type {kind!r} are not taken: only functions of your own")
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _head(service: Service, request: ResponsesRequest) -> Event:
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions or None,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "model": service.name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None, "summary": None, **request.reasoning},
        "store": request.store,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}, **request.text},
        "tool_choice": request.tool_choice,
        "tools": [{"parameters": None, "strict": None, **tool} for tool in request.tools],
        "top_logprobs": request.top_logprobs,
        "top_p": request.top_p,
        "truncation": request.truncation,
        "usage": None,
    }


def _usage(service: Service, conversation: Conversation, items: list[Event]) -> Event:
    (job,) = conversation.jobs
    thought = "".join(item["content"][0]["text"] for item in items if item["type"] == "reasoning")
    tokens = service.engine.tokenizer.encode(thought, add_special_tokens=False) if thought else []
    return {
        "input_tokens": len(job.prompt),
        "input_tokens_details": {"cached_tokens": job.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": job.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": min(len(tokens), job.completion_tokens)},
        "total_tokens": len(job.prompt) + job.completion_tokens,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
