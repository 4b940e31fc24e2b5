"""The server, from outside: the command in its own process, OpenAI's own Python client, and raw requests."""

import base64
import concurrent.futures
import http.client
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from urllib.parse import urlsplit

import mlx.core as mx
import openai
import pytest

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs, PararnnError
from mlx_pararnn.chat.server import Settings, serve
from mlx_pararnn.chat.server.access import MAX_BODY
from tests.support.demo import DEMO
from tests.support.generation import greedy, same_until_a_near_tie
from tests.support.serving import COMMAND, MOST, TEMPLATE, client_of, folder_of, running

PROMPTS = [f"def f{n}(self, value):\n    return {n}\n\nclass C{n * 'x'}" for n in range(16)]
KEY = "a-key-of-ours"
SPACING = 64  # as docs/serving.md has it


@pytest.fixture(scope="module")
def demo(folder):
    return mlx_pararnn.load(folder)


def is_the_greedy_text(demo, prompt, text, n):
    """As long as wanted, and what the model says when it is asked alone (in DESIGN's sense)."""
    model, tokenizer = demo
    ids = tokenizer.encode(prompt)
    alone = greedy(model, ids, n)
    given = tokenizer.encode(text)
    return len(given) == n and same_until_a_near_tie(model, ids, alone, given)


