"""How fast `mlx-pararnn convert` is against copying the file, and how much memory it takes.

python benchmarks/convert.py [--gigabytes 2] [--runs 3] [--scratch DIR]

Prints a table and writes it to benchmarks/results/. Peak memory is RssAnon (Linux only): pages of files that
are mapped or cached do not count, because the system takes them back when it needs them.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "convert"))

from big_checkpoint import peak_anonymous_memory, write_big_checkpoint  # noqa: E402

CASES = {
    "as it is (float32)": [],
    "--dtype float16": ["--dtype", "float16"],
    "--dtype bfloat16": ["--dtype", "bfloat16"],
    "-q (4 bits, groups of 64)": ["-q"],
    "-q --dtype bfloat16": ["-q", "--dtype", "bfloat16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; default: the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        text = report(Path(folder), options.gigabytes, options.runs)
    print(text)
    machine = f"{platform.system()}-{platform.machine()}".lower()
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"convert-{machine}-{date.today()}.md").write_text(text)


def report(folder: Path, gigabytes: float, runs: int) -> str:
    source = folder / "source.safetensors"
    nbytes = write_big_checkpoint(source, int(gigabytes * 1e9))
    rows = []
    for name, arguments in CASES.items():
        copies, conversions = [], []
        for _ in range(runs):  # by turns, so that both see the same state of the disk
            copies.append(copy(source, folder / "copy"))
            conversions.append(convert(source, folder / "out", arguments))
        seconds, peaks, sizes = zip(*conversions, strict=True)
        took, copying = statistics.median(seconds), statistics.median(copies)
        rows.append(
            f"| {name} | {sizes[0] / 1e6:.0f} | {took:.2f} | {nbytes / 1e6 / took:.0f} | "
            f"{nbytes / 1e6 / copying:.0f} | {copying / took:.2f} | {max(peaks) / 1e6:.0f} |"
        )
    return "\n".join([
        f"# Converting a checkpoint of {nbytes / 1e6:.0f} MB",
        "",
        f"{machine()}; {date.today()}; load average at the start {os.getloadavg()[0]:.1f}.",
        f"Median of {runs} runs of the whole command, start of Python included; the copy is shutil.copyfile of the",
        "source, run by turns with it. MB/s count bytes of the source. Source: safetensors, float32, ml-pararnn GRU.",
        "",
        "| | written MB | seconds | MB/s | copy MB/s | speed / copy | peak RssAnon MB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip


def copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    took = time.perf_counter() - begin
    target.unlink()
    return took


def convert(source: Path, out: Path, arguments: list[str]) -> tuple[float, int, int]:
    """Seconds, peak anonymous memory and bytes of weights written."""
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", str(source), "-o", str(out)]
    begin = time.perf_counter()
    with subprocess.Popen(
        [*command, "--tokenizer", "none", *arguments], stdout=subprocess.DEVNULL
    ) as process:
        peak = peak_anonymous_memory(process)
    took = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return took, peak, written


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    main()
