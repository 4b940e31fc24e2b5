"""What clients may ask for: formats, several answers, tokens, names that are let in; and how it ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_pararnn import PararnnError
from mlx_pararnn.chat.server import Settings, serve
from mlx_pararnn.chat.server.choices import TokenTexts, chat_logprobs, completion_logprobs
from mlx_pararnn.chat.server.jobs import Job, TokenInfo
from mlx_pararnn.chat.server.text import AnswerText
from tests.support.demo import DEMO
from tests.support.serving import PAGE_ORIGIN, TEMPLATE, client_of, folder_of, running

DOCS = Path(__file__).parents[2] / "docs"
ENDLESS = (
    "{% if messages[0]['content'] == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)
GROWING = (
    "{% if messages[0]['content'] == 'grow' %}{% set n = namespace(x='ab') %}{% for _ in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}{% endif %}"
)


def ask(server, path, body=None, method="POST", **headers):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    content = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, content, headers, encode_chunked=not isinstance(content, str | None))
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content.decode()


def test_answers_of_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "developer", "content": [{"type": "text", "text": "def "}]}],
            response_format=form,
            temperature=1,
            seed=seed,
            max_tokens=50,
        )
        assert json.loads(answer.choices[0].message.content)["a"] in ("x", "y")
        assert answer.choices[0].finish_reason == "stop"
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "foo"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}], response_format=bad
        )


def test_several_prompts_and_several_answers(client):
    ids = list(b"def main(")
    arguments = {"model": "demo", "max_tokens": 12}
    for prompt in ("def main(", ids, ["def main("], [ids]):
        assert client.completions.create(prompt=prompt, **arguments).choices[0].text == "self, other)"
    arguments = {**arguments, "prompt": ["def main(", "import "], "n": 2, "temperature": 1, "seed": 1}
    answer = client.completions.create(**arguments)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 9 + 7
    assert answer.usage.completion_tokens == 48
    texts = {}
    for chunk in client.completions.create(**arguments, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [texts[n] for n in range(4)] == [choice.text for choice in answer.choices]


def test_the_prompts_own_log_probabilities(client):
    scored = client.completions.create(
        model="demo", prompt="def main(self", max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert scored.finish_reason == "length"
    assert scored.text == "".join(scored.logprobs.tokens) == "def main(self"
    assert scored.logprobs.text_offset == list(range(13))
    assert scored.logprobs.token_logprobs[0] is None
    made = client.completions.create(model="demo", prompt="def main(", max_tokens=4, logprobs=1).choices[0]
    assert made.text == "self"
    assert scored.logprobs.token_logprobs[9:] == pytest.approx(made.logprobs.token_logprobs, abs=0.05)
    both = client.completions.create(
        model="demo", prompt="def main(", max_tokens=4, echo=True, logprobs=1
    ).choices[0]
    assert both.text == "def main(self"
    assert both.logprobs.text_offset == list(range(13))


@pytest.mark.parametrize("told", [1, 0])
def test_a_prompts_log_probabilities_come_in_pieces(client, told):
    """Of 128 tokens each, not as one event of megabytes; together what is told at once."""
    wanted = {
        "model": "demo", "prompt": "def main(self, other):\n    é\n" * 10, "echo": True, "logprobs": 2,
        "max_tokens": told,
    }  # fmt: skip
    whole = client.completions.create(**wanted).choices[0]
    pieces = [chunk.choices[0] for chunk in client.completions.create(**wanted, stream=True)]
    assert (pieces[-1].finish_reason, len(pieces)) == ("length", 4)
    assert "".join(piece.text for piece in pieces) == whole.text
    found = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    assert max(len(part.tokens) for part in found) <= 129
    for name in ("tokens", "text_offset"):
        assert [value for part in found for value in getattr(part, name)] == getattr(whole.logprobs, name)
    numbers = [value for part in found for value in part.token_logprobs[part is found[0] :]]
    assert numbers == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-4)


def test_answers_to_a_prompt_share_its_tokens():
    prompt = [1, 2, 3]
    jobs = [Job(prompt, 1, AnswerText(None), None) for _ in range(2)]
    assert jobs[0].tokens is jobs[1].tokens is prompt


def test_the_bytes_of_a_part_of_a_character_are_its_own(client):
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "x"}],
        logit_bias={str(0xE2): 1000},
        max_tokens=1,
        logprobs=True,
        top_logprobs=20,
    )
    (token,) = answer.choices[0].logprobs.content
    assert token.bytes == [0xE2]
    assert len(token.top_logprobs) == 20
    old = client.completions.create(
        model="demo",
        prompt="x",
        logit_bias={str(n): 100 for n in range(0xE2, 0xE5)},
        max_tokens=1,
        logprobs=3,
    )
    assert set(old.choices[0].logprobs.top_logprobs[0]) == {"bytes:\\xe2", "bytes:\\xe3", "bytes:\\xe4"}


def test_paths_and_bodies(server):
    body = json.dumps({"prompt": "def main(", "max_tokens": 4}).encode()
    chunked = ask(server, "/v1/completions", iter([body[:9], body[9:]]), Transfer_Encoding="chunked")
    assert (chunked[0], '"text":"self"' in chunked[2]) == (200, True)
    assert ask(server, "/v1/completions/?a=b", {"prompt": "x", "max_tokens": 1})[0] == 200
    assert ask(server, "/v1/models/", method="HEAD")[0] == 200
    assert ask(server, "/v1/models", method="PUT")[0] == 405
    status, _, said = ask(server, "/tokenize", {"content": "ab"})
    assert (status, json.loads(said)) == (200, {"tokens": [97, 98], "count": 2})
    described = json.loads(ask(server, "/openapi.json", method="GET")[2])
    assert described["openapi"] == "3.1.0"
    table = [line for line in (DOCS / "serving.md").read_text().splitlines() if line.startswith("| `/")]
    documented = [path for line in table for path in re.findall(r"`(/[\w/.]*)`", line.split("|")[1])]
    assert len(documented) > 5
    assert set(documented) <= set(described["paths"])
    stored = json.loads(ask(server, "/v1/responses", {"input": "x", "max_output_tokens": 1})[2])["id"]
    page = ask(server, "/docs", method="GET")[2]
    for path, entry in described["paths"].items():
        for method in entry:
            there = path.replace("{name}", "demo").replace("{response_id}", stored)
            assert ask(server, there, "{}", method.upper())[0] != 404
            assert f"<h2>{method.upper()} {path}</h2>" in page
    assert "max_completion_tokens<td>integer from 1 or null" in page
    assert not re.search("https?:|//|<script", page)  # nothing of the page comes from elsewhere
    # Nothing of the body is waited for where nothing answers.
    assert ask(server, "/nowhere", b"", Content_Length="1000")[0] == 404


def test_without_a_template_the_messages_are_the_text(client):
    """And a content of null is no word."""
    messages = [{"role": "system", "content": None}, {"role": "user", "content": "def "}]
    messages += [{"role": "assistant", "content": None}, {"role": "user", "content": "main("}]
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == "self, other)"
    assert answer.usage.prompt_tokens == len("def main(")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("😀", '"Hi é'), ("é😀", '"Hi '), (["x", "i é"], '"H'), ('"', ""), ("ü", '"Hi é😀"')]
)
def test_stop_strings_of_several_tokens_a_character(client, stream, stop, text):
    """The model can say this one text only, in bytes."""
    schema = {"name": "n", "schema": {"const": "Hi é😀"}}
    chunks = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "x"}],
        response_format={"type": "json_schema", "json_schema": schema},
        stop=stop,
        stream=stream,
    )
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    else:
        assert chunks.choices[0].message.content == text


def test_the_space_of_a_sentencepiece_token_stays_in_log_probabilities():
    words = ["\u2581Hello", "\u2581world", "s", "<0xC3>", "<0xA9>"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="s"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    infos = [TokenInfo(n, -1.0, [(n, -1.0)]) for n in range(5)]
    said = completion_logprobs(texts, infos)
    assert said["tokens"] == [" Hello", " world", "s", "bytes:\\xc3", "bytes:\\xa9"]
    assert list(said["top_logprobs"][1]) == [" world"]
    content = chat_logprobs(texts, infos)["content"]
    assert content[1]["token"] == " world"
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == " Hello worldsé"


def test_it_does_not_serve_once_a_rank(monkeypatch):
    """MPI would start one server for each of its processes, all on one address."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(PararnnError, match="not of MPI"):
        serve(DEMO, Settings())


