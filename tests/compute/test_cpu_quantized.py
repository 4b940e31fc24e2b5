"""Products of packed matrices and few vectors on a CPU, apart from any model.

By metal/cpu_quantized.h and, where the processor has AVX-512 VNNI, by metal/cpu_digits.h.
"""

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.compute import cpu, cpu_build, cpu_token, texts
from mlx_pararnn.files.quantization_formats import BITS, GROUP_SIZES
from tests.support.msl.instances import DTYPES
from tests.support.processor import has_vnni

pytestmark = pytest.mark.usefixtures("cpu_backend")

TYPES = {"float32": "float", "float16": "pararnn::Float16", "bfloat16": "pararnn::Bfloat16"}
LIBRARY = """
namespace pararnn {
template <typename Form, typename T>
void multiply(const Matrix& m, const float* x, const int64_t* size, float* y) {
  const int64_t first = size[0], rows = size[1], width = size[2], B = size[3];
  const int64_t stride = Form::arranged_size(width);
  std::vector<float> arranged(B * stride, NAN);
  for (int64_t b = 0; b < B; ++b) Form::arrange(x + b * width, width, &arranged[b * stride]);
  Form::template product_rows<T, Form>(m, first, arranged.data(), stride, width, B, y, rows, 0, rows);
}
template <typename T>
void row(const Matrix& m, int64_t width, int64_t number, float* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = unpacked<T>(m, width, number, i);
}
}  // namespace pararnn
"""
EXPORTS = """
extern "C" void multiply_{name}(
    const pararnn::Matrix* m, const float* x, const int64_t* size, float* y) {{
  pararnn::multiply<pararnn::{form}, {type}>(*m, x, size, y);
}}
extern "C" void row_{name}(const pararnn::Matrix* m, int64_t width, int64_t number, float* to) {{
  pararnn::row<{type}>(*m, width, number, to);
}}
"""


def built(bits, group, monkeypatch, form="Quantized"):
    if "digits" in form and not has_vnni():
        pytest.skip("this processor has no AVX-512 VNNI")
    flags = ["-std=c++17", "-O1", "-march=native", "-shared", "-fPIC", "-pthread"]
    monkeypatch.setattr(cpu_build, "_flags", lambda: flags)
    files = "cpu.h", "cpu_linear.h", "cpu_quantized.h", "cpu_digits.h"
    text = "".join(map(texts.metal_text, files)) + LIBRARY
    kind, number = ("Digits", form[0]) if "digits" in form else (form, "")
    arguments = ", ".join(map(str, (bits, group, *number)))
    of = {"form": f"{kind}<{arguments}>"}
    text += "".join(EXPORTS.format(**of, name=name, type=t) for name, t in TYPES.items())
    return cpu_build.build(text, f"packed-{bits}-{group}", (cpu_token.Matrix,))


def quantized(rng, rows, width, bits, group, dtype):
    """A packed matrix, and its weights in float64."""
    matrix = mx.array(rng.normal(size=(rows, width)).astype(np.float32)).astype(dtype)
    packed, scales, biases = mx.quantize(matrix, group, bits)
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    q = np.array(mx.dequantize(packed, ones, zeros, group, bits), np.float64)
    of_each = [np.array(a.astype(mx.float32), np.float64).repeat(group, axis=1) for a in (scales, biases)]
    return (packed, scales, biases), of_each[0] * q + of_each[1]


def struct_of(arrays, bits, group):
    mx.eval(*arrays)
    return cpu_token.Matrix(*(cpu.address(a) for a in arrays), bits, group)


def multiply(library, arrays, bits, group, x, first, rows):
    y = np.full((x.shape[0], rows), np.nan, np.float32)
    size = np.array([first, rows, x.shape[1], x.shape[0]], np.int64)
    name = {v: k for k, v in DTYPES.items()}[arrays[1].dtype]
    library[f"multiply_{name}"](
        ctypes.byref(struct_of(arrays, bits, group)), *(ctypes.c_void_p(a.ctypes.data) for a in (x, size, y))
    )
    return y


FORMS = [("Quantized", bits) for bits in BITS]
FORMS += [(f"{digits} digits", bits) for digits in (3, 2) for bits in (4, 8)]
SAMPLES = (
    *(("Quantized", 4, 64), ("Quantized", 3, 32)),  # others build no library in the quick run
    *(("3 digits", 4, 64), ("2 digits", 8, 64)),
)
# of the largest sum that there could be
STEP = {"Quantized": 2e-6, "3 digits": 2e-6, "2 digits": 2e-5}


