"""What the recurrence's kernels should take, by arithmetic, for metal/README.md. No GPU has been measured.

python benchmarks/roofline.py

A GRU in 16 bits, one sequence. A core has 4 schedulers of 32 lanes, each of which issues an instruction a
cycle. A kernel takes the longest of: its bytes at the announced bandwidth; its instructions; its chain of
steps that wait for each other.
"""

import math

from mlx_pararnn.compute.gpu import CHUNK, FULL_CORE, SHAPES

T, GATES = 2048, 3
# Cores, GHz, GB/s. Cores and bandwidth as Apple and NVIDIA announce them; Apple announces no clocks: these
# are what others report.
DEVICES = {
    "M1": (8, 1.28, 68),
    "M4 Pro": (20, 1.58, 273),
    "M3 Max": (40, 1.38, 400),
    "H200": (132, 1.98, 4800),
}
# Instructions: of a plain step by nvcc for sm_90 (the sequential kernel with a step more in its ring); of a
# dual one that and 58 flops, value and tangents.
PLAIN, DUAL = 128, 186
# Cycles, assumed: a step's chain, 20 operations of 4 and two exponentials and two divisions of 30 each; a
# load from memory, and from a cache; a chunk of the scan; a barrier.
CHAIN, FAR, NEAR, SCAN, BARRIER = 200, 500, 200, 25, 50
LAUNCH_US, LAUNCHES_A_STEP = 5, 10  # of a naive loop in a framework's ops, assumed


def sequential(cores: int, D: int, ahead: bool) -> float:
    """Cycles. Without steps read ahead each waits for its own loads."""
    warps = D / (128 * cores)
    return T * max(CHAIN + (0 if ahead else FAR), warps * PLAIN)


def newton(cores: int, D: int, tiling: str, plain_pass: bool, iterations: int = 2) -> float:
    """Cycles: for every tile the passes over a chunk, the scans, the barriers."""
    channels, _, simdgroups = SHAPES[tiling]
    chunks = simdgroups * 32 // channels
    warps = math.ceil(math.ceil(D / channels) / cores) * simdgroups / 4
    dual = CHUNK * max(CHAIN, warps * DUAL)
    tile = iterations * (dual + (chunks - 1) * SCAN + 2 * BARRIER)
    if plain_pass:  # u in registers, read once
        tile += CHUNK * max(CHAIN, warps * PLAIN) + FAR
    else:
        tile += FAR + (iterations - 1) * NEAR
    return -(-T // (chunks * CHUNK)) * tile


def tiling_for(D: int, threadgroups: int) -> str:
    enough = (name for name, (channels, _, _) in SHAPES.items() if -(-D // channels) >= threadgroups)
    return next(enough, "narrow")


def main() -> None:
    titles = ["", "D", "floor", "sequential before, now", "Newton before, now", "taken now"]
    titles += ["times faster than a naive loop", "than the sequential kernel"]
    print(f"| {' | '.join(titles)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (cores, clock, bandwidth) in DEVICES.items():
        for D in (1024, 4096):
            floor = 2 * (GATES + 1) * T * D / bandwidth / 1e3
            bias = 12 * T * D / bandwidth / 1e3  # added before: read and written again
            us = clock * 1e3
            straight = [max(sequential(cores, D, ahead) / us, floor) for ahead in (False, True)]
            shapes = tiling_for(D, 32), tiling_for(D, cores)
            solved = [
                max(newton(cores, D, shape, plain) / us, floor)
                for shape, plain in zip(shapes, (True, False), strict=True)
            ]
            few = D / cores < FULL_CORE
            taken, method = (solved[1], f"Newton, {shapes[1]}") if few else (straight[1], "sequential")
            print(
                f"| {name} | {D} | {floor:.0f} | {straight[0] + bias:.0f}, {straight[1]:.0f} "
                f"| {solved[0] + bias:.0f}, {solved[1]:.0f} | {taken:.0f}: {method} "
                f"| {T * LAUNCHES_A_STEP * LAUNCH_US / taken:.0f} | {straight[1] / taken:.1f} |"
            )


if __name__ == "__main__":
    main()
