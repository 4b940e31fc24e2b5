"""Writes a Core AI package from a PyTorch checkpoint or an MLX model folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError

from .coreai.require_coreai import require_coreai
from .exporting import Exported, Functions, Progress, check_options, description, export
from .inspection import disk_bytes
from .package.form import Form
from .readers.forms import COREAI

PRECISIONS = ("float32", "float16")


def convert_to_coreai(
    source: str | Path,
    out: str | Path,
    *,
    precision: str = "float32",
    recurrence: str = "float32",
    chunk: int | None = None,
    iterations: int | None = None,
    weights: str | None = None,
    initial_state: str | Path | None = None,
    adapter_path: str | Path | None = None,
    tokenizer: str | Path | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Export `source` (an MLX model folder, or anything `convert_to_mlx` takes) to the folder `out`.

    docs/coreai.md says what `out` then holds. Experimental: it stands on a beta of coreai-core.

    Args:
        precision: what the package computes in, "float32" or "float16".
        recurrence: what the recurrence is computed in and its state kept in, "float32" or "float16".
        weights: how matrices are stored: "int8", "int4", "palette4", or by default in `precision`.
        chunk, iterations, initial_state, adapter_path, tokenizer, family, config, force, allow_nonfinite,
            progress: as for `convert_to_coreml`.

    Raises:
        PararnnError: anything wrong with the input, with `out` or with this machine; nothing is left.
    """
    for name, value in (("precision", precision), ("recurrence", recurrence)):
        if value not in PRECISIONS:
            raise PararnnError(f"{name} {value!r}: choose {' or '.join(PRECISIONS)}")
    weights = weights or precision
    check_options(chunk, iterations, weights, precision)
    require_coreai()
    done = export(
        source,
        out,
        COREAI,
        _write,
        lambda _: Form(activations=np.dtype(precision).type, recurrence=np.dtype(recurrence).type),
        chunk=chunk,
        iterations=iterations,
        weights=weights,
        initial_state=initial_state,
        adapter_path=adapter_path,
        tokenizer=tokenizer,
        family=family,
        config=config,
        force=force,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
        settings={"precision": precision},
    )
    return replace(done, nbytes=disk_bytes(done.path / COREAI.name))


def _write(
    path: Path, functions: Functions, settings: dict[str, Any], title: str, progress: Progress
) -> None:
    from .coreai.aimodel import write_package

    metadata = {"custom": {"pararnn": json.dumps(settings)}, **description(settings, title, "coreai.md")}
    write_package(
        path,
        functions.args,
        functions.weights,
        functions.form,
        functions.tokens,
        functions.iterations,
        metadata,
        progress,
    )
