import os

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX's first matrix product: parity needs float32 ones

from pathlib import Path

import pytest

import mlx_pararnn  # noqa: F401 - loads OpenBLAS before a test imports MLX
from mlx_pararnn import cells
from tests.support.golden import DATA, golden_file


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch):
    """A cell that a test registers is gone after it."""
    monkeypatch.setattr(cells, "_REGISTRY", dict(cells._REGISTRY))


@pytest.fixture(autouse=True)
def this_machines_backend(monkeypatch):
    monkeypatch.delenv("MLX_PARARNN_BACKEND", raising=False)


@pytest.fixture
def cpu_backend():
    """What the CPU backend needs: a C++ compiler, and MLX's CPU, on a machine with a GPU too."""
    import mlx.core as mx

    from mlx_pararnn.compute import cpu_build

    try:
        cpu_build.compiler()
    except cpu_build.BuildError as error:
        pytest.skip(str(error))
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def calls(monkeypatch):
    """Of each token so far, whether it went through the one call."""
    from mlx_pararnn.compute import cpu_token

    made = []
    decode = cpu_token.decode

    def spy(*arguments):
        y = decode(*arguments)
        made.append(y is not None)
        return y

    monkeypatch.setattr(cpu_token, "decode", spy)
    return made


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A function that converts a checkpoint of tests/data once, and gives the model folder."""
    from mlx_pararnn.convert.to_mlx import convert_to_mlx

    folders: dict[tuple, Path] = {}

    def convert(source: str, **options) -> Path:
        key = (source, *sorted((k, str(v)) for k, v in options.items()))
        if key not in folders:
            out = tmp_path_factory.mktemp("converted") / "model"
            options.setdefault("tokenizer", "none")
            convert_to_mlx(golden_file(source), out, **options)
            folders[key] = out
        return folders[key]

    return convert
