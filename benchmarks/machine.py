"""What every result says about itself: the machine, the versions, the date."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

_load_at_start = os.getloadavg()[0]


def write_results(name, caption, header, rows, *, measured=True):
    """Write a Markdown table to benchmarks/results/NAME-MACHINE-DATE.md and print where."""
    lines = [
        f"# {name}",
        "",
        f"{date.today()}, {describe()}." if measured else f"{date.today()}.",
        "",
        caption,
        "",
        *table(header, rows),
        "",
    ]
    file = result_file(name, "md")
    file.write_text("\n".join(lines))
    print(f"written to {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")


def result_file(name, suffix):
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}-{platform.system().lower()}-{platform.machine()}-{date.today()}.{suffix}"


def table(header, rows):
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]


def describe():
    import mlx.core as mx

    others = "".join(f", {name} {found}" for name in ("torch", "pararnn-torch") if (found := _version(name)))
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"mlx {version('mlx')} on {mx.default_device()}, mlx-lm {version('mlx-lm')}{others}; "
        f"load average when the run began {_load_at_start:.1f}"
    )


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
