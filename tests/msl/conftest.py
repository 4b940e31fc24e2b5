"""MLX's Metal kernels run in the harness, as though this were a Mac."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.compute import adjoint, gpu, layer_ops
from mlx_pararnn.compute.recurrence import kernel_works

from ..support.msl import harness


@pytest.fixture
def mac(monkeypatch):
    """Pretend to be a Mac; gives the names of the kernels that were launched."""
    names = []

    def run(launch, arrays, backend):
        assert backend == "metal"
        names.append(launch.name)
        dtypes = {n: "bfloat16" for n, a in arrays.items() if a.dtype == mx.bfloat16}
        given = {
            n: np.array(arrays[n].view(mx.uint16) if n in dtypes else arrays[n]) for n in launch.input_names
        }
        out = harness.run(launch, given, dtypes=dtypes, check=False)
        return {
            n: mx.array(a).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(a)
            for (n, a), dtype in zip(out.items(), launch.output_dtypes, strict=True)
        }

    monkeypatch.setattr(gpu, "available_backend", lambda: "metal")
    monkeypatch.setattr(gpu, "run", run)
    trials = (
        *(kernel_works, adjoint._agrees),
        *(layer_ops.conv_works, layer_ops.decode_works, layer_ops.norm_works),
    )
    for trial in trials:
        trial.cache_clear()
    yield names
    for trial in trials:
        trial.cache_clear()


@pytest.fixture
def launched(mac, monkeypatch):
    """As `mac`, after the trial at first use."""
    for trial in (
        "recurrence.kernel_works",
        "adjoint._agrees",
        "layer_ops.conv_works",
        "layer_ops.decode_works",
        "layer_ops.norm_works",
    ):
        monkeypatch.setattr(f"mlx_pararnn.compute.{trial}", lambda *_: True)
    return mac
