"""One server for all tests that ask it things."""

import pytest

from tests.support.serving import MOST, PAGE_ORIGIN, client_of, demo_in_float32, running


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return demo_in_float32(tmp_path_factory.mktemp("serve") / "demo")


@pytest.fixture(scope="session")
def server(folder):
    names = ("--allow-origin", PAGE_ORIGIN, "--allow-origin", "host.docker.internal")
    with running(folder, "--max-tokens", MOST, *names) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return client_of(server)
