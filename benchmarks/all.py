"""Every benchmark, one after the other, then docs/performance.md.

python benchmarks/all.py [--quick]            about twenty minutes on two cores, and more for training.py

Needs pip install -e ".[bench]" and a machine with nothing else to do. --quick only tries that all run.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main():
    quick = sys.argv[1:] == ["--quick"]
    small = ["--quick"] if quick else []
    profile = ["--tokens", "64", "--repeats", "1"] if quick else ["--write"]
    for script, options in (
        ("recurrence.py", small),
        ("adjoint.py", small),
        ("training.py", ["--sizes", "small", "--rounds", "1"] if quick else ["--write"]),
        ("profile_model.py", profile),
        ("must.py", small),
        ("sizes.py", small),
        ("precision.py", ["--tokens", "16"] if quick else ["--write"]),
        ("arithmetic.py", [] if quick else ["--write"]),
        *([] if quick else [("report.py", [])]),
    ):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, HERE / script, *options], check=True)


if __name__ == "__main__":
    main()
