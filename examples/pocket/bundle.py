"""Make a trained model the bundled one: `python -m examples.pocket.bundle runs/pocket/model`.

The card, README.md in the bundled folder, is written by hand: its numbers are those that evaluate.py gives.
"""

import json
import shutil
import sys
from pathlib import Path

from mlx_pararnn.loading import BUNDLED, load

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
EXAMPLES = (
    "what is 314159265358979323846264338327 + 271828182845904523536028747135?",
    "what day is 90 days after 3 March?",
)
MOST_BYTES = 4_000_000


def bundle(model: Path, to: Path = BUNDLED) -> None:
    """Copy a model folder's files, and add what `chat` shows when it opens."""
    for name in FILES:
        shutil.copyfile(model / name, to / name)
    settings = json.loads((model / "generation_config.json").read_text())
    text = json.dumps({**settings, "examples": EXAMPLES}, indent=2)
    (to / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    assert sum(file.stat().st_size for file in to.iterdir()) < MOST_BYTES
    load(to)


if __name__ == "__main__":
    bundle(Path(sys.argv[1]))
