"""A kernel broken on purpose: `old` is replaced by `new` in one file of metal/, where it must stand once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mlx_pararnn.compute.gpu import Launch
from mlx_pararnn.compute.texts import kernel_body

METAL = Path(__file__).parents[2] / "metal"

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    seen_by: str  # kinds of battery.py, by blanks
    cell: str = "gru"

    def __str__(self) -> str:
        return self.name

    def apply(self, launch: Launch) -> Launch:
        """The launch with this mutation's text; unchanged if it does not contain the file."""
        text = (METAL / self.file).read_text()
        if self.file.endswith(".metal"):
            text = kernel_body(text)
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} contains {text.count(self.old)} times: {self.old!r}")
        broken = text.replace(self.old, self.new)
        return dataclasses.replace(
            launch, source=launch.source.replace(text, broken), header=launch.header.replace(text, broken)
        )


def without_barrier(place: str, instead: str = "") -> str:
    return place.replace(BARRIER, instead)
