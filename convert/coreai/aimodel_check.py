"""Does an .aimodel give here what MLX gave when it was exported? `mlx-pararnn verify OUT`."""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.tools.verification import Check

from ..package.description import checked_description
from ..package.reference import checked_reference, relative_difference
from ..readers.forms import COREAI, PACKAGE_FILE, check_package_files, read_json_object
from .require_coreai import require_coreai
from .runtime import Runner

# ||logits - MLX's|| / ||MLX's|| of a package that computes in float32.
TOLERANCE = 2e-4
_ELEMENTWISE = 32  # about so many operations on single numbers, one after the other, in a layer


def verify_package(folder: Path) -> Iterator[Check]:
    """The reference text read by prefill and decode, and by decode alone, against MLX's logits.

    Raises:
        PararnnError: the folder is not whole, or coreai-core is not installed.
    """
    settings = _checked_settings(folder)
    require_coreai()
    tokens, logits, *_ = checked_reference(folder, folder / COREAI.name, settings)
    chunk = settings.get("chunk") or 0
    half = "float16" in (settings["precision"], settings["states"][0]["dtype"])
    tolerance = float16_bound(settings) if half else TOLERANCE
    with Runner(folder / COREAI.name, settings) as runner:
        answers = [runner.call("decode", token) for token in tokens[:, None]][-len(logits) :]
        yield _check("decode", answers, logits, tolerance)
        if chunk:
            runner.reset()
            answers = [runner.call("prefill", tokens[:chunk])]
            answers += [runner.call("decode", token) for token in tokens[chunk:, None]]
            yield _check("prefill, then decode", answers, logits, tolerance)


def float16_bound(settings: Mapping[str, Any]) -> float:
    """How far logits may be from float32's where float16 is computed in: ||difference|| / ||logits||.

    The runtime adds the terms of a product one by one in float16, and each sum is off by up to half a unit
    of its last place, 2^-11 of it, to either side: n of them by about sqrt(n) times that. n counts what a
    number goes through in a layer. Layers that add to their input average their errors as they do their
    numbers; those that replace it (mlp_residual false) hand theirs on.
    """
    hidden = settings["hidden_size"]
    layer = 4 * hidden + (settings["intermediate_size"] or 0) + _ELEMENTWISE
    layers = 1 if settings["mlp_residual"] else settings["num_hidden_layers"]
    return float(2**-11 * math.sqrt(layers * layer + hidden))


def unseen() -> str:
    """What `verify_package` cannot show on this machine; "" where there is nothing."""
    if platform.system() == "Darwin":
        return "The GPU and the Neural Engine were not asked for."
    return "Core AI's CPU runtime for Linux ran it; Apple's hardware was not asked."


def _check(name: str, answers: list[Any], expected: Any, tolerance: float) -> Check:
    ours = np.stack(answers).astype(np.float32)
    same = int((ours.argmax(-1) == expected.argmax(-1)).sum())
    difference = relative_difference(ours, expected)
    note = f"{same} of {len(answers)} likeliest tokens equal"
    return Check(f"{name} against MLX in float32, relative", difference, tolerance, note)


def _checked_settings(folder: Path) -> dict[str, Any]:
    """pararnn.json, once the package has been found to say the same of itself."""
    check_package_files(folder)
    settings = checked_description(folder, COREAI)
    package = folder / COREAI.name
    about = read_json_object(package / "metadata.json") or {}
    try:
        inside = json.loads(about["creatorDefinedMetadata"]["pararnn"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PararnnError(f"{package}: is no whole Core AI package; export the model again") from error
    if inside != settings:
        raise PararnnError(f"{package}: is not the package that {PACKAGE_FILE} describes; export again")
    return settings