def test_names_are_let_in_that_were_given(server):
    body = {"prompt": "x", "max_tokens": 1}
    status, headers, _ = ask(server, "/v1/completions", body, Origin=PAGE_ORIGIN)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE_ORIGIN)
    preflight = {"Origin": PAGE_ORIGIN, "Access_Control_Request_Method": "POST"}
    assert ask(server, "/v1/completions", method="OPTIONS", **preflight)[0] == 204
    status, headers, said = ask(server, "/v1/completions", body, Origin="tauri://localhost")
    assert (status, headers["Access-Control-Allow-Origin"]) == (403, None)
    assert "--allow-origin tauri://localhost" in said
    assert ask(server, "/v1/models", method="GET", Host="host.docker.internal:8080")[0] == 200
    status, _, said = ask(server, "/v1/models", method="GET", Host="other.internal")
    assert (status, "--allow-origin other.internal" in said) == (403, True)


@pytest.mark.large
def test_a_template_that_has_no_end_or_doubles_its_text_ends_alone(tmp_path):
    import mlx_pararnn

    model, _ = mlx_pararnn.load(DEMO)
    folder = folder_of(tmp_path / "endless", model, DEMO)
    (folder / "chat_template.jinja").write_text(ENDLESS + GROWING + TEMPLATE)
    with running(folder) as server:
        client = client_of(server)
        for asked, why in (("loop", "more than 5 seconds"), ("grow", "more than .* memory")):
            with pytest.raises(openai.BadRequestError, match=why):
                client.chat.completions.create(model="endless", messages=[{"role": "user", "content": asked}])
            said = client.chat.completions.create(
                model="endless", messages=[{"role": "user", "content": "x"}], max_tokens=3
            )
            assert said.usage.completion_tokens == 3


