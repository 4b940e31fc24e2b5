"""Time `mlx-pararnn convert` on a 2 GB checkpoint, against copying the file, and watch its memory.

python benchmarks/convert.py [GIGABYTES]    prints a table and writes benchmarks/results/convert-*.md
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import write_results

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/ is not installed

from tests.support.big_checkpoint import peak_anonymous_memory, write_big_checkpoint

REPEATS = 5
COLD_REPEATS = 3
CASES = {
    "as it is (float32)": [],
    "--dtype float16": ["--dtype", "float16"],
    "--dtype bfloat16": ["--dtype", "bfloat16"],
    "-q (4 bits, groups of 64)": ["-q"],
    "-q --dtype bfloat16": ["-q", "--dtype", "bfloat16"],
}
HEADER = [
    "options", "written MB", "seconds", "MB/s", "copy MB/s", "speed / copy", "peak RssAnon MB",
    "disk to disk: seconds", "copy seconds", "speed / copy",
]  # fmt: skip


def copy(source, target, to_disk=False):
    """Seconds."""
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    if to_disk:
        flush(target)
    took = time.perf_counter() - begin
    target.unlink()
    return took


def convert(source, out, options, to_disk=False):
    """Seconds, peak anonymous memory and bytes of weights written."""
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", source, "-o", out]
    # Python's compiled files are there, as after an installation, wherever this runs.
    environment = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": source.parent / "pycache",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    begin = time.perf_counter()
    with subprocess.Popen(
        [*command, "--tokenizer", "none", *options], stdout=subprocess.DEVNULL, env=environment
    ) as process:
        peak = peak_anonymous_memory(process)
    if to_disk:
        for path in out.iterdir():
            flush(path)
    took = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"the conversion with {options} failed")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return took, peak, written


def flush(path):
    with open(path, "rb+") as file:
        os.fsync(file)


def forget(path):
    """Take a file out of the page cache (Linux)."""
    flush(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for part in range(8):
            try:
                os.preadv(file.fileno(), [bytearray(1)], part * path.stat().st_size // 8, os.RWF_NOWAIT)
            except BlockingIOError:  # not in memory
                continue
            raise SystemExit(f"{path} stays in the page cache")


def cached(source, nbytes, options):
    copies, conversions = [], []
    for _ in range(REPEATS):  # alternating, so that both see the same state of the disk
        copies.append(copy(source, source.parent / "copy"))
        conversions.append(convert(source, source.parent / "out", options))
    seconds, copying = statistics.median([took for took, _, _ in conversions]), statistics.median(copies)
    return (
        f"{conversions[0][2] / 1e6:.0f}",
        f"{seconds:.2f}",
        f"{nbytes / 1e6 / seconds:.0f}",
        f"{nbytes / 1e6 / copying:.0f}",
        f"{copying / seconds:.2f}",
        f"{max(peak for _, peak, _ in conversions) / 1e6:.0f}",
    )


def disk_to_disk(source, options):
    if not hasattr(os, "posix_fadvise"):
        return "not measured", "", ""
    copies, conversions = [], []
    for _ in range(COLD_REPEATS):
        forget(source)
        copies.append(copy(source, source.parent / "copy", to_disk=True))
        forget(source)
        conversions.append(convert(source, source.parent / "out", options, to_disk=True)[0])
    seconds, copying = statistics.median(conversions), statistics.median(copies)
    return f"{seconds:.1f}", f"{copying:.1f}", f"{copying / seconds:.2f}"


def write(rows, nbytes, load):
    caption = (
        f"A {nbytes / 1e6:.0f} MB ml-pararnn GRU, float32, safetensors. Median of {REPEATS} runs of the "
        "whole command, Python's start included; the copy is shutil.copyfile of the source, alternating with "
        "it. The source is in the page cache and neither waits for the disk (no fsync). MB/s count bytes of "
        "the source. RssAnon is memory that no file holds, the most that was seen. Disk to disk: "
        f"median of {COLD_REPEATS} runs, the source taken out of the page cache before each and the output's "
        f"fsync counted, for both. The machine's load average before the first run was {load:.1f}."
    )
    write_results("convert", caption, HEADER, rows)


def main():
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        nbytes = write_big_checkpoint(source, int(gigabytes * 1e9))
        flush(source)
        convert(source, source.parent / "out", ["-q"])  # fills the page cache and Python's
        rows = {name: cached(source, nbytes, options) for name, options in CASES.items()}
        rows = [(name, *row, *disk_to_disk(source, CASES[name])) for name, row in rows.items()]
    for row in rows:
        print(*row, sep=" | ")
    write(rows, nbytes, load)


if __name__ == "__main__":
    main()
