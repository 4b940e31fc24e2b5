"""Repositories of the Hugging Face hub: downloaded, or found in the hub client's own cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import PararnnError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
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
            f"{name}: not a folder here, and Hugging Face could not be reached ({type(error).__name__}); "
            f"check the name and the network, or {advice}"
        ) from error
