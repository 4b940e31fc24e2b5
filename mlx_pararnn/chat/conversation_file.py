"""A conversation in a file: one of MLX-LM's prompt-cache files, with more beside it."""

import glob
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from safetensors import SafetensorError, safe_open

from ..cache import RecurrentCache
from ..errors import PararnnError
from ..files.model_files import check_safetensors
from ..files.whole_file import to_disk
from ..pocket.assistant import Assistant

# So many answers of a loaded conversation can be undone; each adds a state to the file.
SAVED_UNDO_LIMIT = 8


class OfAnotherModelError(PararnnError):
    """A conversation was saved with another model: its state is of no use, its messages may be."""


class Point(NamedTuple):
    """A moment of a conversation."""

    messages: list[dict[str, str]]
    cache: list[RecurrentCache]
    last_token: int | None
    memory: str = ""  # what the assistant of the model that ships remembers


class Turn(NamedTuple):
    """A question that was answered: the moment before it, and a state with the tokens to read from there.

    Of a loaded conversation there is no such state, and the question is read from the moment before it.
    """

    text: str
    before: Point
    cache: list[RecurrentCache] | None = None
    tokens: list[int] | None = None
    image: str | None = None


def write_conversation(
    path: str | Path, now: Point, turns: list[Turn], weights: Callable[[], str], model: str
) -> Path:
    """Write a conversation, with the last of its turns, to one .safetensors file; returns its path.

    Args:
        weights: gives the fingerprint of the model's weights.
        model: the model's name or path.

    Raises:
        PararnnError: the file cannot be written, or is there and is something else.
    """
    path = saved_path(path)
    if path.exists() and not _is_conversation(path):
        raise PararnnError(f"{path} exists and is not a saved conversation; choose another name")
    mx.eval([c.cache for c in now.cache])
    turns = turns[-SAVED_UNDO_LIMIT:]
    metadata = {
        "model": model,  # this and the next for MLX-LM
        "tokenizer_config": "{}",
        "weights": weights(),
        "messages": json.dumps(now.messages),
        "last_token": json.dumps(now.last_token),
        "memory": now.memory,
        "turns": json.dumps([_described(turn) for turn in turns]),
    }
    if not path.parent.is_dir():
        raise PararnnError(f"no such folder: {path.parent}")
    partial = path.with_name(f".{path.stem}-{os.getpid()}.safetensors")
    try:
        _delete_left_overs(path)
        save_prompt_cache(str(partial), now.cache, metadata)
        _add_states(partial, [t.before.cache for t in turns])
        to_disk(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # the second is MLX's
        raise PararnnError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):  # it is not there, or nothing can be changed there any more
            partial.unlink()
    return path


def read_conversation(
    path: str | Path,
    weights: Callable[[], str],
    model: str,
    fits: Callable[[list[RecurrentCache]], bool],
) -> tuple[Point, list[Turn]]:
    """What `write_conversation` wrote, or a prompt that MLX-LM's `cache_prompt` has read; and its turns.

    Args:
        weights, model: as for `write_conversation`, of the model that is to go on.
        fits: whether a state is one that this model makes.

    Raises:
        OfAnotherModelError: it was saved with another model.
        PararnnError: no such file, or no saved state.
    """
    path = _existing(path)
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        messages = json.loads(metadata.get("messages", "[]"))
        last_token, memory = json.loads(metadata.get("last_token", "null")), metadata.get("memory", "")
        now = Point(messages, cache, last_token, memory)
        turns = _saved_turns(path, metadata, messages, len(cache))
        if "weights" in metadata:
            same = metadata["weights"] == weights()
        else:  # by cache_prompt, which notes the model's name
            same = _same_model(metadata["model"], model)
    except Exception as error:  # whatever a file that is something else leads the reader to
        raise _no_conversation(path) from error
    if not same:
        raise OfAnotherModelError(
            f"{path} was saved with another model; load that model to go on with it, or have this one read "
            "its messages (/load in a terminal asks; in Python Chat.read_again)"
        )
    try:
        sound = all(_is_whole(p) and fits(p.cache) for p in (now, *(turn.before for turn in turns)))
        sound = sound and all(isinstance(turn.text, str) for turn in turns)
    except Exception:  # what stands in the place of a state may be anything
        sound = False
    if not sound:
        raise PararnnError(f"{path} is damaged: its state is not one that this model makes")
    return now, turns


def read_messages(path: str | Path) -> tuple[list[dict[str, str]], str]:
    """The messages of a conversation that was saved with any model, and what its assistant remembers.

    Raises:
        PararnnError: no such file, or no saved conversation.
    """
    path = _existing(path)
    try:
        metadata = load_prompt_cache(str(path), return_metadata=True)[1]
        messages, memory = json.loads(metadata["messages"]), metadata.get("memory", "")
        sound = _are_messages(messages) and _is_memory(memory)
    except Exception:  # whatever a file that is something else leads the reader to
        sound = False
    if not sound:
        raise _no_conversation(path)
    return messages, memory


