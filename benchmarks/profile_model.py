"""Where the time of a prompt and of a token goes: every piece's own time, and the whole.

python benchmarks/profile_model.py [--tokens 1024] [--cell gru] [--backends ops,auto] [--write]

The model is the one of must.py: d = 1024, 4 layers, vocabulary 32000, float32; the prompt without the head,
which only its last token needs. The backend "ops" is plain MLX, what there was before the kernels; "auto" is
what a user gets. A piece is timed by waiting for its inputs before it starts and for its outputs before it
ends, and what its own pieces took is taken off; the waiting adds some 10 microseconds a piece, which the
first row, the model as it runs, lacks. --write writes results/profile-*.md.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict

import models

# isort: split
import mlx.core as mx
import mlx.nn as nn
from machine import table, write_results

from mlx_pararnn import model as model_file
from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.compute import cpu_token, layer_ops, matrix_products


def sample(logits):
    """The greedy token, as generate_step finds it."""
    logits = logits[:, -1]
    return mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)


WHOLE, SUM = "the model as it runs", "sum of the pieces"
# (owner, attribute, label): a leaf's own pieces are not told apart
LEAVES = (
    (matrix_products, "linear", "matrix products"),
    (matrix_products, "head", "head"),
    (sys.modules[__name__], "sample", "sampling"),
    (cpu_token, "decode", "all layers, one call"),
    (nn.RMSNorm, "__call__", "RMSNorm"),
    (layer_ops, "rms_norm", "RMSNorm"),
    (nn.Embedding, "__call__", "embedding"),
    (layer_ops, "solve", "recurrence"),
    (layer_ops, "conv_silu", "convolution + SiLU"),
    (layer_ops, "gated_norm", "gated RMSNorm"),
    (layer_ops, "swiglu", "SwiGLU"),
    (layer_ops, "decode", "cell step + gated RMSNorm"),
)
BRANCHES = (
    (model_file.CausalConv, "__call__", "convolution + SiLU"),
    (model_file.RecurrentLayer, "run", "bias and layout of the gates"),
    (model_file.GatedConvMixer, "__call__", "masks, cache, Python"),
    (model_file.MLP, "__call__", "masks, cache, Python"),
    (model_file.Layer, "__call__", "residual sums"),
    (model_file.PararnnModel, "read", "masks, cache, Python"),
    (model_file.Model, "__call__", "masks, cache, Python"),
)


class Profile:
    """Within it, `seconds` adds up each label's own time."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._children = [0.0]  # a frame for each piece that is open: what its own pieces took
        self._in_leaf = False

    def __enter__(self):
        self._before = [(owner, name, vars(owner)[name]) for owner, name, _ in LEAVES + BRANCHES]
        for owner, name, label in LEAVES + BRANCHES:
            is_leaf = (owner, name, label) in LEAVES
            setattr(owner, name, self._timed(vars(owner)[name], label, is_leaf))
        return self

    def __exit__(self, *_):
        for owner, name, function in self._before:
            setattr(owner, name, function)

    def _timed(self, function, label, is_leaf):
        def call(*args, **kwargs):
            if self._in_leaf:
                return function(*args, **kwargs)
            mx.eval(_arrays([*args, *kwargs.values()]))
            begin = time.perf_counter()
            self._children.append(0.0)
            self._in_leaf = is_leaf
            try:
                result = function(*args, **kwargs)
                mx.eval(_arrays([result, *args]))  # the arguments again: a cache has been written to
            finally:
                self._in_leaf = False
            took = time.perf_counter() - begin
            self.seconds[label] += took - self._children.pop()
            self._children[-1] += took
            return result

        return call


def _arrays(items):
    found = []
    for item in items:
        if isinstance(item, RecurrentCache):
            found += [array for array in item.cache if array is not None]
        elif isinstance(item, mx.array):
            found.append(item)
        elif isinstance(item, tuple | list):
            found += _arrays(item)
    return found


def profile(run, backends, repeats):
    """{backend: {label: median milliseconds}}; the backends take turns."""
    wholes = {backend: [] for backend in backends}
    pieces = {backend: [] for backend in backends}
    for turn in range(repeats + 1):
        for backend in backends:
            os.environ["MLX_PARARNN_BACKEND"] = "" if backend == "auto" else backend
            begin = time.perf_counter()
            mx.eval(run())
            whole = time.perf_counter() - begin
            with Profile() as profiled:
                mx.eval(run())
            if turn:  # the first is the warm-up
                wholes[backend].append(1000 * whole)
                pieces[backend].append(profiled.seconds)
    times = {}
    for backend in backends:
        labels = pieces[backend][0]
        medians = {label: 1000 * statistics.median(p[label] for p in pieces[backend]) for label in labels}
        times[backend] = {WHOLE: statistics.median(wholes[backend]), SUM: sum(medians.values()), **medians}
    return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--cell", default="gru")
    parser.add_argument("--backends", default="ops,auto")
    parser.add_argument("--repeats", type=int, default=5, help="runs of the prompt; ten times as many tokens")
    parser.add_argument("--write", action="store_true", help="write the table to results/profile-*.md")
    args = parser.parse_args()
    backends = args.backends.split(",")
    model = models.pararnn(args.cell)
    prompt = mx.random.randint(0, models.VOCABULARY, (1, args.tokens))
    prefill = profile(lambda: model.model(prompt, model.make_cache()), backends, args.repeats)
    cache = model.make_cache()
    token = profile(lambda: sample(model(prompt[:, :1], cache=cache)), backends, 10 * args.repeats)
    columns = [times[backend] for times in (prefill, token) for backend in backends]
    labels = sorted({label for times in columns for label in times} - {WHOLE, SUM})
    labels.sort(key=lambda label: -sum(times.get(label, 0) for times in columns[: len(backends)]))
    header = [
        "milliseconds",
        *(f"prompt, {backend}" for backend in backends),
        *(f"token, {backend}" for backend in backends),
    ]
    rows = [
        (label, *(f"{times[label]:.2f}" if label in times else "" for times in columns))
        for label in (WHOLE, *labels, SUM)
    ]
    print(*table(header, rows), sep="\n")
    if args.write:
        write_results(
            "profile",
            f"d = 1024, 4 layers, vocabulary 32000, {args.cell}, float32, one sequence: a prompt of "
            f"{args.tokens} tokens without the head, which only its last token needs, and one token with its "
            f"sampling. Medians of {args.repeats} and {10 * args.repeats} runs, the backends taking turns: "
            "ops is plain MLX, auto what a user gets.",
            header,
            rows,
        )


if __name__ == "__main__":
    main()
