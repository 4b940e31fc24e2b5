"""Put the newest results into docs/performance.md, so that no number there is copied by hand.

python benchmarks/report.py [--check]

Replaces what stands between `<!-- results NAME -->` and `<!-- end -->` with the caption and the table of the
newest results/NAME-*.md, or a link to the newest results/NAME-*.svg for NAME.svg. --check writes nothing and
fails if the page is not up to date.
"""

import argparse
import re
import sys

from machine import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- results (\S+) -->\n.*?<!-- end -->", re.DOTALL)
DATED = r"-[a-z]+-\w+-\d{4}-\d\d-\d\d"  # system, machine, date


def newest(name, suffix):
    files = [f for f in RESULTS.glob(f"*.{suffix}") if re.fullmatch(re.escape(name) + DATED, f.stem)]
    return max(files, key=lambda f: f.stem[-10:], default=None)


def block(match):
    name = match[1]
    stem, _, suffix = name.partition(".")
    file = newest(stem, suffix or "md")
    if file is None:
        text = "Not measured yet."
    elif suffix:
        text = f"![{stem}](../{file.relative_to(PAGE.parents[1])})"
    else:
        text = file.read_text().split("\n", 2)[2].strip()
    return f"<!-- results {name} -->\n{text}\n<!-- end -->"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    filled = BLOCK.sub(block, page)
    if args.check:
        sys.exit(f"{PAGE.name} is not up to date: run python benchmarks/report.py" if filled != page else 0)
    PAGE.write_text(filled)


if __name__ == "__main__":
    main()
