"""Imports run one way through the rooms, and no two files import each other, at the top or in a function."""

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# room: the rooms whose files its own may import, and with them all that those lead to
ARROWS = {
    "__main__": "cli process",
    "cli": "package chat images tools training convert.to_mlx convert.to_coreml convert.to_coreai "
    "convert.to_torch convert.inspection convert.comparison convert.original convert.add_tokenizer",
    "convert.to_coreml": "convert.exporting convert.coreml",
    "convert.to_coreai": "convert.exporting convert.coreai",
    "convert.exporting": "convert.to_mlx convert.package convert.inspection adapters",
    "convert.coreai": "convert.package tools",
    "convert.to_torch": "convert.writers loading",
    "convert.to_mlx": "convert.overrides convert.writers",
    "convert.comparison": "convert.writers tools",
    "convert.original": "convert.families loading tools",
    "convert.add_tokenizer": "convert.writers",
    "convert.inspection": "convert.writers convert.package model_config",
    "convert.overrides": "convert.writers cells",
    "convert.coreml": "convert.package tools",
    "convert.package": "convert.readers loading generation",
    "convert.writers": "convert.families images files",
    "convert.families": "convert.readers model",
    "convert.readers": "files",
    "chat": "pocket images process",
    "images": "loading generation",
    "pocket": "generation text process",
    "tools": "loading files",
    "training": "convert.writers tools distributed",
    "distributed": "errors",
    "package": "loading generation completion drafts images import_hook pocket",
    "completion": "loading generation",
    "import_hook": "model compute adapters process",
    "adapters": "errors",
    "loading": "model files text mlx_lm_internals quick_start",
    "drafts": "generation",
    "generation": "model text",
    "model": "blocks",
    "blocks": "compute cache model_config sharding",
    "sharding": "compute distributed",
    "model_config": "cells files",
    "compute": "cells process cache model_config",
    "process": "errors",
    "cells": "errors",
    "cache": "errors",
    "text": "errors mlx_lm_internals",
    "quick_start": "",
    "mlx_lm_internals": "",
    "files": "errors",
    "errors": "",
    "convert": "",
    "metal": "",
}


def modules() -> dict[str, Path]:
    """Every file of the library by its name inside mlx_pararnn."""
    found = {}
    for top in ("mlx_pararnn", "convert", "cli", "metal"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "mlx_pararnn":
                if len(parts) > 1 and (ROOT / top / parts[1]).is_symlink():
                    continue
                parts = parts[1:]
            found[".".join(parts).removesuffix("__init__").removesuffix(".") or "package"] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    first, *rest = module.split(".")
    return f"convert.{rest[0]}" if first == "convert" and rest else first


def imports(module: str, source: str) -> set[str]:
    """The library's own modules that a file imports, wherever in it the statement stands."""
    path = MODULES[module]
    package = path.relative_to(ROOT).parent.parts
    package = package if package[:1] == ("mlx_pararnn",) else ("mlx_pararnn", *package)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif by_name := isinstance(node, ast.Call) and re.fullmatch(
            r"import_module\(f'\{__package__\}(\.[\w.]+)'\)", ast.unparse(node)
        ):
            names = [".".join(package) + by_name[1]]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "mlx_pararnn" and name != "mlx_pararnn.__version__":
                while (inside := name.partition(".")[2] or "package") not in MODULES:
                    name = name.rpartition(".")[0]
                found.add(inside)
    return found - {module}


def reachable(start: str) -> set[str]:
    rooms = set(ARROWS[start].split())
    return rooms.union(*map(reachable, rooms))


def offences(module: str, imported: set[str]) -> list[str]:
    allowed = reachable(room(module)) | {room(module)}
    return sorted(f"{module} imports {other}" for other in imported if room(other) not in allowed)


GRAPH = {module: imports(module, path.read_text()) for module, path in MODULES.items()}


def test_every_room_is_declared():
    assert {room(module) for module in MODULES} == set(ARROWS)


def test_the_rooms_make_no_circle():
    TopologicalSorter({name: arrows.split() for name, arrows in ARROWS.items()}).prepare()


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_only_what_its_arrows_lead_to(name):
    inside = [module for module in MODULES if room(module) == name]
    assert [line for module in inside for line in offences(module, GRAPH[module])] == []


@pytest.mark.parametrize("name", ARROWS)
def test_an_arrow_is_an_import(name):
    there = {room(other) for module in MODULES if room(module) == name for other in GRAPH[module]}
    assert set(ARROWS[name].split()) - there == set(), f"{name} declares what it does not import"


def test_no_two_files_import_each_other():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "statement", "offence"),
    [
        ("cells.gru", "from ..model import Model", "cells.gru imports model"),
        ("compute.cpu_token", "def f():\n    from .. import model", "compute.cpu_token imports model"),
        (
            "convert.readers.pickles",
            "import mlx_pararnn.convert.families.base",
            "imports convert.families.base",
        ),
        ("convert.writers.quantize", "from mlx_pararnn.convert import to_mlx", "imports convert.to_mlx"),
        ("convert.package.program", "from ..writers import quantize", "imports convert.writers.quantize"),
        ("chat.session", "from ..cli.app import main", "chat.session imports cli.app"),
        ("tools.doctor", "from ..convert import to_mlx", "tools.doctor imports convert.to_mlx"),
        ("model", "from mlx_pararnn import load", "model imports package"),
        ("pocket.loop", "from ..chat.session import Chat", "pocket.loop imports chat.session"),
        ("images.image_model", "from ..chat.session import Chat", "images.image_model imports chat.session"),
        ("errors", "from .cells import Cell", "errors imports cells"),
        ("errors", "import_module(f'{__package__}.model')", "errors imports model"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module, statement, offence):
    (seen,) = offences(module, imports(module, statement))
    assert offence in seen


def test_every_folder_is_in_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).parts for path in MODULES.values()}
    inside = {".".join(parts if parts[0] == "mlx_pararnn" else ("mlx_pararnn", *parts)) for parts in folders}
    assert inside == set(packages) - {"mlx_pararnn.metal.cells"}  # headers alone


def test_no_two_files_have_one_name():
    """In the library and its tests, but for a command and what it calls, and the names that tools ask for."""
    commands = {
        module
        for module in MODULES
        if room(module) == "cli"
        and module.rpartition(".")[2] in {called.rpartition(".")[2] for called in GRAPH[module]}
    }
    names = [path.name for module, path in MODULES.items() if module not in commands]
    names += [path.name for path in (ROOT / "tests").rglob("*.py")]
    shared = {name for name in names if names.count(name) > 1}
    assert shared == {"__init__.py", "__main__.py", "conftest.py"}
    assert commands == {"cli.add_tokenizer", "cli.doctor"}


def test_tests_import_what_is_their_rooms_or_support():
    """No test module, and nothing of another room's tests."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names += [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
        parts = [part for name in names for part in name.split(".")]
        assert not [part for part in parts if part.startswith(("test_", "conftest"))], path
        shared = ("tests.support", f"tests.{path.relative_to(ROOT / 'tests').parts[0]}")
        foreign = [name for name in names if name.startswith("tests.") and not name.startswith(shared)]
        assert foreign == [], path
