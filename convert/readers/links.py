"""Files of a folder that came from somewhere else: a link in it must not lead to the rest of the disk."""

from pathlib import Path

from mlx_pararnn.errors import PararnnError


def check_link(path: Path, folder: Path) -> None:
    """Raise PararnnError if `path` leads out of `folder`, unless that is to its Hugging Face cache."""
    real, home = path.resolve(), folder.resolve()
    # models--owner--name/snapshots/<commit>/file -> ../../blobs/<hash>
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not in_cache:
        raise PararnnError(
            f"{path}: is a link out of its folder, which is not followed; copy the file itself there"
        )