@pytest.mark.sampled(
    "large", by=lambda form, bits, group: [form, bits] if (form, bits, group) in SAMPLES else []
)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_products(form, bits, group, monkeypatch):
    """Of every dtype, of widths that fill no block, of 1 to 16 rows."""
    library, rng = built(bits, group, monkeypatch, form), np.random.default_rng(bits)
    for n, width in enumerate((group, 3 * group, 5 * group, 1024 + group)):
        for name, dtype in DTYPES.items():
            arrays, weight = quantized(rng, 23, width, bits, group, dtype)
            for B in (1, 3, 4, 7, 16)[n % 2 :: 2]:
                x = (rng.normal(size=(B, width)) + n % 2).astype(np.float32)
                wanted = x.astype(np.float64) @ weight.T
                # in parts of what the largest sum is of
                step = STEP[form] * (np.abs(x.astype(np.float64)) @ np.abs(weight).T).max()
                given = multiply(library, arrays, bits, group, x, 0, 23)
                np.testing.assert_allclose(given, wanted, rtol=0, atol=step)
                part = multiply(library, arrays, bits, group, x, 5, 7)
                np.testing.assert_array_equal(part, given[:, 5:12])  # whichever rows are done together
                alone = multiply(library, arrays, bits, group, x[-1:].copy(), 0, 23)
                np.testing.assert_array_equal(alone, given[-1:])  # and whichever vectors
            if name == "float32":
                of = {"group_size": group, "bits": bits}
                by_mlx = np.array(mx.quantized_matmul(mx.array(x), *arrays, transpose=True, **of))
                np.testing.assert_allclose(given, by_mlx, rtol=0, atol=2 * step)
            row = np.empty(width, np.float32)
            library[f"row_{name}"](
                ctypes.byref(struct_of(arrays, bits, group)),
                ctypes.c_int64(width),
                ctypes.c_int64(11),
                ctypes.c_void_p(row.ctypes.data),
            )
            np.testing.assert_allclose(row, weight[11], rtol=0, atol=1e-6 * np.abs(weight).max())


@pytest.mark.sampled("large", by=lambda bits, digits: [digits] if (bits, digits) in ((4, 3), (8, 2)) else [])
@pytest.mark.parametrize(("digits", "kept"), [(3, 8e-8), (2, 1.6e-5)])
@pytest.mark.parametrize("bits", [4, 8])
def test_digits_keep_parts_of_the_largest_number(bits, digits, kept, monkeypatch):
    """Of small numbers in a group with a large one: each row of the matrix reads one of them."""
    library, most = built(bits, 64, monkeypatch, f"{digits} digits"), 2**bits - 1
    q = np.eye(64, dtype=np.uint64) * most
    per_word = 32 // bits
    words = (q.reshape(64, -1, per_word) << (bits * np.arange(per_word, dtype=np.uint64))).sum(-1)
    arrays = mx.array(words.astype(np.uint32)), mx.ones((64, 1)), mx.zeros((64, 1))
    x = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 64)).astype(np.float32)
    x[0, 0] = 1.0
    given = multiply(library, arrays, bits, 64, x, 0, 64) / most
    assert np.abs(given - x).max() < kept


@pytest.mark.sampled("large", by=lambda bits: ["one"] if bits == 8 else [])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_digits_leave_out_meets_the_weights_less_their_mean(bits, monkeypatch):
    """Weights that are all the same add up to nothing with numbers that do: with a large bias too."""
    library = built(bits, 64, monkeypatch, "2 digits")
    words = mx.full((4, 64 // 32 * bits), 2**32 - 1, mx.uint32)
    arrays = words, mx.ones((4, 1)), mx.full((4, 1), 1.0 - 2**bits)
    x = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    assert np.abs(multiply(library, arrays, bits, 64, x, 0, 4)).max() < 1e-6 * 2**bits * np.abs(x).max()


@pytest.mark.parametrize("form", ["Quantized", "3 digits", pytest.param("2 digits", marks=pytest.mark.large)])
def test_numbers_that_are_none(form, monkeypatch):
    """Infinite and undefined ones of x and of scales reach the rows that they belong to, and no others."""
    library, rng = built(4, 64, monkeypatch, form), np.random.default_rng(0)
    (packed, scales, biases), _ = quantized(rng, 8, 192, 4, 64, mx.float32)
    x = np.ones((1, 192), np.float32)
    scales[3, 2] = float("nan")
    y = multiply(library, (packed, scales, biases), 4, 64, x, 0, 8)
    assert np.isnan(y[0]).tolist() == [n == 3 for n in range(8)]
    x[0, 70] = np.inf
    assert not np.isfinite(multiply(library, (packed, scales, biases), 4, 64, x, 0, 8)).any()
    x[0, 70] = np.nan
    assert np.isnan(multiply(library, (packed, scales, biases), 4, 64, x, 0, 8)).all()


@pytest.mark.sampled("large", by=lambda form, bits: [form] if (form, bits, 64) in SAMPLES else [])
@pytest.mark.parametrize(
    ("form", "bits"), [("Quantized", 4), ("3 digits", 4), ("3 digits", 8), ("2 digits", 8)]
)
def test_numbers_of_every_size(form, bits, monkeypatch):
    """Sums as large as there can be; groups of small numbers beside one of large ones, all as exact."""
    library, width = built(bits, 64, monkeypatch, form), 192
    most, rng = 2**bits - 1, np.random.default_rng(1)
    full = (mx.full((3, width // 32 * bits), 2**32 - 1, mx.uint32), mx.ones((3, 3)), mx.zeros((3, 3)))
    for size in (1e-25, 1.0, 1e30):
        for sign in (1, -1):
            x = np.full((1, width), sign * size, np.float32)
            y = multiply(library, full, bits, 64, x, 0, 3)
            np.testing.assert_allclose(y, x[0, 0].astype(np.float64) * most * width, rtol=STEP[form])
    # row r reads group r alone
    alone = (full[0], mx.eye(3), mx.zeros((3, 3)))
    x = (rng.normal(size=(1, width)) * np.repeat([1e-20, 1.0, 1e10], 64)).astype(np.float32)
    y = multiply(library, alone, bits, 64, x, 0, 3)
    groups = x.astype(np.float64).reshape(3, 64)
    wanted, size = most * groups.sum(axis=1), most * np.abs(groups).sum(axis=1)
    assert np.all(np.abs(y[0] - wanted) <= STEP[form] * size)
    assert not multiply(library, full, bits, 64, np.zeros((1, width), np.float32), 0, 3).any()
