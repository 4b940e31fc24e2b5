"""Of a sampled test the quick run keeps cases that together show everything that any case shows."""

from types import SimpleNamespace

import pytest

from tests.support.golden import DATA
from tests.support.quick_run import LEFT_OUT, a_few, left_out_mark, mark_what_is_left_out


class Item:
    def __init__(self, marker, **params):
        self.marks, self.callspec = [marker.mark], SimpleNamespace(params=params)
        self.nodeid = f"test_file.py::test_it[{'-'.join(map(str, params.values()))}]"

    def iter_markers(self, name):
        return (mark for mark in self.marks if mark.name == name)

    def get_closest_marker(self, name):
        return next(self.iter_markers(name), None)

    def add_marker(self, name):
        self.marks.append(getattr(pytest.mark, name).mark)


def items(**options):
    marker = pytest.mark.sampled("large", **options)
    return [Item(marker, cell=c, T=t) for c in ("gru", "lstm", "nlru", "slstm") for t in (1, 16, 33)]


def test_every_value_of_every_parameter_is_shown_once():
    chosen = [item.callspec.params for item in a_few(items())]
    assert len(chosen) == 4
    assert {p["cell"] for p in chosen} == {"gru", "lstm", "nlru", "slstm"}
    assert {p["T"] for p in chosen} == {1, 16, 33}


def test_what_a_function_names_is_shown_once():
    assert len(a_few(items(by=lambda T: [T]))) == 3
    assert len(a_few(items(by=lambda: ["one"]))) == 1


def test_the_others_wear_the_mark():
    cases = items()
    mark_what_is_left_out(cases)
    assert sum(left_out_mark(item) == "large" for item in cases) == 8
    assert set(LEFT_OUT) == {"harness", "toolchain", "large"}


def test_a_clone_stays_small():
    """What a test can make, as tests/support/demo.py does, is not kept in tests/data."""
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 15_000_000
