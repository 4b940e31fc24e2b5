"""What the project asks of itself on a CPU, and what was measured: one line a target, met or missed.

python benchmarks/must.py [--quick] [--only PART]...      about twelve minutes

The model: d = 1024, 4 layers, vocabulary 32000, float32, everything through MLX-LM's generate_step. PART is
one of prefill, decode, memory, start. Writes results/must-*.md, prefill-*.md, decode-*.md and decode-*.svg.
Needs pip install -e ".[bench]".
"""

import argparse
import ctypes
import subprocess
import sys
import time
from typing import NamedTuple

import models

# isort: split
import mlx.core as mx
import numpy as np
from machine import result_file, table, write_results
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from timing import alternating

from mlx_pararnn.tools.benchmark import decode, read_prompt, resident_bytes
from mlx_pararnn.tools.plot import Panel, draw

OURS, LLAMA, MAMBA2 = "mlx-pararnn", "mlx-lm llama", "mlx-lm mamba2"
PRODUCTS = "matrix products alone"
VECTORS, SGEMV = "matrix-vector products alone, MLX", "matrix-vector products alone, OpenBLAS's sgemv"
PARTS = ("prefill", "decode", "memory", "start")
STEP = 2048  # generate_step's prefill_step_size


class Sizes(NamedTuple):
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int  # generated to time decoding
    repeats: int
    long_prompt: int
    short_prompt: int
    conversation: int  # tokens over which the resident memory may not grow
    starts: int


FULL = Sizes((1024, 4096), (0, 1024, 8192, 32768), 32, 5, 100_000, 4_000, 20_000, 21)
QUICK = Sizes((128, 256), (0, 256), 8, 2, 2_000, 500, 300, 3)


class Line(NamedTuple):
    """One target: `value` is at least, or at most, `target`."""

    what: str
    target: float
    value: float
    at_most: bool = False

    def row(self):
        met = self.value <= self.target if self.at_most else self.value >= self.target
        sign = "at most" if self.at_most else "at least"
        return self.what, f"{sign} {self.target:g}", f"{self.value:.3g}", "met" if met else "**missed**"


def products(model, tokens):
    """A function that makes the matrix products, and no others, by which `model` reads a prompt as
    generate_step has it read: in pieces, without what the last layer needs for the last token alone.
    """
    pieces = [min(STEP, tokens - 1 - begin) for begin in range(0, tokens - 1, STEP)]
    widths = (models.D, models.INTERMEDIATE)
    inputs = {(rows, width): mx.random.normal((1, rows, width)) for rows in {1, *pieces} for width in widths}
    mx.eval(inputs)

    def of_layer(layer, rows, all_of_it):
        x = inputs[rows, models.D]
        by_heads = x.reshape(rows, models.HEADS, -1).swapaxes(0, 1)
        yield layer.mixer.in_proj(x)
        yield layer.mixer.cell.input_proj(by_heads)
        if all_of_it:
            yield layer.mixer.out_proj(x)
            yield layer.mlp.gate_proj(x)
            yield layer.mlp.up_proj(x)
            yield layer.mlp.down_proj(inputs[rows, models.INTERMEDIATE])

    def run():
        for rows in pieces:
            for layer in model.layers:
                mx.eval([*of_layer(layer, rows, layer is not model.layers[-1])])
        last = [product for layer in model.layers for product in of_layer(layer, 1, True)]
        mx.eval(last, model.lm_head(inputs[1, models.D]))

    return run


def sgemv(model):
    """A function that makes the matrix-vector products of one token by OpenBLAS's sgemv, which MLX does not
    call; None where there is no OpenBLAS.
    """
    try:
        function = ctypes.CDLL("libopenblas.so.0").cblas_sgemv
    except (OSError, AttributeError):
        return None
    pointer, number, whole = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
    function.argtypes = [whole] * 4 + [number, pointer, whole, pointer, whole, number, pointer, whole]
    linears = [model.lm_head]
    for layer in model.layers:
        linears += [layer.mixer.in_proj, layer.mixer.cell.input_proj, layer.mixer.out_proj]
        linears += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    matrices = [
        matrix
        for linear in linears
        for matrix in np.array(linear.weight).reshape(-1, *linear.weight.shape[-2:])
    ]
    x, y = np.ones(models.INTERMEDIATE, np.float32), np.empty(models.VOCABULARY, np.float32)

    def run():
        for matrix in matrices:
            rows, width = matrix.shape
            places = matrix.ctypes.data, x.ctypes.data, y.ctypes.data
            function(101, 111, rows, width, 1, places[0], width, places[1], 1, 0, places[2], 1)

    return run


