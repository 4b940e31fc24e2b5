"""Packages exported once a session."""

import pytest

from tests.support.coreml.exports import Exports


@pytest.fixture(scope="session")
def exports(tmp_path_factory, converted) -> Exports:
    return Exports(tmp_path_factory.mktemp("coreai"), converted, to="coreai")
