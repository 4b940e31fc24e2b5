"""What training does with memory: freed arrays are used again, not given back."""

import subprocess
import sys

import pytest

from mlx_pararnn import get_cell
from mlx_pararnn.compute import cpu_adjoint, cpu_gradients
from mlx_pararnn.compute import freed_memory as memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")

ARRAYS = """
import resource, sys
import mlx_pararnn
import mlx.core as mx
from mlx_pararnn.compute.freed_memory import keep_freed_memory

mx.set_default_device(mx.cpu)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def step():  # arrays of 8 and 48 MB
    mx.eval([mx.ones((n, 1 << 20)) for n in (2, 2, 12)])

for _ in range(2):  # after the first the pieces may lie in another order
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def printed(how, **variables):
    command = [sys.executable, "-c", ARRAYS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables or None)
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_freed_memory_is_used_again():
    kept, faults = printed("keep")
    if kept == "False":
        pytest.skip("not glibc, or its settings are the user's")
    pages = 5 * 64 * 256  # of 4 KB
    assert faults < pages / 10
    assert printed("as it is")[1] > 5 * faults


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(name, monkeypatch):
    monkeypatch.setenv(name, "")
    assert not memory.keep_freed_memory.__wrapped__()


@pytest.mark.parametrize(
    ("module", "load"),
    [
        (cpu_gradients, lambda: cpu_gradients._library.__wrapped__("float32")),
        (cpu_adjoint, lambda: cpu_adjoint.load.__wrapped__(get_cell("gru"), "float32")),
    ],
    ids=["layers", "cells"],
)
def test_the_first_gradient_asks_for_it(module, load, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: asked.append(module))
    monkeypatch.setattr(module, "build", lambda *of: None)
    load()
    assert asked == [module]
