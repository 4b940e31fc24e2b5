"""check_units.py UNIT... FILE... : whether all checks of these units passed, in what `verify --json` says.

Units are CPU, GPU and Neural Engine. A file without a check of each of them does not pass either.
"""

import json
import sys
from pathlib import Path


def failures(units: list[str], files: list[Path]) -> list[str]:
    """A sentence for each check that is missing or has failed."""
    found = []
    for file in files:
        try:
            checks = json.loads(file.read_text(encoding="utf-8"))["checks"]
            told = [(c["name"], c["passed"], f"{c['difference']:.2g} ({c['note']})") for c in checks]
        except (ValueError, LookupError, TypeError):
            found.append(f"{file}: verify did not end")
            continue
        for unit in units:
            own = [check for check in told if check[0].startswith(unit)]
            if not own:
                found.append(f"{file}: nothing was run on {unit}")
            found += [f"{file}: {name}: {what}" for name, passed, what in own if not passed]
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    wrong = failures(
        [a for a in arguments if not a.endswith(".json")],
        [Path(a) for a in arguments if a.endswith(".json")],
    )
    print("\n".join(wrong or ["all passed"]))
    sys.exit(bool(wrong))
