"""What a program may do around a model: threads, asyncio, processes, collecting, deleting, interrupting."""

import asyncio
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_pararnn
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.generation import generate, stream_generate
from mlx_pararnn.loading import load
from tests.support.demo import DEMO
from tests.support.golden import golden_file

PROMPTS = ["def main(", "import ", "class Reader:", "x = "]
TOKENS = 12


@pytest.fixture(scope="module")
def demo():
    return load(DEMO)


@pytest.fixture(scope="module")
def texts(demo):
    """What the model says alone."""
    return [generate(*demo, prompt, max_tokens=TOKENS) for prompt in PROMPTS]


def test_threads_share_a_model(demo, texts):
    said, errors = {}, []

    def say(number):
        try:
            for _ in range(2):
                said[number] = generate(*demo, PROMPTS[number], max_tokens=TOKENS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=say, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert errors == []
    assert [said[number] for number in range(4)] == texts


def test_tasks_of_asyncio_share_a_model_and_the_loop_goes_on(demo, texts):
    async def main():
        turns = 0

        async def turn():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        turning = asyncio.create_task(turn())
        asked = [asyncio.to_thread(generate, *demo, prompt, max_tokens=TOKENS) for prompt in PROMPTS]
        said = await asyncio.gather(*asked)
        turning.cancel()
        return said, turns

    said, turns = asyncio.run(main())
    assert said == texts
    assert turns > 2


def work(prompt):
    return generate(*load(DEMO_FOLDER), prompt, max_tokens=TOKENS)


DEMO_FOLDER = os.environ.get("TESTED_MODEL", str(DEMO))


@pytest.mark.large
def test_processes_that_are_spawned(texts, monkeypatch):
    monkeypatch.setenv(
        "TESTED_MODEL", str(DEMO)
    )  # each process that imports the tests makes a DEMO of its own
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map_async(work, PROMPTS[:2]).get(timeout=300) == texts[:2]


FORKED = """
import os, sys
import mlx_pararnn
from mlx_pararnn import generate, load
import mlx.core as mx

when, folder = sys.argv[1:]
pair = load(folder) if when == "after" else None
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    print(generate(*(pair or load(folder)), "def main(", max_tokens=12), flush=True)
    code = 0
except mlx_pararnn.PararnnError as error:
    print(error, flush=True)
    code = 3
if pair is not None:
    try:
        load(folder)
    except mlx_pararnn.PararnnError:
        code += 1
os._exit(code)
"""


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("when", ["after", "before"])
def test_a_process_that_is_forked(when, texts):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, when, DEMO], capture_output=True, text=True, timeout=120
    )
    said, code = {
        "before": (texts[0], 0),
        "after": (
            "this process was forked after MLX was used, and has none of its threads; start it with "
            'multiprocessing.get_context("spawn"), or fork before a model is loaded',
            4,
        ),
    }[when]
    assert (done.stdout, done.returncode) == (f"{said}\n", code), done.stderr


@pytest.mark.large
def test_collecting_during_tokens(demo, texts):
    def collecting(logprobs):
        gc.collect()
        return mx.argmax(logprobs, axis=-1)

    stopped = threading.Event()

    def collect():
        while not stopped.is_set():
            gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        assert generate(*demo, PROMPTS[0], max_tokens=TOKENS, sampler=collecting) == texts[0]
    finally:
        stopped.set()
        thread.join()


def test_a_model_deleted_in_mid_stream(texts):
    model, tokenizer = load(DEMO)
    stream = stream_generate(model, tokenizer, PROMPTS[0], max_tokens=TOKENS)
    said = [response.text for response in islice(stream, 3)]
    del model, tokenizer
    gc.collect()
    assert "".join([*said, *(response.text for response in stream)]) == texts[0]


def test_a_stream_deleted_in_the_middle(demo, texts):
    for number in range(4):
        stream = stream_generate(*demo, PROMPTS[number], max_tokens=TOKENS)
        next(stream)
        del stream
        assert generate(*demo, PROMPTS[number], max_tokens=TOKENS) == texts[number]


OURS = (str(Path(mlx_pararnn.__file__).parent), str(Path(mlx_pararnn.__file__).parents[1]))


class At:
    """Runs functions with a KeyboardInterrupt at one of the lines of this package that they go through."""

    def __init__(self, line=None):
        self.lines, self.line = 0, line

    def __call__(self, function):
        """Whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _called(self, frame, event, argument):
        return self._traced if frame.f_code.co_filename.startswith(OURS) else None

    def _traced(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                raise KeyboardInterrupt
        return self._traced


def moments(function, count):
    """So many different lines, spread at random over all that `function` goes through."""
    whole = At()
    assert not whole(function)
    assert whole.lines > count
    return random.Random(0).sample(range(1, whole.lines), count)


def state_of(model, text):
    cache = model.make_cache()
    mx.eval(model(mx.array([list(text)]), cache=cache))
    return cache


@pytest.mark.large
def test_an_interrupt_anywhere_leaves_a_conversation_as_it_was(demo):
    model, tokenizer = demo

    def begun():
        conversation = Chat(model, tokenizer)
        list(conversation.respond("def main(", max_tokens=2))
        return conversation

    def go_on(conversation):
        list(conversation.respond("x, y", max_tokens=3))

    whole = begun()
    go_on(whole)
    first = begun()
    counted = begun()
    for line in moments(lambda: go_on(counted), 150):
        conversation = begun()
        interrupted = At(line)(lambda c=conversation: go_on(c))
        like = first if interrupted else whole
        assert conversation.messages == like.messages, line
        assert conversation.undoable == like.undoable
        for mine, theirs in zip(conversation.cache, like.cache, strict=True):
            assert mine.offset == theirs.offset
            assert all(mx.array_equal(a, b) for a, b in zip(mine.cache, theirs.cache, strict=True))


@pytest.mark.large
def test_an_interrupt_anywhere_leaves_a_model_as_it_was(demo, texts):
    def say():
        return generate(*demo, PROMPTS[0], max_tokens=TOKENS)

    for line in moments(say, 100):
        assert At(line)(say)
    assert say() == texts[0]


@pytest.mark.large
def test_an_interrupt_anywhere_in_loading(texts):
    for line in moments(lambda: load(DEMO), 50):
        assert At(line)(lambda: load(DEMO))
    assert generate(*load(DEMO), PROMPTS[0], max_tokens=TOKENS) == texts[0]


@pytest.mark.large
def test_an_interrupt_anywhere_in_a_conversion_leaves_no_part_of_it(tmp_path):
    checkpoint = golden_file("lm/paragru_s64/state_dict.pt")
    out = tmp_path / "out"

    def contents():
        return {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None

    def write():
        convert_to_mlx(checkpoint, out, tokenizer="bytes", force=True)

    lines = moments(write, 150)
    whole = contents()
    for line in lines:
        for path in out.glob("*"):
            path.unlink()
        out.rmdir()
        At(line)(write)
        assert contents() in (None, whole), line
        write()
        assert contents() == whole
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
