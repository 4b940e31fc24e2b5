"""`mlx-pararnn add-tokenizer`: gives a converted model its tokenizer later."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .report import Debug, expand_home, reports_errors


@reports_errors
def add_tokenizer(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder that `mlx-pararnn convert` wrote.")
    ],
    tokenizer: Annotated[
        str,
        typer.Argument(
            metavar="DIR|REPO|bytes",
            callback=expand_home,
            help="Where the tokenizer is: a folder, a Hugging Face name, or 'bytes' for models of raw bytes.",
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace the tokenizer that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Give a converted model a tokenizer.

    Example: mlx-pararnn add-tokenizer my-model EleutherAI/gpt-neox-20b
    """
    from mlx_pararnn.convert.add_tokenizer import add_tokenizer as add

    written = add(model, tokenizer, force=force)
    typer.echo(f"{model}: {', '.join(written)}")
    typer.echo(f'Try it: mlx-pararnn generate {shlex.quote(str(model))} -p "..."', err=True)
