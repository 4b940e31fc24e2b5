"""`mlx-pararnn draw`: a picture of what a text says."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .progress import progress_bar
from .report import Debug, expand_home, reports_errors


@reports_errors
def draw(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to draw.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The image file: .png, .jpg, .webp or .bmp.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            callback=expand_home,
            help="A model that draws: a folder, or a Hugging Face repository. None is bundled.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**64 - 1, help="Draw the same picture again.")
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=1000, help="Steps from noise to the picture.")
    ] = 25,
    guidance: Annotated[
        float,
        typer.Option(
            "--guidance", min=0.0, max=100.0, help="How much the picture follows its tokens; 1 is plain."
        ),
    ] = 2.0,
    temp: Annotated[
        float,
        typer.Option(
            "--temp", min=0.0, max=100.0, help="Sampling temperature; 0 takes the likeliest tokens."
        ),
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Draw what a text says, with a model that draws.

    Example: mlx-pararnn draw "a red apple on blue" -o apple.png --model my-model --seed 1
    """
    from mlx_pararnn.images.picture import check_output, write_picture

    check_output(out)
    if out.exists() and not force:
        raise PararnnError(f"{out}: already exists; choose another file or pass --force to replace it")
    loaded, tokenizer = options.load_image_model(model, modules)
    from mlx_pararnn.images.use import draw as draw_picture

    with progress_bar(
        lambda p: (p.TextColumn("drawing"), p.BarColumn(), p.TaskProgressColumn(), p.TimeRemainingColumn())
    ) as update:
        picture = draw_picture(
            loaded,
            tokenizer,
            text,
            seed=seed,
            steps=steps,
            guidance=guidance,
            temp=temp,
            progress=lambda done, total: update(completed=done, total=total),
        )
    write_picture(picture, out)
    print(out)