def measure_prefill(sizes):
    import torch_peers

    ours, llama, mamba2 = models.pararnn(), models.llama(), models.mamba2()
    lines, rows = [], []
    for tokens in sizes.prompts:

        def read(model, tokens=tokens):
            return lambda: read_prompt(model, tokens)["first_token_milliseconds"] / 1000

        runs = {
            PRODUCTS: products(ours, tokens),
            OURS: read(ours),
            **{
                f"pararnn-torch, {solver}": torch_peers.prefill("gru", solver, tokens)
                for solver in torch_peers.SOLVERS
            },
            LLAMA: read(llama),
            MAMBA2: read(mamba2),
        }
        # the slow ones among the peers run once or twice at full length
        took = alternating(runs, sizes.repeats, warm=tokens == sizes.prompts[0])
        torch_best = min(seconds for name, seconds in took.items() if name.startswith("pararnn-torch"))
        for text, target, peer in (
            ("of the speed of matrix products alone", 0.75, took[PRODUCTS]),
            ("times pararnn-torch's best", 1.5, torch_best),
            ("times mlx-lm's llama", 4, took[LLAMA]),
            ("times mlx-lm's mamba2", 4, took[MAMBA2]),
        ):
            lines.append(Line(f"prefill, T = {tokens}: {text}", target, peer / took[OURS]))
        rows += [
            (tokens, name, f"{1000 * seconds:.0f}", f"{tokens / seconds:.0f}", f"{seconds / took[OURS]:.2f}")
            for name, seconds in took.items()
        ]
    header = ["T", "who", "ms to the first token", "tokens/s", "time / ours"]
    return lines, header, rows


def measure_decode(sizes):
    """Returns (lines, header, rows, {who: [(context, tokens/s)]})."""
    ours, llama, mamba2 = models.pararnn(), models.llama(), models.mamba2()
    after = _caches_of_ours(ours, sizes.contexts)
    keys = mx.random.normal((1, 16, max(sizes.contexts), 64))
    short = mx.zeros((1, 16), mx.int32)

    def decode_ours(context):
        return decode(ours, [cache.extract(0) for cache in after[context]], sizes.tokens)

    def decode_llama(context):
        caches = [KVCache() for _ in llama.layers]
        for cache in caches if context else ():
            # filled, not read: attention's work does not depend on what the keys and values are
            cache.keys, cache.values = (mx.array(keys[:, :, :context]) for _ in range(2))
            cache.offset = context
            mx.eval(cache.keys, cache.values)
        return decode(llama, caches, sizes.tokens)

    def decode_mamba2(context):
        caches = mamba2.make_cache()
        if context:  # its state has the same size whatever it has read
            mamba2(short, cache=caches)
            mx.eval([cache.state for cache in caches])
        return decode(mamba2, caches, sizes.tokens)

    def repeated(once):
        def run():
            begin = time.perf_counter()
            for _ in range(sizes.tokens):
                once()
            return (time.perf_counter() - begin) / sizes.tokens

        return run

    decoders = {OURS: decode_ours, LLAMA: decode_llama, MAMBA2: decode_mamba2}
    runs = {
        (name, context): lambda run=run, context=context: run(context)["milliseconds_per_token"] / 1000
        for context in sizes.contexts
        for name, run in decoders.items()
    }
    limits = {VECTORS: products(ours, 1)} | ({SGEMV: blas} if (blas := sgemv(ours)) else {})
    runs |= {(name, 0): repeated(once) for name, once in limits.items()}
    took = alternating(runs, sizes.repeats, limit=120)
    first, last = sizes.contexts[0], sizes.contexts[-1]
    lines = [
        *(Line(f"decode: of the speed of {name}", 0.9, took[name, 0] / took[OURS, first]) for name in limits),
        Line("decode, context 0: of llama's speed", 1, took[LLAMA, first] / took[OURS, first]),
        *(
            Line(
                f"decode, context {context}: times llama", target, took[LLAMA, context] / took[OURS, context]
            )
            for context, target in ((8192, 1.5), (32768, 3))
            if context in sizes.contexts
        ),
        Line("decode, context 0: times mamba2", 1.2, took[MAMBA2, first] / took[OURS, first]),
        Line(
            f"decode: time a token at {last} over that at 0", 1.03, took[OURS, last] / took[OURS, first], True
        ),
    ]
    rows = [
        (name, *(f"{1 / took[name, c]:.1f}" if (name, c) in took else "" for c in sizes.contexts))
        for name in (*decoders, *limits)
    ]
    curves = {
        f"{name} ({models.parameters(model) / 1e6:.0f}M parameters)": [
            (c, 1 / took[name, c]) for c in sizes.contexts
        ]
        for name, model in ((OURS, ours), (LLAMA, llama), (MAMBA2, mamba2))
    }
    curves |= {name: [(c, 1 / took[name, 0]) for c in (first, last)] for name in limits}
    return lines, ["tokens/s at context", *map(str, sizes.contexts)], rows, curves


def _caches_of_ours(model, contexts):
    """The caches after each of `contexts`, really read."""
    caches, read, found = model.make_cache(), 0, {}
    for context in contexts:
        while read < context:
            n = min(STEP, context - read)
            model(mx.random.randint(0, models.VOCABULARY, (1, n)), cache=caches)
            mx.eval([cache.state for cache in caches])
            read += n
        found[context] = [cache.extract(0) for cache in caches]
    return found