def _existing(path: str | Path) -> Path:
    """The file of that name; raises PararnnError where there is none that could be a saved conversation."""
    given, path = Path(path).expanduser(), saved_path(path)
    if not path.is_file():
        reason = " (a saved conversation's name ends in .safetensors)" if given.is_file() else ""
        raise PararnnError(f"no such file: {path}{reason}")
    check_safetensors(path)
    try:
        _check_keys(path)
    except Exception as error:  # of safetensors, or of a key
        raise _no_conversation(path) from error
    return path


def saved_path(path: str | Path) -> Path:
    """The file that `Chat.save` writes for a name: it ends in .safetensors."""
    path = Path(path).expanduser()
    if not path.name or path.is_dir():
        raise PararnnError(f"{path} is a folder; give a file name")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _no_conversation(path: Path) -> PararnnError:
    return PararnnError(
        f"{path} is not a conversation saved by /save, nor a prompt cache that MLX-LM wrote for this model"
    )


def _delete_left_overs(path: Path) -> None:
    """Of processes that were killed while they saved to `path`."""
    for partial in path.parent.glob(f".{glob.escape(path.stem)}-*.safetensors"):
        process = partial.stem.rpartition("-")[2]
        if process.isdecimal():
            try:
                os.kill(int(process), 0)
            except (ProcessLookupError, OverflowError):
                partial.unlink(missing_ok=True)
            except PermissionError:  # another user's, alive
                pass


def _check_keys(path: Path) -> None:
    """Raise for keys that MLX would unfold into lists of any length: a number in a key is an index."""
    with safe_open(path, "numpy") as file:
        keys = [*file.keys(), *(file.metadata() or {})]
    for key in keys:
        parts = key.split(".")
        indices = [part for part in parts if part.isdigit()]
        if len(parts) > 8 or any(len(index) > 9 or int(index) > max(len(keys), 64) for index in indices):
            raise ValueError(f"the key {key[:40]!r} is not one of a saved state")


def _add_states(file: Path, states: list[list[RecurrentCache]]) -> None:
    """Write earlier states into a file of MLX-LM's, after the layers of which MLX-LM reads."""
    if not states:
        return
    arrays, metadata = cast(
        tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True)
    )
    mx.eval(arrays)  # MLX reads when a number is asked for, and the file is written anew
    layers = len(states[0])
    for i, state in enumerate(states, 1):
        for j, layer in enumerate(state):
            for k, array in enumerate(layer.cache):
                if array is not None:
                    arrays[f"{layers * i + j}.0.{k}"] = array
    mx.save_safetensors(str(file), arrays, metadata)


def _described(turn: Turn) -> list[Any]:
    """What a file says of a turn; the state before it stands among the arrays."""
    before = turn.before
    return [turn.text, len(before.messages), before.cache[0].offset, before.last_token, before.memory]


def _saved_turns(
    file: Path, metadata: dict[str, str], messages: list[dict[str, str]], layers: int
) -> list[Turn]:
    """The turns that a file's conversation can go back from."""
    arrays = cast(dict[str, mx.array], mx.load(str(file)))
    found = []
    for i, turn in enumerate(json.loads(metadata.get("turns", "[]")), 1):
        text, said, offset, last_token, *memory = turn  # an older file lacks it
        names = [[f"{layers * i + j}.0.{k}" for k in range(2)] for j in range(layers)]
        cache = [
            RecurrentCache.from_state(([arrays.get(name) for name in pair], [offset], None, None))
            for pair in names
        ]
        image = messages[said].get("image")
        found.append(Turn(text, Point(messages[:said], cache, last_token, *memory), image=image))
    return found


def _is_whole(point: Point) -> bool:
    """True if all but the arrays of a saved conversation is of the kind that is written."""
    messages: Any = point.messages
    cache, last_token = point.cache, point.last_token
    return (
        all(isinstance(c, RecurrentCache) and c.finalized and len(c.offsets) == 1 for c in cache)
        and all(isinstance(c.offset, int) and c.offset >= 0 for c in cache)
        and _are_messages(messages)
        and (last_token is None or isinstance(last_token, int))
        and _is_memory(point.memory)
    )


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
        and all(isinstance(value, str) for message in messages for value in message.values())
    )


def _is_memory(memory: str) -> bool:
    """Whether an assistant can remember it; raises ValueError where not."""
    Assistant().recall(memory)
    return True


def _is_conversation(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return any(key.endswith(".last_token") for key in metadata)


def _same_model(a: str, b: str) -> bool:
    """Whether two names mean one folder, or a repository and the hub's folder for it."""
    as_folder = f"models--{a.replace('/', '--')}"
    return a == b or Path(a).resolve() == Path(b).resolve() or as_folder in Path(b).parts
