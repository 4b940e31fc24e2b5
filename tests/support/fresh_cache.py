"""A CPU library that is not built or loaded yet."""

import sys

from mlx_pararnn.compute import adjoint, cpu, cpu_adjoint, cpu_build
from mlx_pararnn.compute.recurrence import _kernels_agree


class fresh_cache:
    """No library is built or loaded yet; the cache folder is inside `folder`."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(sys, "platform", "linux")

    def __enter__(self):
        of_machine = cpu_build.compiler, cpu_build._machine
        for cached in (*of_machine, cpu.load, cpu_adjoint.load, _kernels_agree, adjoint._agrees):
            cached.cache_clear()

    def __exit__(self, *_):
        self.__enter__()
