"""What the CPU backend meets on a Mac, by stand-ins: where MLX keeps arrays, and two kinds of cores."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import get_cell
from mlx_pararnn.compute import cpu, cpu_token
from mlx_pararnn.compute.recurrence import recurrence
from tests.support.problems import problem
from tests.support.random_models import make

METAL = 8  # kDLMetal of DLPack


@pytest.fixture
def kept_by_metal(monkeypatch):
    """MLX with Metal: DLPack hands out device 8 and an Objective-C object in place of the numbers."""

    def device(_):
        asked.append("__dlpack_device__")
        return METAL, 0

    def capsule(*_, **__):
        asked.append("__dlpack__")
        raise BufferError("the data is an MTLBuffer")

    asked = []
    monkeypatch.setattr(mx.array, "__dlpack_device__", device)
    monkeypatch.setattr(mx.array, "__dlpack__", capsule)
    return asked


def test_weights_are_never_read_through_dlpack(kept_by_metal, cpu_backend, monkeypatch):
    """A token, a prompt and a gradient: addresses come from Python's buffers, which are the host's."""
    assert mx.array(1.0).__dlpack_device__() == (METAL, 0)
    kept_by_metal.clear()
    monkeypatch.setattr(cpu, "_LARGE", 0)
    model = make("gru")
    cache = model.make_cache(1)
    reference = model.make_cache(1)
    for tokens in (mx.array([[1, 2, 3, 4]]), mx.array([[5]])):
        given, wanted = model(tokens, cache=cache), model(tokens, cache=reference, backend="ops")
        assert mx.allclose(given, wanted, rtol=1e-3, atol=1e-4)
    cell, params, u, _ = problem("gru", T=30)
    slope = mx.grad(lambda p: recurrence(cell, p, mx.array(u))[0].sum())(mx.array(params))
    assert mx.isfinite(slope).all()
    assert kept_by_metal == []


def test_addresses_are_those_of_pythons_buffers(cpu_backend):
    class OnMetal(np.ndarray):
        def __dlpack_device__(self):
            return METAL, 0

        def __dlpack__(self, **_):
            raise BufferError("the data is an MTLBuffer")

    array = np.arange(24, dtype=np.float32).reshape(4, 6).view(OnMetal)
    found = cpu.dense_addresses(cpu_token._library(get_cell("gru"), "float32"), [array, array.T])
    assert found == [array.ctypes.data, None]
