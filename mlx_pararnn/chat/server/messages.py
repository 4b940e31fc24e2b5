"""Anthropic's /v1/messages: brought into the form of a chat, and its answer into Anthropic's."""

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from .schema import ChatRequest, Refused, read_request
from .service import Conversation, Service

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Fields that mean the same to both.
SHARED = ("model", "stream", "max_tokens", "temperature", "top_p", "top_k")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages(body: Any) -> ChatRequest:
    """A request to /v1/messages as a chat.

    Raises:
        Refused: it asks for what is not taken; the sentence names the field.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object")
    body = {field: value for field, value in body.items() if value is not None}
    known = {
        *SHARED,
        "messages",
        "system",
        "stop_sequences",
        "tools",
        "tool_choice",
        "metadata",
        "service_tier",
    }
    for field in body.keys() - known:
        if field != "thinking" or body[field] != {"type": "disabled"}:
            raise Refused(400, f"{field[:100]} is not taken by this server; leave it out")
    chat = {field: body[field] for field in SHARED if field in body}
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "messages must be a list of objects, and not an empty one")
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    chat["messages"] = [*system, *(part for message in messages for part in _in_parts(message))]
    chat["stop"] = body.get("stop_sequences")
    if body.get("tools"):
        chat["tools"] = [_tool(tool) for tool in _list(body["tools"], "tools")]
    if "tool_choice" in body:
        choice = body["tool_choice"] if isinstance(body["tool_choice"], dict) else {}
        if choice.get("type") == "tool":
            chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
        else:
            chat["tool_choice"] = CHOICES.get(str(choice.get("type")), "no such choice")
        chat["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use", False)
    return read_request(ChatRequest, chat)


async def message(service: Service, request: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    conversation = await service.converse(request)
    texts, calls, reason = [], [], None
    async with aclosing(service.parts(conversation)) as parts:
        async for _, part, _, ended in parts:
            texts.append(part.content)
            calls += part.calls
            reason = ended or reason
    text = "".join(texts)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        content.append({**_tool_use(call), "input": arguments})
    return {**_head(service), "content": content, **_end(conversation, reason), "usage": _usage(conversation)}


async def message_events(service: Service, request: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The same as Anthropic's events."""
    conversation = await service.converse(request)
    start = {**_head(service), "content": [], "stop_reason": None, "stop_sequence": None}
    block, is_text, reason = -1, False, None
    begun = False
    async with aclosing(service.parts(conversation)) as parts:
        async for _, part, _, ended in parts:
            if not begun:  # only now is it known how much of the prompt was read before
                begun = True
                yield {"type": "message_start", "message": {**start, "usage": _usage(conversation)}}
            reason = ended or reason
            if part.content:
                if not is_text:
                    block, is_text = block + 1, True
                    yield _block_start(block, {"type": "text", "text": ""})
                delta = {"type": "text_delta", "text": part.content}
                yield {"type": "content_block_delta", "index": block, "delta": delta}
            for call in part.calls:
                if is_text:
                    yield {"type": "content_block_stop", "index": block}
                block, is_text = block + 1, False
                yield _block_start(block, {**_tool_use(call), "input": {}})
                delta = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
                yield {"type": "content_block_delta", "index": block, "delta": delta}
                yield {"type": "content_block_stop", "index": block}
    if is_text:
        yield {"type": "content_block_stop", "index": block}
    yield {"type": "message_delta", "delta": _end(conversation, reason), "usage": _usage(conversation)}
    yield {"type": "message_stop"}


def write_event(event: dict[str, Any]) -> bytes:
    """A server-sent event with its name."""
    text = json.dumps(event, ensure_ascii=False, allow_nan=False)
    return f"event: {event['type']}\ndata: {text}\n\n".encode(errors="replace")


def _in_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as those of a chat: results of tools are messages of their own."""
    content = message.get("content")
    if not isinstance(content, list):
        return [message]
    kept: list[Any] = []
    calls, results = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use":
            function = {"name": part.get("name"), "arguments": json.dumps(part.get("input") or {})}
            calls.append({"id": part.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            result = {"role": "tool", "tool_call_id": part.get("tool_use_id")}
            results.append({**result, "content": part.get("content") or ""})
        else:
            kept.append(_image(part) if kind == "image" else part)
    if results and not kept:
        return results
    return [*results, {**message, "content": kept, **({"tool_calls": calls} if calls else {})}]


def _image(part: dict[str, Any]) -> dict[str, Any]:
    """An image in the form of a chat's; where it is no base64 its address stays, to be refused."""
    given = part.get("source")
    source = given if isinstance(given, dict) else {}
    url = source.get("url")
    if source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or "input_schema" not in tool:
        raise Refused(400, "each of tools must have a name and an input_schema")
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": {**function, "description": tool.get("description", "")}}


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(400, f"{field} must be a list")
    return value


def _head(service: Service) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": service.name,
    }


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}


def _block_start(index: int, block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _end(conversation: Conversation, reason: str | None) -> dict[str, Any]:
    text = conversation.jobs[0].text
    if reason == "stop" and text.stopped:
        return {"stop_reason": "stop_sequence", "stop_sequence": text.stop_string}
    return {"stop_reason": STOP_REASONS.get(reason or "stop", "end_turn"), "stop_sequence": None}


def _usage(conversation: Conversation) -> dict[str, int]:
    (job,) = conversation.jobs
    return {
        "input_tokens": len(job.prompt) - job.cached_tokens,
        "cache_read_input_tokens": job.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": job.completion_tokens,
    }
