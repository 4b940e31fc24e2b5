"""Every target of tests/fuzz for three seconds; longer runs by hand, docs in tests/fuzz."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.large
def test_no_input_is_a_finding(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "all", "--seconds", "3", "--runs", "5000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(re.findall(r"^([a-z-]+): ([0-9,]+) runs", done.stdout, re.M))
    assert len(counts) == 14
    assert all(int(count.replace(",", "")) for count in counts.values()), counts
