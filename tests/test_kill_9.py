"""kill -9 at 50 random moments of a conversion: OUT is absent, or complete and loads."""

import subprocess
import sys

import pytest

from mlx_pararnn.loading import load_model
from tests.support.golden import golden_file

pytestmark = pytest.mark.large


def run(code, *arguments):
    """What it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


CONVERT = """
import random, shutil, sys
from pathlib import Path
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from tests.support.killing import finished, killed

checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
quantized = {"q_group_size": 32, "quantize": True} if sys.argv[3] == "quantized" else {}

def convert():
    convert_to_mlx(checkpoint, out, tokenizer="bytes", force=True, **quantized)

def contents():
    return {path.name: path.read_bytes() for path in out.iterdir()}

def check(ended):
    seen.add(out.exists())
    if out.exists():
        assert contents() == whole
        if chance.random() < 0.5:
            shutil.rmtree(out)

finished(convert)
whole, seen, chance = contents(), set(), random.Random(0)
print(killed(convert, check)["killed"], sorted(seen))
finished(convert)
assert contents() == whole
print([path.name for path in out.parent.iterdir()])
"""


@pytest.mark.parametrize("form", ["as it is", "quantized"])
def test_a_conversion(form, tmp_path):
    out = tmp_path / "work/out"
    said = run(CONVERT, golden_file("lm/paragru_s64/state_dict.pt"), out, form)
    assert said == "50 [False, True]\n['out']\n"
    load_model(out)