HANGING = """
import ctypes, threading
from mlx_pararnn import Model
call = Model.__call__
def hang(self, inputs, **kwargs):
    if 7 in inputs.tolist()[0]:
        ctypes.PyDLL(None).sleep(100)  # native code that does not give the interpreter back
    return call(self, inputs, **kwargs)
Model.__call__ = hang
"""


@pytest.mark.large
@pytest.mark.parametrize(("times", "seconds"), [(1, 5), (2, 3)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_whatever_native_code_does(tmp_path, monkeypatch, number, times, seconds):
    """In five seconds; at once where it is asked twice, which leaves room for a busy machine."""
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.chdir(tmp_path)
    with running(DEMO, "--import", "hanging") as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=1)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "\x07\x07", "max_tokens": 2}))
        with pytest.raises(TimeoutError):
            connection.getresponse()
        server.process.send_signal(number)
        for _ in range(times - 1):
            time.sleep(0.2)
            server.process.send_signal(number)
        server.process.wait(timeout=seconds)
        assert server.process.returncode == -signal.SIGKILL


def test_a_signal_as_it_begins_to_serve_ends_it_too():
    def ours(number, frame):
        raise AssertionError("the server has not taken the signal yet")

    before = signal.signal(signal.SIGTERM, ours)
    try:
        serve(DEMO, Settings(port=0), ready=lambda url: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_messages_as_anthropics_clients_send_them(server):
    body = {"model": "demo", "max_tokens": 12, "messages": [{"role": "user", "content": "def main("}]}
    status, _, said = ask(server, "/v1/messages", {**body, "stop_sequences": ["zz", "other"]}, x_api_key="-")
    answer = json.loads(said)
    assert (status, answer["content"]) == (200, [{"type": "text", "text": "self, "}])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "other")
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == 9
    status, headers, said = ask(server, "/v1/messages", {**body, "stream": True})
    assert headers["Content-Type"].startswith("text/event-stream")
    status, _, counted = ask(server, "/v1/messages/count_tokens", body)
    assert (status, json.loads(counted)) == (200, {"input_tokens": 9})
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == "self, other)"
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    thinking = {"type": "enabled", "budget_tokens": 9}
    for wrong, name in (({"thinking": thinking}, "thinking"), ({"tools": [{"name": "a"}]}, "tools")):
        status, _, said = ask(server, "/v1/messages", {**body, **wrong})
        assert (status, name in said) == (400, True)


def test_anthropics_own_client(server):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0, timeout=60)
    arguments = {"model": "demo", "max_tokens": 12, "messages": [{"role": "user", "content": "def main("}]}
    assert client.messages.create(**arguments).content[0].text == "self, other)"
    counted = client.messages.count_tokens(model="demo", messages=arguments["messages"])
    assert counted.input_tokens == 9
    with client.messages.stream(**arguments) as stream:
        assert "".join(stream.text_stream) == "self, other)"


def connect(server):
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=30)


@pytest.mark.large
def test_clients_that_do_not_read_leave_the_others_their_turn():
    body = json.dumps({"prompt": "x", "max_tokens": 10**5, "temperature": 1, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running(DEMO, "--max-tokens", 10**5) as server, contextlib.ExitStack() as stack:
        for _ in range(66):  # more than generate at a time
            stack.enter_context(connect(server)).sendall(head + body)
        status, _, said = ask(server, "/v1/completions", {"prompt": "def main(", "max_tokens": 12})
        assert (status, json.loads(said)["choices"][0]["finish_reason"]) == (200, "length")


@pytest.mark.large
def test_connections_that_ask_for_nothing_make_room(tmp_path, monkeypatch):
    code = "from mlx_pararnn.chat.server import listen\nlisten.MAX_CONNECTIONS = 20\n"
    (tmp_path / "narrow.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with running(DEMO, "--import", "narrow") as server, contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(connect(server)).sendall(b"GET / HT")
        assert ask(server, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
