"""Where a model is: a folder, or a repository of the Hugging Face hub, downloaded or in its client's cache.

Nothing here takes long to import: a wrong path is told before MLX is loaded.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PararnnError

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parents[1] / "pocket-model"  # what every command uses without a MODEL
COMPLETION = Path(__file__).parents[1] / "completion-model"  # what `complete` uses without one

SECONDS = 10.0  # to connect to the hub, and for each answer
SILENT_SECONDS = 0.5  # before it is said what is waited for

# What is fetched of a repository on the hub: never a Python file.
MODEL_FILES = ("*.json", "model*.safetensors", "images.safetensors", "*.model", "*.jinja", "*.txt")

CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth")  # how their names end

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def find_model(path_or_hf_repo: str | Path) -> Path:
    """The local folder of a model; a hub repository is downloaded, or found in the hub's cache.

    Raises:
        PararnnError: neither a folder nor a reachable repository.
    """
    path = Path(path_or_hf_repo)
    if path.is_file():
        advice = "give one that mlx-pararnn convert wrote"
        if path.suffix in (*CHECKPOINTS, ".ckpt"):
            advice = f"convert it first: mlx-pararnn convert {path} -o OUT"
        raise PararnnError(f"{path} is a file, not a model folder; {advice}")
    if path.is_dir():
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            raise PararnnError(
                f"{os.fsencode(path)!r}: a folder in this path has a name that is not UTF-8, and MLX loads "
                "nothing from there; rename it"
            ) from None
        return path
    name = str(path_or_hf_repo)
    if not is_hub_name(name, with_owner=True):
        raise PararnnError(
            f"no such model folder: {name}; give one that mlx-pararnn convert wrote, or owner/name on the "
            "Hugging Face hub"
        )
    return download(name, MODEL_FILES, "pass a folder that mlx-pararnn convert wrote")


def is_hub_name(name: str, with_owner: bool = False) -> bool:
    """Whether `name` can be a repository's: owner/name, or a bare name unless `with_owner`."""
    return bool(_NAME.fullmatch(name)) and ("/" in name or not with_owner)


def download(name: str, patterns: Sequence[str], advice: str) -> Path:
    """The local folder with those files of the repository `name` that match `patterns`.

    Args:
        name: one that `is_hub_name` takes.
        advice: what else the user could pass, for messages.

    Raises:
        PararnnError: there is no such repository, it asks for a login, or it cannot be reached.
    """
    from huggingface_hub import get_session, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        _limit_waiting(get_session())
        with _told_if_slow(f"looking for {name} on Hugging Face"):
            return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise PararnnError(
            f"{name}: this Hugging Face repository asks for a login; run: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise PararnnError(
            f"{name}: neither a folder here nor a repository on Hugging Face; {advice}"
        ) from error
    except Exception as error:  # the hub client lets its HTTP library's own exceptions through
        raise PararnnError(
            f"{name}: not a folder here, and Hugging Face could not be reached; "
            f"check the name and the network, or {advice}"
        ) from error


@contextmanager
def _told_if_slow(what: str) -> Iterator[None]:
    timer = threading.Timer(SILENT_SECONDS, logger.info, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _limit_waiting(session: Any) -> None:
    """Let no request of the hub client (an httpx.Client) wait without end, as it does by default."""
    hooks = session.event_hooks
    if _set_timeout not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _set_timeout]}


def _set_timeout(request: Any) -> None:
    given = request.extensions.get("timeout") or {}
    kinds = ("connect", "read", "write", "pool")
    limits = {kind: SECONDS if given.get(kind) is None else given[kind] for kind in kinds}
    request.extensions = {**request.extensions, "timeout": limits}
