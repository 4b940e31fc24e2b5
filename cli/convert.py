"""`mlx-pararnn convert`: a PyTorch checkpoint to an MLX model folder."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .report import Debug, reports_errors


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Bits(StrEnum):
    two = "2"
    three = "3"
    four = "4"
    five = "5"
    six = "6"
    eight = "8"


class GroupSize(StrEnum):
    small = "32"
    middle = "64"
    large = "128"


class Mode(StrEnum):
    affine = "affine"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


@reports_errors
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A .pt, .pth, .bin or .safetensors file; a folder that holds one, several with an index, or "
            "a torch.distributed.checkpoint; or a Hugging Face name.",
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
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Pack the matrices into few bits; needs MLX.")
    ] = False,
    q_bits: Annotated[Bits | None, typer.Option(help="Bits a weight. Default: 4.")] = None,
    q_group_size: Annotated[
        GroupSize | None,
        typer.Option(
            help="Weights that share a scale; a matrix that it does not divide takes a smaller one. "
            "Default: 64."
        ),
    ] = None,
    q_mode: Annotated[
        Mode | None, typer.Option(help="Format; those other than affine fix bits and group size.")
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
    model_file: Annotated[
        bool,
        typer.Option(
            "--model-file",
            help="Add a file by which bare mlx_lm --trust-remote-code finds the model's class.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert weights that hold NaN or infinity.")
    ] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Convert a PyTorch checkpoint to an MLX model folder.

    Nothing in the checkpoint is executed, and PyTorch is not needed.

    Example: mlx-pararnn convert final.pt -o my-model --tokenizer bytes
    """
    if not quantize and (q_bits or q_group_size or q_mode):
        typer.echo("error: --q-bits, --q-group-size and --q-mode need --quantize", err=True)
        raise typer.Exit(2)
    options.import_modules(modules)
    from mlx_pararnn.convert.to_mlx import convert_to_mlx

    with _progress_bar() as progress:
        done = convert_to_mlx(
            checkpoint,
            output,
            dtype=dtype.value if dtype else None,
            quantize=quantize,
            q_bits=int(q_bits) if q_bits else None,
            q_group_size=int(q_group_size) if q_group_size else None,
            q_mode=q_mode.value if q_mode else "affine",
            tokenizer=tokenizer,
            family=family,
            config=config,
            model_file=model_file,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    typer.echo(
        f"{done.path}: {done.family}, {done.config['cell']}, {done.parameters:,} parameters, "
        f"{' and '.join(done.dtypes)}, {_size(done.nbytes)}"
    )
    if quantize:
        asked = done.config["quantization"]
        how = f"{asked['mode']}, {asked['bits']} bits in groups of {asked['group_size']}"
        exceptions = "".join(f"; {phrase}" for phrase in done.exceptions)
        typer.echo(f"quantized: {done.bits_per_weight:.2f} bits per weight ({how}){exceptions}")
    if done.config["model_type"] == "pararnn_cell":
        if not done.config.get("activations"):
            typer.echo("Taken for granted: the cell's default activations (--config names others).", err=True)
        typer.echo(f"Try it: mlx_pararnn.load_cell({str(done.path)!r})", err=True)
    elif tokenizer != "none":
        typer.echo(f'Try it: mlx-pararnn generate {shlex.quote(str(done.path))} -p "..."', err=True)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
