"""All states of the chat page in one picture: python -m tests.support.contact_sheet FOLDER OUT.png

FOLDER holds what tests/chat/test_page.py wrote with MLX_PARARNN_SCREENSHOTS=FOLDER.
"""

import sys
from pathlib import Path

from PIL import Image

STATES = ("empty", "streaming", "long", "error")
ROWS = [(size, scheme) for size in ("390x844", "1280x800") for scheme in ("light", "dark")]
HEIGHT, GAP = 300, 8


def sheet(folder):
    """A row for each size and color scheme, a column for each state."""
    rows = []
    for size, scheme in ROWS:
        pictures = [Image.open(folder / f"page-{size}-{scheme}-{state}.png") for state in STATES]
        height = HEIGHT if size == "390x844" else HEIGHT * 2 // 3
        rows.append([p.convert("RGB").resize((p.width * height // p.height, height)) for p in pictures])
    width = max(sum(p.width + GAP for p in row) for row in rows) + GAP
    whole = Image.new("RGB", (width, sum(row[0].height + GAP for row in rows) + GAP), "gray")
    y = GAP
    for row in rows:
        x = GAP
        for picture in row:
            whole.paste(picture, (x, y))
            x += picture.width + GAP
        y += row[0].height + GAP
    return whole.quantize(64)


if __name__ == "__main__":
    sheet(Path(sys.argv[1])).save(sys.argv[2], optimize=True)
