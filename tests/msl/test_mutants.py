"""The checks check: each of these broken kernels is seen, by the check meant for it; the real ones pass."""

from pathlib import Path

import pytest

from ..support.msl.adjoint_kernel import adjoint_cases
from ..support.msl.harness import missing
from ..support.msl.instances import CELLS
from ..support.msl.layer_kernels import conv_cases, decode_cases, norm_cases
from . import language
from .battery import newton_cases, objection, sequential_cases
from .mutants import ADJOINT, CONV, DECODE, INPUTS, MUTANTS, NEWTON, NORM, STRAIGHT, Mutant

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CASES = {STRAIGHT: sequential_cases, CONV: conv_cases, DECODE: decode_cases, NORM: norm_cases}
CASES |= {ADJOINT: adjoint_cases, INPUTS: adjoint_cases}  # of other files: newton_cases


@pytest.fixture(scope="module")
def cases_for():
    """The battery's cases by (file, cell); they keep what the oracle says."""
    made = {}

    def cases(file: str, cell: str):
        if (file, cell) not in made:
            made[file, cell] = CASES.get(file, newton_cases)(cell)
        return made[file, cell]

    return cases


@pytest.mark.sampled("harness")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("file", [NEWTON, STRAIGHT, CONV, DECODE, NORM, ADJOINT])
def test_the_kernels_pass(file, cell, cases_for):
    assert objection(cases_for(file, cell), lambda launch: launch) is None


@pytest.mark.sampled("harness", by=lambda mutant: [mutant.file, *mutant.seen_by.split()])
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant, cases_for):
    seen = objection(cases_for(mutant.file, mutant.cell), mutant.apply)
    if seen is None and mutant.seen_by == "language" and not language.clang():
        pytest.skip(f"only clang sees this ({language.APT})")
    assert seen is not None, "nothing sees this mutant"
    assert seen[0] in mutant.seen_by.split(), f"seen by {seen}"


def test_the_documents_count_them():
    for page in ("README.md", "docs/architecture.md"):
        text = (Path(__file__).parents[2] / page).read_text()
        assert f"{len(MUTANTS)} deliberately broken kernels" in text
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
