"""The structs that Python shares with C++ are checked when a library is loaded."""

import ctypes

import pytest

from mlx_pararnn.cells import get_cell
from mlx_pararnn.compute import cpu, cpu_adjoint, cpu_build, cpu_token, texts

pytestmark = pytest.mark.usefixtures("cpu_backend")

STRUCTS = {
    "Call": (cpu.Call, texts.cpu_recurrence_text, "FIELD(int64_t, heads)", "FIELD(int64_t, T)"),
    "Adjoint": (
        cpu_adjoint.Adjoint,
        texts.cpu_adjoint_text,
        "FIELD(int64_t, heads)",
        "FIELD(int64_t, T)",
    ),
    "Matrix": (
        cpu_token.Matrix,
        texts.cpu_token_text,
        "FIELD(int64_t, bits)",
        "FIELD(int64_t, group)",
    ),
    "Token": (cpu_token.Token, texts.cpu_token_text, "FIELD(int64_t, heads)", "FIELD(int64_t, W)"),
    "Layer": (
        cpu_token.Layer,
        texts.cpu_token_text,
        "FIELD(const void*, conv)",
        "FIELD(const void*, conv_bias)",
    ),
}


@pytest.fixture(autouse=True)
def no_optimization(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_build, "_flags", lambda: ["-std=c++17", "-O0", "-shared", "-fPIC", "-pthread"])


def up_to(name, text):
    """The text without what comes after a struct and uses its fields: it compiles whatever they are."""
    begin = text.index(f"PARARNN_STRUCT({name}, ")
    return text[: text.index("\n", begin)] + "\n}  // namespace pararnn\n"


@pytest.mark.sampled("toolchain", by=lambda side, fault: [side, fault == "none"])
@pytest.mark.parametrize("name", STRUCTS)
@pytest.mark.parametrize("fault", ["none", "dropped", "swapped", "added", "added at the end", "other type"])
@pytest.mark.parametrize("side", ["C++", "Python"])
def test_a_field_that_differs_is_found(side, fault, name):
    struct, text_of, first, second = STRUCTS[name]
    text = up_to(name, text_of(get_cell("gru")))
    assert text.count(first) == text.count(second) == 1
    fields = list(struct._fields_)
    at = [field for field, _ in fields].index(first.split(", ")[1][:-1])
    extra, wide = ("extra", ctypes.c_int), ctypes.c_int64 * 2
    if fault == "none":
        pass
    elif side == "Python":
        if fault == "dropped":
            del fields[at]
        elif fault == "swapped":
            fields[at], fields[at + 1] = fields[at + 1], fields[at]
        elif fault == "added":
            fields.insert(at, extra)
        elif fault == "added at the end":  # into padding, where there is some
            fields.append(extra)
        else:
            fields[at] = (fields[at][0], wide)
    elif fault == "dropped":
        text = text.replace(first, "")
    elif fault == "swapped":
        text = text.replace(first, "SWAP").replace(second, first).replace("SWAP", second)
    elif fault == "added":
        text = text.replace(first, f"FIELD(int, extra) {first}")
    elif fault == "added at the end":
        text = text.replace(f"PARARNN_STRUCT({name}, ", f"PARARNN_STRUCT({name}, WITH_")
        table = f"{name.upper()}_FIELDS"
        text = text.replace(
            f"PARARNN_STRUCT({name}, ",
            f"#define WITH_{table}(FIELD) {table}(FIELD) FIELD(int, extra)\nPARARNN_STRUCT({name}, ",
        )
    else:
        text = text.replace(first, first.replace("int64_t", "Wide").replace("const void*", "Wide"))
        text = text.replace("struct LayoutEntry {", "typedef int64_t Wide[2];\nstruct LayoutEntry {")
    used = type(name, (ctypes.Structure,), {"_fields_": tuple(fields)})
    if fault == "none":
        assert cpu_build.build(text, "structs", (used,))
    else:
        with pytest.raises(
            cpu_build.BuildError, match=rf"struct {name} of structs .* install mlx-pararnn again"
        ):
            cpu_build.build(text, "structs", (used,))


@pytest.mark.large
def test_every_struct_of_a_library_is_checked(monkeypatch):
    checked = []
    monkeypatch.setattr(cpu_build, "_check_layout", lambda _, name, struct: checked.append((name, struct)))
    cell = get_cell("nlru")
    cpu.load.__wrapped__(cell, "float32")
    cpu_adjoint.load.__wrapped__(cell, "float32")
    cpu_token._library.__wrapped__(cell, "float32")
    cpu_token._packed.__wrapped__(((4, 64),))
    assert checked == [
        ("recurrence-nlru-float32", cpu.Call),
        ("adjoint-nlru-float32", cpu_adjoint.Adjoint),
        ("decode-nlru-float32", cpu_token.Matrix),
        ("decode-nlru-float32", cpu_token.Layer),
        ("decode-nlru-float32", cpu_token.Token),
        ("packed-4of64", cpu_token.Matrix),
    ]
