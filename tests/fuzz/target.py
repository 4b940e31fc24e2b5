"""What a target is, and files of a folder as inputs of one."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from tests.fuzz.changes import Inside


class Target(NamedTuple):
    """Of one kind of input.

    Attributes:
        run: takes bytes, and raises on a finding only.
        seeds: inputs to begin with.
        words: what changes put in.
        processes: whether it may start processes.
        inside: what takes the header out of a container, for changes that leave the rest whole.
        deletes: whether it may delete files of its folder.
    """

    run: Callable[[bytes], None]
    seeds: list[bytes]
    words: tuple[bytes, ...] = ()
    processes: bool = False
    inside: Inside | None = None
    deletes: bool = False


def forget_first_weights() -> None:
    """Of models: nobody draws them, as a file has others, and till then they wait in MLX's random key."""
    mx.random.seed(0)


def named(name: str, content: bytes) -> bytes:
    """A file of a folder, as one input."""
    return name.encode() + b"\n" + content


def put(folder: Path, names: list[str], data: bytes) -> str | None:
    """Write the file that an input names; None where it names none of these."""
    name, _, content = data.partition(b"\n")
    found = next((known for known in names if known.encode() == name), None)
    if found:
        (folder / found).write_bytes(content)
    return found
