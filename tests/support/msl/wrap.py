"""The text MLX builds around a kernel's body, so that what is checked here is what a Mac compiles.

Follows mlx 0.32.4 (mlx/backend/common/metal_kernel.cpp); test_text.py holds it to what MLX itself prints.
MLX's preamble (`using namespace metal`, `bfloat16_t`, ...) comes before this text on a Mac and is not in it.
"""

import math
import re
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

# Attributes a body may name (Metal specification, table 5.8), in the order MLX writes them.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

METAL_TYPES = {
    "bool": "bool",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
}

FACTS = {"_shape": "int*", "_strides": "int64_t*", "_ndim": "int&"}  # of an input, when the body names them
SMALL = 8  # inputs of fewer elements live in constant memory


class KernelCall(Protocol):
    """The fields of mlx_pararnn.compute.gpu.Launch; `template`, MLX's template arguments, may be there."""

    @property
    def name(self) -> str: ...
    @property
    def input_names(self) -> tuple[str, ...]: ...
    @property
    def output_names(self) -> tuple[str, ...]: ...
    @property
    def source(self) -> str: ...
    @property
    def header(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def threadgroup(self) -> tuple[int, int, int]: ...
    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def output_dtypes(self) -> tuple[mx.Dtype, ...]: ...
    @property
    def contiguous(self) -> bool: ...


@dataclass(frozen=True)
class Input:
    """What the text depends on of an input array."""

    shape: tuple[int, ...]
    dtype: str  # MLX's name, such as "bfloat16"

    @property
    def small(self) -> bool:
        return math.prod(self.shape) < SMALL


@dataclass(frozen=True)
class Parameter:
    """A buffer in the kernel's signature."""

    name: str
    declaration: str  # its type, as written
    of: str  # the array it belongs to, or its own name
    fact: str = ""  # "_shape", "_strides" or "_ndim"


@dataclass(frozen=True)
class Wrapped:
    text: str
    kernel: str  # the function's name
    template_arguments: str  # "<float, 8>" or ""
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]
    body: str


def template_of(call: KernelCall) -> tuple[tuple[str, "int | bool | mx.Dtype"], ...]:
    return getattr(call, "template", ())


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def metal_type(value: "int | bool | mx.Dtype") -> str:
    """A template argument as MLX writes it."""
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if isinstance(value, int) else METAL_TYPES[dtype_name(value)]


def parameter_kind(value: "int | bool | mx.Dtype") -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def used_attributes(body: str) -> tuple[str, ...]:
    """The attributes MLX passes: it looks for the names anywhere in the body, comments included."""
    return tuple(name for name in ATTRIBUTES if name in body)


def input_parameters(call: KernelCall, inputs: list[Input]) -> list[Parameter]:
    found = []
    for name, given in zip(call.input_names, inputs, strict=True):
        space = "constant" if given.small else "device"
        mark = "*" if given.shape else "&"
        found.append(Parameter(name, f"const {space} {METAL_TYPES[given.dtype]}{mark}", name))
        for fact, kind in FACTS.items():
            if given.shape and name + fact in call.source:
                found.append(Parameter(name + fact, f"const constant {kind}", name, fact))
    return found


def wrap(call: KernelCall, inputs: list[Input]) -> Wrapped:
    outputs = [
        Parameter(name, f"device {METAL_TYPES[dtype_name(dtype)]}*", name)
        for name, dtype in zip(call.output_names, call.output_dtypes, strict=True)
    ]
    parameters = input_parameters(call, inputs) + outputs
    attributes = used_attributes(call.source)
    if not attributes:
        # mlx 0.32.4 then closes the signature early, if a `_shape` and two outputs come together
        raise ValueError("a body must use at least one attribute, such as thread_position_in_grid")
    arguments = ", ".join(metal_type(value) for _, value in template_of(call))
    arguments = f"<{arguments}>" if template_of(call) else ""
    kernel = "custom_kernel_" + call.name
    if template_of(call):
        kernel += "_" + re.sub(", |[<>-]", "_", arguments)[:-1]
    for given in inputs:
        kernel += "_" + METAL_TYPES[given.dtype]
        kernel += "s" if not given.shape else "c" if given.small else ""
    for dtype in call.output_dtypes:
        kernel += "_" + METAL_TYPES[dtype_name(dtype)]

    text = call.header
    if template_of(call):
        names = ", ".join(f"{parameter_kind(value)} {name}" for name, value in template_of(call))
        text += f"template <{names}>\n"
    lines = [f"  {p.declaration} {p.name} [[buffer({i})]]" for i, p in enumerate(parameters)]
    lines += [f"  {ATTRIBUTES[name]} {name} [[{name}]]" for name in attributes]
    text += f"[[kernel]] void {kernel}(\n" + ",\n".join(lines) + ") {\n" + call.source + "\n}\n"
    if template_of(call):
        signature = f"{kernel}{arguments}"
        text += f'\ntemplate [[host_name("{kernel}")]] [[kernel]] decltype({signature}) {signature};\n'
    return Wrapped(text, kernel, arguments, tuple(parameters), attributes, call.source)
