"""A training step on a CPU: forward, cross entropy, backward, AdamW; beside pararnn-torch and its products.

python benchmarks/training.py [--sizes large,small] [--rounds 3] [--write]
python benchmarks/training.py --profile [--sizes large] [--backends ops,auto] [--write]

large is the model of must.py (d = 1024, 4 layers, vocabulary 32000) on 1 x 1024 tokens, long the same on
1 x 2048, small a model for a laptop (d = 192, 3 layers, vocabulary 300) on 32 x 256. `lm lora` is MLX-LM's
training as that command runs it: adapters of rank 8 at every layer, Adam. Everyone has a process of its own,
all take turns, each in float32 and with as many threads. The products alone are those of the forward pass,
timed, three times: each has two in the backward pass. --profile times every piece of a step alone, forward
and with its gradients, times how often a step has it. --write writes results/training-*.md or
training-profile-*.md. Needs pip install -e ".[bench]".
"""

import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import models

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from machine import table, write_results
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from must import Line
from timing import PAUSE

from mlx_pararnn.cells import get_cell
from mlx_pararnn.cli.lm_training import run_training
from mlx_pararnn.compute import layer_ops, matrix_products
from mlx_pararnn.compute.freed_memory import keep_freed_memory
from mlx_pararnn.compute.recurrence import recurrence


class Case(NamedTuple):
    sizes: models.Sizes
    B: int
    T: int
    rate: float = 3e-4

    def batch(self):
        ids = mx.random.randint(0, self.sizes.vocabulary, (self.B, self.T + 1), key=mx.random.key(0))
        return ids[:, :-1], ids[:, 1:]


CASES = {
    "large": Case(models.LARGE, 1, 1024),
    "long": Case(models.LARGE, 1, 2048),
    "small": Case(models.SMALL, 32, 256),
}
OURS, PRODUCTS = "mlx-pararnn", "matrix products alone, three times the forward's"
OURS_ALONE = "mlx-pararnn, without the optimizer"
LORA = "mlx-pararnn, `lm lora`"
TORCH = {"pararnn-torch, sequential": "sequential", "pararnn-torch, Newton": "Newton"}


def our_step(case, optimizer=True):
    """A function that makes one step, as mlx_pararnn/training does on a CPU: its update alone is compiled."""
    model, update = models.pararnn(sizes=case.sizes).train(), optim.AdamW(case.rate)
    update.init(model.trainable_parameters())
    tokens, targets = case.batch()
    gradients_of = nn.value_and_grad(model, lambda m: layer_ops.cross_entropy(m(tokens), targets).mean())
    state = [model.state, update.state]

    def apply(gradients):
        update.update(model, gradients)

    compiled = mx.compile(apply, inputs=state, outputs=state)

    def run():
        loss, gradients = gradients_of(model)
        if optimizer:
            compiled(gradients)
            mx.eval(loss, state)
        else:
            mx.eval(loss, gradients)

    return run


def products(case):
    """A function that makes the forward pass's matrix products, and gives three times their seconds."""
    keep_freed_memory()
    model, rows, heads = models.pararnn(sizes=case.sizes), case.B * case.T, case.sizes.heads
    x = mx.random.normal((rows, case.sizes.d))
    wide = mx.random.normal((rows, case.sizes.intermediate))
    by_heads = x.reshape(rows, heads, -1).swapaxes(0, 1)
    mx.eval(x, wide)

    def run():
        begin = time.perf_counter()
        for layer in model.layers:
            mixer, mlp = layer.mixer, layer.mlp
            mx.eval(mixer.in_proj(x), mixer.cell.input_proj(by_heads), mixer.out_proj(x))
            mx.eval(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj(wide))
        mx.eval(model.lm_head(x))
        return 3 * (time.perf_counter() - begin)

    return run


def torch_step(case, solver):
    import torch_peers

    tokens, targets = (numbers.tolist() for numbers in case.batch())
    return torch_peers.training_step("gru", solver, tokens, targets, case.sizes, case.rate)


