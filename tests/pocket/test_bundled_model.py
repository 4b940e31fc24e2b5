"""The model that comes with the package, by every way a user meets it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import mlx_pararnn
from examples.pocket.call_cases import decline_rate, handwritten, measure, out_of_scope
from examples.pocket.evaluate import call_made, spread
from mlx_pararnn import Model, PararnnError, answer
from mlx_pararnn.chat.server.schema import ChatRequest
from mlx_pararnn.chat.server.turns import Turns
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.app import app
from mlx_pararnn.files.hub import BUNDLED
from mlx_pararnn.pocket.answers import assistant_functions, check_message, require_protocol
from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.events import Text
from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.loop import Limits, run_turn
from tests.support.coreml.runner import Runner
from tests.support.scripted import tools_folder
from tests.support.serving import client_of, running

SUMS = [(7, 5), (99_999, 1), (12_345_678_901_234_567_890, 98_765_432_109_876_543_210)]


@pytest.fixture(scope="module")
def pair():
    return mlx_pararnn.load()


def run(*args, **kwargs):
    return CliRunner().invoke(app, list(map(str, args)), **kwargs)


def test_it_is_small_and_whole():
    files = {file.name: file.stat().st_size for file in BUNDLED.iterdir()}
    assert files.keys() == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert sum(files.values()) < 4_000_000


@pytest.mark.parametrize(("a", "b"), SUMS)
def test_sums(pair, a, b):
    assert answer(*pair, f"{a} + {b}", functions=()) == str(a + b)  # the model alone


@pytest.mark.large
def test_sums_of_many_lengths(pair):
    """Of numbers that no training data had."""
    rng = np.random.default_rng(8)
    for digits in (1, 2, 6, 7, 30, 100, 200, 400):
        for _ in range(3):
            a, b = (int("".join(map(str, rng.integers(1, 10, digits)))) for _ in "ab")
            assert answer(*pair, f"{a} + {b}", functions=(), limits=Limits(seconds=900)) == str(a + b)


@pytest.mark.large
def test_lists_and_timers_are_saved_undone_and_branched_with_the_conversation(pair, tmp_path):
    def said(chat, text):
        return "".join(response.text for response in chat.respond(text))

    chat = Chat(*pair)
    assert "milk" in said(chat, "add milk to my shopping list")
    assert "5 minutes" in said(chat, "set a timer for 5 minutes")
    other = chat.branch()
    said(other, "add bread to my shopping list")
    assert said(chat, "show my shopping list") == "Shopping list: milk."
    assert said(other, "show my shopping list") == "Shopping list: milk, bread."
    path = chat.save(tmp_path / "talk")

    loaded = Chat(*pair)
    loaded.load(path)
    assert said(loaded, "show my shopping list") == "Shopping list: milk."
    assert "1 timer" in said(loaded, "show my timers")
    for _ in range(5):  # back to before the first question
        loaded.undo()
    assert loaded.messages == []
    assert said(loaded, "show my shopping list") == "Your shopping list is empty."
    loaded.load(path)
    loaded.undo()
    loaded.undo()
    again = "".join(response.text for response in loaded.regenerate())
    assert "milk" in again
    assert said(loaded, "show my shopping list") == "Shopping list: milk."
    loaded.reset()
    assert said(loaded, "show my timers") == "You have no timers."


def test_generate_and_chat_take_it_without_a_model():
    assert run("generate", "-p", "12345 + 67890").stdout == "80235\n"
    result = run("chat", input="12345 + 67890\n/stats\n")
    assert result.stdout == "80235\n"
    first, second, stats = result.stderr.splitlines()
    examples = json.loads((BUNDLED / "generation_config.json").read_text())["examples"]
    assert first == f"Try: {examples[0]}"
    assert second.startswith(f"Or:  {examples[1]} ")
    assert re.search(r"state \d,\d{3} bytes", stats)


# What is shown to try beside a sum, and what its answer has; 90 days after 3 March is 1 June in any year.
TO_TRY = {"sort 3 1 2": r"^1 2 3$", "what day is 90 days after 3 March?": r"\b1 June\b"}


def test_what_chat_shows_to_try_is_answered(pair):
    first, second = json.loads((BUNDLED / "generation_config.json").read_text())["examples"]
    a, b = map(int, re.findall(r"\d+", first))
    assert len(str(a)) >= 30
    assert answer(*pair, first) == str(a + b)
    assert re.search(TO_TRY[second], answer(*pair, second))


def test_it_declines_what_it_cannot_do_with_one_sentence(pair):
    said = {answer(*pair, message) for message in ("write me a poem about the sea", "who are you?", "why?")}
    assert len(said) == 1
    (sentence,) = said
    assert "12345 + 67890" in sentence  # something to try


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_other_commands_without_a_model(command):
    result = run(command)
    assert result.exit_code == 0, result.output
    said = {"inspect": r"hidden size +192", "verify": r"Same numbers\."}
    assert re.search(said[command], result.stdout)


def test_bench_without_a_model():
    result = run("bench", "--only", "decode", "-c", "0", "-g", "2", "-n", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == BUNDLED.name


@pytest.mark.large
def test_serve_without_a_model():
    """With its own functions, which other models get by --functions."""
    with running() as server:
        client = client_of(server)
        assert [model.id for model in client.models.list()] == [BUNDLED.name]
        said = []
        for message, answer in (
            ("12345 + 67890", "80235"),
            ("add milk to my shopping list", "Added milk to your shopping list."),
            ("set a timer for 5 minutes", "I cannot set timers here, as nothing would ring: "),
            ("show my shopping list", "Shopping list: milk."),
        ):
            said.append({"role": "user", "content": message})
            made = client.chat.completions.create(model=BUNDLED.name, messages=said)
            assert made.choices[0].message.content.startswith(answer)
            assert made.choices[0].finish_reason == "stop"
            said.append({"role": "assistant", "content": made.choices[0].message.content})
        first = client.responses.create(model=BUNDLED.name, input="add eggs to my shopping list")
        shown = client.responses.create(
            model=BUNDLED.name, input="show my shopping list", previous_response_id=first.id
        )
        assert shown.output_text == "Shopping list: eggs."


def test_one_question_promises_nothing(pair):
    """There is no conversation that could keep it."""
    assert answer(*pair, "add milk to my shopping list").startswith("I would not remember a list here")
    assert "nothing would ring" in run("generate", "-p", "set a timer for 5 minutes").stdout


def test_longer_messages_than_it_answers_are_refused_everywhere(pair):
    message = "a" * 10_001
    said = "the bundled model answers messages of at most 10,000 characters, and this one has 10,001; "
    with pytest.raises(PararnnError, match=said):
        answer(*pair, message)
    conversation = Chat(*pair)
    with pytest.raises(PararnnError, match=said):
        next(conversation.respond(message))
    assert conversation.messages == []
    assert run("generate", "-p", message).stderr.startswith(f"error: {said}")
    assert said in run("chat", input=f"{message}\n").stderr
    engine = SimpleNamespace(model=pair[0], tokenizer=pair[1])
    turns = Turns(engine, require_protocol(pair[1]), own_functions=True)
    with pytest.raises(PararnnError, match=said):
        turns.prompt(ChatRequest(messages=[{"role": "user", "content": message}]))


def test_a_message_of_that_length_and_other_models_are_not_refused(pair, tmp_path):
    check_message(pair[1], "a" * 10_000)
    check_message(mlx_pararnn.load(tools_folder(tmp_path / "model"))[1], "a" * 10_001)


@pytest.mark.large
def test_it_understands_as_much_english_as_its_card_says(pair):
    """Of a part of the messages written by hand, a little less than was measured."""
    found = measure(lambda message: call_made(*pair, message), spread(handwritten(), 60))
    assert found["exact"] >= 0.8, found
    assert found["function"] >= 0.88, found
    assert decline_rate(lambda message: call_made(*pair, message), spread(out_of_scope(), 60)) >= 0.85


# Messages that it misreads by itself, and what the answer has.
MISREAD = {
    **dict.fromkeys(("minus 5 + 3", "negative 5 plus 3", "minus five plus three"), r"-2\.?$"),
    **dict.fromkeys((" what is 12 + 30", "What  is   12   +   30   ?", "12\t+\t30", "$12 + $30"), "^42$"),
    **dict.fromkeys(("square root of 16", "max of 3 and 4"), r"\b4\.?$"),
    **dict.fromkeys(("square of 5", "e^2", "12 + 30 + abc", "sum of 1 to 10"), r"^I (?:cannot|can|did not) "),
    "what's minus 40 celsius in fahrenheit": r" -40 fahrenheit\.$",
    "0 c in f": r"^0 c is 32 f\.$",
    "3 hours 20 minutes in minutes": " 200 minutes",
    **dict.fromkeys(("do not set a timer for 5 minutes", "should I set an alarm for 7?"), "^I did nothing: "),
    **dict.fromkeys(
        ("don't add milk to my shopping list", "I already added milk to my list"), "^I did nothing: "
    ),
    "pause the timer": "^I cannot do that with timers",
}


@pytest.mark.large
@pytest.mark.parametrize("message", MISREAD)
def test_what_it_misreads_is_told(pair, message):
    functions = assistant_functions(Assistant())
    assert re.search(MISREAD[message], answer(*pair, message, functions=functions))


@pytest.mark.large
def test_a_sum_that_goes_wrong_shows_no_trace(pair):
    """Three sums, a line each, are none that it does."""
    rng = np.random.default_rng(5)
    lines = []
    for digits in (30, 100, 400):
        a, b = ("".join(map(str, rng.integers(1, 10, digits))) for _ in "ab")
        lines.append(f"{a} - {b}")
    assert re.fullmatch(r"I cannot [\w ,.]+", answer(*pair, "\n".join(lines)))


class InCoreML:
    """A Core ML package's program as what makes tokens in the loop."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.runner, self.vocab_size = Runner(folder), vocab_size

    def read(self, tokens):
        self.logits = self.runner.read(tokens)

    def choose(self, allowed):
        return int(np.where(allowed, self.logits, -np.inf).argmax())


@pytest.mark.large
@pytest.mark.parametrize("state", ["graph", "io"])
def test_as_a_core_ml_package(pair, tmp_path, state):
    """The saved program, executed in float16, takes the same steps and answers the same."""
    pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")
    options = ("--to", "coreml", "-o", tmp_path / "package", "--state", state, "--chunk", "8")
    assert (result := run("convert", BUNDLED, *options)).exit_code == 0, result.output
    model: Model = pair[0]
    protocol = require_protocol(pair[1])
    for message in ("347 + 85", "hello"):
        source = InCoreML(tmp_path / "package", model.args.vocab_size)
        events = run_turn(protocol, source, protocol.render_message(message), Functions(), Limits())
        text = "".join(event.text for event in events if isinstance(event, Text))
        assert text == answer(*pair, message)