def request(server, method, path, body=None, **headers):
    """Status, headers and body of a request with nothing added to it."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, headers)
    response = connection.getresponse()
    try:
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_completions(client, demo):
    answer = client.completions.create(model="demo", prompt="def main(", max_tokens=12)
    choice = answer.choices[0]
    assert choice.text == "self, other)"
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 12)
    assert [m.id for m in client.models.list()] == ["demo"]
    model = client.models.retrieve("demo")
    assert (model.state_bytes, model.has_chat_template) == (6144, False)


def test_stream(client):
    chunks = list(
        client.completions.create(
            model="default_model",
            prompt="def main(",
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "self, other)"
    assert len(chunks) > 8
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [("f, ", "sel"), (["zz", "other"], "self, "), ("se", ""), ("never", "self, other)")],
)
def test_stop_strings(client, stream, stop, text):
    given = client.completions.create(
        model="demo", prompt="def main(", max_tokens=12, stop=stop, stream=stream
    )
    if stream:
        chunks = list(given)
        assert "".join(c.choices[0].text for c in chunks) == text
        finish_reason = chunks[-1].choices[0].finish_reason
    else:
        assert given.choices[0].text == text
        finish_reason = given.choices[0].finish_reason
    assert finish_reason == ("length" if stop == "never" else "stop")


def test_log_probabilities(client, demo):
    model, tokenizer = demo
    ids = tokenizer.encode("def main(")
    answer = client.completions.create(model="demo", prompt="def main(", max_tokens=6, logprobs=3)
    given = answer.choices[0].logprobs
    assert "".join(given.tokens) == answer.choices[0].text == "self, "
    for n, token in enumerate(given.tokens):
        logits = model(mx.array([ids + tokenizer.encode("self, ")[:n]]))[0, -1].astype(mx.float32)
        expected = logits - mx.logsumexp(logits)
        assert given.token_logprobs[n] == pytest.approx(expected[ord(token)].item(), abs=1e-4)
        best = list(given.top_logprobs[n].values())
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert given.top_logprobs[n][token] == given.token_logprobs[n]  # greedy: it is the likeliest

    arguments = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    whole = client.chat.completions.create(model="demo", logprobs=True, top_logprobs=2, **arguments)
    content = whole.choices[0].logprobs.content
    assert "".join(c.token for c in content) == whole.choices[0].message.content
    assert [len(c.top_logprobs) for c in content] == [2] * 5
    assert content[0].bytes == list(content[0].token.encode())
    chunks = list(client.chat.completions.create(model="demo", logprobs=True, stream=True, **arguments))
    streamed = [c for chunk in chunks if chunk.choices[0].logprobs for c in chunk.choices[0].logprobs.content]
    assert [(c.token, c.logprob) for c in streamed] == [(c.token, c.logprob) for c in content]
    plain = client.chat.completions.create(model="demo", **arguments)
    assert plain.choices[0].logprobs is None


def test_sampling_and_seed(client):
    def sample(seed):
        return client.completions.create(
            model="demo",
            prompt="import ",
            max_tokens=20,
            temperature=1.0,
            top_p=0.95,
            seed=seed,
            extra_body={"top_k": 1000, "min_p": 0.01},
        ).choices[0]

    assert sample(1).text == sample(1).text
    assert sample(1).text != sample(2).text


@pytest.mark.large
def test_sixteen_clients_at_once_one_leaving(server, demo):
    """All at the same moment, half of them streaming; each gets what it would get alone."""
    barrier = threading.Barrier(16)

    def ask(n):
        client = client_of(server)
        barrier.wait()
        arguments = {"model": "demo", "prompt": PROMPTS[n], "max_tokens": 24 + n}
        if n == 5:
            with client.completions.create(**{**arguments, "max_tokens": 4000}, stream=True) as stream:
                return [chunk for chunk, _ in zip(stream, range(3), strict=False)]
        answer = client.completions.create(**arguments, stream=n % 2 == 0)
        return "".join(c.choices[0].text for c in (answer if n % 2 == 0 else [answer]))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(16)))
    for n, text in enumerate(texts):
        if n != 5:
            assert is_the_greedy_text(demo, PROMPTS[n], text, 24 + n), n


def count(server, name):
    """A counter of /metrics."""
    text = request(server, "GET", "/metrics")[2].decode()
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"mlx_pararnn_{name}")
    )


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.large
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_generated_for(stream):
    with running(DEMO, "--max-tokens", 10**6) as server:
        client = client_of(server)
        arguments = {"model": "demo", "prompt": "x", "max_tokens": 10**6, "temperature": 1}
        if stream:
            with client.completions.create(**arguments, stream=True) as chunks:
                for _ in zip(chunks, range(3), strict=False):
                    pass
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**arguments, timeout=1)
        until(lambda: count(server, "requests_running") == 0)
        assert 3 <= count(server, "generated_tokens_total") < 10**5
        answer = client.completions.create(model="demo", prompt="def main(", max_tokens=4)
        assert answer.choices[0].text == "self"


def test_an_edited_conversation_is_read_again_from_the_edit(client, demo):
    """Appended to, asked again, and edited in the middle: the same text as read anew, little of it read."""
    story = "".join(f"def function_{n}(self):\n    return self.value_{n}\n\n" for n in range(12))

    def ask(prompt):
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=20)
        assert is_the_greedy_text(demo, prompt, answer.choices[0].text, 20)
        return answer.choices[0].text, len(prompt) - answer.usage.prompt_tokens_details.cached_tokens

    text, read = ask(story)
    assert read == len(story) > 500
    assert ask(story) == (text, 1)
    longer = story + text + "\n\nclass "
    _, read = ask(longer)
    assert read == 8
    # All of this and nothing more was read before: MLX-LM's own cache leaves nothing to generate from.
    assert 1 <= ask(story + text)[1] <= SPACING
    for place in (540, 400, 100):
        edited = story[:place] + "#" + story[place + 1 :]
        _, read = ask(edited)
        after = len(longer) + 20 - place
        assert len(edited) - place <= read < len(edited) - place + max(SPACING, 2 * after / 3)


@pytest.fixture(scope="module")
def guarded(folder, tmp_path_factory):
    """A server with a template and a key, open to other machines."""
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("guarded") / "templated")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running(folder, "-m", 30, "--host", "0.0.0.0", "--api-key", KEY) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


def test_chat_with_a_template(guarded, demo):
    client = client_of(guarded, KEY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import os"}]

    def ask(**kwargs):
        answer = client.chat.completions.create(model="templated", messages=messages, **kwargs)
        rendered = "".join(f"[{m['role'][0]}]{m['content']}~" for m in messages) + "[a]"
        assert answer.usage.prompt_tokens == len(rendered)
        assert is_the_greedy_text(demo, rendered, answer.choices[0].message.content, 30)
        return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens

    first, cached = ask(max_tokens=1000)  # more than -m allows
    assert cached == 0
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and more"},
    ]
    ask()
    assert ask()[1] > 60
    messages[-1]["content"] = "or less"
    assert ask()[1] > 40
    messages[1]["content"] = "import sys"
    assert ask()[1] >= len("[s]Be brief.~")  # the system prompt is kept apart


def word_tokenizer(path, words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "eos_token": "<end>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_tools(tmp_path):
    """A model that says one word after the other, and so calls a tool."""
    words = ["?", "[a]", "<tool_call>", '{"name": "add", "arguments": {"a": 1}}', "</tool_call>", "<end>"]
    model = Model(ModelArgs(8, 1, 8, 8, mlp_residual=True))
    zeros = {name: mx.zeros_like(w) for name, w in dict(mlx_flatten(model.parameters())).items()}
    zeros["model.embed_tokens.weight"] = mx.eye(8)
    zeros["model.norm.weight"] = mx.ones(8)
    zeros["lm_head.weight"] = 100 * mx.eye(8, k=-1)  # after word n comes word n + 1
    model.load_weights(list(zeros.items()))
    folder = folder_of(tmp_path / "caller", model, word_tokenizer(tmp_path / "words", words), eos_token_id=5)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}|{% for tool_call in m.tool_calls or [] %}<tool_call>|"
        "{{ tool_call.name }}|</tool_call>|{% endfor %}{% endfor %}{% if tools %}tools|{% endif %}[a]"
    )
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    arguments = {"model": "caller", "messages": [{"role": "user", "content": "1 + 1"}], "tools": tools}
    with running(folder) as server:
        client = client_of(server)
        choice = client.chat.completions.create(**arguments).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        (call,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        assert (call.function.name, call.index) == ("add", 0)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def mlx_flatten(parameters):
    from mlx.utils import tree_flatten

    return tree_flatten(parameters)


@pytest.mark.large
def test_learned_positions_end_an_answer_and_not_the_server(tmp_path):
    model = Model(ModelArgs(16, 1, 256, 16, max_position_embeddings=64))
    with running(folder_of(tmp_path / "short", model)) as server:
        client = client_of(server)
        answer = client.completions.create(model="short", prompt="x" * 50, max_tokens=100)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (14, "length")
        with pytest.raises(openai.BadRequestError, match="takes 70 of the model's 64 learned positions"):
            client.completions.create(model="short", prompt="x" * 70)
        assert client.completions.create(model="short", prompt="x", max_tokens=3).usage.completion_tokens == 3


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
    (TEXT, {"prompt": "x", "logit_bias": {"256": 1}}, 400, "logit_bias names token '256'"),
    (TEXT, {"prompt": "x", "logit_bias": {"-1": 1}}, 400, "logit_bias names token '-1'"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": 1e999}}, 400, "logit_bias of 1"),
    (TEXT, {"prompt": "x", "xtc_probability": 0.5, "xtc_threshold": 0.9}, 400, "xtc_threshold"),
    (TEXT, {"prompt": "x", "repetition_context_size": 10**30}, 400, "repetition_context_size is out of"),
    (TEXT, {"prompt": "x", "repetition_penalty": 10**400}, 400, "repetition_penalty is out of range"),
    (TEXT, {"prompt": "x", "temperature": float("nan")}, 400, "temperature is out of range"),
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
    ("start", "answer"),
    [
        (b"GET /", b""),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: ", b""),
        (
            b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"',
            b"HTTP/1.1 408",
        ),
    ],
)
def test_a_request_that_trickles_in_is_given_up(hurried, start, answer):
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
        try:
            said = connection.recv(65536)
        except ConnectionError:
            said = b""
    assert said[: len(b"HTTP/1.1 408")] == answer
    assert request(hurried, "POST", TEXT, {"prompt": "x", "max_tokens": 2})[0] == 200


@pytest.fixture(scope="module")
def hurried(tmp_path_factory):
    """A server that gives a request three seconds to arrive."""
    folder = tmp_path_factory.mktemp("hurried")
    (folder / "hurried.py").write_text(
        "from mlx_pararnn.chat.server import app, listen\n"
        "listen.TIMEOUT = app.SECONDS_TO_ARRIVE = 3\n"
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
