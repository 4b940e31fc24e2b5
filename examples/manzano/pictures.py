"""Emoji from SVG files to small pictures of scenes.

The files are those of two icon sets on npm, which `npm install` brings and the repository does not hold:
@iconify-json/noto (Apache License 2.0) and @iconify-json/fluent-emoji-flat (MIT License).
`python -m examples.manzano.pictures ICONS -o sheet.png` draws a sheet of scenes to look at.
"""

import argparse
import io
import json
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import GROUNDS, ICONS, Scene, scene

SETS = ("@iconify-json/noto", "@iconify-json/fluent-emoji-flat")
SIZE = 32
LARGE = 96  # pixels at which an icon is rasterised, once
# of one thing, by how many there are
_SIDES = {1: (17, 24), 2: (13, 15), 3: (10, 11)}


class Sprites:
    """The icons that scenes need, rasterised.

    Args:
        folder: where `npm install` put node_modules.
    """

    def __init__(self, folder: Path) -> None:
        sets = [_icons(folder / "node_modules" / name / "icons.json") for name in SETS]
        self.styles = len(sets)
        self._large = {
            (style, name): rasterise(icons[name], LARGE)
            for style, icons in enumerate(sets)
            for colours in ICONS.values()
            for name in colours.values()
        }
        self._sized = lru_cache(maxsize=None)(self._resize)

    def get(self, style: int, noun: str, colour: str, side: int) -> Image.Image:
        """RGBA, side x side."""
        return self._sized(style, ICONS[noun][colour], side)

    def _resize(self, style: int, name: str, side: int) -> Image.Image:
        return self._large[style, name].resize((side, side), Image.Resampling.LANCZOS)


def draw(shown: Scene, sprites: Sprites, rng: random.Random) -> np.ndarray:
    """A picture of a scene, (SIZE, SIZE, 3), uint8; styles, sizes and places by chance."""
    picture = Image.new("RGB", (SIZE, SIZE), GROUNDS[shown.ground])
    total = sum(group.count for group in shown.groups)
    side = rng.randint(*_SIDES[total])
    for group, (left, top, right, bottom) in zip(shown.groups, _halves(shown.relation), strict=False):
        style = rng.randrange(sprites.styles)
        sprite = sprites.get(style, group.noun, group.colour, side)
        for x, y in _places(group.count, side, (left, top, right, bottom), rng):
            picture.paste(sprite, (x, y), sprite)
    return np.array(picture)


def rasterise(svg: str, side: int) -> Image.Image:
    """An SVG text as an RGBA image of side x side pixels."""
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _icons(file: Path) -> dict[str, str]:
    """Whole SVG texts by name."""
    found = json.loads(file.read_text(encoding="utf-8"))
    width, height = found.get("width", 16), found.get("height", 16)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return {name: f"{head}{icon['body']}</svg>" for name, icon in found["icons"].items()}


def _halves(relation: str) -> list[tuple[int, int, int, int]]:
    """Where the first and the second group are: left, top, right, bottom."""
    middle = SIZE // 2
    left, right = (0, 0, middle, SIZE), (middle, 0, SIZE, SIZE)
    upper, lower = (0, 0, SIZE, middle), (0, middle, SIZE, SIZE)
    return {
        "": [(0, 0, SIZE, SIZE)],
        "left of": [left, right],
        "right of": [right, left],
        "above": [upper, lower],
        "below": [lower, upper],
    }[relation]


def _places(
    count: int, side: int, area: tuple[int, int, int, int], rng: random.Random
) -> list[tuple[int, int]]:
    """Left upper corners of `count` things, in a row along the longer side of the area."""
    left, top, right, bottom = area
    across = right - left >= bottom - top
    length, depth = (right - left, bottom - top) if across else (bottom - top, right - left)
    slot = length / count
    places = []
    for number in range(count):
        along = round(number * slot + rng.uniform(0, max(0, slot - side)))
        beside = round(rng.uniform(0, max(0, depth - side)))
        places.append((left + along, top + beside) if across else (left + beside, top + along))
    return places


def sheet(folder: Path, seed: int, across: int = 8, enlarged: int = 3) -> Image.Image:
    """Scenes side by side, enlarged."""
    sprites, rng = Sprites(folder), random.Random(seed)
    rows = [
        np.hstack([draw(scene(rng, held_out=False), sprites, rng) for _ in range(across)])
        for _ in range(across)
    ]
    return enlarged_rows(rows, enlarged)


def enlarged_rows(rows: list[np.ndarray], enlarged: int) -> Image.Image:
    """Rows of pixels (h, w, 3) under each other, each pixel `enlarged` times as wide and high."""
    picture = Image.fromarray(np.vstack(rows))
    return picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("icons", type=Path, help="the folder where npm install ran")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sheet(given.icons, given.seed).save(given.out)
