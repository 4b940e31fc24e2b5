"""Is a kernel Metal, as far as a machine without Apple's compiler can tell?

Two compilers besides g++, and a lint for what they let pass:
  address_spaces()    clang's C++ for OpenCL, whose rules for address spaces are Metal's
  cuda.compile_ptx()  nvcc, on the text MLX's cuda_kernel builds of the same body
  lint()              lint.py
None of them knows Apple's library: a wrong overload, a missing function or a name taken by MLX's preamble
that is not in our list would show on a Mac only.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from ..support.msl.build import MARK, THREADS, clang, without_instantiation
from ..support.msl.wrap import METAL_TYPES, KernelCall, Wrapped, dtype_name, template_of

# OpenCL's generic address space stays on: without it no struct can be copied. So clang takes a pointer that
# names no space, which Metal does not; lint.py objects to those.
HEADERS = Path(__file__).parent / "clang"
METAL = Path(__file__).parents[2] / "metal"

CLANG = ["-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only", "-cl-no-stdinc"]
CLANG += [
    "-Xclang",
    "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_pipes,-__opencl_c_device_enqueue,+cl_khr_fp16",
]
CLANG += ["-Wall", "-Wextra", "-Werror", "-Wdouble-promotion", "-Wvla", "-Wshadow", "-Wuninitialized"]
CLANG += ["-Wconditional-uninitialized", "-Wno-unused-parameter", "-Wno-unused-variable"]
CLANG += ["-Wno-unused-const-variable", "-Wno-unused-local-typedef"]

APT = "apt-get install -y clang-19"


def to_opencl(call: KernelCall, wrapped: Wrapped) -> str:
    """The text as C++ for OpenCL: no kernel templates there, so their arguments become constants and types;
    and no references to constant memory as parameters, so they become pointers."""
    text = without_instantiation(wrapped.text).replace("#pragma METAL fp", "#pragma clang fp")
    head, mark, kernel = text.partition("[[kernel]] void ")
    assert mark
    if template_of(call):
        head = head[: head.rindex("template <")]
    head = THREADS.sub("", head)
    signature, mark, body = kernel.partition(") {\n")
    assert mark
    pieces = []
    for name, value in template_of(call):
        if isinstance(value, int):
            kind = "bool" if isinstance(value, bool) else "int"
            pieces.append(f"  constexpr {kind} {name} = {str(value).lower()};")
        else:
            pieces.append(f"  using {name} = {METAL_TYPES[dtype_name(value)]};")
    for kind, name in re.findall(r"const constant (\w+)& (\w+)", signature):
        pieces.append(f"  const {kind} {name} = *{name}_at;")
    signature = re.sub(r"const constant (\w+)& (\w+)", r"const constant \1* \2_at", signature)
    line = text[: text.index(") {\n", len(head))].count("\n") + 2
    return (
        f'#include "metal.h"\n#line 1 "kernel.metal"\n{head}\n__kernel void {MARK.sub("", signature)}) {{\n'
        + "\n".join(pieces)
        + f'\n#line {line} "kernel.metal"\n{body}'
    )


def address_spaces(call: KernelCall, wrapped: Wrapped) -> list[str]:
    """What clang objects to; [] if nothing."""
    return _objections(to_opencl(call, wrapped))


def whole_file(path: Path) -> list[str]:
    """What clang objects to in a .metal file as it stands; [] if nothing.

    Of the text only `[[kernel]]` is written otherwise: OpenCL has a word for it. Other attributes are passed
    over; <metal_stdlib> is clang/'s.
    """
    text = path.read_text().replace("[[kernel]]", "__kernel")
    return _objections(text, "-Wno-unknown-attributes", "-Wno-unknown-pragmas", "-I", str(METAL))


def _objections(text: str, *flags: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.clcpp"
        path.write_text(text)
        command = [clang(), *CLANG, *flags, "-I", str(HEADERS), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    complaints = [s for s in done.stderr.splitlines() if re.search(r": (fatal )?(error|warning):", s)]
    return complaints or ([done.stderr] if done.returncode else [])
