"""The type checker sees across the rooms: a wrong call of the converter in cli/ is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="needs mypy (pip install 'mlx-pararnn[test]')")
pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).parents[1]
FILE = "mlx_pararnn/cli/convert.py"
CALL = """
def wrong() -> None:
    from mlx_pararnn.convert.to_mlx import convert_to_mlx

    convert_to_mlx(1, 2, 3, nonsense=4)
"""


def test_a_wrong_call_across_rooms_is_an_error(tmp_path):
    (tmp_path / "convert.py").write_text((ROOT / FILE).read_text() + CALL)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), FILE]
    command += ["--shadow-file", FILE, str(tmp_path / "convert.py")]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert 'Unexpected keyword argument "nonsense" for "convert_to_mlx"' in wrong.stdout
    assert 'Argument 1 to "convert_to_mlx" has incompatible type "int"' in wrong.stdout
