"""reference.safetensors: a few tokens, the logits they must give, and the hash of the package's weights."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from mlx_pararnn.errors import PararnnError

from ..readers.forms import PACKAGE_REFERENCE
from .package_digest import DIGEST, weights_digest

Array = npt.NDArray[Any]


def write_reference(folder: Path, package: Path, tokens: list[int], logits: Array) -> None:
    """Write it to `folder`; `logits` (m, V) are those after the last m of `tokens`."""
    arrays = {"tokens": np.array(tokens, np.int32), "logits": logits.copy()}
    (folder / PACKAGE_REFERENCE).write_bytes(save(arrays, {DIGEST: weights_digest(package)}))


def checked_reference(folder: Path, package: Path) -> tuple[Array, Array]:
    """Its tokens (n,) and logits (m, V), once the package's weights are found to be those of the export.

    Raises:
        PararnnError: it cannot be read, or the weights are others.
    """
    try:
        with safe_open(folder / PACKAGE_REFERENCE, "numpy") as reference:
            tokens, logits = reference.get_tensor("tokens"), reference.get_tensor("logits")
            digest = (reference.metadata() or {}).get(DIGEST)
    except Exception as error:
        raise PararnnError(f"{folder / PACKAGE_REFERENCE}: cannot be read; export the model again") from error
    if digest is not None and weights_digest(package) != digest:
        raise PararnnError(
            f"{package}: its weights are not those that were exported; copy it again, or export the model "
            "again"
        )
    return tokens, logits
