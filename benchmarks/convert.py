"""Time `mlx-pararnn convert` on a 2 GB checkpoint, against copying the file, and watch its memory.

python benchmarks/convert.py [GIGABYTES]    prints a table and writes benchmarks/results/convert-*.md
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "convert"))

from big_checkpoint import peak_anonymous_memory, write_big_checkpoint

REPEATS = 5
CASES = {
    "as it is (float32)": [],
    "--dtype float16": ["--dtype", "float16"],
    "--dtype bfloat16": ["--dtype", "bfloat16"],
    "-q (4 bits, groups of 64)": ["-q"],
    "-q --dtype bfloat16": ["-q", "--dtype", "bfloat16"],
}
HEADER = ["options", "written MB", "seconds", "MB/s", "copy MB/s", "speed / copy", "peak RssAnon MB"]


def copy(source, target):
    """Seconds."""
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    took = time.perf_counter() - begin
    target.unlink()
    return took


def convert(source, out, options):
    """Seconds, peak anonymous memory and bytes of weights written."""
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", source, "-o", out]
    begin = time.perf_counter()
    with subprocess.Popen([*command, "--tokenizer", "none", *options], stdout=subprocess.DEVNULL) as process:
        peak = peak_anonymous_memory(process)
    took = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"the conversion with {options} failed")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return took, peak, written


def measured(source, nbytes, options):
    copies, conversions = [], []
    for _ in range(REPEATS):  # by turns, so that both see the same state of the disk
        copies.append(copy(source, source.parent / "copy"))
        conversions.append(convert(source, source.parent / "out", options))
    seconds = sorted(took for took, _, _ in conversions)[REPEATS // 2]
    copying = sorted(copies)[REPEATS // 2]
    return (
        f"{conversions[0][2] / 1e6:.0f}",
        f"{seconds:.2f}",
        f"{nbytes / 1e6 / seconds:.0f}",
        f"{nbytes / 1e6 / copying:.0f}",
        f"{copying / seconds:.2f}",
        f"{max(peak for _, peak, _ in conversions) / 1e6:.0f}",
    )


def main():
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        nbytes = write_big_checkpoint(source, int(gigabytes * 1e9))
        rows = [(name, *measured(source, nbytes, options)) for name, options in CASES.items()]
    for row in rows:
        print(*row, sep=" | ")
    caption = (
        f"A {nbytes / 1e6:.0f} MB ml-pararnn GRU, float32, safetensors. Median of {REPEATS} runs of the "
        "whole command, Python's start included; the copy is shutil.copyfile of the source, by turns with "
        "it. Neither waits for the disk (no fsync). MB/s count bytes of the source. RssAnon is memory "
        "without a file behind it, the most that was seen. The machine's load average before the first run "
        f"was {load:.1f}."
    )
    write_results("convert", caption, HEADER, rows)


if __name__ == "__main__":
    main()
