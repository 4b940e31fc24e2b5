"""What weights of less than 32 bits cost on a CPU: a prompt and tokens, with our products and with MLX's own.

python benchmarks/precision.py [--tokens 128] [--write]      about five minutes

The model is the one of must.py. "MLX's own" is backend "ops" with every linear layer called as it is, so
float16 there is MLX's float16 product. --write writes results/precision-*.md.
"""

import argparse
import os

import models

# isort: split
import mlx.core as mx
import mlx.nn as nn
from machine import table, write_results
from timing import alternating

from mlx_pararnn.compute import matrix_products
from mlx_pararnn.tools.benchmark import decode, in_dtype, read_prompt

PRECISIONS = ("float32", "float16", "bfloat16", "8 bits", "4 bits")
GENERATED = 16
ROUNDS = 5


def at(precision):
    model = models.pararnn()
    if not precision.endswith("bits"):
        return in_dtype(model, precision)
    nn.quantize(model, group_size=64, bits=int(precision[0]))
    mx.eval(model.parameters())
    return model


def by_mlx_alone(run):
    """`run` on plain MLX with its own products."""

    def timed():
        ours, matrix_products.linear = (
            matrix_products.linear,
            lambda module, x: getattr(module, "as_linear", module)(x),
        )
        os.environ["MLX_PARARNN_BACKEND"] = "ops"
        try:
            return run()
        finally:
            matrix_products.linear = ours
            del os.environ["MLX_PARARNN_BACKEND"]

    return timed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="length of the prompt")
    parser.add_argument("--write", action="store_true", help="write the table to results/precision-*.md")
    args = parser.parse_args()
    rows = []
    for precision in PRECISIONS:
        model = at(precision)

        def prompt(model=model):
            return read_prompt(model, args.tokens)["first_token_milliseconds"] / 1000

        def token(model=model):
            return decode(model, model.make_cache(), GENERATED)["milliseconds_per_token"] / 1000

        runs = {"prompt": prompt, "token": token}
        took = alternating(runs | {f"{name}, MLX": by_mlx_alone(run) for name, run in runs.items()}, ROUNDS)
        rows.append(
            (
                precision,
                f"{args.tokens / took['prompt, MLX']:.0f}",
                f"{args.tokens / took['prompt']:.0f}",
                f"{1 / took['token, MLX']:.1f}",
                f"{1 / took['token']:.1f}",
            )
        )
        print(rows[-1], flush=True)
    header = ["weights", "prompt, MLX's own", "prompt", "generating, MLX's own", "generating"]
    print(*table(header, rows), sep="\n")
    if args.write:
        caption = (
            "Tokens a second; d = 1024, 4 layers, vocabulary 32000, one sequence, through mlx_lm's "
            f"generate_step: a prompt of {args.tokens} tokens, and {GENERATED} generated tokens. "
            f"Medians of {ROUNDS} rounds in which both take turns. Quantized in groups of 64, from float32."
        )
        write_results("precision", caption, header, rows)


if __name__ == "__main__":
    main()
