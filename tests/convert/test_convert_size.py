"""A checkpoint larger than what the converter may hold: 2 GB, in bounded memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from tests.support.big_checkpoint import write_big_checkpoint
from tests.support.memory import peak_anonymous_memory

pytestmark = pytest.mark.large

ROOM = 8_000_000_000
BOUND = 700_000_000


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    free = shutil.disk_usage(folder).free
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc, which this system lacks")
    if free < ROOM:
        pytest.skip(f"needs {ROOM / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    path = folder / "big.safetensors"
    # One head: its B is 50 MB that are transposed, larger than a piece.
    assert write_big_checkpoint(path, 2_000_000_000, heads=1) >= 2_000_000_000
    yield path
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "bits"),
    [([], 32), (["--dtype", "bfloat16"], 16), (["-q"], 5), (["-q", "--dtype", "float16"], 4.5)],
)
def test_two_gigabytes_in_bounded_memory(options, bits, big):
    out = big.parent / "out"
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", str(big), "-o", str(out)]
    with subprocess.Popen(
        [*command, "--tokenizer", "none", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        peak = peak_anonymous_memory(process)
        stdout, stderr = process.communicate()
    try:
        assert process.returncode == 0, stderr
        assert 0 < peak < BOUND, f"{peak / 1e6:.0f} MB"
        parameters = big.stat().st_size / 4
        nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert nbytes * 8 / parameters == pytest.approx(bits, abs=0.05)
        assert "parameters" in stdout
        if not options:
            source, ours = open_checkpoint(big).tensors, open_checkpoint(out / "model.safetensors").tensors
            last = max(int(name.split(".")[1]) for name in source if name.startswith("blocks."))
            theirs = source[f"blocks.{last - 1}.rnn_cell.B"].read()
            projection = ours[f"model.layers.{last // 2}.mixer.cell.input_proj.weight"].read()
            assert (projection == theirs.transpose(0, 2, 3, 1).reshape(projection.shape)).all()
    finally:
        shutil.rmtree(out, ignore_errors=True)