def lora(case):
    """Make a step of `lm lora` whenever a line comes; never returns."""
    output, tokens = sys.stdout, case.batch()[0]

    class Answering(TrainingCallback):
        def on_train_loss_report(self, report):
            if report["iteration"] > 2:  # the first two: until all memory is there
                answer(1 / report["iterations_per_second"], output)
            if report["iteration"] > 1 and not sys.stdin.readline():
                raise SystemExit

    model = models.pararnn(sizes=case.sizes)
    model.freeze()
    linear_to_lora_layers(model, case.sizes.layers, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    rows = [([*row, 0], 0) for row in tokens.tolist()]  # tokens and where those that count begin
    args = TrainingArgs(
        batch_size=case.B,
        iters=10**9,
        steps_per_report=1,
        steps_per_save=10**9,
        max_seq_length=case.T + 1,
    )
    options = {"model": model, "optimizer": optim.Adam(case.rate), "train_dataset": rows, "args": args}
    with contextlib.redirect_stdout(sys.stderr):  # MLX-LM tells its losses
        run_training(train, options | {"training_callback": Answering()})


def answer(seconds, output):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(seconds, peak, file=output, flush=True)


def child(who, name):
    """Make a step whenever a line comes, and print its seconds and the process's peak in MB."""
    case = CASES[name]
    if who == LORA:
        lora(case)
    if who in TORCH:
        run = torch_step(case, TORCH[who])
    else:
        run = products(case) if who == PRODUCTS else our_step(case, optimizer=who == OURS)
        run(), run()  # until all memory is there
    for _ in sys.stdin:
        begin = time.perf_counter()
        took = run()
        answer(time.perf_counter() - begin if took is None else took, sys.stdout)


def measure(name, rounds):
    """Median seconds of a step and peak MB of everyone, who: (seconds, MB)."""
    processes = {
        who: subprocess.Popen(
            [sys.executable, __file__, "--child", who, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in (PRODUCTS, OURS, OURS_ALONE, LORA, *TORCH)
    }
    seconds, peaks = {who: [] for who in processes}, {}
    for turn in range(-1, rounds):  # the first does not count
        for who, process in processes.items():
            time.sleep(PAUSE)
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline().split()
            if not line:
                raise SystemExit(f"{who} ended")
            peaks[who] = int(line[1])
            if turn >= 0:
                seconds[who].append(float(line[0]))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {who: (statistics.median(values), peaks[who]) for who, values in seconds.items()}


def steps(name, rounds, write):
    """A table of one size: everyone's step, and the two targets."""
    case, took = CASES[name], measure(name, rounds)
    ours = took[OURS][0]
    lines = [
        Line("of the speed of matrix products alone", 0.6, took[PRODUCTS][0] / ours),
        Line("times pararnn-torch's faster", 2, min(took[who][0] for who in TORCH) / ours),
    ]
    rows = [
        (
            who,
            f"{1000 * seconds:.0f}",
            f"{case.B * case.T / seconds:.0f}",
            f"{seconds / ours:.2f}",
            "" if who == PRODUCTS else f"{peak:,}",
        )
        for who, (seconds, peak) in took.items()
    ]
    header = ["who", "ms a step", "tokens/s", "time / ours", "peak MB of the process"]
    targets = [f"{what}: {value}, {target} ({met})" for what, target, value, met in map(Line.row, lines)]
    print(f"{name}, {case.B} x {case.T}", *table(header, rows), *targets, sep="\n")
    if write:
        about = (
            f"A training step on {case.B} x {case.T} tokens, GRU, float32: forward, cross entropy, backward, "
            f"AdamW (torch's fused one). {_sizes(case)} Medians of {rounds} steps, everyone in a process of "
            "its own, taking turns. "
        )
        write_results(f"training-{name}", about + "; ".join(targets) + ".", header, rows)


def _sizes(case):
    d, layers, vocabulary, _, _ = case.sizes
    return f"d = {d}, {layers} layers, vocabulary {vocabulary}."


def pieces(case):
    """name: (how often a step has it, function of a backend, shapes of what has a gradient)."""
    (d, layers, vocabulary, wide, heads), B, T = case.sizes, case.B, case.T
    layer = models.pararnn(sizes=case.sizes).layers[0]
    tokens, targets = case.batch()
    state, window, cell = (B, T, d), mx.zeros((B, 3, d)), get_cell("gru")

    def linear(module):
        def call(x, weight):
            module.weight = weight
            return matrix_products.linear(module, x)

        return lambda _: call

    def projection(x, weight, bias):
        by_heads = linear(layer.mixer.cell.input_proj)("")(x.reshape(B * T, heads, -1).swapaxes(0, 1), weight)
        return (by_heads + bias[:, None]).reshape(heads, B, T, 3, -1).swapaxes(0, 1)

    def conv(backend):
        return lambda x, w, b: layer_ops.conv_silu(x, window, w, b, backend=backend)[0]

    return {
        "in_proj": (layers, linear(layer.mixer.in_proj), [state, (2 * d, d)]),
        "gates' projection and bias": (
            layers,
            lambda _: projection,
            [state, (heads, 3 * d // heads, d // heads), (heads, 3 * d // heads)],
        ),
        "out_proj": (layers, linear(layer.mixer.out_proj), [state, (d, d)]),
        "gate_proj, up_proj": (2 * layers, linear(layer.mlp.up_proj), [state, (wide, d)]),
        "down_proj": (layers, linear(layer.mlp.down_proj), [(B, T, wide), (d, wide)]),
        "head": (1, linear(nn.Linear(d, vocabulary, bias=False)), [state, (vocabulary, d)]),
        "embedding": (1, lambda _: lambda weight: weight[tokens], [(vocabulary, d)]),
        "recurrence": (
            layers,
            lambda backend: lambda p, u: recurrence(cell, 0.1 * p, u, backend=backend)[0],
            [(3, d), (B, heads, T, 3, d // heads)],
        ),
        "convolution + SiLU": (layers, conv, [state, (d, 4), (d,)]),
        "gated RMSNorm": (
            layers,
            lambda backend: lambda *a: layer_ops.gated_norm(*a, 1e-6, backend=backend),
            [state, state, (d,)],
        ),
        "RMSNorm": (
            2 * layers + 1,
            lambda backend: lambda *a: layer_ops.rms_norm(*a, 1e-6, backend=backend),
            [state, (d,)],
        ),
        "SwiGLU": (
            layers,
            lambda backend: lambda *a: layer_ops.swiglu(*a, backend=backend),
            [(B, T, wide), (B, T, wide)],
        ),
        "main branch and gate split": (
            layers,
            lambda _: lambda x: mx.add(*mx.split(x, 2, axis=-1)),
            [(B, T, 2 * d)],
        ),
        "residual sums": (2 * layers, lambda _: mx.add, [state, state]),
        "cross entropy": (
            1,
            lambda backend: lambda x: layer_ops.cross_entropy(x, targets, backend=backend),
            [(B, T, vocabulary)],
        ),
    }


def profile(name, backends, rounds, write):
    """A table of milliseconds: every piece's forward, and forward with gradients, for each backend."""
    case, rows, sums = CASES[name], [], [0.0] * (2 * len(backends))
    layer_ops.cross_entropy(mx.zeros((1, 1 << 15)), mx.zeros(1, mx.int32))
    keep_freed_memory()
    for label, (count, make, shapes) in pieces(case).items():
        arrays = [mx.random.normal(shape) for shape in shapes]
        values = []
        for backend in backends:
            function = make("cpu" if backend == "auto" else backend)
            slope = mx.random.normal(function(*arrays).shape)
            mx.eval(arrays, slope)

            def forward(function=function, arrays=arrays):
                mx.eval(function(*arrays))

            def both(function=function, arrays=arrays, slope=slope):
                mx.eval(mx.vjp(lambda *inputs: [function(*inputs)], arrays, [slope]))

            values += [1000 * count * _median(run, rounds) for run in (forward, both)]
        rows.append((f"{label}, {count} times", *values))
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    for optimizer in ("as it is", "compiled"):
        # three runs until its memory is there
        values = [1000 * _median(_update(case, optimizer == "compiled"), rounds, warm=3)] * len(backends)
        rows.append((f"AdamW's update, {optimizer}", *(v for value in values for v in ("", value))))
    rows.sort(key=lambda row: -row[-1])
    rows.append(("sum without AdamW", *sums))
    header = ["milliseconds", *(f"{what}, {b}" for b in backends for what in ("forward", "with gradients"))]
    shown = [(label, *(v if v == "" else f"{v:.1f}" for v in values)) for label, *values in rows]
    print(*table(header, shown), sep="\n")
    if write:
        about = (
            f"Every piece of a training step alone, times how often the step has it, on {case.B} x {case.T} "
            f"tokens. {_sizes(case)} GRU, float32; medians of {rounds}; freed memory is kept. ops is plain "
            "MLX, auto what a user gets."
        )
        write_results(f"training-profile-{name}", about, header, shown)


def _update(case, compiled):
    """A function that makes AdamW's update."""
    model, update = models.pararnn(sizes=case.sizes), optim.AdamW(case.rate)
    update.init(model.trainable_parameters())
    gradients, state = model.trainable_parameters(), [model.state, update.state]

    def apply(gradients):
        update.update(model, gradients)

    apply = mx.compile(apply, inputs=state, outputs=state) if compiled else apply

    def run():
        apply(gradients)
        mx.eval(state)

    return run


def _median(run, rounds, warm=1):
    for _ in range(warm):
        run()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="large,small", help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="the pieces of a step, of the first size")
    parser.add_argument("--backends", default="ops,auto", help="for --profile")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.sizes.split(",")
    if args.child:
        child(*args.child)
    elif args.profile:
        profile(names[0], args.backends.split(","), args.rounds, args.write)
    else:
        for name in names:
            steps(name, args.rounds, args.write)


if __name__ == "__main__":
    main()
