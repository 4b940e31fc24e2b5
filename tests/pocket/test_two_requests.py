"""Messages that ask for two things: no function is called, and the answer says so."""

from itertools import islice

import pytest

from examples.pocket import calls
from examples.pocket.call_cases import handwritten
from mlx_pararnn.pocket.answers import assistant_functions
from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.loop import Limits, run_turn
from mlx_pararnn.pocket.protocol import call_text
from mlx_pararnn.pocket.two_requests import SENTENCE, instead
from tests.support.scripted import Script, tools_protocol

FIRST = [
    "set a timer for 5 minutes",
    "add milk to my list",
    "what time is it",
    "please remind me to call mom",
]
SECOND = ["set an alarm for 7", "remind me to call bob", "also cancel the tea timer", "please wake me at 6"]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("join", ["and", "and then", ", then"])
def test_a_second_request_is_seen(first, second, join):
    assert instead(f"{first} {join} {second}", "set_timer") == SENTENCE
    assert instead(first, "set_timer") is None


@pytest.mark.parametrize(
    ("message", "twice"),
    [
        ("add salt and take out the trash to my list", False),
        ("put bread and show tickets on my list", False),
        ("add milk to my list and show my shopping list", True),
        ("remove eggs from my list and clear the todo list", True),
    ],
)
def test_a_list_named_once_is_the_first_requests(message, twice):
    for function in ("add_to_list", "remove_from_list"):
        assert instead(message, function) == (SENTENCE if twice else None)


@pytest.mark.parametrize("split", ["train", "held"])
@pytest.mark.parametrize("plain", [0, 1])
def test_one_request_is_never_taken_for_two(split, plain):
    for example in islice(calls.examples(split, 7, declines=0, plain=plain), 500):
        assert instead(example.message, example.function) is None, example.message
    for case in handwritten():
        assert instead(case.message, case.calls[0]["name"]) is None, case.message


def answer_of(functions, message):
    call = call_text("add_to_list", {"items": "5 minutes and add milk"})
    script, protocol = Script(f"<|call|>{call}<|result|><|answer|><|end|>"), tools_protocol()
    events = run_turn(protocol, script, protocol.render_message(message), functions, Limits())
    return "".join(getattr(event, "text", "") for event in events if type(event).__name__ == "Text")


def test_no_function_runs_for_two():
    assistant = Assistant()
    message = "set a timer for 5 minutes and add milk to my list"
    assert answer_of(assistant_functions(assistant), message) == SENTENCE
    assert assistant.memory() == ""
    assert answer_of(Functions(assistant.functions()), message).startswith("Added 5 minutes")


def test_long_messages_are_looked_at_in_no_time():
    assert instead("set " + "and put " * 10**6, "set_timer") is None
