"""What requests may say: OpenAI's and Anthropic's fields, and those of MLX-LM and llama.cpp beside them.

A field that is not taken is refused by name, unless it cannot change the answer.
"""

import math
import re
from inspect import signature
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from .sent_images import NOT_TAKEN, url_of

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_ANSWERS = 16  # n, times the prompts of one request
MAX_TOOLS = 128
MAX_DRAWN = 4000  # characters of a text that is drawn
MAX_DRAWINGS = 10  # of one request
MAX_SCHEMA = 2**16  # characters of a JSON schema
# What chat_template_kwargs would give to the tokenizer and not to its template. Among them is the template, a
# program: one of a client's could run for ever.
NOT_FOR_TEMPLATES = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}
# Fields that clients send and that no answer depends on.
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "cache_prompt"),
    *(
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "include",
        "truncation",
    ),
}


class Refused(Exception):
    """A request that is not served: HTTP status, a sentence, OpenAI's code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Request(BaseModel):
    """What all requests have in common: how tokens are chosen, and how many."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    messages_if_missing: ClassVar[dict[str, str]] = {}

    model: str = "default_model"
    stream: bool = False
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=1e9)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=10**9)
    min_p: float | None = Field(None, ge=0, le=1)
    xtc_probability: float = Field(0.0, ge=0, le=1)
    xtc_threshold: float = Field(0.1, ge=0, le=0.5)
    repetition_penalty: float | None = Field(None, ge=0, le=1e9)  # 0 and 1 are none
    repetition_context_size: int = Field(20, ge=0, le=10**9)
    presence_penalty: float = Field(0.0, ge=-1e9, le=1e9)
    presence_context_size: int = Field(20, ge=0, le=10**9)
    frequency_penalty: float = Field(0.0, ge=-1e9, le=1e9)
    frequency_context_size: int = Field(20, ge=0, le=10**9)
    seed: int | None = Field(None, ge=0, lt=2**64)
    logit_bias: dict[str, Any] = {}
    stop: list[str] = []

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, stop: Any) -> list[str]:
        words = [stop] if isinstance(stop, str) and stop else stop or []
        if (
            not isinstance(words, list)
            or len(words) > MAX_STOP_STRINGS
            or not all(isinstance(word, str) and word for word in words)
        ):
            raise ValueError(f"stop must be a string or up to {MAX_STOP_STRINGS}, none of them empty")
        if any(len(word) > MAX_STOP_LENGTH for word in words):
            raise ValueError(f"a stop string may have {MAX_STOP_LENGTH} characters")
        return words

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, bias: Any) -> Any:
        if not isinstance(bias, dict):
            raise ValueError("logit_bias must be an object of token ids and numbers")
        for token, value in bias.items():
            if not re.fullmatch(r"[0-9]{1,9}", token):
                raise ValueError(f"logit_bias names token {token[:20]!r}, which is no token id")
            if type(value) not in (int, float) or not abs(value) <= 1e9:
                raise ValueError(f"logit_bias of {token} is no number in range")
        return bias

    @property
    def format_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must fit."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt's own tokens are asked for."""
        return False


class StreamOptions(BaseModel):
    """What a stream tells beside its pieces."""

    include_usage: bool = False


