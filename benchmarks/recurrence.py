"""The recurrence alone, GRU and LSTM, T = 2048, D = 1024: every backend and method, the loops that one would
write in MLX or PyTorch, pararnn-torch, and a copy of as many bytes as the limit.

python benchmarks/recurrence.py [--quick]         about two minutes; needs pip install -e ".[bench]"

Prints a table and writes benchmarks/results/recurrence-*.md (not with --quick).
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

import mlx_pararnn  # noqa: F401 - before mlx.core: it loads OpenBLAS

# isort: split
import mlx.core as mx
import numpy as np
import torch_peers
from machine import table, write_results
from models import HEADS, D
from timing import alternating

from mlx_pararnn import PararnnError, get_cell
from mlx_pararnn.cells.activations import Functions
from mlx_pararnn.compute.choice import BACKENDS
from mlx_pararnn.compute.recurrence import recurrence

THREADS = os.cpu_count()
COPY, EAGER = "copy of as many bytes, all threads", "MLX, eager step loop"


def ours(cell, params, u):
    """Every method on every backend that is here."""
    for backend in BACKENDS:
        for method in ("sequential", "newton"):

            def run(method=method, backend=backend, steps=None):
                mx.eval(recurrence(cell, params, u[:, :, :steps], method=method, backend=backend))

            try:
                run(steps=2)
            except PararnnError:  # not on this machine, or not for this cell
                continue
            yield f"mlx-pararnn, {backend}, {method}", run


def mlx_loop(cell, params, u, compiled):
    """The loop as one writes it in MLX; u (T, gates, D)."""
    weights = dict(zip(cell.params, params, strict=True))
    slot = cell.slots.index(cell.output)

    def step(x, *state):
        gates = {name: x[k] for k, name in enumerate(cell.gates)}
        return cell.step(state, gates, weights, Functions(mx))

    step = mx.compile(step) if compiled else step

    def run():
        state = (mx.zeros(D),) * len(cell.slots)
        hidden = []
        for t in range(u.shape[0]):
            state = step(u[t], *state)
            hidden.append(state[slot])
        mx.eval(mx.stack(hidden))

    return run


def copy(floats, pool):
    """Copying n floats reads and writes n: as much memory traffic as reading 3/2 n gates and writing n/2."""
    pieces = np.array_split(np.ones(floats // 2, np.float32), THREADS)
    targets = [np.empty_like(piece) for piece in pieces]

    def run():
        list(pool.map(np.copyto, targets, pieces))

    return run


def measure(name, T, repeats):
    """Median milliseconds of each way."""
    cell = get_cell(name)
    gates = len(cell.gates)
    random = np.random.default_rng(0)
    params = 0.1 * random.standard_normal((len(cell.params), D), np.float32)
    u = random.standard_normal((T, gates, D), np.float32)
    by_heads = mx.array(u.reshape(T, gates, HEADS, D // HEADS).transpose(2, 0, 1, 3)[None].copy())
    arrays = mx.array(params), mx.array(u)
    mx.eval(by_heads, *arrays)
    with ThreadPoolExecutor(THREADS) as pool:
        runs = {
            **dict(ours(cell, arrays[0], by_heads)),
            EAGER: mlx_loop(cell, *arrays, compiled=False),
            "MLX, step by mx.compile": mlx_loop(cell, *arrays, compiled=True),
            "PyTorch, plain step loop": torch_peers.plain_loop(name, params, u),
            **{
                f"pararnn-torch, {solver}": torch_peers.recurrence_alone(name, solver, u.reshape(1, T, -1))
                for solver in torch_peers.SOLVERS
            },
            COPY: copy(T * D * (gates + 1), pool),
        }
        return {way: 1000 * seconds for way, seconds in alternating(runs, repeats).items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="T = 256, two rounds, nothing written")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    T, repeats = (256, 2) if args.quick else (2048, args.repeats)
    times = {name: measure(name, T, repeats) for name in ("gru", "lstm")}
    header = ["way", "GRU, ms", "eager / this", "this / copy", "LSTM, ms", "eager / this", "this / copy"]
    rows = [
        (
            way,
            *(
                text
                for t in times.values()
                for text in (f"{t[way]:.2f}", f"{t[EAGER] / t[way]:.1f}", f"{t[way] / t[COPY]:.1f}")
            ),
        )
        for way in times["gru"]
    ]
    print(*table(header, rows), sep="\n")
    cpu = times["gru"].get("mlx-pararnn, cpu, sequential")
    if cpu is not None:
        gru = times["gru"]
        for text, value, met in (
            ("at least 60 times the eager loop", gru[EAGER] / cpu, gru[EAGER] / cpu >= 60),
            ("within 4 times the copy", cpu / gru[COPY], cpu / gru[COPY] <= 4),
        ):
            print(f"GRU on the cpu backend, {text}: {value:.1f}, {'met' if met else 'MISSED'}")
    if not args.quick:
        write_results(
            "recurrence",
            f"Milliseconds for T = {T}, D = {D}, one sequence, float32, weights of initialisation size, "
            f"{THREADS} threads for everyone; medians of {repeats} rounds in which all take turns, each "
            "after a pause of 50 ms, since PyTorch's threads spin for some 8 ms more. The copy is memcpy "
            "into memory that is there already, on all threads; it reads and writes as many bytes in all as "
            "the recurrence, which reads gates and writes hidden states.",
            header,
            rows,
        )


if __name__ == "__main__":
    main()
