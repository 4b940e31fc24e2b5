"""The CPU backend on arm64: cross-compiled, run by QEMU, compared with this machine's own.

What it cannot show: Apple's compiler, and speed.
"""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.compute import cpu, texts
from mlx_pararnn.compute.recurrence import recurrence
from tests.support.msl.instances import DTYPES
from tests.support.problems import problem
from tests.support.random_models import TOKENS, make
from tests.support.token_replay import recorded, replay_text, replayed

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
missing = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]
pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(
        bool(missing), reason=f"no {' and no '.join(missing)} (apt install g++-aarch64-linux-gnu qemu-user)"
    ),
]

MAIN = """
#include <cstdio>
int main(int, char** argv) {
  const int64_t T = %(T)d, W = %(W)d;
  static T_ u[%(gates)d * %(T)d * %(W)d], hidden[%(T)d * %(W)d];
  static float params[%(params)d * %(W)d], initial[%(slots)d * %(W)d], last[%(slots)d * %(W)d];
  FILE* in = fopen(argv[1], "rb");
  if (fread(u, 1, sizeof u, in) + fread(params, 1, sizeof params, in) != sizeof u + sizeof params) return 1;
  const pararnn::Call call{
      u, params, initial, nullptr, hidden, last, nullptr, {0, 0, %(gates)d * W, W}, 1, 1, T, W, 0, 2};
  pararnn_%(dtype)s(&call);
  FILE* out = fopen(argv[2], "wb");
  fwrite(hidden, 1, sizeof hidden, out);
  return fclose(out);
}
"""
TYPES = {"float32": "float", "float16": "pararnn::Float16", "bfloat16": "pararnn::Bfloat16"}


@pytest.mark.parametrize("name", ["gru", "lstm", "slstm", "nlru"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_numbers(name, dtype, tmp_path):
    cell, params, u, _ = problem(name, T=50, D=41, B=1)
    u = mx.array(u).astype(DTYPES[dtype])
    wanted = recurrence(cell, mx.array(params), u, backend="cpu")[0]
    (tmp_path / "in").write_bytes(np.ascontiguousarray(cpu.view(u)).tobytes() + params.tobytes())
    counts = {
        "T": 50,
        "W": 41,
        "gates": len(cell.gates),
        "params": len(cell.params),
        "slots": len(cell.slots),
    }
    text = texts.cpu_recurrence_text(cell) + MAIN.replace("T_", TYPES[dtype]) % {**counts, "dtype": dtype}
    run(COMPILER, text, tmp_path, "-static", "-o", str(tmp_path / "run"))
    subprocess.run([EMULATOR, tmp_path / "run", tmp_path / "in", tmp_path / "out"], check=True)
    given = np.frombuffer((tmp_path / "out").read_bytes(), cpu.view(wanted).dtype).reshape(wanted.shape)
    given = mx.array(given).view(DTYPES[dtype])
    step = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert mx.allclose(given.astype(mx.float32), wanted.astype(mx.float32), rtol=step, atol=step)


@pytest.mark.parametrize(("kind", "dtype"), [("gru", "float32"), ("babylm", "float16"), ("gru", "bfloat16")])
def test_a_token_in_one_call(kind, dtype, monkeypatch, tmp_path):
    made = make(kind, DTYPES[dtype])
    wanted = recorded(made, TOKENS, monkeypatch, tmp_path / "in", threads=2)
    run(COMPILER, replay_text(made, dtype), tmp_path, "-static", "-o", str(tmp_path / "run"))
    subprocess.run([EMULATOR, tmp_path / "run", tmp_path / "in", tmp_path / "out"], check=True)
    step = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(replayed(made, tmp_path / "out"), wanted, rtol=step, atol=step)


def test_elementwise_work_compiles(tmp_path):
    text = texts.cpu_elementwise_text()
    run(COMPILER, text, tmp_path, "-shared", "-fPIC", "-o", str(tmp_path / "library.so"))


def run(compiler, text, folder, *options):
    (folder / "text.cpp").write_text(text)
    command = [compiler, "-std=c++17", "-O2", "-pthread", *options, str(folder / "text.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
