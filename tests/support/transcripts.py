"""The console blocks of a page, which tests/test_docs.py holds to what their commands give.

`python -m tests.support.transcripts README.md` runs the commands and writes what they give into the page.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)


def transcripts(text: str) -> list[tuple[str, str]]:
    """Each command of a page's console blocks, and what the page says it gives."""
    parts = [part for block in _BLOCK.findall(text) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)]
    return [(command, said) for command, _, said in (part.partition("\n") for part in parts if part)]


def given(command: str) -> str:
    """What a command gives, stdout and stderr together, with this checkout's `mlx-pararnn`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("mlx-pararnn", "-m mlx_pararnn.cli.app "), ("python3", "")):
            script = Path(folder) / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {text}"$@"\n')
            script.chmod(0o755)
        paths = os.pathsep.join([folder, os.environ["PATH"]])
        environment = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT)}
        together = ["bash", "-c", f"exec 2>&1\n{command}"]
        return subprocess.run(together, env=environment, text=True, stdout=subprocess.PIPE).stdout


def steady(text: str) -> str:
    """A text without its times and speeds."""
    return re.sub(r"[\d,]+(\.\d+)?(?= s\b| tokens/s)", "N", text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(
            _BLOCK.sub(
                lambda block: "".join(
                    f"$ {command}\n{given(command)}"
                    for command, _ in transcripts(f"```console\n{block[0]}```")
                ),
                page.read_text(),
            )
        )
