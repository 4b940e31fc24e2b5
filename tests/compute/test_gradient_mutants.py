"""metal/cpu_gradients.cpp broken on purpose: the checks of its functions check."""

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.compute import cpu, cpu_gradients, layer_ops
from tests.support.broken_text import broken, built_with
from tests.support.fresh_cache import fresh_cache
from tests.support.layer_functions import FUNCTIONS, as_list, given_by, inputs_of, slopes_of
from tests.support.random_models import numbers

pytestmark = pytest.mark.usefixtures("cpu_backend")
CPP = "cpu_gradients.cpp"
UP = "(in[1]) + row * size[3];\n    const T* slope"
ROWS, STEPS = "(block + 1) * BLOCK : rows;", "int64_t t = begin < K ? 0 : begin - K + 1"
MUTANTS = {
    # SwiGLU
    "the gate's slope is its value": ("load(up + i, n) * at.slope", "load(up + i, n) * at.value"),
    "up's slope is the gate's": ("store(to_up + i, dy * at.value, n)", "store(to_up + i, dy * at.slope, n)"),
    "slope of SiLU": ("s + y * (1.0f - s)", "s + y * s"),
    "up by the strides of a copy": (UP, UP.replace("size[3]", "width")),
    # norms
    "nothing by the scale's slope": (" * scale - load(from + i, n) * shift", " * scale"),
    "a sum for a mean": ("Vec(total(products) / float(width))", "Vec(total(products))"),
    "the scale squared": ("scale * scale * scale * Vec", "scale * scale * Vec"),
    "the weight's slope unscaled": ("add(sums + i, dy * (value * scale), n)", "add(sums + i, dy * value, n)"),
    "the gate's slope without the weight": ("dy * (value * scale * w) * at", "dy * (value * scale) * at"),
    "the norm's slope without the gate": ("dy = dy * at.value;", ""),
    "the slope without the weight": ("dy = dy * w;", ""),
    "the last row": (ROWS, ROWS.replace("rows", "rows - 1")),
    "sums of one block": ("block < blocks; ++block) sum", "block < 1; ++block) sum"),
    "x by the strides of a copy": ("x + row * x_stride", "x + row * width"),
    # convolution
    "the new window's slope": ("given = load(window_slope + (t - steps) * width + i, n);", ""),
    "steps of the block before": (STEPS, "int64_t t = begin"),
    "places past the last step": ("end == steps ? steps + K - 1 : end", "end"),
    "taps the other way": ("newest[(t + K - k) % K", "newest[(t + k) % K"),
    "no slope of the bias": ("add(sums + K * width + i, dz, n);", ""),
    "weights' slopes twice": ("if (t < begin) return;", ""),
    "no bias": ("Vec z = load(bias + i, n);", "Vec z(0.0f);"),
    "inputs by the strides of a copy": ("(place - K + 1) * size[5]", "(place - K + 1) * width"),
    # cross entropy
    "the smallest logit": ("choose(x > tops, x, tops)", "choose(x > tops, tops, x)"),
    "the largest of one lane": ("k < LANES; ++k) top", "k < 1; ++k) top"),
    "the largest without the rest": ("i < width; ++i) top", "i < whole; ++i) top"),
    "the sum without the rest": ("i < width; ++i) sum", "i < whole; ++i) sum"),
    "the loss without the largest": ("[row]) - top);", "[row]));"),
    "the target's slope": ("* scale - slope, 1)", "* scale, 1)"),
    "no softmax": ("const float scale = slope / ", "const float scale = slope + 0 * "),
}  # fmt: skip


def objections():
    """What is not as MLX's operations have it, or float64."""
    for name, (function, *_) in FUNCTIONS.items():
        for size in ((2, 70, 13), (1, 3, 40), (3, 2, 16)):
            arrays = inputs_of(name, size)
            slopes = slopes_of(name, arrays)
            views = [mx.split(mx.concatenate([a, 1 - a], axis=-1), 2, axis=-1)[0] for a in arrays]
            for given_arrays in (arrays, views):
                given = given_by(name, given_arrays, slopes) + as_list(function(*given_arrays, backend="cpu"))
                wanted = given_by(name, arrays, slopes, "ops") + as_list(function(*arrays, backend="ops"))
                if not all(map(close, given, wanted)):
                    yield name, size
    for place in range(37):  # so far apart that the largest alone keeps exp in its range
        logits, targets = mx.zeros((3, 37)), mx.array([0, place, 36])
        logits[:, place] = 200.0
        given, wanted = (layer_ops.cross_entropy(logits, targets, backend=b) for b in ("cpu", "ops"))
        if not close(given, wanted):
            yield "cross_entropy", place


def close(given, wanted):
    return np.allclose(numbers(given), numbers(wanted), rtol=1e-4, atol=1e-4)


def library_of(mutant, monkeypatch, folder) -> ctypes.CDLL:
    built_with(["-O0"], monkeypatch)
    if mutant != "unchanged":
        broken(monkeypatch, CPP, *MUTANTS[mutant])
    with fresh_cache(monkeypatch, folder):
        return cpu_gradients._library.__wrapped__("float32")


@pytest.mark.toolchain
@pytest.mark.parametrize("mutant", ["unchanged", *MUTANTS])
def test_mutants(mutant, monkeypatch, tmp_path):
    """Each broken text is seen, the real one passes."""
    layer_ops._gradients_work(mx.float32)
    library = library_of(mutant, monkeypatch, tmp_path)
    monkeypatch.setattr(cpu, "_LARGE", 0)
    monkeypatch.setattr(cpu, "threads", lambda: 1)
    monkeypatch.setattr(cpu_gradients, "_library", lambda dtype: library)
    seen = next(objections(), None)
    assert (seen is None) == (mutant == "unchanged"), seen
