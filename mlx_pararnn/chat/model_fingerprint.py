"""What tells a model's states from another's: its fingerprint, and the form of its arrays."""

import hashlib
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import Kept
from ..compute.module_arrays import named_arrays

FORMAT = "1"  # changes with what a state's arrays mean


def fingerprint(model: Any) -> str:
    """16 digits that differ where a model's configuration or one of its weights does."""
    digest = hashlib.sha256(f"{FORMAT} {_described(model.args)}".encode())
    for name, array in named_arrays(model.parameters()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()[:16]


def form_of(model: Any) -> list[Kept]:
    """Each layer's arrays after a token, (state, window): all its states have their shapes and types."""
    cache = model.make_cache()
    model(mx.array([[0]]), cache=cache)
    return [(layer.cache[0], layer.cache[1]) for layer in cache]


def has_form(array: Any, form: mx.array | None) -> bool:
    """Whether a state's array has the shape and type of `form`, and holds numbers only."""
    if array is None or form is None:
        return array is form
    return (array.shape, array.dtype) == (form.shape, form.dtype) and bool(mx.isfinite(array).all().item())


def _described(args: Any) -> list[tuple[str, Any]]:
    """What a configuration says besides defaults: a later version's field changes nothing by itself."""
    given = [(field.name, getattr(args, field.name), field.default) for field in fields(args)]
    return sorted((name, value) for name, value, default in given if value != default)
