"""What a request to the server may say: a body is read, and brought into MLX-LM's form or refused."""

import json
import re
from inspect import signature
from io import BufferedIOBase
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import PararnnError
from ..generation import check_text

MAX_BODY = 4 * 2**20  # bytes of a request
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters; MLX-LM makes an automaton of them, and keeps a hundred
MAX_TOP_LOGPROBS = 11  # MLX-LM's limit
# What chat_template_kwargs would give to the tokenizer and not to its template. Among them is the template, a
# program: one of a client's could run for ever.
NOT_FOR_TEMPLATES = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}


class Refused(Exception):
    """A request that is not served: HTTP status, a sentence, OpenAI's code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def read_body(file: BufferedIOBase, content_length: str) -> dict[str, Any]:
    """The JSON object that a client sends.

    Args:
        file: where its bytes come from.
        content_length: the header, "" where there is none.

    Raises:
        Refused: it is too large, of unknown length, or no JSON object.
        TimeoutError: by `file`.
    """
    if not re.fullmatch(r"[0-9]{1,18}", content_length):
        raise Refused(411, "Content-Length is missing or no number")
    length = int(content_length)
    if length > MAX_BODY:
        # A client that is still sending would not see the answer: some of it is taken and thrown away.
        for _ in range(min(length, 8 * MAX_BODY) // 2**16):
            if not file.read(2**16):
                break
        raise Refused(413, f"the request has {length} bytes; {MAX_BODY} are the limit")
    try:
        body = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object")
    return body


def check_body(body: dict[str, Any], *, chat: bool, model: str, vocab_size: int, max_tokens: int) -> None:
    """Bring a request into the form that MLX-LM takes, in place. MLX-LM checks types of numbers.

    Args:
        body: the request.
        chat: whether it has messages, and not a prompt.
        model: the name of the one model there is.
        vocab_size: how many tokens that model has.
        max_tokens: the most that an answer may have.

    Raises:
        Refused: it asks for what cannot be done, or in a way that MLX-LM would not survive.
    """
    if body.get("model", model) not in (model, "default_model"):
        raise Refused(404, f"this server has one model, {model!r}", "model_not_found")
    body["model"] = model
    # OpenAI's clients may send null for what they leave open; MLX-LM knows left out alone.
    for field in [field for field, value in body.items() if value is None]:
        del body[field]
    _check_wishes(body)
    _check_stop(body)
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object")
    body["stream_options"] = {"include_usage": options.get("include_usage") is True}
    _check_numbers(body, vocab_size, max_tokens)
    _check_logit_bias(body, vocab_size)
    variables = body.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise Refused(400, "chat_template_kwargs must be an object")
    for variable in variables:
        if variable in NOT_FOR_TEMPLATES:
            raise Refused(400, f"chat_template_kwargs may not have {variable!r}")
    try:
        for text in [*(_message_texts(body) if chat else [_prompt(body)]), *body["stop"]]:
            check_text(text)
    except PararnnError as error:
        raise Refused(400, str(error)) from None


def _check_wishes(body: dict[str, Any]) -> None:
    """Refuse what is not done here and would else be silently left out."""
    for field in ("adapters", "draft_model", "num_draft_tokens"):
        if field in body:
            raise Refused(400, f"{field} is not taken here")
    if body.get("n", 1) != 1 or body.get("best_of", 1) != 1:
        raise Refused(400, "n and best_of can only be 1")
    if body.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise Refused(400, 'response_format can only be {"type": "text"}: an answer is not held to a form')
    if body.get("suffix"):
        raise Refused(400, "suffix is not taken here: a prompt is gone on with, not filled in")
    if body.get("echo"):
        raise Refused(400, "echo can only be false: an answer does not repeat its prompt")


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop") or []
    body["stop"] = stop = [stop] if isinstance(stop, str) else stop
    words = isinstance(stop, list) and all(isinstance(word, str) and word for word in stop)
    if not words or len(stop) > MAX_STOP_STRINGS:
        raise Refused(400, f"stop must be a string or up to {MAX_STOP_STRINGS}, none of them empty")
    if any(len(word) > MAX_STOP_LENGTH for word in stop):
        raise Refused(400, f"a stop string may have {MAX_STOP_LENGTH} characters")


def _check_numbers(body: dict[str, Any], vocab_size: int, max_tokens: int) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(field), int):
            body[field] = min(body[field], max_tokens)
    if type(body.get("logprobs")) is int:  # as the completions of old have it
        body["top_logprobs"], body["logprobs"] = min(body["logprobs"], MAX_TOP_LOGPROBS), True
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    for field, value in body.items():
        if isinstance(value, bool) and field not in ("stream", "logprobs"):
            body[field] = int(value)  # MLX-LM takes it for a number, and its samplers fail on it
        least, most = (0, 2**64 - 1) if field == "seed" else (-1e9, 1e9)
        if isinstance(value, (int, float)) and not least <= value <= most:  # NaN too
            raise Refused(400, f"{field} is out of range")
    for field in ("xtc_probability", "xtc_threshold"):
        if type(body.get(field)) is int:
            body[field] = float(body[field])
    if isinstance(body.get("xtc_threshold"), float) and body["xtc_threshold"] > 0.5:
        raise Refused(400, "xtc_threshold must be at most 0.5")
    if isinstance(body.get("top_k"), int) and body["top_k"] >= vocab_size:
        body["top_k"] = 0


def _check_logit_bias(body: dict[str, Any], vocab_size: int) -> None:
    bias = body.get("logit_bias")
    if not isinstance(bias, dict):  # MLX-LM says so
        return
    for token, value in bias.items():
        if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= vocab_size:
            raise Refused(400, f"logit_bias names token {token[:20]!r}, not one of 0 to {vocab_size - 1}")
        if not isinstance(value, (int, float)) or not abs(value) <= 1e9:
            raise Refused(400, f"logit_bias of {token} is no number in range")


def _prompt(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt must be a string, and not an empty one")
    return prompt


def _message_texts(body: dict[str, Any]) -> list[str]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list, and not an empty one")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "each message must be an object with a role")
    return [text for message in messages for text in _texts(message)]


def _texts(message: dict[str, Any]) -> list[str]:
    """A message's texts; what would make MLX-LM open a connection, an image's address, is refused."""
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(400, "content must be a string or a list of text parts")
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise Refused(400, "only text parts are taken in content")
    return [part["text"] for part in parts]
