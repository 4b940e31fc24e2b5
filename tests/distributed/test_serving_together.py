"""The server over several processes answers what one process answers, and all of them end together."""

import http.client
import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from queue import SimpleQueue
from unittest.mock import Mock
from urllib.parse import urlsplit

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Model, ModelArgs, generate, load
from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.chat.prompt_cache import SPACING, PromptCache
from mlx_pararnn.chat.server import Settings, listen, together
from mlx_pararnn.chat.server.batch import Batch
from mlx_pararnn.chat.server.engine import load_batch
from mlx_pararnn.chat.server.jobs import Job
from mlx_pararnn.chat.server.reading import read, score
from mlx_pararnn.chat.server.samplers import SeededSampler, shared_sampler
from mlx_pararnn.errors import LOST, PararnnError, is_lost
from mlx_pararnn.files.hub import BUNDLED
from mlx_pararnn.sharding import Whole
from tests.support.ranks import PATIENCE, ranks, said

MOST = 8000  # tokens that an answer may have: more than are made until somebody is noticed to be gone
PROMPTS = ["import ", "def f(x):"]
LONG = "# what a class is for\n" * 60  # read piece by piece before its row begins


@pytest.fixture(scope="module")
def model(converted):
    return str(converted("trained/paragru/final.pt", tokenizer="bytes"))


@pytest.fixture(scope="module")
def answers(model):
    """What one process says to a prompt: its likeliest tokens."""
    loaded, tokenizer = load(model)
    return lambda prompt, count: generate(loaded, tokenizer, prompt, max_tokens=count)


@contextmanager
def serving(folder, model, *options):
    """The server of two processes, and where it answers."""
    command = ["-m", "mlx_pararnn", "serve", model, "--port", "0", "--max-tokens", MOST, *options]
    with ranks(2, folder, *command) as processes:
        begin = time.monotonic()
        while not (found := re.search(r"Serving at (http://\S+)", said(folder, 0, "stderr"))):
            assert time.monotonic() - begin < PATIENCE
            assert all(process.poll() is None for process in processes), said(folder, 0, "stderr")
            time.sleep(0.05)
        yield processes, found[1]


def asked(url, prompt, **fields):
    """The response to a request, which is not read yet, and its connection."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    body = {"model": "default_model", "prompt": prompt, "temperature": 0, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse(), connection


def answer(url, prompt, count, **fields):
    """The text of an answer, streamed or not."""
    response, connection = asked(url, prompt, max_tokens=count, **fields)
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks or [json.loads(text)])


def gauge(url, name):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    return float(re.search(rf"^mlx_pararnn_{name} (\S+)", connection.getresponse().read().decode(), re.M)[1])


@pytest.mark.large
def test_it_answers_what_one_process_answers_and_ends_when_a_rank_was_killed(model, answers, tmp_path):
    with serving(tmp_path, model) as (processes, url):
        assert re.match(r"weights: \S+ MB in rank 0, \S+ MB in rank 1", said(tmp_path, 0, "stderr"))
        assert answer(url, "import ", 12) == answers("import ", 12)
        assert answer(url, "import ", 12, stream=True) == answers("import ", 12)  # from a stored state
        assert answer(url, LONG, 4) == answers(LONG, 4)
        scored = answer(url, LONG[:200], 3, echo=True, logprobs=1)
        assert scored == LONG[:200] + answers(LONG[:200], 3)
        with ThreadPoolExecutor(3) as threads:
            drawn = threads.submit(answer, url, "x = ", 9, temperature=1, seed=3, stop="e")
            both = [*threads.map(lambda prompt: answer(url, prompt, 10), PROMPTS)]
        assert both == [answers(prompt, 10) for prompt in PROMPTS]
        assert drawn.result() == answer(url, "x = ", 9, temperature=1, seed=3, stop="e")

        made = gauge(url, "generated_tokens_total")
        response, connection = asked(url, "class ", max_tokens=MOST, stream=True)
        response.readline()
        connection.close()
        response.close()
        begin = time.monotonic()
        while gauge(url, "requests_running"):
            assert time.monotonic() - begin < PATIENCE
        assert gauge(url, "generated_tokens_total") - made < MOST
        assert answer(url, "import ", 12) == answers("import ", 12)

        response, _ = asked(url, "class ", max_tokens=MOST, stream=True)
        response.readline()
        processes[1].send_signal(signal.SIGKILL)
        with suppress(
            http.client.IncompleteRead
        ):  # where MLX waits for ever nothing is told before the process ends
            assert "connection to another process was lost" in response.read().decode()
        assert processes[0].wait(20) == 1
    assert "error: the connection to another process was lost" in said(tmp_path, 0, "stderr")
    assert said(tmp_path, 1) == said(tmp_path, 1, "stderr") == ""


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ends_all(number, model, tmp_path):
    with serving(tmp_path, model) as (processes, _):
        for process in reversed(processes):
            process.send_signal(number)
        assert [process.wait(20) for process in processes] == [0, 0]
    assert said(tmp_path, 0, "stderr").endswith("Stopped.\n")


@pytest.mark.large
def test_an_idle_server_ends_when_another_rank_or_its_own_was_killed(model, tmp_path):
    for killed, other in ((1, 0), (0, 1)):
        folder = tmp_path / str(killed)
        folder.mkdir()
        with serving(folder, model) as (processes, _):
            processes[killed].send_signal(signal.SIGKILL)
            if not other:  # mlx.launch ends rank 0 as soon as it sees this, perhaps after its last word
                time.sleep(0.5)
                processes[other].send_signal(signal.SIGTERM)
            assert processes[other].wait(20) in (1, -signal.SIGTERM)
        assert "error: the connection to another process was lost" in said(folder, other, "stderr")


class Rank:
    """A group of which this process is one, and that says nothing."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def batch_of(group, prompts):
    """A batch in one of two processes; each has the whole of a small model, the same in all."""
    mx.random.seed(0)
    model = Model(ModelArgs(16, 1, 258, 16))
    model.snapshot_spacing = SPACING
    model.part = Whole()
    model.part.group = group
    return Batch(model, {257}, 2, prompts)


