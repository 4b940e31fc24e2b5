"""The same body as CUDA: the text MLX's cuda_kernel builds, for nvcc.

Follows mlx/backend/cuda/custom_kernel.cpp of 0.32: MLX's CPU build makes no cuda_kernel, so, unlike Metal's,
this text cannot be held to MLX's own print here. MLX's own device header is left out (it needs the CUDA
wheel); the few names of it that a kernel can see are declared instead. nvcc shows that it compiles; the
harness executes it, with shim/cuda_shim.h in place of CUDA (`to_host`).
"""

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mlx_pararnn.compute.texts import cuda_text

from .build import ENTRY, THREADGROUP_ARRAY
from .wrap import FACTS, METAL_TYPES, Input, KernelCall, Wrapped, dtype_name, template_of

COMPAT = Path(__file__).parents[3] / "metal" / "cuda_compat.h"

CUDA_TYPES = {**METAL_TYPES, "float16": "__half", "bfloat16": "__nv_bfloat16"}

# In place of mlx/backend/cuda/device/utils.cuh.
MLX_HEADER = """
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cooperative_groups.h>
#define inf cuda::std::numeric_limits<float>::infinity()
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""


@cache
def nvcc() -> str:
    return shutil.which("nvcc") or next((p for p in ["/usr/local/bin/nvcc"] if Path(p).exists()), "")


def to_cuda(
    call: KernelCall, inputs: list[Input], header: str, source: str, mlx_header: str = MLX_HEADER
) -> str:
    parameters = []
    for name, given in zip(call.input_names, inputs, strict=True):
        parameters.append(f"    const {CUDA_TYPES[given.dtype]}* {name}")
        for fact, kind in zip(FACTS, ("Shape", "Strides", "int"), strict=True):
            if given.shape and name + fact in source:
                parameters.append(f"    const __grid_constant__ {kind} {name}{fact}")
    for name, dtype in zip(call.output_names, call.output_dtypes, strict=True):
        parameters.append(f"    {CUDA_TYPES[dtype_name(dtype)]}* {name}")
    constants = ""
    for name, value in template_of(call):
        if isinstance(value, int):
            kind = "bool" if isinstance(value, bool) else "int"
            constants += f"  constexpr {kind} {name} = {str(value).lower()};\n"
        else:
            constants += f"  using {name} = {CUDA_TYPES[dtype_name(value)]};\n"
    return (
        mlx_header
        + header
        + "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        + f"__global__ void custom_kernel_{call.name}(\n"
        + ",\n".join(parameters)
        + ") {\n"
        + constants
        + f"\n{source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


def to_host(call: KernelCall, wrapped: Wrapped, inputs: list[Input], compat: str) -> str:
    """The CUDA text as C++ for the harness, and a function that calls it with the buffers in a row."""
    source = THREADGROUP_ARRAY.sub(r"MSL_THREADGROUP(\1, \2, \3);", cuda_text(call.source))
    arguments = []
    for i, p in enumerate(wrapped.parameters):
        kind = re.sub(r"\b(device|constant)\b|[*&]", "", p.declaration)
        pointer = f"static_cast<{kind}*>(buffers[{i}])"
        facts = {"_shape": f"{{{pointer}}}", "_strides": f"{{{pointer}}}", "_ndim": f"*{pointer}"}
        arguments.append(facts.get(p.fact, pointer))
    text = to_cuda(call, inputs, compat + cuda_text(call.header), source, '#include "cuda_shim.h"\n')
    function = f"mlx::core::cu::custom_kernel_{call.name}({', '.join(arguments)})"
    return f'{text}\nextern "C" void {ENTRY}(void** buffers, const MslPosition*) {{ {function}; }}\n'


def cuda_twin(call: KernelCall, inputs: list[Input]) -> str:
    """The text for nvcc. NVRTC is told that functions are the device's; nvcc cannot be: they are marked."""
    header = re.sub(r"(?m)^(\s*)(inline|static) ", r"\1\2 __device__ ", cuda_text(call.header))
    return to_cuda(call, inputs, COMPAT.read_text() + header, cuda_text(call.source))


def compile_ptx(text: str) -> list[str]:
    """What nvcc objects to; [] if nothing."""
    done, _ = _nvcc(text)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return errors or ([done.stderr] if done.returncode else [])


def ptx(text: str) -> str:
    return _nvcc(text)[1]


def spilled(text: str, registers: int) -> int:
    """Bytes that a thread of at most so many registers stores and loads for the lack of more."""
    done, _ = _nvcc(text, "-cubin", "-Xptxas", "-v", f"-maxrregcount={registers}")
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def _nvcc(text: str, *flags: str) -> tuple["subprocess.CompletedProcess[str]", str]:
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.out"
        path.write_text(text)
        command = [nvcc(), *(flags or ["-ptx"]), "-arch=sm_90", "-std=c++20", "-o", str(made), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done, made.read_text() if made.exists() and not flags else ""
