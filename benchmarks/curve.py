"""Held-out loss over tokens and over minutes of training: ParaGRU, MLX-LM's llama and mamba2, pararnn-torch.

python benchmarks/curve.py DATA... [--steps 2000] [--only NAME,...] [--quick]      hours; needs .[bench]

DATA is text, read byte by byte; its last 5% are held out, of which at most 256 pieces are scored. All
models have the size of models.SMALL, 1.4M parameters, and read the same batches in the same order: pieces
of --length bytes, each from an empty state or context. Same recipe for all: AdamW, warm-up and cosine,
clipping, decay of matrices. They train one after the other, each in a process of its own; evaluations are
not in its minutes. MLX-LM's models have their step compiled, as its own training has. Writes
results/curve-*.md and curve-*.svg (not with --quick, which tries that all run).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import models

# isort: split
import mlx.core as mx
import numpy as np
from machine import result_file, table, write_results

from mlx_pararnn.compute.layer_ops import cross_entropy
from mlx_pararnn.tools.plot import Panel, draw
from mlx_pararnn.training.batches import Batch
from mlx_pararnn.training.optimizers import schedule
from mlx_pararnn.training.run import initialize
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Trainer

OURS, TORCH = "mlx-pararnn", "pararnn-torch"
MLX = {
    OURS: lambda: models.pararnn(sizes=models.SMALL),
    "llama": lambda: models.llama(models.SMALL),
    "mamba2": lambda: models.mamba2(models.SMALL, 9, 32),
}
ALL = (*MLX, TORCH)


class Pieces:
    """Random pieces of a text, the same in every process."""

    def __init__(self, text, rows, length):
        self.text, self.rows, self.length = text, rows, length

    def starting_at(self, step):
        while True:
            rng = np.random.default_rng(step)
            begins = rng.integers(0, len(self.text) - self.length, (self.rows, 1))
            yield Batch(self.text[begins + np.arange(self.length + 1)])
            step += 1


def read(paths, rows, length):
    """Pieces to learn from without end, and 256 of those held out, evenly spread, as batches."""
    text = np.concatenate([np.frombuffer(Path(path).read_bytes(), np.uint8) for path in paths])
    held = len(text) * 19 // 20
    count = (len(text) - held - 1) // length
    if held <= length or not count:
        raise SystemExit(f"DATA has {len(text)} bytes; give more than {20 * (length + 1)}")
    scored = np.linspace(0, count - 1, min(count, 256), dtype=int)
    rest = [text[held + k * length : held + (k + 1) * length + 1] for k in scored]
    return Pieces(text[:held], rows, length), [
        Batch(np.stack(rest[k : k + rows])) for k in range(0, len(rest), rows)
    ]


def train_mlx(who, settings, pieces, held_out, tell):
    """Train one of MLX's models, and tell (tokens, seconds, held-out loss)."""
    mx.random.seed(0)
    model = MLX[who]()
    if who == OURS:
        initialize(model)
    seconds, tokens = 0.0, 0

    def report(line):
        nonlocal seconds, tokens
        if "loss" in line:
            seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
            tokens = line["tokens"]
        elif "valid_loss" in line:
            tell(tokens, seconds, line["valid_loss"])

    def losses(model, arrays, states):
        ids = arrays["tokens"]
        return cross_entropy(model(ids[:, :-1]), ids[:, 1:]).sum(), []

    how = {"report": report, "losses": losses, "compiled": who != OURS}
    trainer = Trainer(model.train(), pieces, settings, held_out=held_out, **how)
    tell(0, 0.0, trainer.evaluate(held_out)[0])
    trainer.run()