def job(tokens, sampler, **more):
    return Job(tokens, 100, None, sampler, **more)


def held(prompts):
    """The texts that are kept, and the states that have read them."""
    states = [np.array(array) for (layer,) in prompts._states.values() for array in layer.cache]
    return [*prompts._states], states


def test_the_others_do_what_rank_0_does(monkeypatch):
    """Every call of a batch, by threads of one process: rank 0 first, then the other by what was told."""
    told, sampled = SimpleQueue(), SimpleQueue()
    monkeypatch.setattr(together, "share", lambda group, value=None: told.put(json.dumps(value)))
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: sampled.put(np.array(x)) or x)
    prompts = PromptCache(), PromptCache()
    first = batch_of(Rank(0, 2), prompts[0])
    greedy, drawn = shared_sampler(0.0), SeededSampler(1, temp=1.0, top_p=1.0, top_k=0, min_p=0.0)
    long = job([n % 250 for n in range(1100)], greedy, system_length=300)
    short = job([5, 6, 7], drawn, processors=[lambda tokens, logits: logits])
    echoed = job([9] * 200, greedy, score_prompt=True, top_logprobs=0)
    for one in (long, short):
        first.find(one)
        for _ in read(one, first):
            pass
        first.insert(one)
    rows = [[(token.job, token.id) for token in first.step()] for _ in range(12)]
    assert {one for step in rows for one, _ in step} == {long, short}
    first.suspend(short)

    class Texts:
        last_segment = ""

        def add_token(self, token):
            pass

    for _ in score(echoed, first, Texts()):
        pass
    first.insert(echoed)
    first.insert(short)
    for _ in range(4):
        first.step()
    first.remove(long)
    first.forget(long)
    again = job(long.tokens[:700], greedy)
    first.find(again)
    assert again.read == 640
    first.insert(again)
    first.step()
    for one in first.jobs:
        first.remove(one)
    first.pause()
    first.end()
    first.pause()

    monkeypatch.setattr(together, "share", lambda group: json.loads(told.get_nowait()))
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: mx.array(sampled.get_nowait()))
    together.follow(batch_of(Rank(1, 2), prompts[1]), Rank(1, 2))
    assert told.empty()
    assert sampled.empty()
    (texts, states), (others_texts, others_states) = map(held, prompts)
    assert len(texts) > 4
    assert texts == others_texts
    assert all(map(np.array_equal, states, others_states))


class Noted(together.Led):
    """What was called, with what."""

    def __init__(self, group):
        super().__init__(group)
        self.calls = []

    @together.by_all
    def read(self, job, end, slowly=False):
        self.calls.append((job.tokens, end, slowly))


def test_the_others_are_told_all_arguments(monkeypatch):
    told = SimpleQueue()
    monkeypatch.setattr(together, "share", lambda group, value=None: told.put(json.dumps(value)))
    first, other = Noted(Rank(0, 2)), Noted(Rank(1, 2))
    one = job([1, 2], None)
    first.read(one, 1)
    first.read(one, end=2, slowly=True)
    first.end()
    monkeypatch.setattr(together, "share", lambda group: json.loads(told.get_nowait()))
    together.follow(other, Rank(1, 2))
    assert first.calls == other.calls == [([1, 2], 1, False), ([1, 2], 2, True)]


@pytest.mark.parametrize("error", [PararnnError(LOST), RuntimeError("[ring] Sending failed with errno 32")])
def test_nobody_goes_on_when_the_others_could_not_be_told(error, monkeypatch):
    """They may wait for what was said, so that a next call would be another than theirs."""
    assert is_lost(error)
    monkeypatch.setattr(together, "share", Mock(side_effect=error))
    first = Noted(Rank(0, 2))
    with pytest.raises(type(error)):
        first.read(job([1, 2], None), 1)
    assert first.failed
    assert not first.calls


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_divided_server_does_not_take_is_a_sentence(rank, image_folder, tmp_path, monkeypatch):
    group = Rank(rank, 2)
    for folder, words in ((BUNDLED, "uses tools"), (image_folder, "sees images")):
        with pytest.raises(PararnnError, match=f"{words}.* one process"):
            load_batch(folder, PromptCache(), None, None, group)
    monkeypatch.setattr(listen, "world", lambda: group)
    with pytest.raises(PararnnError, match="--prompt-cache-dir"):
        listen.serve(BUNDLED, Settings(prompt_cache_folder=tmp_path))


def test_all_evict_the_same_however_their_heads_are_divided():
    """Sizes are those of whole states."""
    kept = []
    for share in (Fraction(1, 3), Fraction(2, 3)):
        cache = PromptCache(max_bytes=900)
        cache.share = share
        for first in range(4):
            layer = RecurrentCache()
            layer.cache, layer.offsets = [mx.zeros((1, 1, int(60 * share))), None], [2]
            cache.insert_cache("", [first, 0], [layer])
        kept.append([*cache._states])
        assert cache.nbytes == 3 * (60 * 4 + 8)
    assert kept[0] == kept[1]
