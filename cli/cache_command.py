"""`mlx-pararnn cache`: what the package keeps outside its own folder."""

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlx_pararnn.files.model_files import disk_bytes

from .message_editor import history_file
from .report import Debug, reports_errors, size


class Action(StrEnum):
    """What can be done with it."""

    show = "show"
    clear = "clear"


@reports_errors
def cache(
    action: Annotated[
        Action, typer.Argument(help="clear deletes the compiled kernels, which are built again when needed.")
    ] = Action.show,
    debug: Debug = False,
) -> None:
    """Show what is kept on this disk, or clear compiled kernels.

    Models from Hugging Face belong to its own client: hf cache list, hf cache rm.

    Example: mlx-pararnn cache clear
    """
    from mlx_pararnn.compute.cpu_build import cache_folder

    folder = cache_folder()
    if action == Action.clear:
        freed = disk_bytes(folder)
        if folder.exists():
            shutil.rmtree(folder)
        typer.echo(f"deleted {folder}: {size(freed)}")
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    rows = [
        ("compiled kernels", folder, size(disk_bytes(folder))),
        ("chat history", history_file(), size(disk_bytes(history_file()))),
        ("Hugging Face models", Path(HF_HUB_CACHE), "of every program"),
    ]
    for name, path, note in rows:
        typer.echo(f"{name:<19}  {path}  {note}")
