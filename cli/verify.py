"""`mlx-pararnn verify`: does a model give the same numbers whichever way it is run?"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .report import Debug, reports_errors

if TYPE_CHECKING:
    from mlx_pararnn.tools.verification import Check

SAMPLE = "The quick brown fox jumps over the lazy dog; 0123456789 times, import this and return None."


@reports_errors
def verify(
    model: options.ModelPath = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to run the model on.")] = SAMPLE,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="CKPT", help="Compare every tensor with the checkpoint it came from."
        ),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            "--logits", metavar="FILE", help="Compare with logits exported from PyTorch (docs/converting.md)."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object instead of the table.")
    ] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Check a model's numbers: Newton and decoding against the sequential run, its source, PyTorch's logits.

    A Core ML package is run on this Mac's CPU, GPU and Neural Engine, against what MLX gave at its export.

    Example: mlx-pararnn verify my-model --against final.pt --logits reference.safetensors

    Exits with code 1 if anything differs by more than rounding.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX's first matrix product
    options.import_modules(modules)
    from mlx_pararnn.convert.coreml.package_check import is_package, verify_package
    from mlx_pararnn.errors import PararnnError
    from mlx_pararnn.hub import find_model
    from mlx_pararnn.loading import BUNDLED, load_model, load_tokenizer
    from mlx_pararnn.tools.verification import (
        verify_files,
        verify_logits,
        verify_methods,
        verify_weights,
    )

    path = find_model(model or BUNDLED)
    if is_package(path):
        if logits or against:
            typer.echo("error: --against and --logits are for MLX models, not Core ML packages", err=True)
            raise typer.Exit(2)
        _report(list(verify_package(path)), as_json)
        return
    loaded, config = load_model(path)
    known = verify_files(path)
    try:
        tokens = load_tokenizer(path, config).encode(prompt)
    except PararnnError:  # a model of ids only
        tokens = [byte % loaded.args.vocab_size for byte in prompt.encode()]
    tokens = tokens[: loaded.args.max_position_embeddings]
    if len(tokens) < 2:
        raise PararnnError("the prompt is too short to compare anything; give at least two tokens")
    checks = list(verify_methods(loaded, tokens))
    if not (zeros := verify_weights(loaded, known)).passed:
        checks.insert(0, zeros)
    if logits:
        checks.append(verify_logits(loaded, logits))
    if against:
        from mlx_pararnn.convert.comparison import compare_with_source

        checks += compare_with_source(path, against)
    _report(checks, as_json)


def _report(checks: "list[Check]", as_json: bool) -> None:
    """Print the checks; exit with code 1 unless all passed."""
    passed = all(check.passed for check in checks)
    if as_json:
        typer.echo(
            json.dumps({"passed": passed, "checks": [asdict(c) | {"passed": c.passed} for c in checks]})
        )
    else:
        width = max(len(check.name) for check in checks)
        typer.echo(f"{'':<{width}}  difference  allowed")
        for c in checks:
            mark = "ok  " if c.passed else "FAIL"
            typer.echo(
                f"{c.name:<{width}}  {c.difference:<10.2g}  {c.tolerance:<8.2g} {mark} {c.note}".rstrip()
            )
        typer.echo("Same numbers." if passed else "The numbers differ by more than rounding.")
    if not passed:
        raise typer.Exit(1)
