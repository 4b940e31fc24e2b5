"""Prints the Swift blocks of README.md and of some pages of docs/ as one source file, for a build to compile.

Each becomes the body of a function that has a `url`, a `model` and a `chat`; one after a line that says "not
compiled here" is left out.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/swift.md", "docs/tools.md")


def samples() -> str:
    """The source file."""
    lines = ["#if canImport(CoreML)", "import CoreML", "import Foundation", "import ParaRNN", ""]
    count = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for before, block in re.findall(r"([^\n]*)\n+```swift\n(.*?)```", text, re.DOTALL):
            if "not compiled here" in before:
                continue
            count += 1
            names = {n for n in ("url", "model", "chat") if not re.search(rf"\b(let|var) {n}\b", block)}
            known = {"url": "URL", "model": "ParaRNNModel", "chat": "ParaRNNChat"}
            parameters = ", ".join(f"{n}: {known[n]}" for n in known if n in names)
            lines += [
                f"// {page}",
                f"func sample{count}({parameters}) async throws {{",
                block.rstrip(),
                "}",
                "",
            ]
    return "\n".join([*lines, "#endif", ""])


if __name__ == "__main__":
    print(samples(), end="")
