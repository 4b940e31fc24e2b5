"""`mlx-pararnn inspect`: what a checkpoint or model is."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from . import options
from .report import Debug, expand_home, reports_errors, size


@reports_errors
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            callback=expand_home,
            help="A checkpoint in any form that convert takes, or a model folder; the bundled pocket model "
            "if left out.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object instead of the table.")
    ] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint or model is, without reading its weights.

    Example: mlx-pararnn inspect final.pt
    """
    options.import_modules(modules)
    from mlx_pararnn.convert.inspection import inspect as look
    from mlx_pararnn.loading import BUNDLED

    found = look(path or BUNDLED)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    rows = {"kind": f"checkpoint of {found.family}" if found.family else "converted model"}
    rows |= {
        k.replace("_", " "): str(v) for k, v in found.config.items() if v is not None and k != "model_type"
    }
    rows["parameters"] = f"{found.parameters:,}"
    rows["stored as"] = ", ".join(f"{name} ({count:,})" for name, count in found.dtypes.items())
    rows["state"] = f"{found.state_bytes:,} bytes a sequence, however long"
    rows["memory"] = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found.memory.items())
    if found.kind == "checkpoint":
        rows["convert writes"] = f"{found.config['model_type']}, {found.parameters:,} parameters, types kept"
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {value}")