class _OpenAI(Request):
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    stream_options: StreamOptions = StreamOptions()
    response_format: dict[str, Any] = {"type": "text"}

    @field_validator("response_format", mode="before")
    @classmethod
    def _response_format(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in ("text", "json_object", "json_schema"):
            raise ValueError("response_format can only be of type text, json_object or json_schema")
        if kind == "json_schema":
            nested = value.get("json_schema", value)
            schema = nested.get("schema") if isinstance(nested, dict) else None
            if not isinstance(schema, dict):
                raise ValueError("response_format can be of type json_schema only with a json_schema.schema")
            check_schema(schema, "response_format")
        return value

    @property
    def format_schema(self) -> dict[str, Any] | None:
        kind = self.response_format["type"]
        if kind == "json_schema":
            return self.response_format.get("json_schema", self.response_format)["schema"]  # type: ignore[no-any-return]
        return {"type": "object"} if kind == "json_object" else None


class CompletionRequest(_OpenAI):
    """/v1/completions."""

    messages_if_missing = {"prompt": "prompt must be a string, or a list of strings or of token ids"}

    prompt: list[str | list[int]]
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    best_of: int = Field(1, ge=1)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            prompt = [prompt]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(
            isinstance(p, str) or (isinstance(p, list) and all(type(token) is int for token in p))
            for p in prompts
        ):
            raise ValueError(cls.messages_if_missing["prompt"])
        if not prompts or not all(prompts):
            raise ValueError("prompt must be a string, or several, and not an empty one")
        return prompts

    @field_validator("logprobs", mode="before")
    @classmethod
    def _logprobs(cls, value: Any) -> Any:
        return (0 if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _answers(self) -> "CompletionRequest":
        if len(self.prompt) * self.n > 8 * MAX_ANSWERS:
            raise ValueError(f"prompt and n ask for more than {8 * MAX_ANSWERS} answers")
        if self.best_of > self.n:
            raise ValueError("best_of is not taken: it can only be n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1")
        return self

    @property
    def scores_prompt(self) -> bool:
        """As of every request."""
        return self.echo and (self.logprobs is not None or self.max_tokens == 0)


class ChatRequest(_OpenAI):
    """/v1/chat/completions; the other chat protocols are brought into this form."""

    messages_if_missing = {"messages": "messages must be a list, and not an empty one"}

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, messages: Any) -> Any:
        if not isinstance(messages, list) or not messages:
            raise ValueError(cls.messages_if_missing["messages"])
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError("each of messages must be an object with a role")
            check_content(message.get("content"))
            if not isinstance(message.get("tool_calls") or [], list):
                raise ValueError("tool_calls of messages must be a list")
        return messages

    @field_validator("tools", mode="before")
    @classmethod
    def _tools(cls, tools: Any) -> Any:
        if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
            raise ValueError(f"tools must be a list, of {MAX_TOOLS} at most")
        for tool in tools:
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError("each of tools must be a function with a name")
            check_schema(function.get("parameters") or {}, "tools")
        return tools

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _template_kwargs(cls, kwargs: Any) -> Any:
        if not isinstance(kwargs, dict):
            raise ValueError("chat_template_kwargs must be an object")
        for name in kwargs:
            if name in NOT_FOR_TEMPLATES or name.startswith("_"):
                raise ValueError(f"chat_template_kwargs may not have {name[:100]!r}")
        return kwargs

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        choice = self.tool_choice
        named = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
        if named is None and choice not in ("auto", "none", "required"):
            raise ValueError("tool_choice must be auto, none, required or a function of tools")
        if named is not None and named not in [tool["function"]["name"] for tool in self.tools]:
            raise ValueError(f"tool_choice names {str(named)[:100]!r}, which is not in tools")
        if choice == "required" and not self.tools:
            raise ValueError("tool_choice is required, but there are no tools")
        return self


class ResponsesRequest(Request):
    """/v1/responses; responses.py brings it into the form of a chat."""

    messages_if_missing = {"input": "input must be a string or a list of items, and not empty"}

    input: str | list[dict[str, Any]]
    instructions: str = ""
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    include: list[str] = []
    top_logprobs: int = Field(0, ge=0, le=20)
    reasoning: dict[str, Any] = {}
    metadata: dict[str, str] = Field({}, max_length=16)
    store: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    stream_options: dict[str, Any] = {}
    max_tool_calls: int | None = None
    prompt_cache_options: dict[str, Any] = {}
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: Any) -> Any:
        is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        if not value or not (isinstance(value, str) or is_list):
            raise ValueError(cls.messages_if_missing["input"])
        return value

    @model_validator(mode="after")
    def _limit(self) -> "ResponsesRequest":
        self.max_tokens = self.max_output_tokens or self.max_tokens
        return self


Kind = TypeVar("Kind", bound=BaseModel)


def read_request(kind: type[Kind], body: Any) -> Kind:
    """A request from its JSON.

    Raises:
        Refused: it asks for what cannot be done; the sentence names the field.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object")
    # Clients may send null for what they leave open.
    body = {field: value for field, value in body.items() if value is not None}
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise Refused(400, _sentence(kind, error)) from None
    except (RecursionError, OverflowError):
        raise Refused(400, "the request is nested too deeply, or a number is out of range") from None
    for field, value in (request.model_extra or {}).items():
        if field not in WITHOUT_EFFECT and value not in (False, "", [], {}):
            raise Refused(400, f"{field[:100]} is not taken by this server; leave it out")
    return request


class ImageRequest(BaseModel):
    """/v1/images/generations."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(max_length=MAX_DRAWN)
    model: str = "default_model"
    n: int = Field(1, ge=1, le=MAX_DRAWINGS)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["auto"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    seed: int | None = Field(None, ge=0, lt=2**64)


def check_content(content: Any) -> None:
    """Raise ValueError where a message's content is neither text nor an image in a `data:` URL."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError("content must be a string or a list of text parts")
    for part in content:
        kinds = ("text", "input_text", "output_text")
        if isinstance(part, dict) and url_of(part) is not None:
            continue
        if not (isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)):
            raise ValueError(NOT_TAKEN)


def check_schema(schema: Any, field: str) -> None:
    """Raise ValueError for a JSON schema that is none, or too large."""
    if not isinstance(schema, dict) or len(str(schema)) > MAX_SCHEMA:
        raise ValueError(f"{field} must have a JSON schema of at most {MAX_SCHEMA} characters")


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if isinstance(part, str)) or "the request"
    context = first.get("ctx", {})
    kind_of_error, bound = first["type"], context.get("ge", context.get("le", math.inf))
    if kind_of_error == "value_error":
        return str(context["error"])
    if kind_of_error == "missing":
        return getattr(kind, "messages_if_missing", {}).get(field, f"{field} is missing")
    if kind_of_error in ("greater_than_equal", "less_than_equal") and abs(bound) < 1e9 and field != "seed":
        return f"{field} must be at {'least' if 'ge' in context else 'most'} {bound}"
    out_of_range = ("greater_than_equal", "less_than_equal", "less_than", "finite_number", "int_parsing_size")
    if kind_of_error in out_of_range or type(first["input"]) is int:
        return f"{field} is out of range"
    return f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}"


class TokenizeRequest(BaseModel):
    """/tokenize: llama.cpp's content and add_special, or vLLM's prompt and add_special_tokens."""

    model_config = ConfigDict(extra="allow")

    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> "TokenizeRequest":
        if (self.content is None) == (self.prompt is None):
            raise ValueError("either content or prompt must be a string")
        return self

    @property
    def text(self) -> str:
        """What is to be tokenized."""
        return self.content if self.content is not None else self.prompt or ""

    @property
    def special(self) -> bool:
        """Whether the tokenizer's own special tokens are put around the text."""
        return self.add_special if self.content is not None else self.add_special_tokens
