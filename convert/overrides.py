"""`--config FILE`: what a user says about the model, laid over what the tensors say."""

import math
from pathlib import Path
from typing import Any

from mlx_pararnn.cells import get_cell
from mlx_pararnn.errors import PararnnError

from .readers.checkpoint import Checkpoint
from .readers.forms import read_json_object
from .readers.wording import listed, shown
from .writers.tokenizer import is_token_ids

# What the tensors alone decide: naming it is allowed, contradicting them is an error.
_FROM_TENSORS = (
    "cell", "hidden_size", "input_size", "num_hidden_layers", "vocab_size", "num_heads", "intermediate_size",
    "mixer", "conv_kernel", "norm", "mlp", "mlp_bias", "residual_scale", "max_position_embeddings",
)  # fmt: skip
_FREE = ("norm_eps", "mlp_residual", "tie_word_embeddings", "activations", "eos_token_id", "bos_token_id")
# Of a source's config.json: the rest are partly placeholders for other tools.
_FROM_SOURCE = ("hidden_size", "num_hidden_layers", "vocab_size")
FIELDS = ("model_type", *_FROM_TENSORS, *_FREE)


def read_overrides(path: Path | None) -> dict[str, Any]:
    """The fields of the JSON file at `path`; empty without one.

    Raises:
        PararnnError: no such file, not a JSON object, an unknown field or a value of the wrong kind.
    """
    if path is None:
        return {}
    fields = read_json_object(path)
    if fields is None:
        raise PararnnError(f"{path}: no such file (--config takes a JSON file of model fields)")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise PararnnError(f"{path}: unknown fields: {listed(unknown)}; known: {', '.join(FIELDS)}")
    for name, value in fields.items():
        if not _fits(name, value):
            raise PararnnError(f"{path}: {name} cannot be {shown(repr(value))}")
    return fields


def apply_overrides(
    args: dict[str, Any], model_type: str, overrides: dict[str, Any], where: str
) -> dict[str, Any]:
    """`args` with the free fields of `overrides` laid over them.

    Raises:
        PararnnError: an override contradicts what the tensors' names and shapes say.
    """
    if overrides.get("model_type", model_type) != model_type:
        raise PararnnError(
            f"--config says model_type {overrides['model_type']!r}, but {where} is a {model_type!r}"
        )
    for name in _FROM_TENSORS:
        if name in overrides and overrides[name] != args.get(name):
            raise PararnnError(
                f"--config says {name} is {overrides[name]!r}, but the tensors in {where} say "
                f"{args.get(name)!r}"
            )
    free = {name: value for name, value in overrides.items() if name in _FREE}
    if model_type == "pararnn_cell":
        free = {name: value for name, value in free.items() if name == "activations"}
    if free.get("activations"):
        get_cell(args["cell"], free["activations"])  # raises for what the cell does not know
    return args | free


def check_source_config(checkpoint: Checkpoint, args: dict[str, Any]) -> None:
    """Raise where the source's own config.json contradicts the tensors: one of them is another model's."""
    for name in _FROM_SOURCE:
        said = (checkpoint.config or {}).get(name)
        if type(said) is int and name in args and said != args[name]:
            raise PararnnError(
                f"{checkpoint.folder / 'config.json'}: it says {name} is {said}, but the tensors in "
                f"{checkpoint.path} say {args[name]}; put the model's own config.json there"
            )


def _fits(name: str, value: Any) -> bool:
    if name == "norm_eps":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    if name in ("mlp_residual", "tie_word_embeddings"):
        return isinstance(value, bool)
    if name == "activations":
        return value is None or (
            isinstance(value, dict) and all(isinstance(activation, str) for activation in value.values())
        )
    if name in ("eos_token_id", "bos_token_id"):
        return is_token_ids(value)
    return True
