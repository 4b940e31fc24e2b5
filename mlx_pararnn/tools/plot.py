"""Line charts of benchmark results, drawn by matplotlib (the extra `plot`)."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..errors import PararnnError

# One each for a line: they differ in black and white print too.
_DASHES = ("-", "--", ":", "-.", (0, (9, 3, 2, 3)), (0, (1, 4)))


class Panel(NamedTuple):
    """One chart.

    Attributes:
        lines: name -> its points (x, y), in the order of x.
        scaled: x to scale, for many points; else the x of all lines stand at equal distances.
    """

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    scaled: bool = False


def require_matplotlib() -> None:
    """Raise PararnnError, with the command that installs it, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise PararnnError("--plot draws with matplotlib, which is missing: pip install 'mlx-pararnn[plot]'")


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels below each other to `path`; its ending is the format (.svg, .png, .pdf).

    y starts at 0.

    Raises:
        PararnnError: matplotlib is missing, or knows no such format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5 * len(panels)), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise PararnnError(f"{path}: choose an ending out of .svg, .png and .pdf")
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        places = sorted({x for points in panel.lines.values() for x, _ in points})
        for number, (name, points) in enumerate(panel.lines.items()):
            across = [x if panel.scaled else places.index(x) for x, _ in points]
            marker = None if panel.scaled else "o"
            dashes = _DASHES[number % len(_DASHES)]
            axes.plot(across, [y for _, y in points], label=name, marker=marker, linestyle=dashes)
        if not panel.scaled:
            axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        if panel.lines:
            axes.legend()
    figure.savefig(path)
