"""What the server refuses and whom it turns away, and how it ends: from outside, as test_serve.py."""

import asyncio
import base64
import http.client
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import openai
import pytest
from typer.testing import CliRunner

from mlx_pararnn import PararnnError
from mlx_pararnn.chat.server import Settings, prompts, serve
from mlx_pararnn.chat.server.access import MAX_BODY
from mlx_pararnn.chat.server.schema import Refused
from mlx_pararnn.cli.app import app
from tests.support.demo import DEMO
from tests.support.serving import COMMAND, KEY, MOST, client_of, request, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


SAID = {"messages": [{"role": "user", "content": "x"}]}


IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


REFUSED = [  # what would end MLX-LM's generating thread, open a connection, load a file, or make no sense
    (TEXT, {"prompt": ""}, 400, "not an empty one"),
    (TEXT, {"prompt": ["a", "b"]}, 200, ""),
    (TEXT, {"prompt": ["a", 1]}, 400, "prompt must be a string"),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt must be a string"),
    (TEXT, {"prompt": []}, 400, "not an empty one"),
    (TEXT, {"prompt": [[65, 256]]}, 400, "token id 256"),
    (TEXT, {}, 400, "prompt must be a string"),
    (TEXT, {"prompt": "x", "stop": [1]}, 400, "stop must be"),
    (TEXT, {"prompt": "x", "stop": ""}, 200, ""),
    (TEXT, {"prompt": "x", "stop": ["a"] * 17}, 400, "stop must be"),
    (TEXT, {"prompt": "x", "stop": "a" * 257}, 400, "a stop string may have 256 characters"),
    (TEXT, {"prompt": "x", "top_k": True, "temperature": 1.0}, 200, ""),
    (TEXT, {"prompt": "x", "seed": -1}, 400, "seed is out of range"),
    (TEXT, {"prompt": "x", "seed": 2**64}, 400, "seed is out of range"),
    (TEXT, {"prompt": "x", "logit_bias": {"256": 1}}, 400, "logit_bias names token '256'"),
    (TEXT, {"prompt": "x", "logit_bias": {"-1": 1}}, 400, "logit_bias names token '-1'"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": 1e999}}, 400, "Infinity is no number of JSON's"),
    (TEXT, {"prompt": "x", "xtc_probability": 0.5, "xtc_threshold": 0.9}, 400, "xtc_threshold"),
    (TEXT, {"prompt": "x", "repetition_context_size": 10**30}, 400, "repetition_context_size is out of"),
    (TEXT, {"prompt": "x", "repetition_penalty": 10**400}, 400, "repetition_penalty is out of range"),
    (TEXT, {"prompt": "x", "temperature": float("nan")}, 400, "NaN is no number of JSON's"),
    (TEXT, {"prompt": "x", "temperature": -1}, 400, "temperature must be at least 0"),
    (TEXT, {"prompt": "x", "top_k": 10**6, "temperature": 1.0}, 200, ""),
    (TEXT, {"prompt": "x", "max_tokens": None, "seed": None, "stop": None, "logit_bias": None}, 200, ""),
    (TEXT, {"prompt": "x", "n": 2}, 200, ""),
    (TEXT, {"prompt": "x", "n": 17}, 400, "n must be at most 16"),
    (TEXT, {"prompt": "x", "best_of": 2}, 400, "best_of is not taken"),
    (TEXT, {"prompt": ["x"] * 100, "n": 2}, 400, "prompt and n ask for more than 128 answers"),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix is not taken"),
    (TEXT, {"prompt": "x", "echo": True}, 200, '"text":"x'),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
    (TEXT, {"prompt": "x", "suffix": None, "echo": False, "response_format": None}, 200, ""),
    (TEXT, {"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format can only"),
    (
        CHAT,
        {**SAID, "response_format": {"type": "json_schema", "json_schema": {}}},
        400,
        "response_format can",
    ),
    (CHAT, {**SAID, "tools": TOOLS}, 400, "tools are not taken"),
    (CHAT, {**SAID, "tools": TOOLS, "tool_choice": "required"}, 400, "tools are not taken"),
    (CHAT, {**SAID, "tool_choice": "required"}, 400, "tool_choice is required"),
    (CHAT, {**SAID, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be at most 20"),
    (CHAT, {**SAID, "logprobs": True, "top_logprobs": 20}, 200, ""),
    (CHAT, {**SAID, "frobnicate": 1}, 400, "frobnicate is not taken"),
    (CHAT, {**SAID, "response_format": "text"}, 400, "response_format can only be"),
    (CHAT, {**SAID, "response_format": {"type": "text"}}, 200, ""),
    (TEXT, {"prompt": "x", "stream_options": 3}, 400, "stream_options"),
    (TEXT, {"prompt": "x\ud800"}, 400, "not UTF-8"),
    (TEXT, {"prompt": "x", "adapters": "/etc"}, 400, "adapters is not taken"),
    (TEXT, {"prompt": "x", "draft_model": "/etc"}, 400, "draft_model is not taken"),
    (CHAT, {"messages": []}, 400, "messages must be a list"),
    (CHAT, {"messages": ["x"]}, 400, "an object with a role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text parts"),
    (CHAT, {"prompt": "x", "messages": [{"role": "user", "content": IMAGE}]}, 400, "only text parts"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "content must be a string"),
    (CHAT, {}, 400, "messages must be a list"),
    (CHAT, {**SAID, "chat_template_kwargs": 5}, 400, "chat_template_kwargs must be an object"),
    (CHAT, {**SAID, "chat_template_kwargs": {"chat_template": "x"}}, 400, "may not have 'chat_template'"),
    (CHAT, {**SAID, "chat_template_kwargs": {"max_length": 9}}, 400, "may not have 'max_length'"),
    (CHAT, {**SAID, "chat_template_kwargs": {"enable_thinking": False}}, 200, ""),
    (TEXT, b"{", 400, "not JSON"),
    (TEXT, b"[" * 100_000, 400, "not JSON"),
    (TEXT, b"[]", 400, "not a JSON object"),
    (TEXT, b"\xff", 400, "not JSON"),
    ("/v1/embeddings", {"prompt": "x"}, 404, "Not Found"),
]


@pytest.mark.parametrize("model", ["mlx-community/other", "gpt-4o"])
def test_another_models_name_is_taken(server, model):
    """Many programs have one built in; the answer says which model it came from."""
    status, _, answer = request(server, "POST", TEXT, {"prompt": "x", "max_tokens": 1, "model": model})
    assert (status, json.loads(answer)["model"]) == (200, "demo")


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_what_is_asked_wrongly_is_refused_and_the_server_goes_on(server, path, body, status, message):
    if isinstance(body, dict) and status == 200:
        body = {**body, "max_tokens": 2}
    given, _, content = request(server, "POST", path, body)
    assert (given, message in content.decode()) == (status, True), content
    assert request(server, "GET", "/health")[0] == 200


def test_sizes_are_bounded(server):
    assert request(server, "POST", TEXT, {"prompt": "x" * MAX_BODY})[0] == 413
    assert request(server, "POST", TEXT, None, Content_Length="many")[0] == 400
    assert request(server, "GET", "/" + "x" * 70_000)[0] == 404
    status, _, content = request(server, "POST", TEXT, {"prompt": "x", "max_tokens": 10**9})
    assert status == 200
    assert json.loads(content)["usage"]["completion_tokens"] == MOST


@pytest.mark.large
@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: ",
        b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"',
    ],
)
def test_a_request_that_trickles_in_is_given_up(hurried, start):
    """Each byte is early enough; all of them are not."""
    with socket.create_connection(("127.0.0.1", urlsplit(hurried.url).port), timeout=30) as connection:
        connection.sendall(start)
        for _ in range(400):
            if select.select([connection], [], [], 0.05)[0]:
                break
            try:
                connection.send(b"x")
            except ConnectionError:
                break
        else:
            pytest.fail("the server still waits")
        said = connection.recv(65536)
    assert said.startswith(b"HTTP/1.1 408")
    assert request(hurried, "POST", TEXT, {"prompt": "x", "max_tokens": 2})[0] == 200


@pytest.fixture(scope="module")
def hurried(tmp_path_factory):
    """A server that gives a request three seconds to arrive."""
    folder = tmp_path_factory.mktemp("hurried")
    (folder / "hurried.py").write_text(
        "from mlx_pararnn.chat.server import endpoints, listen\n"
        "listen.TIMEOUT = endpoints.SECONDS_TO_ARRIVE = 3\n"
        "listen.MAX_CONNECTIONS = 20\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with running(DEMO, "--import", "hurried") as server:
            yield server


def test_other_sites_and_names_are_turned_away(server):
    port = urlsplit(server.url).port
    for host, status in (
        (f"localhost:{port}", 200),
        (f"[::1]:{port}", 200),
        ("evil.example", 403),
        ("[", 403),
    ):
        assert request(server, "GET", "/v1/models", Host=host)[0] == status
    for origin, status in ((server.url, 200), ("http://evil.example", 403), ("null", 403)):
        assert request(server, "POST", TEXT, {"prompt": "x", "max_tokens": 1}, Origin=origin)[0] == status
    _, headers, _ = request(server, "OPTIONS", TEXT)
    assert "Access-Control-Allow-Origin" not in headers
    _, headers, page = request(server, "GET", "/")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    # Nothing of the page comes from elsewhere.
    markup = re.sub(rb"<script>.*?</script>", b"", page, flags=re.S)
    assert re.findall(rb"""(?:src|href)\s*=\s*["'][^"']|url\(""", markup) == [b'href="d']  # the icon, data:,
    assert re.findall(r"\S+", headers["Content-Security-Policy"].split("connect-src")[1])[0] == "'self';"


def test_every_request_needs_the_key(guarded):
    server = guarded
    answer = client_of(server, KEY).completions.create(model="templated", prompt="def main(", max_tokens=4)
    assert answer.choices[0].text == "self"
    for wrong in ("", "wrong", KEY[:-1], KEY + "x", "é"):
        bearer = f"Bearer {wrong}".encode()
        assert request(server, "GET", "/v1/models", Authorization=bearer)[0] == 401
    with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
        client_of(server, "wrong").completions.create(model="demo", prompt="x")
    for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT"):
        for path in ("/", "/health", "/v1/models", TEXT, "/nowhere"):
            assert request(server, method, path)[0] == 401
    for user, key, status in (("any", KEY, 200), ("", KEY, 200), ("any", "wrong", 401), (KEY, "", 401)):
        basic = "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()
        assert request(server, "GET", "/", Authorization=basic)[0] == status
    assert request(server, "GET", "/", Authorization="Basic ???")[0] == 401
    assert request(server, "GET", "/")[1]["WWW-Authenticate"].startswith("Basic")


@pytest.mark.large
@pytest.mark.parametrize(
    ("number", "seed"), [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGINT, 1)]
)
def test_it_stops_cleanly_in_the_middle_of_an_answer(number, seed):
    with running(DEMO, "--max-tokens", 10**6) as server:
        stream = client_of(server).completions.create(
            model="demo", prompt="x", max_tokens=10**6, temperature=1, seed=seed, stream=True
        )
        next(iter(stream))
        code, said = server.stop(number)
        assert (code, said.splitlines()[-1]) == (0, "Stopped.")
        assert "Traceback" not in said


@pytest.mark.large
def test_answers_go_on_for_a_moment_after_sigterm_and_no_new_ones_begin():
    with running(DEMO) as server:
        kept = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        arguments = {"model": "demo", "prompt": "def main(", "max_tokens": 200, "stream": True}
        chunks = iter(client_of(server).completions.create(**arguments))
        said = [next(chunks)]
        server.process.send_signal(signal.SIGTERM)
        said += list(chunks)
        assert said[-1].choices[0].finish_reason == "length"
        assert len(said) > 100
        try:
            kept.request("POST", TEXT, json.dumps({"prompt": "x", "max_tokens": 1}))
            status = kept.getresponse().status
        except (OSError, http.client.HTTPException):
            status = 503
        assert status == 503
        kept.close()
        server.process.wait(timeout=60)
        assert server.process.returncode == 0


@pytest.mark.large
def test_it_stops_while_it_reads_a_prompt_that_is_answered_by_itself():
    with running(DEMO) as server:
        with pytest.raises(openai.APITimeoutError):
            client_of(server).completions.create(
                model="demo", prompt="x" * 1_000_000, max_tokens=1, seed=1, timeout=5
            )
        assert server.stop()[0] == 0


BROKEN = """
from mlx_pararnn import Model
from mlx_pararnn.chat.server import prompts
from mlx_pararnn.text.detokenizer import Detokenizer

class Panic(BaseException):
    pass  # as Rust's libraries raise them

call, encode, add_token = Model.__call__, prompts.encode, Detokenizer.add_token

def broken(self, inputs, **kwargs):
    if 7 in inputs.tolist()[0]:
        raise RuntimeError("the device is gone")
    return call(self, inputs, **kwargs)

def panicking(tokenizer, prompt):
    if prompt == "panic":
        raise Panic("index out of bounds")
    return encode(tokenizer, prompt)

def panicking_token(self, token):
    if token == 5:
        raise Panic("not a char boundary")
    add_token(self, token)

Model.__call__, prompts.encode, Detokenizer.add_token = broken, panicking, panicking_token
"""


@pytest.mark.large
def test_a_panic_ends_a_request_and_a_lost_device_the_server(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    with running(DEMO, "--import", "broken") as server:
        status, _, content = request(server, "POST", TEXT, {"prompt": "panic"})
        assert (status, "Panic: index out of bounds" in content.decode()) == (400, True)
        body = {"prompt": "x", "max_tokens": 2, "logit_bias": {"5": 1000}}
        status, _, content = request(server, "POST", TEXT, body)
        assert (status, "Panic: not a char boundary" in content.decode()) == (500, True)
        assert request(server, "POST", TEXT, {"prompt": "x", "max_tokens": 2})[0] == 200
        status, _, content = request(server, "POST", TEXT, {"prompt": "\x07\x07", "max_tokens": 2})
        assert (status, "generation stopped: the device is gone" in content.decode()) == (503, True)
        server.process.wait(timeout=60)
        code, said = server.stop()
        assert code == 1
        assert "error: generation stopped: the device is gone" in said
        assert "Traceback" not in said


def refused(*args):
    result = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.large
def test_what_it_says_when_it_cannot_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused("--port", port)
    assert said == (
        f"error: cannot listen on 127.0.0.1 port {port} (Address already in use); choose another with --host "
        "or --port"
    )
    assert "can be reached from other machines: give a key" in refused("--host", "0.0.0.0")
    assert "no such model folder" in refused("nowhere", "--port", "0")
    for settings, message in (
        (Settings(host="::"), "can be reached from other machines"),
        (Settings(api_key=""), "must be printable ASCII"),
        (Settings(host="no.such.host.invalid"), "no such host here: 'no.such.host.invalid'"),
    ):
        with pytest.raises(PararnnError, match=message):
            serve(DEMO, settings)


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "spun"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a thread has used")
def test_a_prompt_is_given_up_by_what_it_uses_not_by_what_others_do(monkeypatch):
    """A thread that waits for a processor, as on a busy machine, is waited for; one that spins is not."""
    monkeypatch.setattr(prompts, "SECONDS", 0.3)
    run = prompts.run_apart
    assert asyncio.run(run(lambda: time.sleep(1) or "slept")) == "slept"
    assert asyncio.run(run(spin, 0.05)) == "spun"
    with pytest.raises(Refused, match=r"more than 0\.3 seconds of a processor"):
        asyncio.run(run(spin, 100))
    monkeypatch.setattr(prompts, "MOST_SECONDS", 0.5)
    with pytest.raises(Refused, match=r"more than 0\.5 seconds for this prompt"):
        asyncio.run(run(time.sleep, 2))


SCORED = {"prompt": [65] * 16_384, "echo": True, "logprobs": 20, "max_tokens": 0}


@pytest.mark.parametrize("fields", [{"prompt": [65] * 16_385}, {"prompt": "x" * 16_385, "logprobs": None}])
def test_a_prompt_whose_log_probabilities_are_too_many(server, fields):
    status, _, said = request(server, "POST", TEXT, {**SCORED, **fields})
    sentence = "echo with logprobs is for prompts of 16384 tokens at most, and this one has 16385"
    assert (status, sentence in said.decode()) == (400, True), said


def test_a_request_that_would_hold_too_much(server):
    for fields in ({"n": 16}, {"prompt": [[65] * 8192] * 16}):
        status, _, said = request(server, "POST", TEXT, {**SCORED, **fields})
        assert (status, b"of this request take up to" in said) == (400, True), said


@pytest.mark.large
def test_requests_that_would_hold_too_much_together(server):
    """The second is told to come again, until the first has been answered or is gone."""

    def begin():
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.request("POST", TEXT, json.dumps({**SCORED, "n": 5, "stream": True}))
        status = connection.getresponse().status
        return status, connection

    begun, first = begin()
    assert begun == 200
    status, headers, said = request(server, "POST", TEXT, {**SCORED, "n": 5})
    assert (status, headers["Retry-After"], b"too many long requests" in said) == (503, "1", True)
    assert request(server, "POST", TEXT, {"prompt": "x", "max_tokens": 1})[0] == 200
    first.close()
    deadline = time.monotonic() + 60
    while (begun := begin())[0] == 503:
        begun[1].close()
        assert time.monotonic() < deadline
    begun[1].close()
    assert begun[0] == 200


@pytest.mark.parametrize("opened", [True, False])
def test_a_page_that_no_browser_opens_is_named(opened, monkeypatch):
    asked = []
    monkeypatch.setattr("webbrowser.open", lambda page: asked.append(page) or opened)
    monkeypatch.setattr(
        "mlx_pararnn.chat.server.serve", lambda model, settings, ready: ready("http://0.0.0.0:8080")
    )
    result = CliRunner().invoke(app, ["serve", str(DEMO), "--open"])
    assert asked == ["http://127.0.0.1:8080"]
    said = "No browser could be opened here; open http://127.0.0.1:8080 in one."
    assert (said in result.stderr.splitlines()) is not opened
