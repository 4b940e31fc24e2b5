"""Time the recurrence alone: cells x lengths x methods, and a copy of its input as the limit.

python benchmarks/recurrence.py            prints a table and writes benchmarks/results/recurrence-*.md
"""

import time

import mlx.core as mx
from machine import write_results

import mlx_pararnn  # noqa: F401 - before mlx.core: it loads OpenBLAS
from mlx_pararnn import get_cell
from mlx_pararnn.recurrence import recurrence

D, HEADS, REPEATS = 1024, 4, 5
METHODS = {
    "sequential": {"method": "sequential"},
    "Newton, C=16": {"method": "newton"},
    "Newton, C=64": {"method": "newton", "chunk": 64},
}


def milliseconds(function, *arguments, **options):
    mx.eval(function(*arguments, **options))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        mx.eval(function(*arguments, **options))
        times.append(time.perf_counter() - begin)
    return 1000 * sorted(times)[REPEATS // 2]


def main():
    rows = []
    for name in ("gru", "lstm", "nlru"):
        cell = get_cell(name)
        params = 0.1 * mx.random.normal((len(cell.params), D), key=mx.random.key(0))
        for T in (1, 128, 512, 2048):
            u = mx.random.normal((1, HEADS, T, len(cell.gates), D // HEADS), key=mx.random.key(T))
            mx.eval(u)
            times = [milliseconds(recurrence, cell, params, u, **options) for options in METHODS.values()]
            *_, info = recurrence(cell, params, u, method="newton", return_info=True)
            copy = milliseconds(mx.add, u, 0)
            rows.append([name, T, *(f"{t:.2f}" for t in times), info.iterations, f"{copy:.2f}"])
            print(*rows[-1])
    write_results(
        "recurrence",
        f"Milliseconds, median of {REPEATS}; float32, batch 1, D = {D}, weights of initialisation size. "
        "Iterations are those of Newton with C = 16; the copy moves the input once.",
        ["cell", "T", *METHODS, "iterations", "copy"],
        rows,
    )


if __name__ == "__main__":
    main()