def measure_memory(sizes):
    """In processes of their own, side by side: nothing here is timed."""
    commands = {
        "long": ("prompt", sizes.long_prompt),
        "short": ("prompt", sizes.short_prompt),
        "conversation": ("conversation", sizes.conversation),
    }
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child", what, str(n)], stdout=subprocess.PIPE, text=True
        )
        for name, (what, n) in commands.items()
    }
    answers = {}
    for name, process in processes.items():
        text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the measurement of memory ({name}) failed")
        answers[name] = [int(word) for word in text.split()]
    long, short, conversation = answers["long"], answers["short"], answers["conversation"]
    ratio = sizes.long_prompt, sizes.short_prompt
    return [
        Line(
            "prompt of {:,} tokens: MLX's peak memory over that of {:,}".format(*ratio),
            1.1,
            long[0] / short[0],
            True,
        ),
        Line(
            "prompt of {:,} tokens: peak RssAnon over that of {:,}".format(*ratio),
            1.1,
            long[1] / short[1],
            True,
        ),
        Line(
            f"resident memory over {sizes.conversation:,} generated tokens: largest over first",
            1.01,
            max(conversation) / conversation[0],
            True,
        ),
    ]


def child(what, n):
    """What measure_memory starts: prints bytes."""
    model = models.pararnn()
    if what == "prompt":
        peaks = []
        prompt = mx.random.randint(0, models.VOCABULARY, (n,))
        steps = generate_step(
            prompt,
            model,
            max_tokens=2,
            prompt_progress_callback=lambda done, total: peaks.append(resident_bytes()),
        )
        list(steps)
        print(mx.get_peak_memory(), max(peaks))
        return
    every = max(n // 20, 1)
    for count, _ in enumerate(generate_step(mx.array([1]), model, max_tokens=n), start=1):
        if count % every == 0:
            print(resident_bytes(), flush=True)


def measure_start(sizes):
    def start(*arguments):
        return lambda: (
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL) and None
        )

    took = alternating(
        {
            "typer": start("-c", "import typer"),
            "help": start("-m", "mlx_pararnn.cli.app", "--help"),
            "mlx": start("-c", "import mlx.core"),
            "pararnn": start("-c", "import mlx_pararnn"),
        },
        sizes.starts,
    )
    return [
        Line("mlx-pararnn --help: time over `import typer`", 1.5, took["help"] / took["typer"], True),
        Line("import mlx_pararnn: time over `import mlx.core`", 1.2, took["pararnn"] / took["mlx"], True),
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it works; writes nothing"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; the others' lines stay")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]))
        return
    sizes = QUICK if args.quick else FULL
    write = (lambda *_: None) if args.quick else write_results
    about = (
        "d = 1024, 4 layers, vocabulary 32000, float32, one sequence, through mlx_lm's generate_step; "
        f"medians of up to {sizes.repeats} rounds in which all take turns, each after a pause, as "
        "many threads for everyone."
    )
    lines = []
    for part in args.only or PARTS:
        begin = time.perf_counter()
        if part == "prefill":
            found, header, rows = measure_prefill(sizes)
            print(*table(header, rows), sep="\n")
            write("prefill", f"{about} {_sizes_of_models()}", header, rows)
        elif part == "decode":
            found, header, rows, curves = measure_decode(sizes)
            print(*table(header, rows), sep="\n")
            write("decode", f"{about} {_sizes_of_models()} {_CONTEXTS}", header, rows)
            if not args.quick:
                panel = Panel(
                    "Generating, d = 1024, 4 layers, float32", "context, tokens", "tokens/s", curves
                )
                draw([panel], result_file("decode", "svg"))
        else:
            found = measure_memory(sizes) if part == "memory" else measure_start(sizes)
        lines += found
        print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    header, rows = ["what", "target", "measured", ""], [line.row() for line in lines]
    print(*table(header, rows), sep="\n")
    write("must", f"{about} The parts may be of several runs. {_sizes_of_models()}", header, _whole(rows))


def _whole(rows):
    """`rows`, and of the parts that did not run those that today's result has."""
    file = result_file("must", "md")
    lines = file.read_text().splitlines() if file.exists() else []
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if " at " in line]
    before = {row[0]: row for row in cells if len(row) == 4}
    return [*(before | {row[0]: row for row in rows}).values()]


_CONTEXTS = (
    "The context was really read by mlx-pararnn; llama's keys and values are random numbers in its cache, "
    "and mamba2's state, which is of one size, is that of 16 tokens."
)


def _sizes_of_models():
    counts = {
        name: models.parameters(make())
        for name, make in ((OURS, models.pararnn), (LLAMA, models.llama), (MAMBA2, models.mamba2))
    }
    return "Parameters: " + ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items()) + "."


if __name__ == "__main__":
    main()
