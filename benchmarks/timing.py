"""Alternating timing: everything that is compared sees the same states of a machine that others use too."""

import statistics
import time

# The threads of PyTorch and OpenBLAS spin for 8 to 30 ms after their last work, on a core of whoever is next.
PAUSE = 0.05


def alternating(runs, repeats, *, warm=True, limit=30.0):
    """Median seconds of each of `runs`, name -> function, which take turns, each after a pause.

    Args:
        runs: a function does one run, and returns its seconds where not all of it counts.
        repeats: rounds that count.
        warm: make one round first that does not count.
        limit: what has taken so many seconds in all is not run again.
    """
    seconds = {name: [] for name in runs}
    for turn in range(-1 if warm else 0, repeats):
        for name, run in runs.items():
            if sum(seconds[name]) > limit:
                continue
            time.sleep(PAUSE)
            begin = time.perf_counter()
            took = run()
            took = time.perf_counter() - begin if took is None else took
            if turn >= 0:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}
