"""What quantization costs: size and perplexity of the trained test model, on text it was not trained on.

python benchmarks/quantization.py    prints a table and writes benchmarks/results/quantization-*.md
"""

import math
import os
import tempfile
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"

from machine import write_results

from mlx_pararnn import load_model
from mlx_pararnn.convert.to_mlx import convert_to_mlx

import mlx.core as mx  # isort: skip - after mlx_pararnn, which loads OpenBLAS

MODEL = Path(__file__).parents[1] / "tests" / "data" / "trained" / "paragru"
CASES = {
    "float32": {},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    **{f"-q --q-bits {bits}": {"quantize": True, "q_bits": bits} for bits in (8, 6, 5, 4, 3, 2)},
    "-q --q-bits 4 --q-group-size 32": {"quantize": True, "q_bits": 4, "q_group_size": 32},
    "-q --q-bits 2 --q-group-size 32": {"quantize": True, "q_bits": 2, "q_group_size": 32},
    **{f"-q --q-mode {mode}": {"quantize": True, "q_mode": mode} for mode in ("mxfp8", "mxfp4", "nvfp4")},
}
HEADER = ["convert", "bits a weight", "kB", "perplexity", "against float32"]


def perplexity(folder, ids, targets):
    model, _ = load_model(folder)
    logits = model(ids).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return math.exp((mx.logsumexp(logits, axis=-1) - chosen).mean().item())


def main():
    golden = mx.load(str(MODEL / "golden.safetensors"))
    ids, targets = golden["heldout_input_ids"], golden["heldout_targets"]
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CASES.items():
            done = convert_to_mlx(
                MODEL / "final.pt", Path(folder) / str(len(rows)), tokenizer="none", **options
            )
            found = perplexity(done.path, ids, targets)
            first = first or found
            bits, size = f"{done.bits_per_weight:.2f}", f"{done.nbytes / 1e3:.0f}"
            rows.append((name, bits, size, f"{found:.3f}", f"{100 * (found / first - 1):+.1f} %"))
            print(*rows[-1], sep=" | ", flush=True)
    caption = (
        f"The trained byte-level ParaGRU of tests/data ({done.parameters:,} parameters), converted with "
        f"these options. Perplexity a byte on {targets.size} bytes of held-out Python source, {len(ids)} "
        f"pieces of {ids.shape[1]}. Scales are counted in the bits; without --dtype they are stored as the "
        "checkpoint is, in float32. A matrix that the group size does not divide takes a smaller one."
    )
    write_results("quantization", caption, HEADER, rows)


if __name__ == "__main__":
    main()
