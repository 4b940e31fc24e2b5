"""python -m tests.fuzz.native TARGET: the CPU backend's C++ under libFuzzer and sanitizers.

    python -m tests.fuzz.native --list
    python -m tests.fuzz.native token-gru --runs 100000

The texts are those that mlx_pararnn/compute compiles, called by the functions that it calls: cpu_calls.cpp
makes the calls, and the sanitizers of addresses and of undefined behaviour look on. Needs a Clang with its
fuzzer's library (Debian: clang-19, libclang-rt-19-dev). A finding is kept as a file in the working folder; in
tests/fuzz/found, as cpu-TARGET-..., it is tried first from then on.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlx_pararnn import get_cell
from mlx_pararnn.compute import texts

FOUND = Path(__file__).with_name("found")
CELLS = ("gru", "lstm", "slstm", "nlru")
SECONDS = 60  # by the clock, that one input may take


def _token_text(cell: str) -> str:
    return texts.cpu_token_text(get_cell(cell)) + texts.packed_products(texts.EVERY_FORMAT)


TEXTS: dict[str, Callable[[], str]] = {
    "elementwise": texts.cpu_elementwise_text,
    "gradients": texts.cpu_gradients_text,
    **{f"recurrence-{c}": lambda c=c: texts.cpu_recurrence_text(get_cell(c)) for c in CELLS},  # type: ignore[misc]
    **{f"adjoint-{c}": lambda c=c: texts.cpu_adjoint_text(get_cell(c)) for c in CELLS},  # type: ignore[misc]
    **{f"token-{c}": lambda c=c: _token_text(c) for c in CELLS},  # type: ignore[misc]
}


def compiler() -> str | None:
    """A Clang that links its fuzzer; None where there is none."""
    for name in ("clang++-19", "clang++"):
        if found := shutil.which(name):
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "x.cpp")
                source.write_text('extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }')
                command = [found, "-fsanitize=fuzzer,address", str(source), "-o", f"{folder}/x"]
                if not subprocess.run(command, capture_output=True).returncode:
                    return found
    return None


def compiled(target: str, folder: Path, lanes: int, text: str | None = None, level: str = "-O1") -> Path:
    """The fuzzer of a target, or of another text in its place, with vectors of so many lanes."""
    source, program = folder / f"{target}.cpp", folder / f"{target}-{lanes}"
    source.write_text((text or TEXTS[target]()) + Path(__file__).with_name("cpu_calls.cpp").read_text())
    kind = target.partition("-")[0].upper()
    command = [
        *(compiler() or "clang++", "-std=c++17", level, "-g1", "-march=native", "-fno-math-errno"),
        *("-fsanitize=fuzzer,address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
        "-fno-sanitize-coverage=trace-cmp",  # comparisons of numbers: no way to new shapes
        *("-pthread", f"-DFUZZ_{kind}", f"-DLANES={lanes}", str(source), "-o", str(program)),
    ]
    subprocess.run(command, check=True)
    return program


def fuzz(program: Path, target: str, runs: int, seconds: int, seed: int, corpus: Path | None) -> int:
    """The fuzzer's exit code, 0 where nothing was found; it says what it does on stderr."""
    with tempfile.TemporaryDirectory() as work:
        for path in FOUND.glob(f"cpu-{target}-*"):
            shutil.copy(path, work)
        folders = [str(corpus)] if corpus else []
        command = [str(program), f"-runs={runs}", f"-max_total_time={seconds}", f"-seed={seed}"]
        command += ["-max_len=4096", "-len_control=0", f"-timeout={SECONDS}", "-rss_limit_mb=2048"]
        command += [f"-artifact_prefix=cpu-{target}-"]
        variables = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        # without randomized addresses: some kernels place them where the sanitizer keeps its own
        still = ["setarch", "-R"] if shutil.which("setarch") else []
        return subprocess.run([*still, *command, *folders, work], env=variables).returncode


def main() -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.native", description=__doc__)
    parser.add_argument("target", nargs="?", choices=list(TEXTS), metavar="TARGET")
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=16, choices=[4, 8, 16], help="floats of a vector")
    parser.add_argument("--corpus", type=Path, help="the folder of inputs that it keeps")
    args = parser.parse_args()
    if args.list or not args.target:
        print("\n".join(TEXTS))
        return 0 if args.list else 2
    if not compiler():
        wanted = "apt install clang-19 libclang-rt-19-dev"
        print(f"there is no Clang with a fuzzer's library: {wanted}", file=sys.stderr)
        return 2
    if args.corpus:
        args.corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(args.target, Path(folder), args.lanes)
        return fuzz(program, args.target, args.runs, args.seconds, args.seed, args.corpus)


if __name__ == "__main__":
    sys.exit(main())
