"""A tokenizer's chat template, rendered in a process of its own with limits of memory and time."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from inspect import signature
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe

from ..errors import PararnnError
from .plain_tokenizer import PlainTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5  # of a processor
MOST_SECONDS = 60  # that pass meanwhile, on a busy machine
STARTING = 60  # of them until its process has imported Jinja
MEMORY = 1 << 30  # bytes
SPARE = 1 << 20  # characters that a template may write besides what it is given, eight times over
IDLE = 2  # processes that are kept for the next template

# What transformers hands to a template, as JSON: it drops and renames fields of messages, and makes JSON
# schemas of functions.
_GIVEN = "{{ {'messages': messages, 'tools': tools, 'documents': documents}|tojson }}"
# Fields of messages that it hands over as they are, and an option that it leaves to the template.
_PLAIN_FIELDS = {"role", "content"}
_PLAIN_OPTIONS = {"enable_thinking"}
# Its own options that change no more than what the template is given.
_TEMPLATES_OWN = {
    "self", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "return_dict", "kwargs",
}  # fmt: skip


@cache
def _others() -> set[str]:
    """Options of transformers that change more than what the template is given."""
    from transformers import PreTrainedTokenizerBase

    return set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - _TEMPLATES_OWN


class ChatTemplate:
    """Messages as a tokenizer's chat template writes them; what MLX-LM's wrapper calls for them.

    The text is the one that `tokenizer.apply_chat_template` gives. With an option of that function that
    changes more than what the template is given (`continue_final_message`, `padding`, ...) it is called
    itself, in this process and without limits; no command does so. Messages that are texts alone need no
    transformers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | PlainTokenizer") -> None:
        self._tokenizer = tokenizer

    def __call__(
        self,
        conversation: list[Any],
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The text.

        Raises:
            PararnnError: the template takes too much memory or time.
            jinja2.TemplateError: it fails.
        """
        more: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        more |= self._tokenizer.special_tokens_map | kwargs
        plain = tools is None and documents is None and kwargs.keys() <= _PLAIN_OPTIONS
        if plain and _are_texts(conversation):
            template = self._tokenizer.get_chat_template(chat_template)
            return _render(template, {"messages": conversation, "tools": None, "documents": None} | more)
        given: dict[str, Any] = {"tools": tools, "documents": documents, "tokenize": False}
        if _others() & kwargs.keys() or (conversation and isinstance(conversation[0], list | tuple)):
            given |= {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
            return self._tokenizer.apply_chat_template(conversation, **given, **kwargs)
        template = self._tokenizer.get_chat_template(chat_template, tools)
        text = self._tokenizer.apply_chat_template(conversation, chat_template=_GIVEN, **given)
        return _render(template, json.loads(str(text)) | more)


def _are_texts(conversation: Any) -> bool:
    """Whether it is messages of texts alone, at least one."""
    return bool(conversation) and all(
        type(message) is dict
        and message.keys() <= _PLAIN_FIELDS
        and all(type(value) is str for value in message.values())
        for message in conversation
    )


class _Process:
    def __init__(self) -> None:
        folders = {str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)}
        script = str(Path(__file__).with_name("template_process.py"))
        self._socket, theirs = Pipe()
        limits = (str(theirs.fileno()), str(MEMORY), str(SECONDS))
        try:
            # A session of its own: Ctrl-C is for this process, which ends that one.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", script, *limits, *folders],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            raise PararnnError(
                f"no process can be started to render the chat template ({error.strerror}: {sys.executable})"
            ) from error
        finally:
            theirs.close()
        try:
            if not self._socket.poll(STARTING):
                raise EOFError
            self._socket.recv_bytes()
        except (EOFError, OSError):
            self.end()
            raise PararnnError(
                f"the process that renders the chat template does not start ({sys.executable} {script})"
            ) from None

    def ask(self, request: bytes) -> dict[str, str]:
        """Its answer; {"exceeded": what} where it takes too much."""
        deadline = time.monotonic() + MOST_SECONDS
        try:
            self._socket.send_bytes(request)
            while not self._socket.poll(0.2):
                if time.monotonic() > deadline:
                    return {"exceeded": "time"}
                if sys.platform == "darwin" and self._resident() > MEMORY:  # which does not keep such limits
                    return {"exceeded": "memory"}
            answer: dict[str, str] = json.loads(self._socket.recv_bytes())
        except (EOFError, OSError):  # the system ended it
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            return {"exceeded": "time" if self._process.returncode == -signal.SIGXCPU else "memory"}
        return answer

    def lives(self) -> bool:
        """Whether nobody has ended it meanwhile."""
        return self._process.poll() is None

    def end(self) -> None:
        """At once, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _resident(self) -> int:
        command = ["ps", "-o", "rss=", "-p", str(self._process.pid)]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return int(said) << 10 if said.isdigit() else 0


_idle: list[_Process] = []


def _render(template: str, names: dict[str, Any]) -> str:
    given = json.dumps(names)
    longest = SPARE + 8 * len(given)
    request = json.dumps({"template": template, "names": names, "longest": longest}).encode()
    process = _idle_process() or _Process()
    keep = False
    try:
        answer = process.ask(request)
        keep = "exceeded" not in answer
    finally:  # after Ctrl-C too
        if keep and len(_idle) < IDLE:
            _idle.append(process)
        else:
            process.end()
    if "exceeded" in answer:
        what = {
            "time": f"takes more than {SECONDS} seconds of a processor",
            "memory": f"takes more than {MEMORY >> 30} GB of memory",
            "text": f"writes more than {longest:,} characters",
        }[answer["exceeded"]]
        raise PararnnError(
            f"the chat template {what} for these messages; put the model's own chat_template.jinja into its "
            "folder"
        )
    if "error" in answer:
        raise jinja2.TemplateError(answer["error"])
    text = answer["text"]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PararnnError(
            "what the chat template writes for these messages is not UTF-8 (it has lone surrogates); convert "
            "the messages first, for instance with iconv"
        ) from None
    return text


def _idle_process() -> _Process | None:
    while True:
        try:
            process = _idle.pop()
        except IndexError:
            return None
        if process.lives():
            return process
        process.end()


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # they answer the other process
