"""What quantization costs, and what it gains on a CPU.

python benchmarks/quantization.py            perplexity of the trained test model: results/quantization-*.md
python benchmarks/quantization.py --speed    milliseconds a token of a large one: quantized-decode-*.md
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"

import models
from machine import write_results

from mlx_pararnn import load_model
from mlx_pararnn.convert.to_mlx import convert_to_mlx

import mlx.core as mx  # isort: skip - after mlx_pararnn, which loads OpenBLAS
import mlx.nn as nn
from mlx.utils import tree_flatten
from timing import PAUSE

from mlx_pararnn.tools.benchmark import in_dtype

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


def at(precision):
    model = models.pararnn()
    dtype, _, bits = precision.partition(", ")
    model = in_dtype(model, dtype)
    if bits:
        nn.quantize(model, 64, int(bits[0]), class_predicate=model.quant_predicate)
    mx.eval(model.parameters())
    return model


def seconds_a_token(model, tokens, **options):
    cache = model.make_cache()
    took = []
    for _ in range(tokens):
        begin = time.perf_counter()
        mx.eval(model(mx.array([[7]]), cache=cache, **options))
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


PRECISIONS = (
    "float32",
    "float16",
    "float32, 8 bits",
    "float32, 4 bits",
    "float16, 8 bits",
    "float16, 4 bits",
)


def speed(threads):
    """Of each precision: megabytes that a token reads, seconds here, seconds by MLX's own product."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    made = {precision: at(precision) for precision in PRECISIONS}
    ours = {precision: [] for precision in made}
    by_mlx = {precision: [] for precision in made if "bits" in precision}
    for turn in range(-1, 7):
        for precision, model in made.items():
            time.sleep(PAUSE)
            took = seconds_a_token(model, 5)
            if turn >= 0:
                ours[precision].append(took)
            if precision in by_mlx and 0 <= turn < 2:
                by_mlx[precision].append(seconds_a_token(model, 2, backend="ops"))
    read = {}
    for precision, model in made.items():
        arrays = tree_flatten(model.parameters())
        read[precision] = sum(a.nbytes for path, a in arrays if "embed_tokens" not in path) / 1e6
    return read, ours, by_mlx


def measure_speed():
    rows = []
    for threads in (1, 2):
        read, ours, by_mlx = speed(threads)
        for precision in PRECISIONS:
            allowed = min(ours["float32"]) * read[precision] / read["float32"]
            here = ours[precision]
            rows.append(
                (
                    threads,
                    precision,
                    f"{read[precision]:.0f}",
                    f"{1e3 * statistics.median(by_mlx[precision]):.1f}" if precision in by_mlx else "",
                    f"{1e3 * statistics.median(here):.2f}",
                    f"{1e3 * min(here):.2f}",
                    f"{1e3 * allowed:.2f}",
                    f"{allowed / min(here):.2f}",
                )
            )
            print(*rows[-1], sep=" | ", flush=True)
    caption = (
        "Milliseconds a token, one sequence, a call of the model; d = 1024, 4 layers, vocabulary 32000 (116M "
        "parameters), groups of 64. Each figure is of 7 rounds in which all take turns, a round's the median "
        "of 5 tokens; MLX's own quantized product, 2 rounds. \"Bytes allow\": float32's fastest round, times "
        "the megabytes that a token reads over float32's."
    )
    header = [
        "threads",
        "weights",
        "MB a token",
        "MLX's product",
        "median",
        "fastest",
        "bytes allow",
        "of that",
    ]
    write_results("quantized-decode", caption, header, rows)


def measure_perplexity():
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true", help="milliseconds a token instead of perplexity")
    (measure_speed if parser.parse_args().speed else measure_perplexity)()


if __name__ == "__main__":
    main()
