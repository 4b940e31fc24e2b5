"""The Python blocks of README and docs run, in the order in which they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_blocks(page, converted, tmp_path, monkeypatch, capsys):
    model = converted("trained/paragru/final.pt", tokenizer="bytes")
    (tmp_path / "my-model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert "self, other" in capsys.readouterr().out
