"""clang, nvcc and the lint accept every instantiation, and object to what Metal forbids."""

import dataclasses
import re

import pytest

from ..support.msl import cuda
from ..support.msl.instances import all_instances, few_instances, instance
from ..support.msl.wrap import wrap
from . import language, occupancy, preamble
from .lint import lint

NO_CLANG = f"no clang of at least 19 ({language.APT})"
needs_clang = pytest.mark.skipif(not language.clang(), reason=NO_CLANG)
needs_nvcc = pytest.mark.skipif(not cuda.nvcc(), reason="no nvcc")


@pytest.mark.sampled("toolchain")
@needs_clang
@pytest.mark.parametrize("made", list(all_instances()), ids=str)
def test_address_spaces(made):
    assert language.address_spaces(made.launch, wrap(made.launch, made.inputs)) == []


@pytest.mark.sampled("harness")
@pytest.mark.parametrize("made", list(all_instances()), ids=str)
def test_lint(made):
    assert lint(wrap(made.launch, made.inputs), made.launch.header) == []


@pytest.mark.toolchain
@needs_nvcc
@pytest.mark.parametrize("made", [m for m in few_instances() if not m.activation], ids=str)
def test_cuda_twin_compiles(made):  # (activations are plain functions: all of them are compiled each time)
    assert cuda.compile_ptx(cuda.cuda_twin(made.launch, made.inputs)) == []


def test_a_constant_input_needs_no_other_text():
    """Arrays of fewer than 8 elements are in constant memory: the kernels must not call them `device`."""
    for tiling in ("narrow", None):
        made = instance("gru", tiling=tiling, shape=(1, 1, 2, 1))
        wrapped = wrap(made.launch, made.inputs)
        assert "const constant float* u " in wrapped.text
        assert lint(wrapped, made.launch.header) == []
        if language.clang():
            assert language.address_spaces(made.launch, wrapped) == []


