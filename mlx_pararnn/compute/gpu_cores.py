"""How many cores the GPU has: as macOS or NVIDIA's driver tells it, else by its name."""

import ctypes
import platform
import re
import subprocess
from functools import lru_cache

import mlx.core as mx

# Of Apple's (their technical specifications; of several the most) and NVIDIA's multiprocessors (their data
# sheets), by what MLX calls the device.
_BY_NAME = {
    **{"M1": 8, "M1 Pro": 16, "M1 Max": 32, "M1 Ultra": 64},
    **{"M2": 10, "M2 Pro": 19, "M2 Max": 38, "M2 Ultra": 76},
    **{"M3": 10, "M3 Pro": 18, "M3 Max": 40, "M3 Ultra": 80},
    **{"M4": 10, "M4 Pro": 20, "M4 Max": 40, "M5": 10},
    **{"H200": 132, "H100": 132, "A100": 108, "L40S": 142, "L4": 58, "T4": 40, "RTX 4090": 128},
    **{"RTX 3090": 82, "RTX 5090": 170},
}
_UNKNOWN = 32


@lru_cache(maxsize=1)
def gpu_cores() -> int:
    """Cores of an Apple GPU, multiprocessors of an NVIDIA card; 32 for one that is not known."""
    return _asked() or named(str(mx.device_info().get("device_name", "")))


def named(device: str) -> int:
    """By the longest name of the table that stands in the device's, such as "Apple M4 Pro"."""
    found = [name for name in _BY_NAME if re.search(rf"\b{name}\b", device)]
    return _BY_NAME[max(found, key=len)] if found else _UNKNOWN


def _asked() -> int:
    """The entry of the GPU's driver in macOS's registry, or what NVIDIA's says; 0 where there is none."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return 0
    if platform.system() != "Darwin":
        return multiprocessors()
    asked = ["ioreg", "-rd1", "-c", "AGXAccelerator"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=5).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
    count = re.search(r'"gpu-core-count" = (\d+)', told)
    return int(count[1]) if count else 0


def multiprocessors(driver: str = "libcuda.so.1") -> int:
    """Of the first card, by the driver's own interface (cuda.h: cuDeviceGetAttribute, attribute 16)."""
    device, count = ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL(driver)
        failed = (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDeviceGetAttribute(ctypes.byref(count), 16, device)
        )
    except (OSError, AttributeError):
        return 0
    return 0 if failed else count.value
