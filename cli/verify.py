"""`mlx-pararnn verify`: does a model give the same numbers whichever way it is run?"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .progress import working
from .report import Debug, passed_or_not, reports_errors, usage_error

if TYPE_CHECKING:
    from mlx_pararnn.tools.verification import Check

SAMPLE = "The quick brown fox jumps over the lazy dog; 0123456789 times, import this and return None."
SAME = "Same numbers."


@reports_errors
def verify(
    model: options.ModelPath = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to run the model on.")] = SAMPLE,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="CKPT",
            help="Compare every tensor with the checkpoint or model it came from; tell what quantizing cost.",
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
    adapter_path: options.Adapters = None,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Check a model's numbers, run in every way.

    Newton and decoding are compared with the sequential run, its source, PyTorch's logits.

    Of a quantized model it tells what quantizing cost: perplexity and KL divergence on a bundled text.

    A Core ML package is run on the CPU, the GPU and the Neural Engine, as far as this Mac has them, each in a
    process of its own, against what MLX gave at its export; a Core AI package on a Mac or on Linux.

    Example: mlx-pararnn verify my-model --against final.pt

    Exits with code 1 if anything differs by more than rounding.
    """
    if against and adapter_path:
        usage_error("--against compares the weights as they are stored; leave out --adapter-path")
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX's first matrix product
    if logits and not logits.exists():
        raise PararnnError(f"{logits}: no such file; docs/converting.md shows how to export logits")
    path = options.find(model, modules)
    if against:
        from mlx_pararnn.convert.readers.checkpoint import check_source
        from mlx_pararnn.convert.readers.forms import PACKAGE_FILE

        if not any((folder / PACKAGE_FILE).is_file() for folder in (path, path.parent)):
            check_source(str(against))
    what = f"Checking {model or 'the bundled model'}"
    with working(what):
        from mlx_pararnn.convert.inspection import held_package

        package = held_package(path)
    if package and (logits or against or adapter_path):
        usage_error(f"--against, --logits and --adapter-path are for MLX models, not {package} packages")
    with working(what):
        report: tuple[list[Check], str, dict[str, Any] | None] = (
            _checked_package(path, package)
            if package
            else _checked(path, prompt, against, logits, adapter_path)
        )
    _report(as_json, *report)


def _checked(
    path: Path,
    prompt: str,
    against: Path | None,
    logits: Path | None,
    adapter_path: Path | None,
) -> "tuple[list[Check], str, dict[str, Any] | None]":
    """The checks, the sentence for all that pass, and what quantizing cost."""
    from mlx_pararnn.loading import load_model
    from mlx_pararnn.tools.quantization_cost import noted_cost, sample_tokens
    from mlx_pararnn.tools.verification import (
        verify_files,
        verify_logits,
        verify_methods,
        verify_weights,
    )

    loaded, config = load_model(path, adapter_path=adapter_path)
    known = verify_files(path)
    quantized = "quantization" in config
    tokens, _ = sample_tokens(prompt, path, loaded.args, config)
    tokens = tokens[: loaded.args.max_position_embeddings]
    if len(tokens) < 2:
        raise PararnnError("the prompt is too short to compare anything; give at least two tokens")
    of_source: list[Check] = []  # first: a wrong CKPT is told before the model is run
    if against:
        from mlx_pararnn.convert.comparison import compare_with_source
        from mlx_pararnn.convert.original import cost_against

        of_source = list(compare_with_source(path, against))
    checks = list(verify_methods(loaded, tokens))
    if not (zeros := verify_weights(loaded, known)).passed:
        checks.insert(0, zeros)
    if logits:
        checks.append(verify_logits(loaded, logits, quantized))
    checks += of_source
    cost = noted_cost(config) if quantized else None
    if against and quantized:
        cost = cost_against(path, against)
    if not quantized:
        return checks, SAME, None
    if cost:
        return checks, f"Quantized: {cost.sentence()}.", asdict(cost)
    return checks, "Quantized; --against the original tells what that cost.", None


def _checked_package(path: Path, title: str) -> "tuple[list[Check], str, None]":
    if title == "Core AI":
        from mlx_pararnn.convert.coreai import aimodel_check as coreai

        return list(coreai.verify_package(path)), f"{SAME} {coreai.unseen()}", None
    from mlx_pararnn.convert.coreml import mlpackage_check as coreml

    checks = list(coreml.verify_package(path))
    return checks, f"{SAME} {coreml.unseen()}".rstrip(), None


def _report(as_json: bool, checks: "list[Check]", last: str, cost: dict[str, Any] | None) -> None:
    """Print the checks and, if all passed, `last`; else exit with code 1."""
    passed = all(check.passed for check in checks)
    if as_json:
        found = {"passed": passed, "checks": [asdict(c) | {"passed": c.passed} for c in checks]}
        typer.echo(json.dumps(found | ({"quantization_cost": cost} if cost else {})))
    else:
        width = max(len(check.name) for check in checks)
        typer.echo(f"{'':<{width}}  difference  allowed")
        for c in checks:
            typer.echo(f"{c.name:<{width}}  {_row(c)}".rstrip())
        typer.echo(last if passed else "The numbers differ by more than rounding.")
    if not passed:
        raise typer.Exit(1)


def _row(check: "Check") -> str:
    mark = "told" if check.passed and check.tolerance is None else passed_or_not(check.passed)
    if check.counted:
        found = f"{check.difference:.0f} {check.counted}" if check.difference else "none"
        return f"{found:<10}  {'any' if check.tolerance is None else 'none':<8} {mark} {check.note}"
    allowed = "any" if check.tolerance is None else f"{check.tolerance:.2g}"
    return f"{check.difference:<10.2g}  {allowed:<8} {mark} {check.note}"
