"""The Core ML tests' fixture; a plugin, since a second conftest.py would hide that of tests/."""

import pytest
from exporting import Exports


@pytest.fixture(scope="session")
def exports(tmp_path_factory, converted) -> Exports:
    return Exports(tmp_path_factory.mktemp("coreml"), converted)
