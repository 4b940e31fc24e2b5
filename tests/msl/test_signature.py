"""A .metal file is a kernel of Metal as it stands, with the signature that MLX writes around its body."""

import re

import pytest

from ..support.msl.adjoint_kernel import all_adjoints
from ..support.msl.instances import all_instances
from ..support.msl.layer_kernels import all_calls
from ..support.msl.wrap import METAL_TYPES, dtype_name, wrap
from . import language
from .language import METAL

FILES = sorted(METAL.glob("*.metal"), key=lambda path: path.stem)
FLAG = re.compile(r"#define (MASKED|STATES|INFO|GATED|CENTERED|SCALED) (\d)")


def written(kernel: str, flags: dict[str, int]) -> str:
    """The signature in the file, without what the flags cut out."""
    text = (METAL / f"{kernel}.metal").read_text()
    lines, kept = [], True
    for line in text[text.index("[[kernel]]") : text.index("{\n", text.index("[[kernel]]"))].splitlines():
        if line.startswith("#if "):
            kept = bool(flags[line.removeprefix("#if ")])
        elif line == "#endif":
            kept = True
        elif kept:
            lines.append(line)
    return "\n".join(lines)


def arguments(signature: str) -> list[tuple[str, str]]:
    """(type, name) of each, numbers of buffers left out: they count on where a flag cuts some out."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    found = []
    for argument in re.sub(r"\[\[.*?\]\]", "", inside).split(","):
        kind, _, name = argument.strip().rpartition(" ")
        found.append((kind, name))
    return found


CALLS = [(made.launch, made.inputs) for made in all_instances()]
CALLS += [(call.launch, call.inputs) for call in (*all_calls(), *all_adjoints())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_signature_is_mlxs(path):
    """Names, order, constness and address space of every argument, for every instantiation."""
    compared = 0
    for launch, inputs in CALLS:
        if launch.name.split("_")[1] != path.stem:
            continue
        if any(given.small for name, given in zip(launch.input_names, inputs, strict=True) if name in "uxy"):
            continue  # arrays of fewer than 8 elements are in constant memory, whatever they are
        text = wrap(launch, inputs).text
        mlx = text[text.index("[[kernel]] void") : text.index("{\n", text.index("[[kernel]] void"))]
        flags = {name: int(value) for name, value in FLAG.findall(launch.header)}
        types = {
            name: METAL_TYPES[dtype_name(value)]
            for name, value in launch.constants
            if not isinstance(value, int)
        }
        ours = written(path.stem, flags)
        for name, kind in types.items():
            ours = re.sub(rf"\b{name}\b", kind, ours)
        normal = str.maketrans({"\n": " "})
        given = [
            (re.sub(r"\bint\b", "int32_t", kind), name) if not name.endswith("_shape") else (kind, name)
            for kind, name in arguments(ours.translate(normal))
        ]
        assert given == arguments(mlx.translate(normal))
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_buffers_are_numbered(path):
    numbers = re.findall(r"\[\[buffer\((\d+)\)\]\]", path.read_text())
    assert [*map(int, numbers)] == [*range(len(numbers))]


@pytest.mark.skipif(not language.clang(), reason=f"no clang of at least 19 ({language.APT})")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_compiles_as_it_stands(path, tmp_path):
    assert language.whole_file(path) == []
    broken = tmp_path / path.name
    broken.write_text(
        path.read_text().replace("[[kernel]] void", "inline int f() { return nothing; }\n[[kernel]] void")
    )
    assert language.whole_file(broken)
    broken.write_text(
        path.read_text()
        .replace("device OutT* y", "device float* z")
        .replace("device OutT* hidden", "")
        .replace("device InT* d_u", "")
    )
    assert language.whole_file(broken)
