"""How many cores a GPU has, as macOS and NVIDIA's driver tell it and by name."""

import platform
import subprocess
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_pararnn.compute import cpu_build, gpu_cores

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


# Of each stand-in for NVIDIA's driver what it answers, as C; and what is understood.
DRIVERS = {
    "int cuInit(unsigned n) { return n; }"
    "int cuDeviceGet(int *device, int n) { *device = n + 7; return 0; }"
    "int cuDeviceGetAttribute(int *to, int what, int of) { *to = 100 * what + of; return 0; }": 1607,
    "int cuInit(unsigned n) { return 100; }"
    "int cuDeviceGet(int *device, int n) { return 0; }"
    "int cuDeviceGetAttribute(int *to, int what, int of) { *to = 5; return 0; }": 0,  # no card
    "int cuInit(unsigned n) { return n; }": 0,
    None: 0,
}


@pytest.mark.skipif(platform.system() != "Linux", reason="its driver is Linux's")
@pytest.mark.parametrize("driver", DRIVERS, ids=["a card", "no card", "another library", "no driver"])
def test_as_nvidias_driver_tells_it(driver, tmp_path):
    library = tmp_path / "libcuda.so.1"
    if driver is not None:
        (tmp_path / "driver.cpp").write_text('extern "C" {' + driver + "}")
        command = [cpu_build.compiler(), "-shared", "-fPIC", tmp_path / "driver.cpp", "-o", library]
        subprocess.run(command, check=True)
    assert gpu_cores.multiprocessors(str(library)) == DRIVERS[driver]
