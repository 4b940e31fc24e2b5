"""The fields that clients of OpenAI, llama.cpp and vLLM send, each with what it does to an answer."""

import concurrent.futures
import json
import socket
from urllib.parse import urlsplit

import mlx.core as mx
import openai
import pytest
from starlette.testclient import TestClient

from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.chat.prompt_cache import PromptCache
from mlx_pararnn.chat.server.endpoints import make_app
from mlx_pararnn.chat.server.engine import Engine
from mlx_pararnn.chat.server.metrics import Metrics
from mlx_pararnn.chat.server.server_settings import Settings
from mlx_pararnn.chat.server.service import Service
from tests.support.demo import DEMO
from tests.support.serving import KEY, MOST, calling_model, client_of, folder_of, request, running

SAID = {"model": "demo", "messages": [{"role": "user", "content": "def main("}]}


def chat(client, **fields):
    return client.chat.completions.create(**{**SAID, **fields})


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_how_long_an_answer_may_be(client, field):
    answer = chat(client, **{field: 5})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
    answer = chat(client, max_tokens=9, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3  # the newer name goes before the older


def test_stream_options(client):
    chunks = list(chat(client, max_tokens=4, stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    chunks = list(chat(client, max_tokens=4, stream=True, stream_options={"include_usage": False}))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_n_answers_of_a_chat(client):
    answer = chat(client, n=3, max_tokens=8, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 24)


def test_a_seed_is_kept_to_beside_other_requests(client):
    """The same answer alone and while seven others generate, with and without seeds of their own."""

    def ask(seed, temperature=1.0):
        fields = {} if seed is None else {"seed": seed}
        return chat(client, max_tokens=40, temperature=temperature, top_p=0.9, **fields)

    alone = ask(7).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        beside = list(pool.map(ask, [7, None, 1, 7, 2, None, 7, 3]))
    said = [answer.choices[0].message.content for answer in beside]
    assert said[0] == said[3] == said[6] == alone
    assert len(set(said)) > 3


def test_the_largest_and_the_smallest_nucleus(client):
    """`top_p` 1 is none at all; 0 is the likeliest token alone, as OpenAI and llama.cpp have it."""
    greedy = chat(client, max_tokens=20, temperature=0).choices[0].message.content
    for seed in (None, 1, 2):
        for top_p in (0, 1e-9):
            said = (
                chat(client, max_tokens=20, temperature=1, top_p=top_p, seed=seed).choices[0].message.content
            )
            assert said == greedy
    drawn = {
        chat(client, max_tokens=20, temperature=1, top_p=1, seed=n).choices[0].message.content
        for n in range(3)
    }
    assert len(drawn) == 3


def test_a_bias_and_stops(client):
    biased = chat(client, max_tokens=3, logit_bias={"65": 1000}).choices[0]
    assert biased.message.content == "AAA"
    assert chat(client, max_tokens=12, logit_bias={"44": -1000}).choices[0].message.content.count(",") == 0
    for stop in ("other", ["zz", "other"]):
        choice = chat(client, max_tokens=12, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("self, ", "stop")


def test_penalties_change_what_is_said(client):
    plain = chat(client, max_tokens=30).choices[0].message.content
    for field in ("presence_penalty", "frequency_penalty"):
        assert chat(client, max_tokens=30, **{field: 50}).choices[0].message.content != plain
    said = chat(client, max_tokens=30, extra_body={"repetition_penalty": 50.0}).choices[0].message.content
    assert said != plain
    body = {**SAID, "max_tokens": 20, "temperature": 1, "seed": 3}
    for fields in ({"top_k": 1}, {"min_p": 1.0}):
        said = chat(client, **{**body, "extra_body": fields}).choices[0].message.content
        assert said == plain[:20]


def test_a_penalty_that_nobody_asks_for_is_the_models_own(folder):
    """As its generation_config.json says; a request's own goes before it, and 0 and 1 are none."""
    engine = Engine(folder, PromptCache(), Metrics())
    engine.wait()

    def answers(penalty, *asked):
        settings = Settings(repetition_penalty=penalty)
        app = make_app(Service(engine, "demo", settings, Metrics()), settings, Metrics())
        with TestClient(app, base_url="http://127.0.0.1:8080") as client:
            (entry,) = client.get("/v1/models").json()["data"]
            assert entry["repetition_penalty"] == penalty
            bodies = [{"prompt": "def main(", "max_tokens": 30, **fields} for fields in asked]
            said = [client.post("/v1/completions", json=body).json() for body in bodies]
        return [answer["choices"][0]["text"] for answer in said]

    try:
        plain, asked = answers(1.0, {}, {"repetition_penalty": 50})
        own, off, zero = answers(50.0, {}, {"repetition_penalty": 1}, {"repetition_penalty": 0})
    finally:
        engine.stop()
        engine.thread.join(60)
    assert own == asked != plain == off == zero


def test_parts_of_content_and_the_developers_role(guarded):
    """As one text, and as the system's: the template writes [role's first letter]content~."""
    client = client_of(guarded, KEY)
    parts = [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]
    told = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    fields = {"model": "templated", "max_tokens": 8}
    first = client.chat.completions.create(messages=[told, {"role": "user", "content": parts}], **fields)
    assert first.usage.prompt_tokens == len("[s]Be kind.~[u]import os~[a]")
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "import os"}]
    second = client.chat.completions.create(messages=plain, **fields)
    assert second.choices[0].message.content == first.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1


def test_what_was_read_before_is_counted(client):
    prompt = "class Counted:\n    def __init__(self):\n" * 3
    fields = {"model": "demo", "prompt": prompt, "max_tokens": 4}
    first, second = (client.completions.create(**fields).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1 == len(prompt) - 1
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "x", "grammar": "root ::= x"}, "grammar"),
        ("/v1/completions", {"prompt": "x", "guided_json": {"type": "object"}}, "guided_json"),
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("/v1/chat/completions", {"audio": {"voice": "a"}}, "audio"),
        ("/v1/chat/completions", {"prediction": {"type": "content"}}, "prediction"),
        ("/v1/chat/completions", {"web_search_options": {"a": 1}}, "web_search_options"),
        ("/v1/messages", {"max_tokens": 4, "mcp_servers": ["x"]}, "mcp_servers"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(server, path, fields, named):
    body = {**fields, **({} if "prompt" in fields else {"messages": SAID["messages"]})}
    status, _, said = request(server, "POST", path, body)
    assert (status, json.loads(said)["error"]["message"].startswith(named)) == (400, True), said


def test_a_target_that_names_the_host_too(server, guarded):
    """As programs behind a proxy ask: its name counts, whatever the Host header says (RFC 9112, 3.2.2)."""
    address = urlsplit(server.url).netloc

    def ask(target, host, url=server.url):
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=30) as connection:
            head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode())
            return int(connection.makefile("rb").readline().split()[1])

    for target in (f"http://{address}/v1/models", f"HTTP://{address}/v1/models/?a=b", f"http://{address}"):
        assert ask(target, address) == 200
        assert ask(target, "evil.example") == 200
    assert ask(f"http://{address}/nowhere", address) == 404
    assert ask("http://evil.example/v1/models", address) == 403
    assert ask("http:///v1/models", address) == 403
    assert ask(f"http://{urlsplit(guarded.url).netloc}/v1/models", address, guarded.url) == 401


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    with running(calling_model(tmp_path_factory.mktemp("caller") / "caller")) as server:
        yield client_of(server)


