"""What a token takes in a Core AI package, run by the CPU runtime that coreai-core carries.

python benchmarks/core_ai.py    prints a table and writes benchmarks/results/core-ai-*.md; two minutes

It says nothing of a Mac or an iPhone, which have other runtimes and a GPU and a Neural Engine.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"

import numpy as np
from machine import write_results
from timing import alternating

from mlx_pararnn.convert.coreai.runtime import Runner
from mlx_pararnn.convert.to_coreai import convert_to_coreai
from mlx_pararnn.files.hub import BUNDLED, COMPLETION

TRAINED = Path(__file__).parents[1] / "tests" / "data" / "trained" / "paragru" / "final.pt"
CHUNK = 16
FORMS = {
    "float32": {},
    "float16, recurrence float32": {"precision": "float16"},
    "float16": {"precision": "float16", "recurrence": "float16"},
    "float32, int8": {"weights": "int8"},
    "float32, palette4": {"weights": "palette4"},
}
COUNTS = {"decode": 1, "prefill": CHUNK}
HEADER = ["model", "form", "MB", "decode, ms a token", "prefill, ms a token"]


def read(runner, function, count):
    runner.call(function, np.arange(count))


def main():
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for model, source in (
            ("trained GRU, 0.8M", TRAINED),
            ("pocket model, 1.4M", BUNDLED),
            ("completion model, 1.5M", COMPLETION),
        ):
            for form, options in FORMS.items():
                out = Path(root) / str(len(rows))
                done = convert_to_coreai(source, out, tokenizer="none", chunk=CHUNK, **options)
                with Runner(out / "model.aimodel", done.settings) as runner:
                    runs = {name: partial(read, runner, name, n) for name, n in COUNTS.items()}
                    took = alternating(runs, 9, limit=3.0)
                times = (f"{1e3 * took['decode']:.1f}", f"{1e3 * took['prefill'] / CHUNK:.1f}")
                rows.append((model, form, f"{done.nbytes / 1e6:.1f}", *times))
                print(*rows[-1], sep=" | ", flush=True)
    reads = f"prefill reads {CHUNK} tokens a call"
    caption = f"Medians of up to 9 calls; {reads}. By coreai-core's CPU runtime for Linux."
    write_results("core-ai", caption, HEADER, rows)


if __name__ == "__main__":
    main()