def train_torch(settings, pieces, held_out, tell):
    """The same with PyTorch."""
    import torch
    import torch.nn.functional as F
    import torch_peers

    torch.manual_seed(0)
    model = torch_peers.LanguageModel("gru", "Newton", models.SMALL).train()
    matrices = [
        p for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1 and "embed" not in n
    ]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas, rate = (settings.beta1, settings.beta2), schedule(settings)
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas, settings.epsilon, fused=True)

    def loss_of(batch):
        ids = torch.from_numpy(batch.tokens.astype(np.int64))
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def evaluated():
        with torch.no_grad():
            found = [(loss_of(batch).item(), len(batch.tokens)) for batch in held_out]
        return sum(loss * rows for loss, rows in found) / sum(rows for _, rows in found)

    tell(0, 0.0, evaluated())
    seconds = 0.0
    for step, batch in zip(range(settings.steps), pieces.starting_at(0), strict=False):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(mx.array(step)).item()
        optimizer.zero_grad(set_to_none=True)
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        seconds += time.perf_counter() - begin
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            tell((step + 1) * batch.tokens[:, 1:].size, seconds, evaluated())


def child(args):
    settings = Settings(
        steps=args.steps,
        batch_size=args.rows,
        length=args.length,
        learning_rate=args.rate,
        warmup=min(100, args.steps // 10),
        report_every=1,
        eval_every=max(1, args.steps // 20),
        save_every=0,
    )
    pieces, held_out = read(args.data, args.rows, args.length)

    def tell(tokens, seconds, loss):
        print(json.dumps([tokens, seconds, loss]), flush=True)

    if args.child == TORCH:
        train_torch(settings, pieces, held_out, tell)
    else:
        train_mlx(args.child, settings, pieces, held_out, tell)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(kilobytes / (1000 if sys.platform == "linux" else 10**6)))  # bytes on a Mac


def at(points, seconds):
    """The last loss that a curve has at that time."""
    return [loss for _, when, loss in points if when <= seconds][-1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", metavar="DATA")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--only", default=",".join(ALL), help=f"of {', '.join(ALL)}")
    parser.add_argument("--quick", action="store_true", help="three small steps, nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rows, args.length = 3, 2, 32
    if args.child:
        child(args)
        return
    curves, megabytes = {}, {}
    for who in args.only.split(","):
        if who not in ALL:
            parser.error(f"there is no {who!r}; choose from {', '.join(ALL)}")
        if who == TORCH and not find_spec("pararnn"):
            print(f"{who} is left out: it is not installed", file=sys.stderr)
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--child", who]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        *curves[who], megabytes[who] = map(json.loads, done.stdout.splitlines())
    if not curves:
        parser.error("none of these models can be trained here: pip install pararnn-torch")
    shortest = min(points[-1][1] for points in curves.values())
    rows = [
        (
            who,
            f"{points[-1][0] / points[-1][1]:.0f}",
            f"{points[-1][2]:.3f}",
            f"{points[-1][1] / 60:.1f}",
            f"{at(points, shortest):.3f}",
            f"{megabytes[who]:,.0f}",
        )
        for who, points in curves.items()
    ]
    tokens = args.steps * args.rows * args.length
    header = [
        "who",
        "tokens/s",
        f"loss after {tokens:,} tokens",
        "its minutes",
        f"loss after {shortest / 60:.1f} minutes",
        "peak MB of the process",
    ]
    print(*table(header, rows), sep="\n")
    if args.quick:
        return
    about = (
        f"Held-out loss in nats a byte, models of 1.4M parameters, {args.rows} x {args.length} bytes a step, "
        f"float32, learning rate {args.rate:g}, {args.steps} steps; llama and mamba2: MLX-LM's. Evaluations "
        "are not in the minutes; after equal ones: the last evaluation before, on a schedule for all steps."
    )
    write_results("curve", about, header, rows)
    panels = [
        Panel(
            f"Held-out loss over {name}",
            name,
            "nats a byte",
            {who: [(point[place] / unit, point[2]) for point in points] for who, points in curves.items()},
            scaled=True,
        )
        for name, place, unit in (("tokens", 0, 1), ("minutes", 1, 60))
    ]
    draw(panels, result_file("curve", "svg"))


if __name__ == "__main__":
    main()
