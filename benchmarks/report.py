"""Put the newest results into docs/performance.md and docs/coreai.md: no number there is copied by hand.

python benchmarks/report.py [--check]

Replaces what stands between `<!-- results NAME -->` and `<!-- end -->` with the caption and the table of the
newest results/NAME-*.md, or a link to the newest results/NAME-*.svg for NAME.svg. --check writes nothing and
fails if a page is not up to date.
"""

import argparse
import re
import sys

from machine import RESULTS

DOCS = RESULTS.parents[1] / "docs"
PAGES = (DOCS / "performance.md", DOCS / "coreai.md")
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
        text = f"![{stem}](../{file.relative_to(DOCS.parent)})"
    else:
        text = file.read_text().split("\n", 2)[2].strip()
    return f"<!-- results {name} -->\n{text}\n<!-- end -->"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        filled = BLOCK.sub(block, text)
        if filled != text:
            if args.check:
                sys.exit(f"{page.name} is not up to date: run python benchmarks/report.py")
            page.write_text(filled)


if __name__ == "__main__":
    main()