def function(name):
    argument = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "parameters": argument}}


def call_tools(client, **fields):
    return client.chat.completions.create(
        model="caller",
        messages=[{"role": "user", "content": "x"}],
        tools=[function("one"), function("two")],
        **fields,
    ).choices[0]


def test_a_call_that_is_required_or_named(caller):
    for choice, names in (
        ("required", {"one", "two"}),
        ({"type": "function", "function": {"name": "two"}}, {"two"}),
    ):
        answer = call_tools(caller, tool_choice=choice, max_tokens=100)
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls"
        assert call.function.name in names
        assert json.loads(call.function.arguments)["a"] in (1, 2)  # held to the schema
    assert not call_tools(caller, tool_choice="none", max_tokens=20).message.tool_calls
    with pytest.raises(openai.BadRequestError, match="tool_choice names 'three'"):
        call_tools(caller, tool_choice={"type": "function", "function": {"name": "three"}})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_in_an_answer(caller, parallel, stream):
    """The model calls one function after the other; without parallel calls the first is all that is told."""
    fields = {"logit_bias": {"256": 1000}, "max_tokens": 200, "parallel_tool_calls": parallel}
    if stream:
        chunks = list(
            caller.chat.completions.create(
                model="caller", messages=[{"role": "user", "content": "x"}],
                tools=[function("one"), function("two")], stream=True, **fields,
            )
        )  # fmt: skip
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [call.index for call in calls] == list(range(len(calls)))
    else:
        calls = call_tools(caller, **fields).message.tool_calls
    assert len({call.id for call in calls}) == len(calls)
    assert all(json.loads(call.function.arguments)["a"] in (1, 2) for call in calls)
    assert len(calls) > 2 if parallel else len(calls) == 1


