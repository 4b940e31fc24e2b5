"""A conversation whose whole memory is the recurrent state: history is never read again."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache import RecurrentCache
from ..errors import PararnnError
from ..generation import check_max_tokens, check_text, encode, render, stream_generate
from ..images.image_model import ImageModel
from ..images.image_prompts import MARK, embeddings, lay_out, look, without_template
from ..images.picture import from_base64, read_picture, to_base64
from ..model import Model
from ..pocket.answers import PIECE, assistant_functions, stream_answer
from ..pocket.assistant import Assistant
from ..pocket.events import Event, Finish, Text
from ..pocket.functions import Functions
from ..pocket.loop import Limits
from ..pocket.protocol import find_protocol
from .conversation_file import Point, Turn, read_conversation, read_messages, write_conversation
from .model_fingerprint import fingerprint, form_of, has_form

if TYPE_CHECKING:
    from PIL.Image import Image

# Stands for what has been read when the chat template is asked what comes after it.
_READ = "\ue000read\ue001"
# So many answers can be undone; each costs two states.
UNDO_LIMIT = 64


@dataclass
class ToolResponse(GenerationResponse):
    """The response of a model that uses tools; `event` says what has happened, which need not be text."""

    event: Event | None = None


class _State(NamedTuple):
    """All of a conversation. It is replaced as a whole: an interrupt leaves the one before or the new one."""

    system: str | None
    now: Point
    turns: list[Turn]


class Chat:
    """A conversation with a model: `respond` streams an answer, the state goes on from turn to turn.

    With a chat template each turn is rendered by it; without one the text is fed as it is typed. A model that
    uses tools answers by them, and `respond` gives a `ToolResponse` for everything that happens. A state is
    small, so those before each question are kept: `undo`, `regenerate` and `branch` read nothing again.

    Args:
        model, tokenizer: the model.
        system: a system prompt, for models with a chat template.
        functions: for a model that uses tools those that it may call; without it those of an `Assistant`,
            whose lists and timers belong to the conversation: they are saved, undone and branched with it.
        images: the model that `model` is the language model of, where that sees images.
        rings: whether somebody asks `due`; if not, an `Assistant` refuses timers, alarms and reminders.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        system: str | None = None,
        functions: Functions | None = None,
        images: ImageModel | None = None,
        rings: bool = True,
    ) -> None:
        self.model = model
        self.images = images
        self.tokenizer = tokenizer
        self._check_system(system)
        self._state = self._empty(system)
        self._protocol = find_protocol(tokenizer)
        self._assistant: Assistant | None = None
        if functions is None:
            self._assistant = Assistant(rings=rings)
            functions = assistant_functions(self._assistant)
        self.functions = functions

    def reset(self) -> None:
        """Forget the conversation."""
        self._state = self._empty(self.system)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as chat templates want it: role and content.

        Where an image was shown `image` has its pixels, base64 of a PNG.
        """
        return self._state.now.messages

    @property
    def cache(self) -> list[RecurrentCache]:
        """The state after everything read and said."""
        return self._state.now.cache

    @property
    def system(self) -> str | None:
        """The system prompt; None or "" for none."""
        return self._state.system

    @property
    def uses_tools(self) -> bool:
        """Whether the model speaks the protocol of tools."""
        return self._protocol is not None

    @property
    def nbytes(self) -> int:
        """Size of the state, which does not depend on how long the conversation is."""
        return sum(c.state_nbytes for c in self.cache)

    @property
    def tokens(self) -> int:
        """Tokens read and generated so far."""
        return self.cache[0].offset

    def respond(
        self,
        text: str,
        *,
        image: "Path | str | bytes | Image | None" = None,
        interrupted: Callable[[], bool] = lambda: False,
        **kwargs: Any,
    ) -> Generator[GenerationResponse, None, None]:
        """Stream the answer to `text`.

        Leaving the generator early, by `interrupted` turning true or by not asking for more, keeps what has
        been said. Left while the prompt is still being read, the conversation stays as it was.

        Args:
            text: what the user says.
            image: what the text asks about, for a model that sees: a file, its bytes, an image of Pillow's.
            interrupted: asked after each token and each piece of the prompt.
            kwargs: for `stream_generate`: max_tokens, sampler, stop, ...; of these a model that uses tools
                takes sampler, max_tokens, which are those of the answer, prefill_step_size, and `limits`
                (`pocket.loop.Limits`).
        """
        shown = None if image is None else self._read_image(image)
        tokens, more = self._prompt(text, shown)
        yield from self._answer(text, shown, tokens, self._state.now, interrupted, {**kwargs, **more})

    def undo(self) -> str:
        """Go back to before the last question, which is returned.

        Raises:
            PararnnError: there is none, or it is older than what is kept.
        """
        turn = self._last_turn()
        self._state = self._state._replace(now=turn.before, turns=self._state.turns[:-1])
        return turn.text

    def regenerate(
        self, *, interrupted: Callable[[], bool] = lambda: False, **kwargs: Any
    ) -> Generator[GenerationResponse, None, None]:
        """Stream another answer to the last question, in place of the one it had; arguments as for `respond`.

        Raises:
            PararnnError: there is none, or it is older than what is kept.
        """
        turn = self._last_turn()
        tokens, start = turn.tokens, turn.cache
        if tokens is None or start is None:
            twin = self.branch()
            twin.undo()
            tokens, more = twin._prompt(turn.text, turn.image)
            start, kwargs = twin.cache, {**kwargs, **more}
        yield from self._answer(turn.text, turn.image, tokens, turn.before, interrupted, kwargs, start)

    def set_system(self, text: str) -> None:
        """Put another system prompt before the conversation, which is read again with the next question.

        Raises:
            PararnnError: the tokenizer has no chat template.
        """
        self._check_system(text)
        said = [message for message in self.messages if message["role"] != "system"]
        self._state = self._told(text, said, self._state.now.memory)

    def _told(self, system: str | None, said: list[dict[str, str]], memory: str) -> _State:
        """After these messages, with nothing read of them."""
        now, turns = self._empty(system).now._replace(memory=memory), []
        for question, answer in zip(said[::2], said[1::2], strict=False):
            turns.append(Turn(question["content"], now, image=question.get("image")))
            now = now._replace(messages=[*now.messages, question, answer])
        return _State(system, now, turns[-UNDO_LIMIT:])

    def due(self) -> list[str]:
        """What the assistant has to say by itself: sentences for timers and the like whose time has come."""
        if self._assistant is None:
            return []
        now = self._state.now
        self._assistant.recall(now.memory)
        sentences = self._assistant.due()
        self._state = self._state._replace(now=now._replace(memory=self._assistant.memory()))
        return sentences

    def branch(self) -> "Chat":
        """Another conversation that stands where this one does, and goes on by itself."""
        twin = Chat(self.model, self.tokenizer, self.system, self.functions, self.images)
        twin._assistant = self._assistant
        twin._state = self._state._replace(now=self._state.now._replace(cache=self._copy(self.cache)))
        if "_weights" in vars(self):
            twin._weights = self._weights
        return twin

    @cached_property
    def _weights(self) -> str:
        """All of the model's weights are read for it, so once is enough."""
        return fingerprint(self.model)

    @property
    def undoable(self) -> int:
        """How many questions can be undone."""
        return len(self._state.turns)

    def _answer(
        self,
        text: str,
        image: str | None,
        tokens: list[int],
        before: Point,
        interrupted: Callable[[], bool],
        kwargs: dict[str, Any],
        start: list[RecurrentCache] | None = None,
    ) -> Generator[GenerationResponse, None, None]:
        """Read `tokens`, from `start` on or from the current state, and answer; `before` is before `text`.

        With `start` it takes the place of the last answer. An error leaves everything as it was.
        """
        turns = self._state.turns if start is None else self._state.turns[:-1]
        cache, last_token = self._copy(start or before.cache), before.last_token
        progress = kwargs.pop("prompt_progress_callback", lambda done, total: None)
        read: list[RecurrentCache] = []

        def prompt_progress(done: int, total: int) -> None:
            if interrupted():
                raise _Interrupted
            if done == total - 1 and not self.uses_tools:  # which reads messages and results, each by itself
                read.extend(self._copy(cache))
            progress(done, total)

        answer: list[str] = []
        if self._assistant:
            self._assistant.recall(before.memory)
        try:
            with suppress(GeneratorExit):
                for response in self._responses(text, tokens, cache, prompt_progress, **kwargs):
                    answer.append(response.text)
                    last_token = response.token
                    yield response
                    if interrupted():
                        break
        except _Interrupted:
            return
        turn = Turn(text, before, read or before.cache, tokens[-1:], image)
        said = [_user(text, image), {"role": "assistant", "content": "".join(answer)}]
        memory = self._assistant.memory() if self._assistant else before.memory
        now = Point([*before.messages, *said], cache, last_token, memory)
        self._state = self._state._replace(now=now, turns=[*turns, turn][-UNDO_LIMIT:])

    def _responses(
        self,
        text: str,
        tokens: list[int],
        cache: list[RecurrentCache],
        progress: Callable[[int, int], None],
        **kwargs: Any,
    ) -> Iterator[GenerationResponse]:
        if self._protocol is None:
            yield from stream_generate(
                self.model,
                self.tokenizer,
                tokens,
                prompt_cache=cache,
                prompt_progress_callback=progress,
                **kwargs,
            )
            return
        if kwargs.get("stop") or kwargs.get("logits_processors"):
            raise PararnnError("this model ends its answers itself: stop and penalties are not taken")
        limit = kwargs.get("max_tokens", -1)
        check_max_tokens(limit)
        answer = {"answer": limit} if limit != -1 else {}
        events = stream_answer(
            self.model,
            self.tokenizer,
            text,
            functions=self.functions,
            limits=replace(kwargs.get("limits", Limits()), **answer),
            sampler=kwargs.get("sampler"),
            cache=cache,
            progress=progress,
            prefill_step_size=kwargs.get("prefill_step_size", PIECE),
        )
        message, begin = len(self._protocol.render_message(text)), time.perf_counter()
        for event in events:
            made = event.tokens - message
            yield ToolResponse(
                text=event.text if isinstance(event, Text) else "",
                token=self._protocol.end,  # what the state lacks when the turn is over
                logprobs=mx.array([]),
                from_draft=False,
                prompt_tokens=message,
                prompt_tps=0.0,
                generation_tokens=made,
                generation_tps=made / max(time.perf_counter() - begin, 1e-9),
                peak_memory=0.0,
                finish_reason=event.reason if isinstance(event, Finish) else None,
                event=event,
            )

    def _check_is_whole(self) -> None:
        if self.model.group is not None:
            raise PararnnError("no process has the whole state of this model: it is not saved or loaded")

    def _check_system(self, text: str | None) -> None:
        if text and not self.tokenizer.has_chat_template:
            raise PararnnError("this model's tokenizer has no chat template, so it can take no system prompt")

    def _last_turn(self) -> Turn:
        if not self._state.turns:
            raise PararnnError("there is no answer to go back from")
        return self._state.turns[-1]

    def _empty(self, system: str | None) -> _State:
        messages = [{"role": "system", "content": system}] if system else []
        return _State(system, Point(messages, self.model.make_cache(), None), [])

    def _copy(self, cache: list[RecurrentCache]) -> list[RecurrentCache]:
        """What is read on with while `cache` stays; it has the model's initial state, which no file has."""
        twins = self.model.make_cache()
        for twin, layer in zip(twins, cache, strict=True):
            twin.state = layer.state
        return twins

    def save(self, path: str | Path) -> Path:
        """Write the conversation, messages and current state, to one .safetensors file; returns its path.

        It is one of MLX-LM's prompt-cache files: `mlx_lm.generate --prompt-cache-file` goes on from it.

        Raises:
            PararnnError: it cannot be written, or the model is divided among processes.
        """
        self._check_is_whole()
        name = str(self.tokenizer.name_or_path)
        return write_conversation(path, self._state.now, self._state.turns, lambda: self._weights, name)

    def load(self, path: str | Path) -> None:
        """Go on from what `save` wrote, or from a prompt that MLX-LM's `cache_prompt` has read.

        Raises:
            OfAnotherModelError: it was saved with another model, as `read_again` may go on from.
            PararnnError: no such file, no saved state, or the model is divided among processes; nothing is
                changed then.
        """
        self._check_is_whole()
        model = str(self.tokenizer.name_or_path)
        now, turns = read_conversation(path, lambda: self._weights, model, self._fits)
        first = now.messages[0] if now.messages else {}
        system = first.get("content") if first.get("role") == "system" else None
        self._state = _State(system, now._replace(cache=self._copy(now.cache)), turns)

    def read_again(self, path: str | Path) -> int:
        """Go on from what `save` wrote with any model: its messages are read with the next question.

        Returns how many there are. Where the tokenizer has no chat template the system prompt is left out. A
        model that uses tools reads no earlier messages: of them it keeps the lists, timers and reminders.

        Raises:
            PararnnError: no such file, no saved conversation, or nothing in it that this model could read;
                nothing is changed then.
        """
        messages, memory = read_messages(path)
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        said = [message for message in messages if message["role"] != "system"]
        if any("image" in message for message in said) and self.images is None:
            raise PararnnError(f"{path}: this conversation has an image, and this model sees none")
        if self.uses_tools:
            if not memory:
                raise PararnnError(f"{path}: a model that uses tools reads no earlier messages")
            system, said = None, []
        self._state = self._told(system if self.tokenizer.has_chat_template else None, said, memory)
        return len(self.messages)

    def _fits(self, cache: list[RecurrentCache]) -> bool:
        """True if `cache` can be a state of this model; before the first word it has no arrays."""
        forms = form_of(self.model)
        return len(cache) == len(forms) and all(
            array is None or has_form(array, form)
            for layer, arrays in zip(cache, forms, strict=True)
            for array, form in zip(layer.cache, arrays, strict=True)
        )

    def _prompt(self, text: str, image: str | None) -> tuple[list[int], dict[str, Any]]:
        """The tokens to read before an answer, and what else `stream_generate` is told."""
        if self.uses_tools:
            return [], {}
        if image is None and not any("image" in message for message in self.messages):
            return encode(self.tokenizer, self._turn(text)), {}
        return self._turn_with_images(text, image)

    def _turn_with_images(self, text: str, image: str | None) -> tuple[list[int], dict[str, Any]]:
        """Tokens and embeddings of this turn, and of those before it that the state has not read."""
        if self.images is None:
            raise PararnnError("this conversation has an image, and the model was loaded without its images")
        check_text(text)
        unread = [*(self.messages if self.tokens == 0 else []), _user(text, image)]
        marked = [_marked(message) for message in unread]
        if not self.tokenizer.has_chat_template:
            whole = ("\n" if self.tokens else "") + without_template(marked)
        elif self.tokens == 0:
            whole = render(self.tokenizer, marked, tokenize=False)
        else:
            whole = self._rest(marked[0]["content"])
        pictures = [
            read_picture(from_base64(message["image"]), self.images.args.size)
            for message in unread
            if "image" in message
        ]
        prompt = lay_out(self.images.args, self.tokenizer, whole, pictures)
        tokens = self._without_end(prompt.tokens)
        given = embeddings(self.images, prompt.tokens, look(self.images, prompt))
        return tokens, {"input_embeddings": given[len(prompt.tokens) - len(tokens) :]}

    def _read_image(self, image: "Path | str | bytes | Image") -> str:
        if self.images is None or self.uses_tools:
            raise PararnnError("this model sees no images")
        return to_base64(read_picture(image, self.images.args.size))

    def _turn(self, text: str) -> str | list[int]:
        """What the model has to read before it answers `text`: this turn alone."""
        check_text(text)
        user = {"role": "user", "content": text}
        if not self.tokenizer.has_chat_template:
            if self.tokens:
                return self._encode(text)
            return "".join(message["content"] for message in self.messages) + text
        if self.tokens == 0:
            return list(render(self.tokenizer, [*self.messages, user]))
        return self._without_end(self._encode(self._rest(text)))

    def _rest(self, text: str) -> str:
        """What the chat template writes after what has been read."""
        user = {"role": "user", "content": text}
        said = [{"role": m["role"], "content": m["content"]} for m in self.messages[:-1]]
        history = [*said, {"role": "assistant", "content": _READ}, user]
        if not self.messages:  # cache_prompt stops inside the user's message, and MLX-LM goes on there
            history = [{"role": "user", "content": _READ + text}]
        rendered = render(self.tokenizer, history, tokenize=False)
        _, found, rest = rendered.rpartition(_READ)
        if not found:
            raise PararnnError(
                "this model's chat template leaves earlier answers out, so the conversation cannot go on "
                "from its state; /reset starts a new one"
            )
        return rest

    def _without_end(self, tokens: list[int]) -> list[int]:
        """Tokens without the one that ends the answer before them, where the model wrote that itself."""
        last = self._state.now.last_token
        ended = last in self.tokenizer.eos_token_ids and tokens[:1] == [last]
        return tokens[1:] if ended else tokens

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens


def _user(text: str, image: str | None) -> dict[str, str]:
    return {"role": "user", "content": text} | ({} if image is None else {"image": image})


def _marked(message: dict[str, str]) -> dict[str, str]:
    """A message as a template takes it, with a mark where its image stands: before the text."""
    mark = MARK if "image" in message else ""
    return {"role": message["role"], "content": mark + message["content"]}


class _Interrupted(Exception):
    """Raised inside MLX-LM's prompt loop, between two pieces, to leave it."""
