"""Line charts as SVG text, for the benchmarks: a few lines instead of a plotting library."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Distinguishable in black and white by their dashes, and for most colour-blind readers by their colours.
STYLES = (
    ("#0b62a4", ""),
    ("#d1495b", "7 3"),
    ("#2e8540", "2 3"),
    ("#8a5a00", "9 3 2 3"),
    ("#6a3d9a", "4 4"),
    ("#444444", "1 2"),
)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 640, 320, 70, 40, 50, 18


class Panel(NamedTuple):
    """One chart.

    Attributes:
        lines: name -> its points (x, y), in the order of x.
    """

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


def svg(panels: Sequence[Panel]) -> str:
    """The panels below each other; y starts at 0, the x of all lines stand at equal distances."""
    heights = [HEIGHT + LEGEND * len(panel.lines) for panel in panels]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{sum(heights)}" '
        f'viewBox="0 0 {WIDTH} {sum(heights)}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    top = 0
    for panel, height in zip(panels, heights, strict=True):
        parts += [f'<g transform="translate(0 {top})">', *_panel(panel), "</g>"]
        top += height
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    places = sorted({x for points in panel.lines.values() for x, _ in points})
    highest = max((y for points in panel.lines.values() for _, y in points), default=0) or 1
    step = _round_step(highest / 4)
    ceiling = step * math.ceil(highest / step)
    right, floor = WIDTH - 30, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (right - LEFT) * (places.index(x) + 0.5) / len(places)

    def up(y: float) -> float:
        return floor - (floor - TOP) * y / ceiling

    parts = [f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(panel.title)}</text>']
    for k in range(round(ceiling / step) + 1):
        y = up(k * step)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{k * step:g}</text>')
    for x in places:
        parts.append(f'<text x="{across(x):.1f}" y="{floor + 18}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{floor + 38}" text-anchor="middle">{escape(panel.x)}</text>')
    parts.append(
        f'<text transform="translate(16 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y)}</text>"
    )
    for k, (name, points) in enumerate(panel.lines.items()):
        colour, dashes = STYLES[k % len(STYLES)]
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = HEIGHT + LEGEND * k
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + 40}" y1="{y}" y2="{y}" {stroke}/>')
        parts.append(f'<text x="{LEFT + 48}" y="{y + 4}">{escape(name)}</text>')
    return parts


def _round_step(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * (1 - 1e-9))
