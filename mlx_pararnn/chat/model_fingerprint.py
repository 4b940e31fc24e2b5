"""What tells a model's states from another's."""

import hashlib
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np

from ..compute.module_arrays import named_arrays

FORMAT = "1"  # changes with what a state's arrays mean


def fingerprint(model: Any) -> str:
    """16 digits that differ where a model's configuration or one of its weights does."""
    digest = hashlib.sha256(f"{FORMAT} {_described(model.args)}".encode())
    for name, array in named_arrays(model.parameters()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()[:16]


def _described(args: Any) -> list[tuple[str, Any]]:
    """What a configuration says besides defaults: a later version's field changes nothing by itself."""
    given = [(field.name, getattr(args, field.name), field.default) for field in fields(args)]
    return sorted((name, value) for name, value, default in given if value != default)
