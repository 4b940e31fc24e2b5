"""The prompt cache in a folder, so that a server that starts again goes on where another stopped."""

import hashlib
import logging
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import Kept, RecurrentCache
from ..errors import PararnnError
from ..files.model_files import check_safetensors
from .model_fingerprint import fingerprint, form_of, has_form
from .prompt_cache import SPACING, PromptCache

logger = logging.getLogger(__name__)

NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{32})\.safetensors")  # model, contents
SECONDS = 1.0  # between two files while there is other work


class SavedPromptCache(PromptCache):
    """A prompt cache whose states are written to a folder too, a file each, snapshots included.

    A file's name holds the model's fingerprint and a hash of the contents: a file of another model is left
    alone, a damaged one is dropped with a warning. What is evicted is deleted. Together the files of all
    models take no more than `max_bytes`; those not used for longest go first, whichever model they are of.

    Args:
        folder: made where it is missing; nobody else can read it.
        max_size, max_bytes: as in memory.

    Raises:
        PararnnError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, max_size: int, max_bytes: int) -> None:
        super().__init__(max_size, max_bytes)
        self._folder = folder
        self._model = ""
        self._files: dict[Any, Path] = {}
        self._unsaved: dict[Any, None] = {}
        self._saved_at = 0.0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PararnnError(
                f"the folder for states cannot be made: {folder} ({error.strerror})"
            ) from error
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PararnnError(f"the folder for states cannot be written to: {folder}")

    def open(self, model: Any) -> None:
        """Read what was saved for this model; called once, before any other use."""
        self._model, forms = fingerprint(model), form_of(model)
        for rest in self._folder.glob(".*.safetensors"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)
        self._trim_folder()
        for path in self._found():
            match = NAME.fullmatch(path.name)
            if match is None or match[1] != self._model:
                continue
            try:
                tokens, states = _read(path, match[2], forms)
            except Exception as error:  # whatever a damaged file leads to
                logger.warning("a saved state cannot be used and is dropped: %s (%s)", path.name, error)
                path.unlink(missing_ok=True)
                continue
            key = "", tokens.tobytes()
            if key in self._states:  # two servers wrote the same text; what was used last stays
                self._drop(key)
            self._files[key] = path
            super()._store(key, states)

    def save_some(self, busy: bool = False) -> bool:
        """Write a state that is not in the folder yet; False if there is none, or it is too soon if busy."""
        if not self._unsaved or (busy and time.monotonic() < self._saved_at + SECONDS):
            return False
        key = next(iter(self._unsaved))
        del self._unsaved[key]
        try:
            self._files[key] = _write(self._folder, self._model, key[1], self._states[key])
            self._trim_folder()
        except (OSError, RuntimeError) as error:
            logger.warning("a state cannot be saved in %s (%s)", self._folder, error)
        self._saved_at = time.monotonic()
        return True

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        """As `PromptCache`'s; the file of the state that is found counts as used last."""
        found = super().fetch_nearest_cache(model, tokens)
        if found[0] is not None:
            path = self._files.get(next(reversed(self._states)))
            if path is not None and path.exists():
                os.utime(path)  # used last
        return found

    def _store(self, key: Any, states: list[RecurrentCache]) -> None:
        self._unsaved[key] = None
        super()._store(key, states)

    def _drop(self, key: Any) -> None:
        super()._drop(key)
        self._unsaved.pop(key, None)
        path = self._files.pop(key, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def _found(self) -> list[Path]:
        """All files, what was used last at the end; no folders, pipes or devices of such a name."""
        times = []
        for path in self._folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except OSError:  # another server's, just now evicted; a link to nothing
                continue
            if stat.S_ISREG(status.st_mode):
                times.append((status.st_mtime_ns, path))
        return [path for _, path in sorted(times)]

    def _trim_folder(self) -> None:
        paths = self._found()
        sizes = [path.stat().st_size for path in paths]
        excess = sum(sizes) - self.max_bytes
        for path, size in zip(paths, sizes, strict=True):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _write(folder: Path, model: str, tokens: bytes, states: list[RecurrentCache]) -> Path:
    """One file with a state and its snapshots, whole or not at all."""
    text = np.frombuffer(tokens, np.int32)
    arrays = {"tokens": mx.array(text)}
    for n, layer in enumerate(states):
        places = {**layer.kept[0], len(text): tuple(layer.cache)}
        for position, parts in places.items():
            for part, array in zip(("state", "window"), parts, strict=True):
                if array is not None:
                    arrays[f"{n}.{position}.{part}"] = array
    rest = folder / f".{os.getpid()}.safetensors"
    try:
        rest.touch(mode=0o600)
        mx.save_safetensors(str(rest), arrays)
        path = folder / f"{model}-{_hash(rest)}.safetensors"
        os.replace(rest, path)
    except BaseException:
        with suppress(OSError):
            rest.unlink()
        raise
    return path


def _read(path: Path, contents: str, forms: list[Kept]) -> tuple[np.ndarray, list[RecurrentCache]]:
    """The tokens (T,) and the states that have read them; raises where they are not of `forms`."""
    check_safetensors(path)
    if _hash(path) != contents:
        raise ValueError("its contents are not what they were")
    arrays: dict[str, mx.array] = dict(mx.load(str(path)))  # type: ignore[arg-type]
    mx.eval(list(arrays.values()))
    tokens = np.array(arrays.pop("tokens"))
    layers: dict[int, dict[int, Kept]] = {}
    for name, state in arrays.items():
        n, position, part = name.split(".")
        if part == "state":
            window = arrays.get(f"{n}.{position}.window")
            layers.setdefault(int(n), {})[int(position)] = state, window
    positions = [*layers.get(0, {})]
    if (tokens.ndim, tokens.dtype) != (1, np.int32) or len(tokens) not in positions or min(positions) < 1:
        raise ValueError("its tokens are not those of a state")
    if len(layers) != len(forms) or any(layer.keys() != layers[0].keys() for layer in layers.values()):
        raise ValueError("its layers are not those of the model")
    states = []
    for number, form in enumerate(forms):
        if not all(
            has_form(a, b) for kept in layers[number].values() for a, b in zip(kept, form, strict=True)
        ):
            raise ValueError("its arrays are not those of a state of the model")
        layer = RecurrentCache()
        layer.cache = list(layers[number][len(tokens)])
        layer.offsets, layer.kept, layer.spacing = [len(tokens)], [layers[number]], SPACING
        states.append(layer)
    return tokens, states


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
