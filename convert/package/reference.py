"""reference.safetensors: a few tokens, the logits they must give, and the hash of the package's weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from mlx_pararnn.errors import PararnnError

from ..readers.forms import PACKAGE_FILE, PACKAGE_REFERENCE
from .description import MAX_CHUNK
from .package_digest import DIGEST, weights_digest

Array = npt.NDArray[Any]

TAIL = 8  # tokens of the reference that are decoded one by one


class Reference(NamedTuple):
    """What reference.safetensors says.

    Attributes:
        tokens: (n,) int32.
        logits: (m, V) float32, those after the last m tokens.
        yardstick: how far MLX's own logits in float16 were from `logits`, relative; None in a package of an
            earlier version, or where float16 gave no numbers.
        margins: (m,) float32, the farthest that a logit was off there; None with `yardstick`.
    """

    tokens: Array
    logits: Array
    yardstick: float | None = None
    margins: Array | None = None


def write_reference(
    folder: Path, package: Path, tokens: list[int], logits: Array, half: Array | None = None
) -> None:
    """Write it to `folder`.

    Args:
        logits: (m, V), those after the last m of `tokens`.
        half: the same as MLX gives them in float16, in float32; None for a package that computes in float32.
    """
    arrays = {"tokens": np.array(tokens, np.int32), "logits": logits.copy()}
    if half is not None and np.isfinite(half).all():
        arrays["yardstick"] = np.array(relative_difference(half, logits), np.float32)
        arrays["margins"] = np.abs(half - logits).max(-1)
    (folder / PACKAGE_REFERENCE).write_bytes(save(arrays, {DIGEST: weights_digest(package)}))


def checked_reference(folder: Path, package: Path, settings: Mapping[str, Any]) -> Reference:
    """What it says, once the package's weights are found to be those of the export.

    Args:
        settings: pararnn.json, from `checked_description`.

    Raises:
        PararnnError: it cannot be read or is not of this model, or the weights are others.
    """
    try:
        with safe_open(folder / PACKAGE_REFERENCE, "numpy") as reference:
            tokens, logits = reference.get_tensor("tokens"), reference.get_tensor("logits")
            names = reference.keys()
            half = [reference.get_tensor(name) for name in ("yardstick", "margins") if name in names]
            digest = (reference.metadata() or {}).get(DIGEST)
    except Exception as error:
        raise PararnnError(f"{folder / PACKAGE_REFERENCE}: cannot be read; export the model again") from error
    vocabulary = settings["vocab_size"]
    count, steps = tokens.size, settings.get("chunk") or 1
    if (
        tokens.shape != (count,)
        or tokens.dtype != np.int32
        or not steps <= count <= MAX_CHUNK + TAIL
        or not ((tokens >= 0) & (tokens < vocabulary)).all()
        or logits.shape != (count - steps + 1, vocabulary)
        or logits.dtype != np.float32
        or not np.isfinite(logits).all()
        or not logits.any()
        or not _fits(half, len(logits))
    ):
        raise PararnnError(
            f"{folder / PACKAGE_REFERENCE}: is not of the model that {PACKAGE_FILE} describes; export the "
            "model again"
        )
    if digest is not None and weights_digest(package) != digest:
        raise PararnnError(
            f"{package}: its weights are not those that were exported; copy it again, or export the model "
            "again"
        )
    if not half:
        return Reference(tokens, logits)
    return Reference(tokens, logits, float(half[0]), half[1])


def _fits(half: list[Array], count: int) -> bool:
    """Whether both or none of `yardstick` and `margins` are there, and are such."""
    shapes = [array.shape for array in half]
    return shapes == [] or (
        shapes == [(), (count,)]
        and all(a.dtype == np.float32 and np.isfinite(a).all() and (a >= 0).all() for a in half)
    )


def relative_difference(logits: Array, expected: Array) -> float:
    """||logits - expected|| / ||expected||; NaN where a logit is none."""
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
