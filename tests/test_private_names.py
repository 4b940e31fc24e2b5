"""Tests use what the library offers; each private name of its modules that they need has a reason here."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
REASONS = {
    "cells._REGISTRY": "cells that a test registers must be gone after it; users never take one back",
    "compute.recurrence._kernels_agree": "the trial at first use, to forget or to skip",
    "compute.adjoint._agrees": "the trial at first use, to forget or to skip",
    "compute.layer_ops._elementwise_works": "the trial at first use, to forget or to skip",
    "compute.matrix_products._UNPACKED_AT_ONCE": "small, so that small weights are unpacked in pieces",
    "compute.layer_ops._gradients_work": "the trial at first use, to forget or to skip",
    "compute.cpu_gradients._call": "records what the C++ functions are given",
    "compute.cpu_gradients._library": "the library, forgotten between compilers' flags",
    "compute.cpu_token._works": "the trial at first use, to forget or to skip",
    "compute.cpu_token._library": "records what the C++ function is given",
    "compute.cpu_token._shapes": "the sizes of what is recorded",
    "compute.cpu_token._MANY": "the threshold itself is under test",
    "compute.cpu._elementwise": "no library may be built at this place",
    "compute.cpu._LARGE": "small arrays go the way of large ones",
    "compute.cpu_build._check_layout": "counts the structs that are checked",
    "compute.cpu_build._flags": "other vector units than this machine's",
    "compute.cpu._performance_cores": "a Mac's cores are asked for with a stand-in for sysctl",
    "compute.cpu._quota": "a container's quota is read from a file that the test writes",
    "compute.cpu_build._machine": "what is known of the machine is forgotten between tests",
    "compute.cpu_build._say_where": "the line is said once a process",
    "compute.cpu_build._temporary_folder": "forgotten between tests",
    "compute.openblas._better_kernels": "processors that this machine does not have",
    "convert.readers.tensors._READ_COST": "small files are read as large ones are",
    "convert.writers.output_folder._check_room": "room is promised and not there",
    "tools.device_report._timings": "a stand-in for a GPU has none",
    "tools.benchmark._cache_after": "its cache is compared with a prompt's",
}


def private_names(path: Path) -> set[str]:
    """`module._name` of our modules, as attribute, import, monkeypatch.setattr or dotted text."""
    tree = ast.parse(path.read_text())
    modules, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_pararnn"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}".removeprefix("mlx_pararnn.")
                modules[alias.asname or alias.name] = name
                found |= {name} if is_private(alias.name) else set()
    for node in ast.walk(tree):
        module = name = None
        if isinstance(node, ast.Attribute):
            module, name = node.value, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 1:
            module, name = node.args[0], getattr(node.args[1], "value", None)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.removeprefix("mlx_pararnn.")
            if text != node.value and is_private(text.rpartition(".")[2]) and "\n" not in text:
                found.add(text)
        if (
            isinstance(name, str)
            and is_private(name)
            and isinstance(module, ast.Name)
            and module.id in modules
        ):
            found.add(f"{modules[module.id]}.{name}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_in_the_tests_has_a_reason():
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert set().union(*map(private_names, paths)) == set(REASONS)
