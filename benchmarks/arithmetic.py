"""What a token and a prompt cost a GPU, by arithmetic: launches, bytes, and the time that these alone take.

python benchmarks/arithmetic.py [--write]      prints a table, or writes results/arithmetic-*.md

Nothing is run or measured here. Bytes follow from the shapes; launches are those that
tests/compute/test_layer_ops.py counts in the recorded graph and pins; the GPU's figures are others',
and stand below with their sources.
"""

import argparse
import sys
from pathlib import Path

from machine import table, write_results

from mlx_pararnn import ModelArgs

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/ is not installed

from tests.support.launches import COUNTS

# Memory bandwidth, GB/s: Apple's announcements (M4: 120, M4 Pro: 273, M4 Max: up to 546).
CHIPS = {"M4": 120, "M4 Pro": 273, "M4 Max": 546}
# FLOP/s of the M4's GPU in float32 matrix products, measured by arXiv 2502.05317.
M4_FLOPS = 2.9e12
# Seconds a launch: a chain of 3,200 tiny dependent kernels took 8.8 ms through MLX on an M3 Ultra (issue 4521
# of MLX on GitHub).
LAUNCH = 8.8e-3 / 3200
OUTSIDE = 2  # of the layers: the first norm and the head
PROMPT = 2048  # generate_step's piece
BYTES = {"float16": 2, "4 bits": 4.5 / 8}  # affine quantization: a scale and a bias for each 64 weights


def weights(args):
    """(in the layers' matrix products, in the head)."""
    D, I = args.hidden_size, args.intermediate_size  # noqa: E741
    layer = 2 * D * D + 3 * D * D // args.num_heads + D * D + 3 * D * I
    return args.num_hidden_layers * layer, args.vocab_size * D


def activations(args):
    """Numbers that a prompt token reads and writes beside the weights, each primitive from memory to memory.

    The recurrence reads its gates once: that its sweeps find them in the cache again is the kernel's design.
    """
    sums_and_norms, projections, bias = 2 * 4, (1 + 2) + (1 + 3) + (1 + 1), 3 + 3
    convolution, cell, gated_norm, ends_of_mlp = 2, 3 + 1, 3, 2 + 1
    inside = sums_and_norms + projections + bias + convolution + cell + gated_norm + ends_of_mlp
    mlp = 2 + 3 + 1  # gate and up, SwiGLU, down
    return args.num_hidden_layers * (inside * args.hidden_size + mlp * args.intermediate_size)


def rows():
    products, per_token, per_prompt, _ = COUNTS["gru"]
    for preset in ("400m", "1b", "2.9b", "7b"):
        args = ModelArgs.preset(preset)
        in_layers, in_head = weights(args)
        launches = args.num_hidden_layers * (products + per_token) + OUTSIDE
        of_prompt = args.num_hidden_layers * (products + per_prompt)
        # float32 state and three inputs of the convolution, read and written
        state = 2 * args.num_hidden_layers * args.hidden_size * (4 + 3 * 2)
        for name, size in BYTES.items():
            read = (in_layers + in_head) * size + state
            yield (
                preset,
                name,
                launches,
                f"{1e3 * launches * LAUNCH:.2f}",
                f"{read / 1e6:.0f}",
                *(
                    f"{1 / max(read / bandwidth / 1e9, launches * LAUNCH):.0f}"
                    for bandwidth in CHIPS.values()
                ),
                f"{of_prompt / PROMPT:.2f}",
                f"{(activations(args) * 2 + in_layers * size / PROMPT) / 1e6:.1f}",
                f"{2 * in_layers / 1e9:.2f}",
                f"{M4_FLOPS / (2 * in_layers):.0f}",
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    header = [
        "preset, GRU",
        "weights",
        "launches a token",
        "ms for them",
        "MB read a token",
        *(f"bound on {chip}, tokens/s" for chip in CHIPS),
        "launches a prompt token",
        "MB a prompt token",
        "GFLOP a prompt token",
        "bound on M4, prompt tokens/s",
    ]
    found = list(rows())
    print(*table(header, found), sep="\n")
    if args.write:
        write_results(
            "arithmetic",
            "**Arithmetic: no GPU has been measured.** A token reads every weight once and launches each "
            "primitive once; its bound is the longer of reading at the chip's announced bandwidth (M4: 120, "
            "M4 Pro: 273, M4 Max: 546 GB/s) and launching at "
            f"{1e6 * LAUNCH:.2f} microseconds a dependent kernel (MLX issue 4521: 3,200 of them in 8.8 ms on "
            f"an M3 Ultra). A prompt is read in pieces of {PROMPT} tokens; its activations are counted in "
            f"float16, its bound at the {M4_FLOPS / 1e12} TFLOP/s that arXiv 2502.05317 measured for float32 "
            "products on an M4. Launches as pinned by tests/compute/test_layer_ops.py, plus the first norm "
            "and the head.",
            header,
            found,
            measured=False,
        )


if __name__ == "__main__":
    main()
