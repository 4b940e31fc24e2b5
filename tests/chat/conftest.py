"""One server for all tests that ask it things, and one with a key and a template."""

import shutil

import pytest

from tests.support.serving import KEY, MOST, PAGE_ORIGIN, TEMPLATE, client_of, demo_in_float32, running


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


@pytest.fixture(scope="session")
def guarded(folder, tmp_path_factory):
    """A server with a template and a key, open to other machines."""
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("guarded") / "templated")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running(folder, "-m", 30, "--host", "0.0.0.0", "--api-key", KEY) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server
