"""`mlx-pararnn draw`: a picture of what a text says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .preview import previewing
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
    preview: Annotated[
        bool,
        typer.Option("--preview/--no-preview", help="Show the picture in the terminal as it is made."),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Draw what a text says, with a model that draws.

    Example: mlx-pararnn draw "a red apple on blue" -o apple.png --model my-model
    """
    from mlx_pararnn.images.picture import check_output, write_picture

    check_output(out)
    if out.exists() and not force:
        raise PararnnError(f"{out}: already exists; choose another file or pass --force to replace it")
    loaded, tokenizer = options.load_image_model(model, modules)
    from mlx_pararnn.images.use import draw as draw_picture

    with drawing_shown(preview) as shown:
        picture = draw_picture(
            loaded, tokenizer, text, seed=seed, steps=steps, guidance=guidance, temp=temp, **shown
        )
        write_picture(picture, out)
    print(out)


@contextmanager
def drawing_shown(wanted: bool = True) -> Iterator[dict[str, Any]]:
    """What `images.use.draw` is told, so that a bar and, where `wanted`, the picture show how far it has got.

    The picture stays on the terminal once it is drawn.
    """
    with previewing(wanted) as preview:
        with progress_bar(
            lambda p: (
                p.TextColumn("drawing"),
                p.BarColumn(),
                p.TaskProgressColumn(),
                p.TimeRemainingColumn(),
            ),
            above=preview,
        ) as update:
            shown: dict[str, Any] = {"progress": lambda done, total: update(completed=done, total=total)}
            if preview is not None:
                shown["preview"] = lambda picture: setattr(preview, "picture", picture)
            yield shown
        if preview is not None:
            preview.leave()
