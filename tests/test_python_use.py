"""What a program may do around a model: threads, asyncio, processes, collecting, deleting, interrupting."""

import asyncio
import gc
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

import mlx_pararnn
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.convert.to_coreai import convert_to_coreai
from mlx_pararnn.convert.to_coreml import convert_to_coreml
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.generation import generate, stream_generate
from mlx_pararnn.loading import load
from mlx_pararnn.training import checkpoints, run
from mlx_pararnn.training.reporting import read_log
from mlx_pararnn.training.settings import Plan, Settings
from tests.support.coreml.exports import small_model
from tests.support.demo import DEMO
from tests.support.golden import golden_file
from tests.support.serving import TEMPLATE
from tests.support.training_runs import SMALL, TEXT, losses

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


OURS = (str(Path(mlx_pararnn.__file__).parents[1]), str(Path(mlx_lm.__file__).parent))


# Python loses an exception in a generator that is being closed, and says so.
LOST = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LAST = 40  # lines, each of which is interrupted


class At:
    """Runs functions with a KeyboardInterrupt at one of the lines of this package and of MLX-LM."""

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


def moments(function, count, last=LAST):
    """So many different lines at random among all that `function` goes through, and its last."""
    whole = At()
    assert not whole(function)
    some = random.Random(0).sample(range(1, whole.lines), min(count, whole.lines - 1))
    return [*some, *range(max(1, whole.lines - last), whole.lines)]


def state_of(model, text):
    cache = model.make_cache()
    mx.eval(model(mx.array([list(text)]), cache=cache))
    return cache


ACTS = {
    "respond": lambda chat, folder: list(chat.respond("x, y", max_tokens=3)),
    "regenerate": lambda chat, folder: list(chat.regenerate(max_tokens=3)),
    "undo": lambda chat, folder: chat.undo(),
    "reset": lambda chat, folder: chat.reset(),
    "set_system": lambda chat, folder: chat.set_system("Be brief."),
    "load": lambda chat, folder: chat.load(folder / "other"),
    "read_again": lambda chat, folder: chat.read_again(folder / "other"),
    "save": lambda chat, folder: chat.save(folder / "saved"),
}


def same_conversation(a, b):
    def numbers(cache):
        return [(c.offset, *(None if array is None else array.tolist() for array in c.cache)) for c in cache]

    a, b = a.branch(), b.branch()
    while (a.messages, a.system, a.undoable) == (b.messages, b.system, b.undoable):
        if numbers(a.cache) != numbers(b.cache) or a.undoable == 0:
            return numbers(a.cache) == numbers(b.cache)
        assert a.undo() == b.undo()
    return False


@LOST
@pytest.mark.large
@pytest.mark.parametrize("act", ACTS)
def test_an_interrupt_anywhere_leaves_a_conversation_as_it_was_or_is_to_be(act, tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)  # which a system prompt needs
    model, tokenizer = load(folder)

    def begun(text="def main("):
        conversation = Chat(model, tokenizer)
        conversation._weights = weights
        for said in (text, "a, b"):
            list(conversation.respond(said, max_tokens=2))
        return conversation

    weights = Chat(model, tokenizer)._weights  # all weights are read for it, once
    before = begun()
    begun("import ").save(tmp_path / "other")
    before.save(tmp_path / "saved")
    after = begun()
    ACTS[act](after, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    counted = begun()
    for line in moments(lambda: ACTS[act](counted, tmp_path), 150):
        conversation = begun()
        interrupted = At(line)(lambda c=conversation: ACTS[act](c, tmp_path))
        if not (interrupted and same_conversation(conversation, before)):
            assert same_conversation(conversation, after), line
        assert {path.name for path in tmp_path.iterdir()} == files, line
        if act == "save":
            conversation.load(tmp_path / "saved")
            assert conversation.messages == before.messages


@pytest.mark.large
def test_an_interrupt_anywhere_leaves_the_last_checkpoint(tmp_path):
    arrays = {"a": mx.arange(4)}
    folder = tmp_path / "checkpoints"

    def save(step):
        return checkpoints.save(folder, step, {"a": mx.arange(step)}, {"n": step}, keep=2)

    def write():
        save(4)
        save(5)
        save(6)

    lines = moments(write, 100)
    for line in lines:
        shutil.rmtree(folder)
        save(3)
        interrupted = At(line)(write)
        arrays, state = checkpoints.load(folder)
        last = checkpoints.steps(folder)[-1]
        assert (state, arrays["a"].size) == ({"step": last, "n": last}, last)
        assert last == 6 or interrupted
        assert not list(folder.glob("*.partial"))
        write()
        save(7)
        assert checkpoints.steps(folder) == [6, 7]


@LOST
@pytest.mark.large
def test_an_interrupt_anywhere_leaves_a_model_as_it_was(demo, texts):
    def say():
        return generate(*demo, PROMPTS[0], max_tokens=TOKENS)

    for line in moments(say, 100):
        At(line)(say)
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


@pytest.mark.large
@pytest.mark.parametrize(("to", "needed"), [("coreml", "coremltools"), ("coreai", "coreai")])
def test_an_interrupt_anywhere_in_an_export_leaves_no_part_of_it(to, needed, tmp_path):
    pytest.importorskip(needed)
    export = {"coreml": convert_to_coreml, "coreai": convert_to_coreai}[to]
    source = small_model(tmp_path / "model", num_hidden_layers=1)
    out = tmp_path / "work/out"
    out.parent.mkdir()

    def names():
        return {str(path.relative_to(out)) for path in out.rglob("*")}

    def write():
        export(source, out, tokenizer="none", chunk=2, iterations=1)

    write()  # what is imported, is
    whole = names()
    shutil.rmtree(out)
    for line in moments(write, 10, last=10):
        shutil.rmtree(out, ignore_errors=True)
        assert At(line)(write), line
        assert not out.exists() or names() == whole, line
        assert {path.name for path in out.parent.iterdir()} <= {"out"}, line
    shutil.rmtree(out, ignore_errors=True)
    write()
    assert names() == whole


@pytest.mark.large
def test_an_interrupt_anywhere_in_a_training_run_is_resumed_from(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = Settings(steps=3, batch_size=2, length=16, warmup=2, report_every=1, save_every=1, keep=2)
    plan = Plan(tmp_path / "text.txt", model=SMALL, settings=settings)
    out = tmp_path / "work/out"
    out.parent.mkdir()

    def train():
        (run.resume(out) if out.exists() else run.start(out, plan)).run()

    def result():
        return losses(read_log(out)), (out / "model.safetensors").read_bytes()

    train()
    whole = result()
    shutil.rmtree(out)
    for line in moments(train, 15, last=5):
        shutil.rmtree(out, ignore_errors=True)
        assert At(line)(train), line
        assert {path.name for path in out.parent.iterdir()} <= {"out"}, line
        assert not [path for path in out.rglob("*") if path.name.endswith(".partial")], line
        train()
        assert result() == whole, line
