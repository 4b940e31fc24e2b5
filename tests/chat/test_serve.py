"""The server, from outside: the command in its own process, OpenAI's own Python client, and raw requests."""

import asyncio
import concurrent.futures
import json
import socket
import threading
import time

import mlx.core as mx
import openai
import pytest

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.chat.server import listen
from mlx_pararnn.chat.server.server_settings import Settings
from tests.support.demo import DEMO
from tests.support.greedy_tokens import greedy, same_until_a_near_tie
from tests.support.serving import KEY, client_of, folder_of, request, running

PROMPTS = [f"def f{n}(self, value):\n    return {n}\n\nclass C{n * 'x'}" for n in range(16)]
SPACING = 64  # as docs/serving.md has it


@pytest.fixture(scope="module")
def demo(folder):
    return mlx_pararnn.load(folder)


def is_the_greedy_text(demo, prompt, text, n):
    """As long as wanted, and what the model says when it is asked alone but for near ties."""
    model, tokenizer = demo
    ids = tokenizer.encode(prompt)
    alone = greedy(model, ids, n)
    given = tokenizer.encode(text)
    return len(given) == n and same_until_a_near_tie(model, ids, alone, given)


def test_completions(client, demo):
    answer = client.completions.create(model="demo", prompt="def main(", max_tokens=12)
    choice = answer.choices[0]
    assert choice.text == "self, other)"
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 12)
    assert [m.id for m in client.models.list()] == ["demo"]
    model = client.models.retrieve("demo")
    assert (model.state_bytes, model.has_chat_template) == (6144, False)


def test_no_packet_waits_for_the_clients_word_on_the_one_before():
    """Which takes a client 40 ms, once for each answer on a connection that stays."""

    async def sends_at_once():
        loop, transports = asyncio.get_running_loop(), asyncio.Queue()

        class Noting(asyncio.Protocol):
            def connection_made(self, transport):
                transports.put_nowait(transport)

        with listen._listening(Settings(host="127.0.0.1", port=0)) as listener:
            await loop.create_server(Noting, sock=listener)
            await asyncio.open_connection(*listener.getsockname())
            connection = (await transports.get()).get_extra_info("socket")
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(sends_at_once())


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


def test_requests_and_other_names_are_logged_without_a_terminal_too(server, client):
    client.completions.create(model="gpt-4", prompt="a secret", max_tokens=1)
    server.wait_for(r"(?m)^asked for the model 'gpt-4'; 'demo', the only one here, answers$", seconds=10)
    server.wait_for(r"(?m)^POST /v1/completions: 200 in \d+\.\d\d s$", seconds=10)
    request(server, "GET", "/lines%0aof%1b[1mothers")
    server.wait_for(r"(?m)^GET /lines%0Aof%1B%5B1mothers: 404 in ", seconds=10)
    assert "secret" not in server.said


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
    given = {"model": "demo", "prompt": "import ", "max_tokens": 5}
    cold = {
        client.completions.create(**given, temperature=temp, seed=seed).choices[0].text
        for temp in (0, 1e-30, 1e-45)
        for seed in (1, None)
    }
    assert len(cold) == 1


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
    # other tests ask this server too, and none of them begins like this
    story = "\n".join(f"def function_{n}(self):\n    return self.value_{n}\n" for n in (*"xyz", *range(9)))
    story = f"class Story:\n{story}"

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
