"""From a request's text and messages to tokens, in a thread whose end need not be waited for."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import PararnnError
from ...generation import check_text, check_tokens, encode, find_room
from ...images.config import ImageArgs
from ...images.image_prompts import MARK, lay_out, without_template
from ...process.interrupt import Interrupted, interrupt
from .schema import ChatRequest, Refused
from .sent_images import open_images, url_of

SECONDS = 5  # of a processor, for a chat template and a tokenizer
MOST_SECONDS = 60  # that pass meanwhile, on a busy machine
MOST_THREADS = 32  # of these at a time
Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from.

    Attributes:
        tokens: their ids.
        room: how many can follow, None for no end.
        system_length: how many of them come from the system prompt alone.
        reasoning: whether the answer begins inside of a reasoning.
        pictures: of each image where its first token stands, and its pixels (S, S, 3), uint8.
        memory: what the assistant of a model that uses tools remembers, as `Assistant.recall` takes it.
    """

    tokens: list[int]
    room: int | None
    system_length: int = 0
    reasoning: bool = False
    pictures: tuple[tuple[int, np.ndarray], ...] = ()
    memory: str = ""


class Prompts:
    """Makes prompts for one model. Nothing of a request is run: the template is the model's own.

    Args:
        model, tokenizer: the model.
        images: what it sees; None for nothing.
    """

    def __init__(self, model: Any, tokenizer: Any, images: ImageArgs | None = None) -> None:
        self._model, self._tokenizer, self._images = model, tokenizer, images

    def of_text(self, text: str | list[int]) -> Prompt:
        """The prompt of a completion: text or token ids."""
        tokens = encode(self._tokenizer, text)
        check_tokens(tokens, self._model.args.vocab_size)
        return Prompt(tokens, find_room(self._model, len(tokens)))

    def of_chat(self, request: ChatRequest) -> Prompt:
        """The prompt of a conversation; where the model has no template, its texts one after the other."""
        tokenizer = self._tokenizer
        tools = request.tools if request.tool_choice != "none" else []
        if tools and not tokenizer.has_tool_calling:
            raise Refused(400, "tools are not taken: this model's chat template has no tool calls")
        urls: list[str] = []
        messages = [plain(message, None if self._images is None else urls) for message in request.messages]
        for message in messages:
            check_text(message["content"])
        if not tokenizer.has_chat_template and not urls:
            return self.of_text("".join(message["content"] for message in messages))

        def render(messages: list[dict[str, Any]], generate: bool, tokenize: bool = True) -> Any:
            return tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=generate,
                tools=tools or None,
                tokenize=tokenize,
                **request.chat_template_kwargs,
            )

        pictures: list[tuple[int, np.ndarray]] = []
        if urls:
            assert self._images is not None
            opened = open_images(urls, self._images.size)
            has_template = tokenizer.has_chat_template
            text = render(messages, True, False) if has_template else without_template(messages)
            prompt = lay_out(self._images, tokenizer, text, opened)
            tokens, pictures = prompt.tokens, prompt.pictures
        else:
            tokens = list(render(messages, True))
        check_tokens(tokens, self._model.args.vocab_size)
        systems = next((n for n, m in enumerate(messages) if m["role"] != "system"), 0)
        system_length = 0
        if systems and tokenizer.has_chat_template:
            beginning = render([*messages[:systems], {"role": "user", "content": ""}], False)
            pairs = zip(beginning, tokens, strict=False)
            system_length = next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
        reasoning = bool(
            tokenizer.has_thinking and tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
        )
        room = find_room(self._model, len(tokens))
        return Prompt(tokens, room, system_length, reasoning, tuple(pictures))


def plain(message: dict[str, Any], images: list[str] | None = None) -> dict[str, Any]:
    """A message as chat templates want it: its content a string, the arguments of its calls objects.

    Where an image stands the string has MARK, and `images` gets its URL; None refuses images.
    """
    content = message.get("content") or ""
    if isinstance(content, list):
        urls = [url for part in content if (url := url_of(part)) is not None]
        if urls and images is None:
            raise Refused(400, "content has an image, and this model sees none; only text parts are taken")
        if images is not None:
            images += urls
        content = "".join(MARK if url_of(part) is not None else part["text"] for part in content)
    plain = {**message, "content": content}
    if plain["role"] == "developer":
        plain["role"] = "system"
    if message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return plain


def _plain_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Refused(400, "each of tool_calls must have a function")
    try:
        arguments = function.get("arguments") or {}
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        raise Refused(400, "the arguments in tool_calls are not JSON") from None
    return {**call, "function": {**function, "arguments": parsed}}


_threads: set[threading.Thread] = set()


def _used(thread: threading.Thread, passed: float) -> float:
    """Seconds of a processor that a thread has used; `passed` where the system does not tell."""
    try:
        said = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:  # not on Linux; or it has just ended
        return 0.0 if sys.platform == "linux" else passed
    ticks = said.rpartition(")")[2].split()[11:13]  # in user mode, in the system's
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


async def run_apart(function: Callable[..., Result], *args: Any) -> Result:
    """What a function returns that may take for ever: a chat template, a tokenizer.

    After `SECONDS` of a processor it is interrupted, or after `MOST_SECONDS` in any case; native code cannot
    be, and keeps its thread. Where a thread's own time cannot be asked for (macOS) all time counts as its.

    Raises:
        Refused: it takes too long, or fails in whatever way, a panic of native code among them.
    """
    if len(_threads) >= MOST_THREADS:
        raise Refused(503, "too many prompts are being read; try again in a moment")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, refused = None, None
        try:
            result = function(*args)
        except (Refused, Interrupted) as error:
            refused = error if isinstance(error, Refused) else None
        except PararnnError as error:
            refused = Refused(400, str(error))
        except BaseException as error:  # a panic is no Exception
            said = " ".join(str(error).split())[:300]
            refused = Refused(400, f"the prompt cannot be read ({type(error).__name__}: {said})")
        _threads.discard(thread)
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, refused)

    thread = threading.Thread(target=run, name="prompt", daemon=True)
    _threads.add(thread)
    thread.start()
    begin = time.monotonic()
    try:
        while not (await asyncio.wait({future}, timeout=0.2))[0]:
            passed = time.monotonic() - begin
            used = _used(thread, passed)
            if used > SECONDS or passed > MOST_SECONDS:
                limit = f"{SECONDS} seconds of a processor" if used > SECONDS else f"{MOST_SECONDS} seconds"
                what = "the chat template or the tokenizer"
                raise Refused(400, f"{what} takes more than {limit} for this prompt")
        return future.result()
    finally:
        if thread in _threads:
            interrupt(thread)
