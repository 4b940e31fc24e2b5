"""The recurrence forward and backward, GRU and LSTM, T = 2048, D = 1024: our backends, pararnn-torch's
fastest, and a copy of as many bytes as the limit. Then the memory that each takes at T = 8192.

python benchmarks/adjoint.py [--quick]         about two minutes; needs pip install -e ".[bench]"

Prints tables and writes benchmarks/results/adjoint-*.md and adjoint-memory-*.md (not with --quick).
"""

import argparse
import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx_pararnn  # noqa: F401 - before mlx.core: it loads OpenBLAS

# isort: split
import mlx.core as mx
import numpy as np
import torch_peers
from machine import table, write_results
from models import HEADS, D
from recurrence import THREADS, copy
from timing import alternating

from mlx_pararnn import get_cell
from mlx_pararnn.compute.recurrence import recurrence

CPU, OPS, NEWTON = "mlx-pararnn, cpu", "mlx-pararnn, ops", "pararnn-torch, Newton"
COPY = "copy of as many bytes, all threads"
LONG = 8192  # steps, where memory is measured


def ways(name, T):
    """Functions that compute hidden states, and the gradients of u and weights for a given one of hidden."""
    cell = get_cell(name)
    random = np.random.default_rng(0)
    params = 0.1 * random.standard_normal((len(cell.params), D), np.float32)
    u = random.standard_normal((T, len(cell.gates), D), np.float32)
    slope = random.standard_normal((1, T, D), np.float32)
    by_heads = mx.array(u.reshape(T, len(cell.gates), HEADS, D // HEADS).transpose(2, 0, 1, 3)[None].copy())
    arrays, slopes = [mx.array(params), by_heads], [mx.array(slope)]
    mx.eval(arrays, slopes)

    def ours(backend):
        def forward(params, u):
            return [recurrence(cell, params, u, backend=backend)[0]]

        return lambda: mx.eval(mx.vjp(forward, arrays, slopes))

    return {
        CPU: ours("cpu"),
        OPS: ours("ops"),
        NEWTON: torch_peers.recurrence_with_gradient(name, "Newton", u.reshape(1, T, -1), slope),
    }


def measure(name, T, repeats):
    """Median milliseconds of each way."""
    gates = len(get_cell(name).gates)
    with ThreadPoolExecutor(THREADS) as pool:
        # forward: u is read, hidden written; backward: u and hidden's gradient are read, u's written
        runs = {**ways(name, T), COPY: copy(T * D * (3 * gates + 2), pool)}
        # ops, whose gigabytes slow down whoever comes next, do not take turns with the others
        alone = {OPS: runs.pop(OPS)}
        times = alternating(runs, repeats) | alternating(alone, 1, warm=False)
        return {way: 1000 * seconds for way, seconds in times.items()}


def memory(name, way):
    """Megabytes that one run at T = LONG takes above its inputs. In a process of its own."""
    ways(name, 128)[way]()  # libraries are loaded
    run = ways(name, LONG)[way]
    mx.clear_cache()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and is kept would be used again, uncounted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    run()
    return (_status("VmHWM") - before) / 1e3


def _status(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("times", "memory"), help="one of the two alone")
    parser.add_argument("--quick", action="store_true", help="times at T = 256, nothing written")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("CELL", "WAY"), help="print the MB that one way takes")
    args = parser.parse_args()
    if args.one:
        print(f"{memory(*args.one):.0f}")
        return
    if args.what != "memory":
        compare_times(256 if args.quick else 2048, 2 if args.quick else args.repeats, write=not args.quick)
    if args.what != "times" and not args.quick and sys.platform == "linux":
        compare_memory()


def compare_times(T, repeats, write):
    times = {name: measure(name, T, repeats) for name in ("gru", "lstm")}
    header = ["way", "GRU, ms", "this / cpu", "this / copy", "LSTM, ms", "this / cpu", "this / copy"]
    rows = [
        (
            way,
            *(
                text
                for t in times.values()
                for text in (f"{t[way]:.2f}", f"{t[way] / t[CPU]:.1f}", f"{t[way] / t[COPY]:.1f}")
            ),
        )
        for way in times["gru"]
    ]
    print(*table(header, rows), sep="\n")
    gru = times["gru"]
    for text, value, met in (
        ("at least 10 times pararnn-torch's fastest", gru[NEWTON] / gru[CPU], gru[NEWTON] / gru[CPU] >= 10),
        ("within 6 times the copy", gru[CPU] / gru[COPY], gru[CPU] / gru[COPY] <= 6),
    ):
        print(f"GRU on the cpu backend, {text}: {value:.1f}, {'met' if met else 'MISSED'}")
    if write:
        write_results(
            "adjoint",
            f"Milliseconds for T = {T}, D = {D}, one sequence, float32, weights of initialisation size, "
            f"{THREADS} threads for everyone: hidden states, and from hidden's gradient those of u and "
            f"weights. Medians of {repeats} rounds in which all take turns, each after a pause of 50 ms; "
            "ops once, on their own. The copy reads and writes as many bytes in all as both "
            "passes must: u read and hidden written, then u and hidden's gradient read and u's written. "
            "pararnn-torch's sequential solver is left out: its gradient, by autograd through 2048 slices of "
            "the input, takes more than a minute.",
            header,
            rows,
        )


def compare_memory():
    header = ["way", "GRU, MB"]
    rows = [(way, _in_a_process("gru", way)) for way in ways("gru", 16)]
    print(*table(header, rows), sep="\n")
    write_results(
        "adjoint-memory",
        "Megabytes (10^6 bytes) that the resident memory grows by at most, from inputs that are there to "
        f"gradients, T = {LONG}, D = {D}, one sequence, float32, each in a process of its own. Hidden and "
        "the gradient of u, which everyone returns, are in it: 34 and 101 MB.",
        header,
        rows,
    )


def _in_a_process(name, way):
    command = [sys.executable, __file__, "--one", name, way]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
