"""What the tests of `convert` run and look at."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from mlx_pararnn.cli.app import app


def convert(*arguments: object) -> Result:
    """`mlx-pararnn convert` with these arguments, in this process."""
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
