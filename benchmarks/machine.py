"""What every result says about itself: the machine, the versions, the date."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path


def write_results(name, caption, header, rows):
    """Write a Markdown table to benchmarks/results/NAME-MACHINE-DATE.md and print where."""
    lines = [
        f"# {name}",
        "",
        f"{date.today()}, {describe()}.",
        "",
        caption,
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
        "",
    ]
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-{platform.system().lower()}-{platform.machine()}-{date.today()}.md"
    file.write_text("\n".join(lines))
    print(f"written to {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")


def describe():
    import mlx.core as mx

    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"mlx {version('mlx')} on {mx.default_device()}"
    )


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
