"""The block that `mlx-pararnn doctor --report` prints: on this machine's CPU, and on a GPU by a stand-in."""

import re
import subprocess
import sys

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.compute import adjoint, choice, gpu, layer_ops, recurrence
from mlx_pararnn.tools import device_report


@pytest.mark.large
def test_one_block_to_paste(cpu_backend):
    """In a process of its own, as other tests make trials fail."""
    command = [sys.executable, "-m", "mlx_pararnn", "doctor", "--report"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *lines, last = done.stdout.strip().splitlines()
    assert (first, last) == ("```text", "```")
    assert lines[0].startswith("mlx-pararnn ")
    assert any(re.fullmatch(r"kernels: (\d+) of \1 passed their trial, \d+ s", line) for line in lines)
    assert sum(line.endswith(" ms") for line in lines) == 5
    assert CliRunner().invoke(app, ["doctor", "--report", "--json"]).exit_code == 2


@pytest.fixture
def stand_in(monkeypatch):
    """A GPU that runs nothing: kernels give zeros, one kind is refused, and so is what is too large."""

    def run(launch, arrays, backend):
        launched.append(launch)
        if "adjoint" in launch.name:
            raise ValueError("Thread group size (256)\nis greater than the maximum allowed 224")
        shapes = zip(launch.output_names, launch.output_shapes, launch.output_dtypes, strict=True)
        return {name: mx.zeros(shape, dtype) for name, shape, dtype in shapes}

    def metal_kernel(**_):
        def refuse(*, threadgroup, **_):
            raise ValueError(f"{threadgroup[0]} threads are more than the maximum allowed 1024")

        return refuse

    launched = []
    monkeypatch.setattr(gpu, "available_backend", lambda: "metal")
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(choice, "TRIALS", {})
    monkeypatch.setattr(device_report, "RUNS", 1)
    monkeypatch.setattr(device_report, "_timings", lambda backend: [])
    # numbers that a stand-in gives are not compared
    monkeypatch.setattr(mx, "allclose", lambda *_, **__: mx.array(True))
    return launched


@pytest.mark.large
def test_kernels_and_limits_of_a_gpu(stand_in):
    trials = recurrence.kernel_works, adjoint._agrees, layer_ops.conv_works, layer_ops.decode_works
    for trial in trials:
        trial.cache_clear()
    try:
        text = device_report.device_report()
    finally:
        for trial in trials:
            trial.cache_clear()
    assert "threads of a threadgroup: 4096 threads are more than the maximum allowed 1024" in text
    tried, passed = len(choice.TRIALS), sum(not why for why in choice.TRIALS.values())
    assert f"kernels: {passed} of {tried} passed their trial" in text
    assert tried - passed == 3 * len(gpu.CELLS)  # a gradient's shape each, of every cell
    assert "metal: the gradient of 'gru', float32, wide, masked, states: Thread group size (256) is" in text
    kinds = {launch.name.split("_")[1] for launch in stand_in}
    assert kinds == set(gpu.INSTANTIATIONS)
    shapes = {dict(launch.constants).get("CW") for launch in stand_in if "recurrence" in launch.name}
    assert shapes == {channels for channels, _, _ in gpu.SHAPES.values()}
    dtypes = {dtype for launch in stand_in for name, dtype in launch.constants if name == "InT"}
    assert dtypes == set(gpu.DTYPES)
