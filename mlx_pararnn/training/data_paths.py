"""Whether there is anything where the data is said to be: told before MLX is imported."""

from pathlib import Path

from ..errors import PararnnError


def check_data(path: Path, what: str = "DATA") -> None:
    """Raise a PararnnError where neither a file nor a folder is at `path`."""
    if not path.exists():
        raise PararnnError(
            f"{path}: no such file or folder; {what} is a text file, a folder of them or .jsonl"
        )
