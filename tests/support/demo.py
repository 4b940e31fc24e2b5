"""A small model that continues text, without tools and without a chat template."""

import json
import tempfile
from pathlib import Path

from mlx_pararnn.convert.to_mlx import convert_to_mlx
from tests.support.golden import DATA

_folder = tempfile.TemporaryDirectory(prefix="mlx-pararnn-demo-")
DEMO = Path(_folder.name) / "demo"
convert_to_mlx(DATA / "trained/paragru/final.pt", DEMO, dtype="float16", tokenizer="bytes")
(DEMO / "generation_config.json").write_text(json.dumps({"do_sample": False}))  # greedy, so that tests repeat
