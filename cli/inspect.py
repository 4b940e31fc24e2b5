"""`mlx-pararnn inspect`: what a checkpoint or model is."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from mlx_pararnn.quick_start import start_quickly

from . import options
from .progress import working
from .report import Debug, expand_home, reports_errors, size

# Settings that have a line of their own, or say nothing to a person.
ELSEWHERE = (
    *(
        "model_type",
        "quantization",
        "quantization_config",
        "quantization_cost",
        "eos_token_id",
        "parameters",
        "weights",
    ),
    *("format", "format_version", "states", "package"),
)


@reports_errors
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            callback=expand_home,
            help="A checkpoint in any form that convert takes, a model folder, or a package for Core ML or "
            "Core AI; the bundled pocket model if left out.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object instead of the table.")
    ] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint or model is, without its weights.

    Example: mlx-pararnn inspect final.pt
    """
    from mlx_pararnn.convert.readers.checkpoint import check_source
    from mlx_pararnn.files.hub import BUNDLED

    if path is not None:
        check_source(path)  # before seconds of importing
    options.import_modules(modules)
    with working(f"Reading {path or 'the bundled model'}"):
        start_quickly()
        from mlx_pararnn.convert.inspection import held_package
        from mlx_pararnn.convert.inspection import inspect as look
        from mlx_pararnn.tools.quantization_cost import noted_cost

        found = look(path or BUNDLED)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    kinds = {"model": "converted model", "package": f"{held_package(path or BUNDLED)} package"}
    rows = {"kind": kinds.get(found.kind, f"checkpoint of {found.family}")}
    rows |= {
        name.replace("_", " "): _shown(value)
        for name, value in found.config.items()
        if value is not None and name not in ELSEWHERE
    }
    rows["parameters"] = f"{found.parameters:,}"
    rows["stored as"] = ", ".join(f"{name} ({count:,})" for name, count in found.dtypes.items())
    if found.quantization:
        rows["quantization"] = found.quantization
    if cost := noted_cost(found.config):
        rows["what that cost"] = cost.sentence()
    rows["size on disk"] = size(found.disk_bytes)
    rows["state"] = f"{found.state_bytes:,} bytes a sequence, however long"
    rows["memory"] = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found.memory.items())
    if found.kind == "checkpoint":
        rows["convert writes"] = f"{found.config['model_type']}, {found.parameters:,} parameters, types kept"
    else:
        rows["tokenizer"] = found.tokenizer or "none"
        rows["chat template"] = "yes" if found.chat_template else "no"
        rows["end tokens"] = ", ".join(map(str, found.end_tokens)) or "none"
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {value}")


def _shown(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
