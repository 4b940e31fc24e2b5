"""MLX compiles for a CPU in a folder that others can reach: nothing of theirs is loaded, and it works."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_pararnn.compute import cpu_build
from tests.support.privileges import given_away

pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles for a CPU in a shared folder on Linux"),
]

COMPILE = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(mx.compile(lambda x: mx.exp(x) + x * x)(mx.zeros((3,))).sum().item())
"""
CHECK = """
import os, tempfile
print(tempfile.gettempdir() == os.environ["TMPDIR"] == %r)
"""
IMPORTS = {
    "before MLX": "import mlx_pararnn\n" + COMPILE,
    "after MLX": "import mlx.core\nimport mlx_pararnn\n" + COMPILE,
    "by MLX-LM": "import mlx_pararnn\nimport mlx_lm.models\n" + COMPILE,
}
GENERATE = [
    "-m",
    "mlx_pararnn.cli.app",
    "generate",
    "-p",
    "def main",
    "-m",
    "3",
    "--temp",
    "0.8",
    "--top-k",
    "9",
]


@pytest.fixture
def shared(tmp_path) -> Path:
    """A folder for temporary files as /tmp is."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def run(shared, tmp_path, *arguments):
    variables = {**os.environ, "TMPDIR": str(shared), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables["MLX_PARARNN_BACKEND"] = "ops"  # nothing of ours has to be compiled
    variables.pop("MLX_DISABLE_COMPILE", None)  # what the quick run's other commands do without
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """An mlx/ with libraries that end the process that loads them, under every name that COMPILE asks for."""
    shared = tmp_path_factory.mktemp("planted")
    first = run(shared, shared, "-c", COMPILE)  # plain MLX: the names
    assert first.returncode == 0, first.stderr
    source, library = shared / "planted.cpp", shared / "planted.so"
    source.write_text("__attribute__((constructor)) static void run() { __builtin_trap(); }")
    subprocess.run([cpu_build.compiler(), "-shared", "-fPIC", "-o", library, source], check=True)
    names = [*shared.glob("mlx/*/cpu/*.so")]
    assert names
    for name in names:
        name.unlink()
        shutil.copy(library, name)
    assert run(shared, shared, "-c", COMPILE).returncode < 0  # plain MLX runs them
    return shared / "mlx"


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    ("whose", "order"),
    [*(("another's", order) for order in IMPORTS), ("all may write", "before MLX"), ("a link", "before MLX")],
)
def test_a_planted_library_is_not_loaded(whose, order, planted, shared, tmp_path):
    shutil.copytree(planted, shared / "mlx")
    if whose == "all may write":
        (shared / "mlx").chmod(0o777)
    elif whose == "a link":
        (shared / "mlx").rename(tmp_path / "elsewhere")
        (shared / "mlx").symlink_to(tmp_path / "elsewhere")
    code = IMPORTS[order] + CHECK % str(shared)
    with given_away(shared / "mlx") if whose == "another's" else nullcontext():
        done = run(shared, tmp_path, "-c", code)
    assert (done.returncode, done.stdout) == (0, "3.0\nTrue\n"), done.stderr
    (used,) = (tmp_path / "cache" / "mlx-pararnn").iterdir()
    assert used.stat().st_mode & 0o777 == 0o700
    assert [*used.glob("mlx/*/cpu/*.so")]


@pytest.mark.large
@pytest.mark.parametrize("place", ["mlx", "mlx/VERSION", "mlx/VERSION/cpu"])
def test_a_folder_of_anothers_does_not_end_generation(place, shared, tmp_path):
    folder = shared / place.replace("VERSION", mx.__version__)
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    with given_away(folder):
        done = run(shared, tmp_path, *GENERATE)
    assert done.returncode == 0, done.stderr
    assert not [*folder.rglob("*.so")]


def test_a_folder_of_ones_own_is_used_and_a_missing_one_made(shared, tmp_path):
    for _ in range(2):
        done = run(shared, tmp_path, "-c", IMPORTS["before MLX"])
        assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
        assert len([*shared.glob("mlx/*/cpu/*.so")]) == 1
    assert (shared / "mlx").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "cache").exists()


def test_without_the_sticky_bit_nothing_there_is_trusted(shared, tmp_path):
    """Others could put a folder of theirs in the place of ours."""
    shared.chmod(0o777)
    done = run(shared, tmp_path, "-c", IMPORTS["before MLX"])
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
    assert not [*shared.iterdir()]


def test_a_private_folder_for_temporary_files_is_left_alone(shared, tmp_path):
    shared.chmod(0o700)
    run(shared, tmp_path, "-c", "import mlx_pararnn, mlx.core")
    assert not [*shared.iterdir()]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", ["set to nothing", "a file", "missing"])
def test_without_a_folder_for_temporary_files_there_is_another(kind, tmp_path):
    """MLX would end with std::filesystem's error."""
    (tmp_path / "a file").touch()
    temporary = "" if kind == "set to nothing" else tmp_path / kind
    done = run(temporary, tmp_path, "-c", IMPORTS["before MLX"])
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
    (used,) = (tmp_path / "cache" / "mlx-pararnn").iterdir()
    assert [*used.glob("mlx/*/cpu/*.so")]
