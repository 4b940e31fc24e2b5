"""A conversation whose whole memory is the recurrent state: history is never read again."""

import hashlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors import SafetensorError, safe_open

from .cache import RecurrentCache
from .errors import PararnnError
from .generation import check_text, stream_generate
from .model import Model

# Stands for the last answer when the chat template is asked what comes after one.
_ANSWER = "\ue000answer\ue001"


class Chat:
    """A talk with a model: `respond` streams an answer, the state goes on from turn to turn.

    With a chat template each turn is rendered by it; without one the text is fed as it is typed.

    Attributes:
        messages: the talk so far, as chat templates want it: role and content.
        cache: the state after everything read and said.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper, system: str | None = None) -> None:
        if system and not tokenizer.has_chat_template:
            raise PararnnError("this model's tokenizer has no chat template, so it can take no system prompt")
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget the talk."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.cache = self.model.make_cache()
        self._last_token: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the state, which does not depend on how long the talk is."""
        return sum(c.nbytes for c in self.cache)

    @property
    def tokens(self) -> int:
        """Tokens read and generated so far."""
        return self.cache[0].offset

    def respond(
        self, text: str, *, interrupted: Callable[[], bool] = lambda: False, **kwargs: Any
    ) -> Generator[GenerationResponse, None, None]:
        """Stream the answer to `text`.

        Leaving the generator early, by `interrupted` turning true or by not asking for more, keeps what has
        been said. Left while the prompt is still being read, the talk is as if nothing had been asked.

        Args:
            text: what the user says.
            interrupted: asked after each token and each piece of the prompt.
            kwargs: for `stream_generate`: max_tokens, sampler, stop, ...
        """
        last_token = self._last_token
        before = [RecurrentCache.from_state(c.state) for c in self.cache]
        progress = kwargs.pop("prompt_progress_callback", lambda done, total: None)

        def prompt_progress(done: int, total: int) -> None:
            if interrupted():
                raise _Interrupted
            progress(done, total)

        answer: list[str] = []
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                self._turn(text),
                prompt_cache=self.cache,
                prompt_progress_callback=prompt_progress,
                **kwargs,
            ):
                answer.append(response.text)
                self._last_token = response.token
                yield response
                if interrupted():
                    break
        except GeneratorExit:
            pass
        except BaseException as error:
            # A layer may have read more than another: only the state before this turn is sound.
            self.cache, self._last_token = before, last_token
            if isinstance(error, _Interrupted):
                return
            raise
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "".join(answer)},
        ]

    def save(self, path: str | Path) -> Path:
        """Write the talk to one file: MLX-LM's prompt-cache format, .safetensors; returns its path."""
        path = _with_suffix(path)
        if path.exists() and not _is_talk(path):
            raise PararnnError(f"{path} exists and is not a saved talk; choose another name")
        mx.eval([c.cache for c in self.cache])
        metadata = {
            "model": _fingerprint(self.model),
            "messages": json.dumps(self.messages),
            "last_token": json.dumps(self._last_token),
        }
        if not path.parent.is_dir():
            raise PararnnError(f"no such folder: {path.parent}")
        partial = path.with_name(f".{path.stem}-{os.getpid()}.safetensors")
        try:
            save_prompt_cache(str(partial), self.cache, metadata)
            os.replace(partial, path)
        except RuntimeError as error:  # what MLX raises where a file cannot be written
            raise PararnnError(f"cannot write {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    def load(self, path: str | Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            PararnnError: no such file, not a saved talk, or one of another model. The talk is then unchanged.
        """
        given, path = Path(path).expanduser(), _with_suffix(path)
        if not path.is_file():
            reason = " (a saved talk's name ends in .safetensors)" if given.is_file() else ""
            raise PararnnError(f"no such file: {path}{reason}")
        try:
            cache, metadata = load_prompt_cache(str(path), return_metadata=True)
            messages, last_token = json.loads(metadata["messages"]), json.loads(metadata["last_token"])
            whole = _is_whole(cache, messages, last_token)
        except Exception as error:  # whatever a file that is something else leads the reader to
            raise PararnnError(f"{path} is not a talk saved by /save") from error
        if metadata.get("model") != _fingerprint(self.model):
            raise PararnnError(f"{path} was saved with another model; load that model to go on with it")
        if not whole or not self._fits(cache):
            raise PararnnError(f"{path} is damaged: its state is not one that this model makes")
        self.cache, self.messages, self._last_token = cache, messages, last_token

    def _fits(self, cache: list[RecurrentCache]) -> bool:
        """True if `cache` has the shapes and types of a state of this model, and holds numbers only."""
        like = self.model.make_cache()
        self.model(mx.array([[0]]), cache=like)
        return len(cache) == len(like) and all(
            _same_form(a, b)
            for mine, c in zip(like, cache, strict=True)
            for a, b in zip(mine.cache, c.cache, strict=True)
        )

    def _turn(self, text: str) -> str | list[int]:
        """What the model has to read before it answers `text`: this turn alone."""
        check_text(text)
        user = {"role": "user", "content": text}
        if not self.tokenizer.has_chat_template:
            return text if self.tokens == 0 else self._encode(text)
        if self.tokens == 0:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [*self.messages, user], add_generation_prompt=True
            )
            return ids
        history = [*self.messages[:-1], {"role": "assistant", "content": _ANSWER}]
        rendered = self.tokenizer.apply_chat_template(
            [*history, user], add_generation_prompt=True, tokenize=False
        )
        _, found, rest = rendered.rpartition(_ANSWER)
        if not found:
            raise PararnnError(
                "this model's chat template leaves earlier answers out, so the talk cannot go on from its "
                "state; /reset starts a new one"
            )
        tokens = self._encode(rest)
        if self._last_token in self.tokenizer.eos_token_ids and tokens[:1] == [self._last_token]:
            tokens = tokens[1:]  # the model ended its turn itself
        return tokens

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens


class _Interrupted(Exception):
    """Raised inside MLX-LM's prompt loop, between two pieces, to leave it."""


def _is_whole(cache: list[Any], messages: Any, last_token: Any) -> bool:
    """True if all but the arrays of a saved talk is of the kind that `save` writes."""
    return (
        all(isinstance(c, RecurrentCache) and c.finalized and len(c.offsets) == 1 for c in cache)
        and all(isinstance(c.offset, int) and c.offset >= 0 for c in cache)
        and isinstance(messages, list)
        and all(isinstance(m, dict) and all(isinstance(v, str) for v in m.values()) for m in messages)
        and (last_token is None or isinstance(last_token, int))
    )


def _same_form(a: mx.array | None, b: Any) -> bool:
    """`b` may be missing: a talk saved before its first word."""
    if a is None or b is None:
        return b is None
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bool(mx.isfinite(b).all().item())


def _is_talk(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return any(key.endswith(".last_token") for key in metadata)


def _with_suffix(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.name or path.is_dir():
        raise PararnnError(f"{path} is a folder; give a file name")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _fingerprint(model: Model) -> str:
    """Tells models apart by their arguments and small weights: norms and recurrent weights of all layers."""
    digest = hashlib.sha256(json.dumps(vars(model.args), sort_keys=True).encode())
    weights = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    for name, weight in weights:
        if name.endswith(("norm.weight", "recurrent_weight")):
            digest.update(np.array(weight.astype(mx.float32)).tobytes())
    return digest.hexdigest()
