"""`mlx-pararnn doctor`: what this machine offers, and what is missing."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .report import Debug, reports_errors


@reports_errors
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Print one block to paste into an issue: limits, kernels tried, timings."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what this machine offers, and what is missing.

    Versions, device, backends, BLAS and compiler, and what to install or set.

    Example: mlx-pararnn doctor
    """
    from mlx_pararnn.tools.doctor import examine

    if report:
        if as_json:
            raise typer.BadParameter("--report is a block of text; leave out --json")
        from mlx_pararnn.tools.device_report import device_report

        typer.echo(device_report())
        return
    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    width = max(len(finding.item) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.item:<{width}}  {finding.value}")
        if finding.advice:
            typer.echo(f"{'':<{width}}  -> {finding.advice}")
