"""The fields that clients of OpenAI, llama.cpp and vLLM send, each with what it does to an answer."""

import concurrent.futures
import json
import socket
from urllib.parse import urlsplit

import pytest

from tests.support.serving import KEY, MOST, client_of, request

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


def test_a_limit_of_the_server_goes_before_a_requests(client):
    assert chat(client, max_tokens=10**6).usage.completion_tokens == MOST
