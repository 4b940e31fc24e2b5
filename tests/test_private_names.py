"""Nobody uses the private names of another: modules of the library none, tests those that have a reason here.

A name counts as private with one underscore before it, whether a module has it or an object.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REASONS = {
    "._row": "a row's arrays of a cache, to compare bit for bit",
    "text.chat_template._idle": "processes whose limit is another than the test's",
    "cells._REGISTRY": "cells that a test registers must be gone after it; users never take one back",
    "compute.recurrence._kernels_agree": "the trial at first use, to forget or to skip",
    "compute.adjoint._agrees": "the trial at first use, to forget or to skip",
    "compute.layer_ops._elementwise_works": "the trial at first use, to forget or to skip",
    "compute.matrix_products._UNPACKED_AT_ONCE": "small, so that small weights are unpacked in pieces",
    "compute.layer_ops._gradients_work": "the trial at first use, to forget or to skip",
    "compute.cpu_gradients._call": "records what the C++ functions are given",
    "compute.cpu_gradients._library": "the library, forgotten between compilers' flags",
    "compute.cpu_token._works": "the trial at first use, to forget or to skip",
    "compute.cpu_token._packed": "the library, forgotten between compilers' flags",
    "compute.cpu_build._prebuilt": "records which texts are asked for, in a checkout, which brings none",
    "compute.cpu_token._library": "records what the C++ function is given",
    "compute.cpu_token._shapes": "the sizes of what is recorded",
    "compute.cpu_token._MANY": "the threshold itself is under test",
    "compute.cpu._elementwise": "no library may be built at this place",
    "compute.cpu._LARGE": "small arrays go the way of large ones",
    "compute.cpu_build._check_layout": "counts the structs that are checked",
    "compute.cpu_build._flags": "other vector units than this machine's",
    "compute.cpu_cores._performance_cores": "a Mac's cores are asked for with a stand-in for sysctl",
    "compute.cpu_cores._quota": "a container's quota is read from a file that the test writes",
    "compute.cpu_build._machine": "what is known of the machine is forgotten between tests",
    "compute.cpu_build._say_where": "the line is said once a process",
    "compute.cpu_build._temporary_folder": "forgotten between tests",
    "compute.openblas._better_kernels": "processors that this machine does not have",
    "chat.server.listen._listening": "what asyncio sets on connections to that socket",
    "convert.coreml.mlpackage_check._SECONDS": "a processor that hangs is not waited for so long",
    "convert.coreai.runtime._silent": "what translation runs in the runtime is silenced alike",
    "._weights": "a fingerprint that is known already, so that an interrupt meets what comes after it",
    "convert.readers.tensors._READ_COST": "small files are read as large ones are",
    "convert.writers.output_folder._check_room": "room is promised and not there",
    "tools.device_report._timings": "a stand-in for a GPU has none",
    "tools.benchmark._cache_after": "its cache is compared with a prompt's",
    "._states": "which texts a prompt cache keeps, and the order in which they would go",
    "._mlp_residual": "no two layers of a model that is made have different ones",
    "._wanted": "the rule itself, at lengths that take too long to read",
    "._write_model": "a model that is written while another process is lost",
    "._make_step": "a step of training in which something happens",
    "._report": "a report during which weights change",
    "._targets": "a run that is stopped as by a signal has none",
    "._obj": "ctypes': what a reference points to",
}
# Of other libraries, each held by tests/test_contract.py.
OTHERS = {
    "mlx_pararnn/mlx_lm_internals.py": {"._tokenizer"},
    "convert/coreai/aimodel.py": {"._callable", "coreai._compiler"},
    "mlx_pararnn/compute/openblas.py": {"_ctypes"},
    "convert/coreml/mlpackage.py": {"._deduplicate_const_across_functions"},
}
# Named so in Python's documentation.
DOCUMENTED = {"_replace", "_fields", "_fields_", "_asdict", "_handle", "_name", "_exit"}


def private_names(path: Path) -> set[str]:
    """`module._name` and `._name` of objects, as attribute, import, setattr, getattr or dotted text."""
    text = path.read_text()
    if not re.search(r"""(\.|["']|import |, )_[a-zA-Z]""", text):
        return set()
    nodes = list(ast.walk(ast.parse(text)))
    modules, found, of_objects = {}, set(), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}".removeprefix("mlx_pararnn.")
                modules[alias.asname or alias.name] = name
                found |= {name} if is_private(alias.name) else set()
                parts = (node.module or "").split(".")
                found |= {".".join(parts[: n + 1]) for n, part in enumerate(parts) if is_private(part)}
    for node in nodes:
        base = name = None
        if isinstance(node, ast.Attribute):
            base, name = node.value, node.attr
        elif isinstance(node, ast.Call) and called(node).endswith("attr") and len(node.args) > 1:
            base, name = node.args[0], getattr(node.args[1], "value", None)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.removeprefix("mlx_pararnn.")
            if text != node.value and is_private(text.rpartition(".")[2]) and "\n" not in text:
                found.add(text)
        if base is not None and isinstance(name, str) and is_private(name):
            if isinstance(base, ast.Name) and base.id in modules:
                found.add(f"{modules[base.id]}.{name}")
            elif ast.unparse(base) not in ("self", "cls", "super()"):
                of_objects.add(name)
    return found | {f".{name}" for name in of_objects - (own_names(nodes) if of_objects else set())}


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def own_names(nodes: list[ast.AST]) -> set[str]:
    """The names that a file's own classes have."""
    names = set()
    for cls in nodes:
        if isinstance(cls, ast.ClassDef):
            for node in ast.walk(cls):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def test_every_private_name_in_the_tests_has_a_reason():
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    # that of another library is the subject of the contract test
    found = set().union(*(private_names(path) for path in paths if path.name != "test_contract.py"))
    assert found == set(REASONS)


def test_no_file_uses_the_private_names_of_another():
    found = {}
    for top in ("mlx_pararnn", "convert", "cli", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if names := private_names(path):
                found[name] = names
    assert found == OTHERS


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("from mlx_pararnn.compute import cpu_cores\ncpu_cores._quota()", {"compute.cpu_cores._quota"}),
        ("from .compute.cpu_cores import _quota", {"compute.cpu_cores._quota"}),
        ("load('x').layers[0]._cell", {"._cell"}),
        ("def f(layer):\n    layer._cell = 1", {"._cell"}),
        ("getattr(layer, '_cell')", {"._cell"}),
        ("monkeypatch.setattr(layer, '_cell', 1)", {"._cell"}),
        ("patch('mlx_pararnn.compute.cpu_cores._quota')", {"compute.cpu_cores._quota"}),
        ("class A:\n    def f(self, other):\n        self._x = other._x", set()),
        ("class A:\n    def f(self, other):\n        self._x = other._y", {"._y"}),
        ("choice._replace(step=True)", set()),
    ],
)
def test_a_private_name_is_seen(source, seen, tmp_path):
    (tmp_path / "file.py").write_text(source)
    assert private_names(tmp_path / "file.py") == seen
