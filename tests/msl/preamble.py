"""Names that MLX's preamble takes: what stands before every kernel when MLX compiles it on a Mac.

Read from the headers that the installed wheel of MLX ships, so the list is that version's own.
"""

import re
from functools import cache
from pathlib import Path

import mlx.core as mx

HEADER = "mlx/backend/metal/kernels/utils.h"  # MLX writes it out before a kernel, with all that it includes


def include_folder() -> Path:
    """The folder of MLX's headers, what `-I` names."""
    return Path(mx.__file__).parent / "include"


@cache
def names() -> frozenset[str]:
    """Macros, and what is declared outside of namespaces; namespaces themselves."""
    found: set[str] = set()
    for text in _texts(HEADER, set()):
        found |= _declared(text)
    return frozenset(found)


def _texts(header: str, seen: set[str]) -> list[str]:
    if header in seen:
        return []
    seen.add(header)
    text = (include_folder() / header).read_text()
    included = [t for name in re.findall(r'(?m)^\s*#include "([^"]+)"', text) for t in _texts(name, seen)]
    return [*included, text]


def _declared(text: str) -> set[str]:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    text = re.sub(r"\\\n", " ", text)  # a macro of several lines is one line
    found = set(re.findall(r"(?m)^\s*#\s*define\s+(\w+)", text))
    text = re.sub(r"(?m)^\s*#[^\n]*", "", text)
    for statement in _at_program_scope(text):
        statement = re.sub(r"^template\s*<[^;{}]*?>\s*(?=[a-zA-Z_])", "", statement)
        for pattern in (
            r"^\s*(?:struct|class|enum|union|namespace)\s+(\w+)",
            r"^\s*using\s+(\w+)\s*=",
            r"^\s*typedef\b.*?(\w+)\s*;?$",
            r"\b(\w+)\s*\([^()]*\)?",  # a function
            r"\b(\w+)\s*=",  # a constant
        ):
            if match := re.search(pattern, statement, re.DOTALL):
                found.add(match[1])
                break
    return found - {"operator", "static_assert"}


def _at_program_scope(text: str) -> list[str]:
    """What stands before each brace or semicolon outside of all braces."""
    statements, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        if character == "{":
            if depth == 0:
                statements.append(text[begin:place])
            depth += 1
        elif character == "}":
            depth -= 1
            begin = place + 1
        elif character == ";" and depth == 0:
            statements.append(text[begin : place + 1])
            begin = place + 1
    return [statement.strip() for statement in statements if statement.strip(" \n;")]
