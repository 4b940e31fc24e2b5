"""Conversions that must succeed or fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.converting import convert


@pytest.fixture
def refused(tmp_path) -> Callable[..., str]:
    """A function that runs a conversion that must fail and leave nothing; it gives the sentence."""

    def run(source: object, *options: object, out: Path | None = None) -> str:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        result = convert(source, "-o", out or work / "out", *(options or ("--tokenizer", "none")))
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert "Traceback" not in result.stderr
        assert "--debug" not in result.stderr, "an error that nobody foresaw"
        assert sorted(tmp_path.rglob("*")) == before, "something was left"
        return result.stderr.removeprefix("error: ").strip()

    return run


@pytest.fixture
def accepted(tmp_path) -> Callable[..., Path]:
    """A function that runs a conversion that must succeed; it gives the model folder."""

    def run(source: object, *options: object) -> Path:
        out = tmp_path / "accepted" / f"model-{len(list(tmp_path.glob('accepted/*')))}"
        result = convert(source, "-o", out, *(options or ("--tokenizer", "none")))
        assert result.exit_code == 0, result.output
        return out

    return run
