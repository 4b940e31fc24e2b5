"""without_compiler.py [CELL...]: whether an installed platform wheel computes where no compiler is found.

Prompts, tokens, quantized weights and gradients on a CPU, as plain MLX ops compute them. Nothing may be
compiled, and no warning may say that ops took the CPU backend's place.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.pop("CXX", None)
os.environ |= {"PATH": "", "XDG_CACHE_HOME": tempfile.mkdtemp()}

import mlx.core as mx
import mlx.nn as nn

from mlx_pararnn import Model, ModelArgs, get_cell
from mlx_pararnn.compute import choice, cpu, prebuilt
from mlx_pararnn.compute.cpu_build import cache_folder
from mlx_pararnn.compute.gpu import CELLS
from mlx_pararnn.compute.recurrence import recurrence


def tokens(cell: str, bits: int | None) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 128}
    model = Model(ModelArgs(cell=cell, **sizes))
    if bits:
        nn.quantize(model, 64, bits, class_predicate=model.quant_predicate)
    cache, twin = model.make_cache(), model.make_cache()
    for ids in ([[1, 2, 3]], [[4]], [[5]]):
        given, wanted = model(mx.array(ids), cache=cache), model(mx.array(ids), cache=twin, backend="ops")
        assert mx.allclose(given, wanted, atol=1e-4), (cell, bits)


def gradient(cell: str) -> None:
    made = get_cell(cell)
    params, u = mx.ones((len(made.params), 8)) / 4, mx.ones((1, 1, 70, len(made.gates), 8))

    def slope(backend: str) -> mx.array:
        return mx.grad(lambda p: recurrence(made, p, u, backend=backend)[0].sum())(params)

    assert mx.allclose(slope("cpu"), slope("ops"), rtol=1e-3, atol=1e-4), cell


def main(cells: list[str]) -> None:
    warnings.simplefilter("error", RuntimeWarning)
    mx.set_default_device(mx.cpu)
    for cell in cells:
        for bits in (None, 3, 8):
            tokens(cell, bits)
        gradient(cell)
        library = Path(cpu.load(get_cell(cell), "float32")._name)
        assert library.parent == prebuilt.FOLDER, library
        print(library.name)
    assert not any(choice.TRIALS.values()), choice.TRIALS
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "mlx_pararnn"]
    asked = ["generate", "-p", "31415926535897932384 + 27182818284590452353"]
    said = subprocess.run([*command, *asked], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said == "58598744820488384737\n", said
    assert not [*cache_folder().glob("*.so")], f"compiled into {cache_folder()}"


if __name__ == "__main__":
    main(sys.argv[1:] or [*CELLS])
