"""Assembles the sources of metal/: what is compiled for a GPU and what for a CPU, and their names.

One text serves a Mac (mx.fast.metal_kernel), an NVIDIA card (mx.fast.cuda_kernel, with cuda_compat.h before
it), a CPU (cpu.h: a vector in place of each float) and the conformance harness of tests/msl.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files

import mlx.core as mx

from ..cells import Cell, get_cell
from ..errors import PararnnError
from ..files.quantization_formats import BITS, GROUP_SIZES

# (bits, group size) of every quantized matrix that the CPU backend reads
EVERY_FORMAT = tuple((bits, group) for bits in BITS for group in GROUP_SIZES)
CPU_TYPES = {"float32": "float", "float16": "pararnn::Float16", "bfloat16": "pararnn::Bfloat16"}
_METAL_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
_ACTIVATIONS = {
    "identity": "Identity",
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "elu": "Elu",
    "selu": "Selu",
    "gelu": "Gelu",
    "silu": "Silu",
    "softplus": "Softplus",
    "sigmoid": "Sigmoid",
    "half_sigmoid": "HalfSigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
}


@lru_cache(maxsize=32)
def metal_text(*path: str) -> str:
    """A file of metal/."""
    return files("mlx_pararnn.metal").joinpath(*path).read_text()


def cell_header(cell: Cell) -> str:
    """What comes before a kernel: dual numbers, activations, the cell's struct, and `Cell`, its name."""
    text = _cell_text(cell)
    counts = {"SLOTS": cell.slots, "GATES": cell.gates, "PARAMS": cell.params}
    agreed = [f"Cell::{count} == {len(names)}" for count, names in counts.items()]
    agreed.append(f"Cell::OUTPUT == {cell.output_slot}")
    return (
        metal_text("dual.h")
        + metal_text("activations.h")
        + f"{text}\nusing Cell = {_struct(cell, 'pararnn')};\n"
        + f'static_assert({" && ".join(agreed)}, "the Metal text is not the Python class\'s");\n'
    )


def tangent_header(cell: Cell) -> tuple[str, str]:
    """What comes after `cell_header` where a step is to be derived by its inputs too.

    Two texts: what the second needs, and the cell's struct again as `TangentCell`, in the namespace
    `tangents` and with `Real` in place of each float: a dual number with a tangent a slot, gate and param.
    """
    count = len(cell.slots) + len(cell.gates) + len(cell.params)
    before = f"namespace pararnn {{ enum {{ INPUTS = {count} }}; }}\n"
    before += "namespace tangents { using Real = pararnn::Dual<pararnn::INPUTS>; }\n"
    text = re.sub(r"\bpararnn\b", "tangents", _cell_text(cell))
    struct = f"using TangentCell = {_struct(cell, 'tangents')};\n"
    return before + metal_text("dual_inputs.h"), re.sub(r"\bfloat\b", "Real", text) + struct


def _cell_text(cell: Cell) -> str:
    if not has_kernel(cell):
        raise PararnnError(f"cell {cell.name!r} brings no MSL, so it runs on the backend 'ops' alone")
    text = cell.msl if cell.msl is not None else metal_text("cells", f"{cell.name}.h")
    _check_ascii(cell, "MSL", text)
    return text


def _check_ascii(cell: Cell, what: str, text: str) -> None:
    """MLX hands the text to Metal as C strings, and Metal may end the process at any other letter."""
    if not text.isascii():
        letter = next(letter for letter in text if not letter.isascii())
        raise PararnnError(
            f"the {what} of cell {cell.name!r} has {letter!r}; write it in ASCII, comments too"
        )


def _struct(cell: Cell, namespace: str) -> str:
    _check_ascii(cell, "class's name", type(cell).__name__)
    names = [f"pararnn::{_ACTIVATIONS[cell.activations[place]]}" for place in cell.default_activations]
    return f"{namespace}::{type(cell).__name__}" + (f"<{', '.join(names)}>" if names else "")


@lru_cache(maxsize=256)
def kernel_text(
    kernel: str,
    cell: Cell | None,
    flags: tuple[tuple[str, int], ...],
    constants: tuple[tuple[str, int | mx.Dtype], ...],
    threads: int,
) -> tuple[str, str, str]:
    """Name, body and header of a kernel; kept, since every layer asks for them at every token.

    Constants stand in the header and are no template arguments of MLX: the header's last line, the threads of
    a threadgroup, is an attribute of the function, which cannot stand before `template`.
    """
    header = "".join(f"#define {flag} {value}\n" for flag, value in flags)
    header += cell_header(cell) if cell else metal_text("dual.h") + metal_text("activations.h")
    if cell and kernel == "adjoint":
        header += "".join(tangent_header(cell))
    header += "".join(map(_constant, constants))
    header += f"[[max_total_threads_per_threadgroup({threads})]]\n"
    source = kernel_body(metal_text(f"{kernel}.metal"))
    # MLX's CUDA side keeps compiled kernels by their name alone, so the name holds the text's hash.
    digest = hashlib.sha256((header + source).encode()).hexdigest()[:10]
    return f"pararnn_{kernel}_{plain_name(cell) if cell else 'any'}_{digest}", source, header


def _constant(constant: tuple[str, int | mx.Dtype]) -> str:
    name, value = constant
    if isinstance(value, int):
        return f"constant constexpr int {name} = {value};\n"
    return f"using {name} = {_METAL_TYPES[value]};\n"


