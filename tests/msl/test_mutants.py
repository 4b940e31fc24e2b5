"""The checks check: each of these broken kernels is seen, by the check meant for it; the real ones pass."""

import pytest

from . import language
from .battery import newton_cases, objection, sequential_cases
from .harness import missing
from .instances import CELLS
from .mutants import MUTANTS, STRAIGHT, Mutant

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def cases_for():
    """The battery's cases by (kernel, cell); they keep what the oracle says."""
    made = {}

    def cases(straight: bool, cell: str):
        if (straight, cell) not in made:
            made[straight, cell] = (sequential_cases if straight else newton_cases)(cell)
        return made[straight, cell]

    return cases


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("straight", [False, True], ids=["newton", "sequential"])
def test_the_kernels_pass(straight, cell, cases_for):
    assert objection(cases_for(straight, cell), lambda launch: launch) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant, cases_for):
    seen = objection(cases_for(mutant.file == STRAIGHT, mutant.cell), mutant.apply)
    if seen is None and mutant.seen_by == "language" and not language.clang():
        pytest.skip(f"only clang sees this ({language.APT})")
    assert seen is not None, "nothing sees this mutant"
    assert seen[0] in mutant.seen_by.split(), f"seen by {seen}"


def test_there_are_enough():
    assert len(MUTANTS) >= 25
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
