"""benchmarks/curve.py: every model learns on the same batches, and all are in the table."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training_runs import TEXT

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "curve.py"


@pytest.mark.large
def test_curves(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "text.txt", "--quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows][:3] == ["mlx-pararnn", "llama", "mamba2"]
    for row in rows:
        assert 3 < float(row[2]) < 7, row  # nats a byte of models that know little


@pytest.mark.large
def test_a_text_too_short_is_one_sentence(tmp_path):
    (tmp_path / "text.txt").write_text("short")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "text.txt", "--quick", "--child", "llama"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (1, "DATA has 5 bytes; give more than 660")
