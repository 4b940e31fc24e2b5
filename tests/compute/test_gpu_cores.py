"""How many cores a GPU has, as macOS tells it and by name."""

import platform
import subprocess
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_pararnn.compute import gpu_cores

NAMES = {
    "Apple M1": 8,
    "Apple M4 Pro": 20,
    "Apple M3 Max": 40,
    "NVIDIA H200": 132,
    "NVIDIA A100-SXM4-80GB": 108,
    "NVIDIA L40S": 142,
    "Apple Paravirtual device": 32,
    "": 32,
}


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name):
    assert gpu_cores.named(name) == NAMES[name]


TOLD = {
    '  | {\n  |   "gpu-core-count" = 14\n  | }\n': 14,
    "": 8,
    OSError("no ioreg"): 8,
    subprocess.TimeoutExpired("ioreg", 5): 8,
}


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_as_macos_tells_it_else_by_name(told, monkeypatch):
    def run(*_, **__):
        if isinstance(told, Exception):
            raise told
        return SimpleNamespace(stdout=told)

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1"})
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_cores.gpu_cores.__wrapped__() == TOLD[told]