# What each objects to: (in the header, at the top of the body), part of the message, who says it.
FORBIDDEN = {
    "device pointer given for a thread one": (
        "inline float at(const thread float* p) { return p[0]; }\n",
        "float q = at(params);",
        "clang",
    ),
    "thread pointer given for a device one": (
        "inline float at(const device float* p) { return p[0]; }\n",
        "float a[2] = {0.0f, 1.0f}; float q = at(a);",
        "clang",
    ),
    "threadgroup pointer given for a device one": (
        "inline float at(const device float* p) { return p[0]; }\n",
        "threadgroup float s[2];\n float q = at(s);",
        "clang",
    ),
    "cast between spaces": ("", "thread float* p = (thread float*)params;", "clang"),
    "pointer to constant given for a device one": (
        "inline float at(const device float* p) { return p[0]; }\n",
        "float q = at(tol);",
        "clang",
    ),
    "write to an input": ("", "device float* p = params;", "clang"),
    "threadgroup memory in a helper": (
        "inline float f() { threadgroup float s[2]; s[0] = 1.0f; return s[0]; }\n",
        "",
        "clang lint",
    ),
    "function pointer": ("inline float f(float x) { return x; }\n", "float (*p)(float) = &f;", "clang lint"),
    "double": ("", "double q = 1.0f;", "clang lint"),
    "double literal": ("", "float q = tol[0] * 2.0;", "clang lint"),
    "array of run-time length": ("", "float q[thread_index_in_simdgroup + 1u]; q[0] = 1.0f;", "clang"),
    "exception": ("inline float f(float x) { if (x > 1.0f) throw 1; return x; }\n", "", "clang lint"),
    "virtual": ("struct V { virtual float f(); };\n", "", "clang lint"),
    "new": ("", "thread float* q = new float(0.0f);", "clang lint"),
    "header of the system": ("#include <cmath>\n", "", "clang lint"),
    "printf": ("", 'printf("x");', "clang lint"),
    "unknown function": ("", "float q = expm1(tol[0]);", "clang"),
    "mixed min": ("", "int q = min(1u, 2);", "clang"),
    "float to bfloat": ("", "bfloat16_t q; q = 1.0f;", "clang"),
    "unknown attribute": ("", "uint q = thread_index_in_warp;", "clang"),
    "pointer without an address space": ("inline float at(const float* p) { return p[0]; }\n", "", "lint"),
    "spaced pointer without an address space": ("inline float at(float * p) { return p[0]; }\n", "", "lint"),
    "reference without an address space": ("inline void set(float& p) { p = 0.0f; }\n", "", "lint"),
    "own type's pointer without a space": (
        "struct Q { float a; };\ninline float at(Q* q, float x) { return x; }\n",
        "",
        "lint",
    ),
    "local pointer without an address space": ("", "const float* q = params;", "lint"),
    "goto": ("", "if (tol[0] > 9.0f) goto end;\n end:", "lint"),
    "static variable": ("", "static float q = 0.0f;", "lint"),
    "lambda": ("", "auto q = [](float x) { return x; };", "lint"),
    "C++ library": ("", "float q = std::max(1.0f, 2.0f);", "clang lint"),
    "variable at program scope": ("float q = 1.0f;\n", "", "lint"),
    "macro": ("#define STEP(x) x\n", "", "lint"),
    "threadgroup memory in an inner scope": (
        "",
        "if (tol[0] > 9.0f) {\n threadgroup float q[2];\n q[0] = 1.0f; }",
        "lint",
    ),
    "two threadgroup arrays in one declaration": ("", "threadgroup float q[2], r[2];", "lint"),
    "a word of Metal's as a name": ("", "int sampler = 1;", "lint"),
    "a name of MLX's preamble": (
        "inline int ceildiv(int a, int b) { return (a + b - 1) / b; }\n",
        "",
        "lint",
    ),
    "product of 32 bits in an offset": ("", "float q = params[int(max_iters[0]) * int(u_shape[2])];", "lint"),
    "product of 32 bits beside a wide one": (
        "",
        "const int q = int(u_shape[2]); float r = params[size_t(q) * q + q * q];",
        "lint",
    ),
    "product of 32 bits, widened too late": ("", "const int q = 1; const size_t r = q * q;", "lint"),
    "product of 32 bits in a cast": ("", "const int q = 1; float r = params[size_t(q * q)];", "lint"),
    "64 bits kept in 32": ("", "const int q = 2 * u_strides[2];", "lint"),
    "product of 32 bits moves a pointer": (
        "",
        "const int q = 1; auto p = &params[0]; p += q * q; float r = p[0];",
        "lint",
    ),
    "product of 32 bits in the offset of a pointer": (
        "",
        "const int q = 1; auto p = &params[q * q]; float r = p[0];",
        "lint",
    ),
    "product of 32 bits from a pointer": (
        "",
        "const int q = 1; auto p = &params[q]; float r = p[q * q];",
        "lint",
    ),
    "pointer arithmetic": ("", "float q = *(params + u_shape[2] * u_shape[2]);", "lint"),
    "an offset too complicated to read": ("", "float q = params[u_shape[2] << 3];", "lint"),
    "fast math": ("", "float q = metal::fast::exp(1.0f);", "lint"),
}


def with_text(header: str, body: str):
    made = instance("gru")
    launch = made.launch
    changed = dataclasses.replace(launch, header=launch.header + header, source=f"  {body}\n{launch.source}")
    return changed, wrap(changed, made.inputs)


@pytest.mark.parametrize("fault", [f for f in FORBIDDEN if "lint" in FORBIDDEN[f][2]])
def test_lint_objects(fault):
    header, body, _ = FORBIDDEN[fault]
    changed, wrapped = with_text(header, body)
    assert lint(wrapped, changed.header)


@needs_clang
@pytest.mark.parametrize("fault", [f for f in FORBIDDEN if "clang" in FORBIDDEN[f][2]])
def test_clang_objects(fault):
    header, body, _ = FORBIDDEN[fault]
    changed, wrapped = with_text(header, body)
    assert language.address_spaces(changed, wrapped)


