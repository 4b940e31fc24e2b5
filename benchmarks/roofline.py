"""What the recurrence's kernels should take, by arithmetic, for metal/README.md. No GPU has been measured.

python benchmarks/roofline.py

A GRU, one sequence; the first table in 16 bits. A core has 4 schedulers of 32 lanes, each of which issues
an instruction a cycle. A kernel takes the longest of: its bytes at the announced bandwidth; its instructions;
its chain of steps that wait for each other.
"""

import math

from mlx_pararnn.compute.gpu import CHUNK, FULL_CORE, SHAPES

import mlx.core as mx  # isort: skip - after mlx_pararnn, which loads OpenBLAS

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
SHUFFLED = 30  # a level of a scan by shuffles: two of them, a product and a sum
LAUNCH_US, LAUNCHES_A_STEP = 5, 10  # of a naive loop in a framework's ops, assumed


def sequential(cores: int, D: int, ahead: bool) -> float:
    """Cycles. Without steps read ahead each waits for its own loads."""
    warps = D / (128 * cores)
    return T * max(CHAIN + (0 if ahead else FAR), warps * PLAIN)


def newton(
    cores: int, D: int, tiling: str, last: str = "none", iterations: int = 2, shuffled: bool = False
) -> float:
    """Cycles: for every tile the passes over a chunk, the scans, the barriers.

    Args:
        last: the pass after the last iteration: "dual" in 32 bits; in 16 bits there is "none"; "kept" was a
            plain one, u in registers and read once; "plain" would be one with u read again.
        shuffled: if the chunks of a simdgroup were scanned by shuffles, and only its ends from memory.
    """
    channels, _, simdgroups = SHAPES[tiling]
    chunks = simdgroups * 32 // channels
    warps = math.ceil(math.ceil(D / channels) / cores) * simdgroups / 4
    dual = CHUNK * max(CHAIN, warps * DUAL)
    plain = CHUNK * max(CHAIN, warps * PLAIN)
    scan = (chunks - 1) * SCAN
    if shuffled:
        scan = math.log2(32 / channels) * SHUFFLED + (simdgroups - 1) * SCAN
    tile = iterations * (dual + scan + 2 * BARRIER) + FAR
    tile += {"none": 0, "kept": plain, "dual": dual + NEAR, "plain": plain + NEAR}[last]
    tile += 0 if last == "kept" else (iterations - 1) * NEAR
    return -(-T // (chunks * CHUNK)) * tile


def tiling_for(D: int, threadgroups: int) -> str:
    enough = (name for name, (channels, _, _) in SHAPES.items() if -(-D // channels) >= threadgroups)
    return next(enough, "narrow")


def main() -> None:
    print_taken()
    print()
    print_left_out()


def print_left_out() -> None:
    """What two changes would gain where Newton is taken."""
    print("| | D | shape | 16 bits, shuffled | 32 bits, shuffled, last pass plain | sequential |")
    print("|---|---|---|---|---|---|")
    for name, (cores, clock, _) in DEVICES.items():
        for D in (256, 512, 1024, 4096):
            shape, us = tiling_for(D, cores), clock * 1e3

            def times(*ways: dict) -> str:
                return ", ".join(f"{newton(cores, D, shape, **way) / us:.0f}" for way in ways)  # noqa: B023

            def few(dtype: mx.Dtype) -> bool:
                return D / cores <= FULL_CORE[dtype]  # noqa: B023

            if few(mx.float16):
                dual = {"last": "dual"}
                wide = times(dual, {**dual, "shuffled": True}, {"last": "plain"})
                print(
                    f"| {name} | {D} | {shape} | {times({}, {'shuffled': True})} "
                    f"| {wide if few(mx.float32) else '(sequential)'} "
                    f"| {sequential(cores, D, ahead=True) / us:.0f} |"
                )


def print_taken() -> None:
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
                max(newton(cores, D, shape, last) / us, floor)
                for shape, last in zip(shapes, ("kept", "none"), strict=True)
            ]
            few = D / cores <= FULL_CORE[mx.float16]
            taken, method = (solved[1], f"Newton, {shapes[1]}") if few else (straight[1], "sequential")
            print(
                f"| {name} | {D} | {floor:.0f} | {straight[0] + bias:.0f}, {straight[1]:.0f} "
                f"| {solved[0] + bias:.0f}, {solved[1]:.0f} | {taken:.0f}: {method} "
                f"| {T * LAUNCHES_A_STEP * LAUNCH_US / taken:.0f} | {straight[1] / taken:.1f} |"
            )


if __name__ == "__main__":
    main()
