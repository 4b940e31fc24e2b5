"""The tests that `pytest` alone leaves out: those marked `harness`, `toolchain` or `large`.

`@pytest.mark.sampled("large")` marks the cases of a parametrised test but for a few that together show every
value of every parameter, or, of a parameter with a text of its own, every word of it. With a function, as in
`sampled("harness", by=lambda mutant: [mutant.file, mutant.seen_by])`, they show all that it names of a case.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import cast

import pytest

LEFT_OUT = {
    "harness": "kernels executed on a CPU, beyond one instance and one mutant of each kind",
    "toolchain": "needs a compiler, browser or library besides g++ and MLX",
    "large": "many cases of one kind, large files, or many processes",
}


def facets(item: pytest.Function) -> set[Hashable]:
    """What a case shows."""
    (marker,) = item.iter_markers("sampled")
    params = item.callspec.params
    if "by" in marker.kwargs:
        by = marker.kwargs["by"]
        names = by.__code__.co_varnames[: by.__code__.co_argcount]
        return set(by(*(params[name] for name in names)))
    shown: set[Hashable] = set()
    for name, value in params.items():
        simple = isinstance(value, str | int | float | None)
        words = [value] if simple else str(value).replace("-", " ").split()
        shown |= {(name, word) for word in words}
    return shown


def a_few(items: Iterable[pytest.Function]) -> list[pytest.Function]:
    """Cases that together show all that any of them does: each time the one that shows most that is new."""
    left = {item: facets(item) for item in items}
    chosen, missing = [], set().union(*left.values())
    while missing:
        best = max(left, key=lambda item: len(left[item] & missing))
        chosen.append(best)
        missing -= left.pop(best)
    return chosen


def mark_what_is_left_out(items: Iterable[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            cases[item.nodeid.partition("[")[0]].append(cast(pytest.Function, item))
    for group in cases.values():
        chosen = a_few(group)
        for item in group:
            if item not in chosen:
                item.add_marker(next(item.iter_markers("sampled")).args[0])


def left_out_mark(item: pytest.Item) -> str | None:
    return next((mark for mark in LEFT_OUT if item.get_closest_marker(mark)), None)