def test_a_limit_of_the_server_goes_before_a_requests(client):
    assert chat(client, max_tokens=10**6).usage.completion_tokens == MOST


LOGPROBS = [
    ("/v1/completions", {"prompt": "x", "logprobs": 5}),
    ("/v1/chat/completions", {"messages": SAID["messages"], "logprobs": True, "top_logprobs": 5}),
    ("/v1/responses", {"input": "x", "top_logprobs": 5}),
]


def only_json(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def numbers(value):
    """All that is called a log probability in an answer."""
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    if not isinstance(value, dict):
        return []
    if "token_logprobs" in value:
        tops = [top.values() for top in value["top_logprobs"] if top is not None]
        return [n for numbers in (value["token_logprobs"], *tops) for n in numbers if n is not None]
    own = [value["logprob"]] if "logprob" in value else []
    return own + [n for v in value.values() for n in numbers(v)]


def told(server, path, body):
    """Status and objects of an answer, whole or in events, each of them JSON."""
    status, _, said = request(server, "POST", path, {"max_tokens": 3, **body})
    if not body.get("stream") or status != 200:
        return status, [only_json(said)]
    lines = [line[6:] for line in said.decode().splitlines() if line.startswith("data: ")]
    return status, [only_json(line) for line in lines if line != "[DONE]"]


def format_of(path, kind):
    return (
        {"text": {"format": {"type": kind}}}
        if path == "/v1/responses"
        else {"response_format": {"type": kind}}
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), LOGPROBS)
def test_tokens_that_cannot_follow_have_a_log_probability_that_is_json(server, path, body, stream):
    """-9999 as OpenAI has it: JSON has no infinity."""
    status, said = told(server, path, {**body, **format_of(path, "json_object"), "stream": stream})
    found = numbers(said)
    assert (status, min(found)) == (200, -9999.0)
    assert max(found) <= 0
    for bias in (1e9, -1e9):
        status, said = told(server, path, {**body, "logit_bias": {"65": bias}, "stream": stream})
        assert (status, bool(numbers(said))) == (200, True)


@pytest.mark.large
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), LOGPROBS)
def test_biases_and_penalties_that_float16_does_not_hold(half, path, body, stream):
    status, said = told(half, path, {**body, "logit_bias": {"65": 1e9}, "stream": stream})
    assert (status, "AAA" in json.dumps(said) or json.dumps(said).count('"A"') > 2) == (200, True)
    assert numbers(said)
    for fields in ({"logit_bias": {"65": -1e9}}, {"repetition_penalty": 1e9}, {"presence_penalty": -1e9}):
        status, said = told(half, path, {**body, **fields, "stream": stream})
        assert (status, bool(numbers(said))) == (200, True)


@pytest.fixture(scope="module")
def half():
    """A server of a model in float16."""
    with running(DEMO) as server:
        yield server


@pytest.mark.large
@pytest.mark.parametrize(("scale", "dtype"), [(mx.nan, mx.float32), (60_000, mx.float16)])
def test_weights_that_make_no_numbers_end_the_answer_in_a_sentence(tmp_path, scale, dtype):
    """NaN among them, or logits that float16 does not hold; without log probabilities tokens are given."""
    model = Model(ModelArgs(16, 1, 256, 16))
    model.model.norm.weight = model.model.norm.weight * scale
    model.lm_head.weight = model.lm_head.weight * 30
    model.set_dtype(dtype)
    with running(folder_of(tmp_path / "broken", model)) as server:
        for path, body in [*LOGPROBS, ("/v1/completions", {"prompt": "xyz", "logprobs": 2, "echo": True})]:
            for stream in (False, True):
                status, said = told(server, path, {**body, "stream": stream})
                assert status == (200 if stream and path == "/v1/responses" else 500)
                assert "no log probabilities (NaN)" in said[-1]["error"]["message"]
        assert told(server, "/v1/completions", {"prompt": "x"})[0] == 200
        code, last = server.stop()
    assert (code, "Traceback" in last) == (0, False)


def test_what_an_answer_repeats_of_a_request_is_json(server):
    """/v1/responses tells its fields again: NaN, which Python reads and writes, is refused."""
    for value in (b"NaN", b"-Infinity", b"1e999"):
        for field in (b'"reasoning": {"effort": %s}', b'"text": {"a": %s}', b'"tools": [{"a": %s}]'):
            body = b'{"input": "x", ' + field % value + b"}"
            status, _, said = request(server, "POST", "/v1/responses", body)
            message = only_json(said)["error"]["message"]
            assert (status, f"{value.decode()} is no number of JSON's" in message) == (400, True), message
