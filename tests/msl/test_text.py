"""The text the checks work on is MLX's own, byte for byte.

MLX prints the text of a kernel while a call is exported, on any machine. That MLX on a Mac then compiles
exactly this text, after its preamble, is MLX's word (metal/custom_kernel.cpp) and not shown here.
"""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_pararnn.compute import gpu

from ..support.msl.instances import all_instances
from ..support.msl.wrap import METAL_TYPES, Input, wrap
from . import write_texts
from .mlx_text import assert_same, mlx_text
from .sample import Sample

BODY = "  uint i = thread_position_in_grid.x;\n  y[i] = x[i];"

SHAPES = [(), (1,), (7,), (8,), (9,), (2, 3), (2, 4), (1, 2, 3, 4), (2, 1, 1, 1, 3), (3, 1, 1, 1, 3), (0, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("facts", ["", "x_shape", "x_strides", "x_ndim", "x_shape x_strides x_ndim"])
def test_shapes(shape, facts, tmp_path, capfd):
    assert_same(Sample(BODY + f"  // {facts}"), [Input(shape, "float32")], tmp_path, capfd)


@pytest.mark.parametrize("dtype", METAL_TYPES)
@pytest.mark.parametrize("shape", [(), (3,), (64,)], ids=str)
def test_dtypes(dtype, shape, tmp_path, capfd):
    mlx_dtype = getattr(mx, dtype if dtype != "bool" else "bool_")
    call = Sample(BODY, output_dtypes=(mlx_dtype,), template=(("T", mlx_dtype),))
    assert_same(call, [Input(shape, dtype)], tmp_path, capfd)


TEMPLATES = [
    (("N", 3),),
    (("N", -3),),
    (("N", 0), ("M", -2147483648)),
    (("F", True),),
    (("F", False), ("G", True)),
    (("T", mx.bfloat16), ("N", -1), ("F", True), ("U", mx.float32)),
]


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_templates(template, tmp_path, capfd):
    assert_same(Sample(BODY, template=template), [Input((64,), "float32")], tmp_path, capfd)


ATTRIBUTE_USES = [
    "thread_index_in_simdgroup + simdgroup_index_in_threadgroup",
    "threadgroup_position_in_grid.x + threads_per_threadgroup.x",
    "my_grid_size",  # names grid_size
    "dispatch_threads_per_threadgroup.x",  # names threads_per_threadgroup
    "1; // thread_execution_width",
]


@pytest.mark.parametrize("use", ATTRIBUTE_USES)
def test_attributes(use, tmp_path, capfd):
    assert_same(Sample(f"  y[0] = {use};"), [Input((64,), "float32")], tmp_path, capfd)


@pytest.mark.parametrize("contiguous", [True, False])
def test_many_arrays(contiguous, tmp_path, capfd):
    call = Sample(
        BODY + "// u_strides mask_shape z_ndim",
        input_names=("x", "u", "mask", "z"),
        output_names=("y", "last"),
        output_shapes=((64,), (3, 2)),
        output_dtypes=(mx.float32, mx.float16),
        header="// a header\ninline float f(float x) { return x; }\n",
        contiguous=contiguous,
    )
    inputs = [
        Input((64,), "float32"),
        Input((2, 3, 4), "bfloat16"),
        Input((2, 2), "bool"),
        Input((), "int32"),
    ]
    assert_same(call, inputs, tmp_path, capfd)


def test_mlx_still_breaks_a_body_without_attributes(tmp_path, capfd):
    """Why wrap() refuses one. When this fails, MLX has mended it, and wrap() may allow it."""
    call = Sample(
        "  y[0] = x_shape[0];",
        output_names=("y", "z"),
        output_shapes=((64,),) * 2,
        output_dtypes=(mx.float32,) * 2,
    )
    assert ") {\n  device float* z" in mlx_text(call, [Input((64,), "float32")], tmp_path, capfd)
    with pytest.raises(ValueError, match="attribute"):
        wrap(call, [Input((64,), "float32")])
    assert wrap(dataclasses.replace(call, source=BODY), [Input((64,), "float32")])


def test_the_table_of_instantiations_is_complete():
    metal = Path(__file__).parents[2] / "metal"
    assert {path.stem for path in metal.glob("*.metal")} == set(gpu.INSTANTIATIONS)
    assert {path.stem for path in (metal / "cells").iterdir()} == set(gpu.CELLS)


def test_all_texts_are_written_for_apples_compiler(tmp_path):
    """Every row of the table once, in a file of its own name, with the folder of MLX's headers."""
    count = write_texts.write(tmp_path)
    files = sorted(tmp_path.glob("*.metal"))
    assert count == len(files)
    include = Path((tmp_path / "include").read_text())
    kinds = Counter()
    for file in files:
        text = file.read_text()
        header = re.match(r'#include "([^"]+)"\n', text)[1]
        assert (include / header).is_file()
        assert re.search(rf"\]\]\n\[\[kernel\]\] void {re.escape(file.stem)}\(", text)
        kinds[file.stem.split("_")[3]] += 1
    rows = {kernel: len(list(gpu.options(kernel))) for kernel in gpu.INSTANTIATIONS}
    for kernel, row in rows.items():
        cells = 1 if kernel in ("conv", "norm") else len(gpu.CELLS)
        assert kinds[kernel] >= row * len(gpu.DTYPES) * cells


@pytest.mark.sampled("harness")
@pytest.mark.parametrize("made", list(all_instances()), ids=str)
def test_project_kernels(made, tmp_path, capfd):
    assert_same(made.launch, made.inputs, tmp_path, capfd)