CONTROLS = {
    "pointers with spaces": (
        "inline float at(const device float* p, thread float& q, const constant int* r) { return q; }\n",
        "",
    ),
    "products": (
        "",
        "constexpr int Q = 3; constexpr int R = 4; const int q = Q * R; const int r = max(Q * R, q);",
    ),
    "words in comments": ("// double, std::vector<float*>, goto, 1.0\n", "// new static lambda [](x) {}"),
    "literals": ("", "const float q = 1e-4f + .5f + 2.f + 1.0e+3f; const int r = 0x1f + 10;"),
    "constant at program scope": ("constant float q = 1.0f;\n", ""),
    "offsets": (
        "",
        "const int one = int(u_shape[2]); const int64_t two = one * u_strides[2];\n"
        " const float r = params[size_t(one) * one] + float(u[two + (one > 1 ? one - 1 : 0)]);",
    ),
    "a pointer that moves": (
        "",
        "const int q = 1; auto at = &params[0];\n"
        " at += q > 0 ? u_strides[2] : 0; float r = at[q * u_strides[3]];",
    ),
    "unrolled": ("", "float q[2];\n#pragma unroll\n for (int i = 0; i < 2; ++i) { q[i] = 1.0f; }"),
    "contraction": ("#pragma METAL fp contract(off)\n", ""),
    "flags": ("#define FLAG 1\n", "\n#if FLAG\n const int q = 1;\n#endif\n"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_no_false_alarm(control):
    changed, wrapped = with_text(*CONTROLS[control])
    assert lint(wrapped, changed.header) == []
    if language.clang():
        assert language.address_spaces(changed, wrapped) == []


def test_the_names_of_mlxs_preamble_are_read_from_its_headers():
    """Of every kind of declaration one that is there, and nothing of a namespace's or a function's inside."""
    names = preamble.names()
    kinds = {"MTL_CONST", "Limits", "ConditionalType", "bfloat16_t", "ceildiv", "log1p", "RMS_N_READS", "mlx"}
    assert kinds | {"elem_to_loc", "instantiate_kernel", "simd_shuffle_and_fill_up", "complex64_t"} <= names
    assert not names & {"os_log", "max", "i", "elem", "loc", "x", "U", "int", "metal_stdlib"}


def test_the_list_is_that_of_the_installed_version(monkeypatch, tmp_path):
    text = (preamble.include_folder() / preamble.HEADER).read_text()
    header = tmp_path / preamble.HEADER
    header.parent.mkdir(parents=True)
    header.write_text(re.sub(r'#include "[^"]*"', "", text).replace("ceildiv", "round_up_division"))
    monkeypatch.setattr(preamble, "include_folder", lambda: tmp_path)
    names = preamble.names.__wrapped__()
    assert "round_up_division" in names
    assert not names & {"ceildiv", "complex64_t"}


def test_too_many_buffers():
    made = instance("gru")
    names = tuple(f"extra{i}" for i in range(30))
    launch = dataclasses.replace(made.launch, input_names=(*made.launch.input_names, *names))
    wrapped = wrap(launch, [*made.inputs, *[made.inputs[1]] * 30])
    assert any("buffers" in objection for objection in lint(wrapped, launch.header))


@pytest.mark.toolchain
@needs_nvcc
def test_nvcc_fuses_no_value():
    """See dual.h. Without exp and tanh, which fuse by themselves, a plain step has no fused operation."""
    cell = {"update": "relu", "reset": "identity", "state": "relu"}
    made = instance("gru", tiling=None, activations=cell)
    text = cuda.cuda_twin(made.launch, made.inputs)
    assert "fma.rn.f32" not in cuda.ptx(text)
    assert "fma.rn.f32" in cuda.ptx(text.replace("__fadd_rn(a, b)", "a + b"))


@pytest.mark.toolchain
@needs_nvcc
@pytest.mark.parametrize("cell", ["gru", "lstm", "nlru", "slstm"])
def test_registers(cell):
    """128 are what a thread of an M1 has. (nvcc is not Apple's compiler: a stand-in, see metal/README.md.)"""
    made = instance(cell, tiling="wide", shape=(2, 1, 400, 64))
    assert occupancy.usage(made.launch, made.inputs).stack == 0
    text = cuda.cuda_twin(made.launch, made.inputs)
    assert cuda.spilled(text, 96) == 0
    if cell == "nlru":
        assert cuda.spilled(text, 32) > 0


@pytest.mark.toolchain
@needs_nvcc
def test_nvcc_objects():
    made = instance("gru")
    text = cuda.cuda_twin(made.launch, made.inputs)
    assert cuda.compile_ptx(text.replace("= simd_any(", "= simd_every("))
