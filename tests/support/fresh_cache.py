"""A CPU library that is not built or loaded yet."""

import sys

from mlx_pararnn.compute import cpu, cpu_build
from mlx_pararnn.compute.recurrence import _kernels_agree


class fresh_cache:
    """No library is built or loaded yet; the cache folder is inside `folder`."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(sys, "platform", "linux")

    def __enter__(self):
        for cached in (cpu_build.compiler, cpu_build._machine, cpu.load, _kernels_agree):
            cached.cache_clear()

    def __exit__(self, *_):
        self.__enter__()
