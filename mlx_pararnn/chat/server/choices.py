"""Answers in OpenAI's words: choices, log probabilities, calls of tools, usage; whole and in chunks."""

import json
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...mlx_lm_internals import MessageStates
from ...text.detokenizer import Tokens
from .jobs import Job, TokenInfo

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """A piece of a message: text, reasoning and calls of tools as OpenAI has them."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def delta(self) -> dict[str, Any]:
        """The fields of a streamed message, those that are not empty."""
        named = {"content": self.content, "reasoning": self.reasoning, "tool_calls": self.calls}
        return {name: value for name, value in named.items() if value}


class MessageParser:
    """Divides an answer's text into what is said, what is thought and which tools are called.

    Args:
        tokenizer: MLX-LM's wrapper.
        tools: OpenAI's, those that can be called.
        reasoning: whether the answer begins inside of a reasoning.
        most_calls: further calls are left out; None for no limit.
    """

    def __init__(
        self, tokenizer: Any, tools: list[dict[str, Any]], reasoning: bool, most_calls: int | None = None
    ) -> None:
        self._tokenizer, self._tools, self._most_calls = tokenizer, tools, most_calls
        has_states = tokenizer.has_thinking or tokenizer.has_tool_calling
        self._states = MessageStates(tokenizer, reasoning) if has_states else None
        self._call = ""
        self.calls = 0

    def add(self, text: str, last: bool = False) -> Part:
        """What can be told after some more text; `last` where none follows."""
        if self._states is None:
            return Part(text)
        segments = self._states.split(text)
        if last:
            segments.append(self._states.flush())
        part = Part()
        for state, said in segments:
            if state == "tool":
                self._call += said
                continue
            self._end_call(part)
            if state == "reasoning":
                part.reasoning += said
            else:
                part.content += said
        if last:
            self._end_call(part)
        return part

    def _end_call(self, part: Part) -> None:
        text, self._call = self._call, ""
        if not text.strip():
            return
        try:
            parsed = self._tokenizer.tool_parser(text, self._tools)
            calls = [_openai_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception as error:  # each format's parser has its own; a call that was cut short, mostly
            logger.warning("a call of a tool cannot be read: %s", error)
            part.content += text
            return
        for call in calls if self._most_calls is None else calls[: self._most_calls - self.calls]:
            part.calls.append({"index": self.calls, **call})
            self.calls += 1


def _openai_call(call: Any) -> dict[str, Any]:
    """A call that one of MLX-LM's parsers read; raises where no client could read it."""
    name, arguments, given = call["name"], call["arguments"], call.get("id")
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        raise ValueError("a name must be a string, and arguments an object")
    identity = given if isinstance(given, str) and given else f"call_{uuid.uuid4().hex[:24]}"
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    f"{identity}{name}{written}".encode()  # half of a character by its escape in JSON
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": written}}


class TokenTexts:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokens = Tokens(tokenizer)

    def bytes(self, token: int) -> bytes:
        """A token's own bytes, which may be part of a character."""
        return self._tokens.bytes_in_text(token)

    def text(self, token: int) -> str:
        """As text, and where it is part of a character as OpenAI writes that: bytes:\\xf0."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(texts: TokenTexts, tokens: Iterable[TokenInfo]) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = texts.bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {**entry(info.id, info.logprob), "top_logprobs": [entry(*best) for best in info.top]}
            for info in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(texts: TokenTexts, tokens: list[TokenInfo]) -> dict[str, Any]:
    """`logprobs` of a completion's choice."""
    tops: list[dict[str, float] | None] = []
    for info in tokens:
        top: dict[str, float] = {}
        for token, logprob in info.top:
            top.setdefault(texts.text(token), logprob)
        tops.append(None if info.logprob is None else top)
    return {
        "tokens": [texts.text(info.id) for info in tokens],
        "token_logprobs": [info.logprob for info in tokens],
        "top_logprobs": tops,
        "text_offset": [info.offset for info in tokens],
    }


def usage_of(jobs: list[Job], n: int = 1) -> dict[str, Any]:
    """Tokens of several answers, `n` to each prompt, which counts once."""
    prompt = sum(len(job.prompt) for job in jobs[::n])
    made = sum(job.completion_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs[::n])},
    }