def kernel_body(text: str) -> str:
    """What stands between the braces of a .metal file's kernel; MLX writes each call's signature."""
    signature = text.index("[[kernel]]")
    return text[text.index("{\n", signature) + 2 : text.rindex("\n}")]


def for_dtype(text: str, dtype: str) -> str:
    """A C++ text, of the functions of one dtype ("float32") alone: three take three times as long."""
    return f"#define PARARNN_DTYPES(EXPORT) EXPORT({dtype}, {CPU_TYPES[dtype]})\n{text}"


def cpu_recurrence_text(cell: Cell) -> str:
    """The C++ text of a cell's recurrence; raises PararnnError for a cell without MSL."""
    cell_text = cpu_text(cell_header(cell), "VecGroup")
    return metal_text("cpu.h") + metal_text("cpu_vectors.h") + cell_text + metal_text("cpu_recurrence.cpp")


def cpu_adjoint_text(cell: Cell) -> str:
    """The C++ text of the adjoint of a cell's recurrence; raises PararnnError for a cell without MSL."""
    needed, tangents = tangent_header(cell)
    header = cpu_text(cell_header(cell) + needed) + cuda_text(tangents)
    header = header.replace("Vec d[N > 0 ? N : 1];", "Tangent d[N > 0 ? N : 1];")
    text = header + metal_text("cpu_adjoint.cpp")
    # loops over tangents are unrolled whole, also those that GCC finds too long: cpu_tangents.h
    text = re.sub(r"(for \(int i = 0; i < (N|INPUTS);)", r'_Pragma("GCC unroll 64") \1', text)
    return metal_text("cpu.h") + metal_text("cpu_tangents.h") + text


def cpu_elementwise_text() -> str:
    """The C++ text of what needs no cell."""
    return "".join(map(metal_text, ("cpu.h", "cpu_rows.h", "cpu_linear.h", "cpu_elementwise.cpp")))


def cpu_gradients_text() -> str:
    """The C++ text of the gradients of what needs no cell, and of the cross entropy."""
    return "".join(map(metal_text, ("cpu.h", "cpu_rows.h", "cpu_gradients.cpp")))


def cpu_token_text(cell: Cell) -> str:
    """The C++ text of a token through all layers; raises PararnnError for a cell without MSL."""
    headers = "cpu.h", "cpu_rows.h", "cpu_linear.h", "cpu_quantized.h"
    text = "".join(map(metal_text, headers)) + cpu_text(cell_header(cell))
    return text + metal_text("cpu_token.cpp") + metal_text("cpu_buffers.h")


def cpu_packed_text(formats: tuple[tuple[int, int], ...]) -> str:
    """The C++ text of a token's products with quantized matrices, of these (bits, group size)."""
    return "".join(map(metal_text, ("cpu.h", "cpu_linear.h", "cpu_quantized.h"))) + packed_products(formats)


def packed_products(formats: tuple[tuple[int, int], ...]) -> str:
    """What `cpu_packed_text` has beside `cpu_token_text`."""
    listed = " ".join(f"FORMAT({bits}, {group})" for bits, group in formats)
    formats_text = f"#define PARARNN_FORMATS(FORMAT) {listed}\n"
    return formats_text + metal_text("cpu_digits.h") + metal_text("cpu_packed.cpp")


def built_in_texts() -> Iterator[tuple[str, str]]:
    """Name and C++ text of each library that built-in cells need on a CPU, with their usual activations.

    A wheel brings them compiled (prebuilt.py).
    """
    for dtype in CPU_TYPES:
        yield f"elementwise-{dtype}", for_dtype(cpu_elementwise_text(), dtype)
        yield f"gradients-{dtype}", for_dtype(cpu_gradients_text(), dtype)
    yield "packed", cpu_packed_text(EVERY_FORMAT)
    for path in files("mlx_pararnn.metal").joinpath("cells").iterdir():
        name = path.name.removesuffix(".h")
        cell = get_cell(name)
        for dtype in CPU_TYPES:
            yield f"recurrence-{name}-{dtype}", for_dtype(cpu_recurrence_text(cell), dtype)
            yield f"adjoint-{name}-{dtype}", for_dtype(cpu_adjoint_text(cell), dtype)
            yield f"decode-{name}-{dtype}", for_dtype(cpu_token_text(cell), dtype)


def cuda_text(text: str) -> str:
    """The text without Metal's address spaces, which CUDA's own keywords collide with as macros.

    Without its attributes too, and with CUDA's names of 16-bit floats.
    """
    text = re.sub(r"\[\[max_total_threads_per_threadgroup\(\d+\)\]\]\n", "", text)
    for metal, cuda in (("bfloat16_t", "__nv_bfloat16"), ("float16_t", "__half")):
        text = re.sub(rf"\b{metal}\b", cuda, text)
    return re.sub(r"(?<![\w])(device|constant|thread) (?=[A-Za-z_])", "", text)


def cpu_text(text: str, scalar: str = "Vec") -> str:
    """Metal's text with a vector (cpu.h) or a group of them (cpu_vectors.h) in place of each float."""
    return re.sub(r"\bfloat\b", scalar, cuda_text(text))


def has_kernel(cell: Cell) -> bool:
    """True for the four built-in cells and for a cell of a user's that brings its step in MSL."""
    return cell.msl is not None or _built_in(cell)


def plain_name(cell: Cell) -> str:
    """The cell's name as part of an identifier or of a file's name."""
    return re.sub(r"[^A-Za-z0-9_]", "_", cell.name)


def _built_in(cell: Cell) -> bool:
    return type(cell).__module__.startswith(Cell.__module__.rpartition(".")[0] + ".")
