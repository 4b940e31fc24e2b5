"""What strangers do to the server in numbers: it answers with the right status, stays small, and goes on."""

import base64
import contextlib
import http.client
import io
import json
import random
import socket
import sys
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.support.image_models import image_model, write_image_model
from tests.support.memory import anonymous_memory
from tests.support.serving import calling_model, request, running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def connect(server):
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=60)


def post(path, body):
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def answers(server):
    status, _, said = request(server, "POST", TEXT, {"prompt": "def main(", "max_tokens": 2})
    return status == 200 and json.loads(said)["usage"]["completion_tokens"] == 2


def test_a_list_of_10_000_stop_strings_is_refused(server):
    for path, given in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": [{"role": "user", "content": "x"}]})):
        for stop in (["a"] * 10_000, [f"{n}" * 50 for n in range(10_000)]):
            status, _, said = request(server, "POST", path, {**given, "stop": stop})
            assert (status, b"stop must be a string or up to 16" in said) == (400, True)
    status, _, said = request(
        server, "POST", "/v1/messages",
        {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "stop_sequences": ["a"] * 10_000},
    )  # fmt: skip
    assert (status, b"stop" in said) == (400, True)
    assert answers(server)


@pytest.mark.parametrize("headers", [1, 100])
def test_headers_of_a_megabyte_are_refused(server, headers):
    with connect(server) as connection:
        lines = "".join(f"X-{n}: {'x' * (2**20 // headers)}\r\n" for n in range(headers))
        with contextlib.suppress(ConnectionError):  # it answers before it has read them all
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
        said = connection.recv(100)
    assert said[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert answers(server)


def test_a_request_line_that_is_none_and_bodies_that_do_not_fit_their_length(server):
    for sent, status in (
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, b"400"),  # TLS
        (b"POST " + TEXT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"400"),
        (post(TEXT, b'{"prompt": "x"}')[:-1].replace(b"Length: 15", b"Length: 14"), b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", b"400"),
    ):
        with connect(server) as connection:
            connection.sendall(sent)
            said = connection.recv(65536)
        assert said[:12] == b"HTTP/1.1 " + status, (sent[:40], said)
        assert b"Traceback" not in said
    assert answers(server)


@pytest.mark.large
def test_300_connections_at_once(server):
    """Each asks, and each is answered or told to come again."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(300)]
        for number, connection in enumerate(held):
            connection.sendall(post(TEXT, {"prompt": f"{number}", "max_tokens": 2}))
        statuses = [connection.recv(65536)[9:12] for connection in held]
    assert set(statuses) <= {b"200", b"503"}
    assert statuses.count(b"200") >= 256  # access.MAX_REQUESTS
    assert answers(server)


@pytest.mark.large
def test_clients_that_vanish_in_the_middle(server):
    """Of the request, of its body, of the answer."""
    body = post(TEXT, {"prompt": "x", "max_tokens": 300, "stream": True, "temperature": 1})
    chance = random.Random(0)
    for _ in range(200):
        connection = connect(server)
        connection.sendall(body[: chance.randrange(1, len(body) + 60)])
        if chance.random() < 0.3:
            time.sleep(0.02)
        if chance.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    assert answers(server)


MOST = 4 << 20  # bytes that 8,000 requests may add: 524 each
TOLD = {"role": "user", "content": "x"}
RESPONSES = "/v1/responses"


def word(chance, length):
    return chance.randbytes(length // 2).hex()


def function(chance):
    parameters = {"type": "object", "properties": {word(chance, 20): {"enum": [chance.randrange(9)]}}}
    return {"type": "function", "function": {"name": word(chance, 40), "parameters": parameters}}


def schema(chance):
    format_name = {"type": "string", "format": word(chance, chance.choice((40, 6 * 10**4)))}
    return {"type": "json_schema", "json_schema": {"schema": {**format_name, "maxLength": 1}}}


def kinds_of_text(chance):
    """Ones that are answered and ones that are refused: method, path, body, headers, status."""
    return [
        ("POST", TEXT, lambda: {"prompt": f"{chance.random()}", "max_tokens": 1}, {}, 200),
        ("POST", CHAT, lambda: {"messages": [TOLD], "max_tokens": 1}, {}, 200),
        ("POST", TEXT, lambda: {"prompt": "x", "max_tokens": 1, "seed": chance.randrange(9)}, {}, 200),
        ("GET", "/health", None, {}, 200),
        ("POST", TEXT, lambda: {"prompt": "x" * chance.randrange(3000), "stop": [""] * 99}, {}, 400),
        ("POST", TEXT, lambda: b"{" + chance.randbytes(40), {}, 400),
        ("GET", "/v1/models", None, {"Origin": "http://evil.example"}, 403),
        ("GET", "/v1/models", None, {"Host": f"{chance.random()}.example"}, 403),
        ("GET", f"/{'x' * 500}", None, {}, 404),
        ("PUT", TEXT, None, {}, 405),
        ("POST", CHAT, lambda: {"messages": [TOLD], "max_tokens": 2, "stream": True}, {}, 200),
        ("POST", TEXT, lambda: {"prompt": "x", "max_tokens": 1, "model": word(chance, 10**5)}, {}, 200),
        (
            "POST", TEXT,
            lambda: {"prompt": "x", "max_tokens": 1, "response_format": schema(chance)},
            {}, 200,
        ),
        ("POST", RESPONSES, lambda: {"input": word(chance, 40), "max_output_tokens": 1}, {}, 200),
        ("POST", RESPONSES, lambda: {"input": "x", "max_output_tokens": 1, "stream": True}, {}, 200),
        (
            "POST", CHAT,
            lambda: {
                "messages": [TOLD], "max_tokens": 2, "tools": [function(chance)], "tool_choice": "required",
            },
            {}, 200,
        ),
        ("POST", CHAT, lambda: {"messages": [picture_message(chance)], "max_tokens": 1}, {}, 400),
        ("POST", TEXT, lambda: {"prompt": "xyz", "max_tokens": 1, "logprobs": 5, "echo": True}, {}, 200),
        ("GET", f"{RESPONSES}/resp_0", None, {}, 404),
        ("POST", "/v1/messages", lambda: {"messages": [TOLD], "max_tokens": 1, "stream": True}, {}, 200),
    ]  # fmt: skip


def kinds_of_images(chance):
    """To a model that sees and draws."""
    return [
        ("POST", CHAT, lambda: {"messages": [picture_message(chance)], "max_tokens": 1}, {}, 200),
        ("POST", CHAT, lambda: {"messages": [TOLD], "max_tokens": 1}, {}, 200),
        ("POST", "/v1/images/generations", lambda: {"prompt": word(chance, 20)}, {}, 200),
        ("POST", CHAT, lambda: {"messages": [picture_message(chance, b"none")], "max_tokens": 1}, {}, 400),
    ]


def picture_message(chance, data=None):
    if data is None:
        file = io.BytesIO()
        Image.frombytes("RGB", (40, 30), chance.randbytes(3600)).save(file, "PNG")
        data = file.getvalue()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def ask_all(server, kinds, count):
    """So many requests, each with its status; the bytes of the server after each tenth of them."""
    sizes, connection = [], None
    for number in range(count):
        if number % (count // 10) == 0:
            sizes.append(anonymous_memory(server.process.pid))
        method, path, body, headers, wanted = kinds[number % len(kinds)]
        content = body and body()
        content = json.dumps(content) if isinstance(content, dict) else content
        connection = connection or http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        said = response.read()
        assert (response.status, b"Traceback" in said) == (wanted, False), (path[:50], said[:300])
        if response.will_close:
            connection = connection.close()
    return [*sizes, anonymous_memory(server.process.pid)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_long_names_are_not_kept(server):
    def ask(count):
        for number in range(count):
            body = {"prompt": "x", "max_tokens": 1, "model": f"{number}" * 10**6}
            assert request(server, "POST", TEXT, body)[0] == 200

    ask(5)
    before = anonymous_memory(server.process.pid)
    ask(20)
    assert anonymous_memory(server.process.pid) - before < 8 << 20


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_10_000_requests_leave_its_memory_as_it_was(tmp_path):
    """Of twenty kinds, names, schemas and functions that were never asked for before among them."""
    chance = random.Random(0)
    with running(calling_model(tmp_path / "model")) as server:
        for _ in range(1000):  # so many responses are kept
            status, _, _ = request(server, "POST", RESPONSES, {"input": "x" * 40, "max_output_tokens": 1})
            assert status == 200
        sizes = ask_all(server, kinds_of_text(chance), 10_000)
        assert sizes[-1] - sizes[2] < MOST, sizes
        assert answers(server)
        code, last = server.stop()
        assert (code, last.count("Traceback")) == (0, 0)


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_2_000_images_leave_its_memory_as_it_was(tmp_path):
    """What is read of each is kept as long as the prompt cache has room, here for a few."""
    folder = write_image_model(image_model(), tmp_path / "model")
    with running(folder, "--prompt-cache-mb", 1) as server:
        sizes = ask_all(server, kinds_of_images(random.Random(0)), 2_000)
        assert sizes[-1] - sizes[2] < MOST, sizes
        code, last = server.stop()
        assert (code, last.count("Traceback")) == (0, 0)
