"""`mlx-pararnn convert`: a PyTorch checkpoint to an MLX model folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .report import Debug, reports_errors


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@reports_errors
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="A .pt, .pth, .bin or .safetensors file, or a folder that holds one.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="The model folder to make.", show_default=False),
    ],
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Format of the weights; recurrent weights stay float32. Default: as in the checkpoint."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|REPO|bytes|none",
            help="Where the tokenizer is: a folder, a Hugging Face name (EleutherAI/gpt-neox-20b), 'bytes' "
            "for models of raw bytes, 'none' for ids only. Default: the files beside the checkpoint.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take the checkpoint for one of this family.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON fields that go before what was inferred: {"tie_word_embeddings": false}.',
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert weights that hold NaN or infinity.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Convert a PyTorch checkpoint to an MLX model folder.

    Nothing in the checkpoint is executed, and PyTorch is not needed.

    Example: mlx-pararnn convert final.pt -o my-model --tokenizer bytes
    """
    from mlx_pararnn.convert.to_mlx import convert_to_mlx

    with _progress_bar() as progress:
        done = convert_to_mlx(
            checkpoint,
            output,
            dtype=dtype.value if dtype else None,
            tokenizer=tokenizer,
            family=family,
            config=config,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    typer.echo(
        f"{done.path}: {done.family}, {done.config['cell']}, {done.parameters:,} parameters, "
        f"{' and '.join(done.dtypes)}, {done.nbytes / 1e6:.1f} MB"
    )
    if done.config["model_type"] == "pararnn" and tokenizer != "none":
        typer.echo(f'Try it: mlx-pararnn generate {done.path} -p "..."', err=True)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
