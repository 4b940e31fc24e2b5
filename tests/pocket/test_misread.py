"""What the bundled model is known to misread: it is calculated, or refused in a sentence, and never wrong."""

import random
from itertools import islice

import pytest

import mlx_pararnn
from examples.pocket import calls
from examples.pocket.data import TASKS
from mlx_pararnn.pocket.answers import assistant_functions, stream_answer
from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.date_words import HOLIDAYS, MONTHS, UNITS, WEEKDAYS
from mlx_pararnn.pocket.events import Result, Text
from mlx_pararnn.pocket.loop import LOST, Limits, run_turn
from mlx_pararnn.pocket.misread import (
    NOT_SURE,
    NOTHING_DONE,
    OTHER_ACTIONS,
    OTHER_SUMS,
    check_answer,
    instead,
    instead_of_answer,
)
from mlx_pararnn.pocket.number_words import ORDINALS, SMALL, TENS
from mlx_pararnn.pocket.protocol import call_text
from tests.support.scripted import Script, tools_protocol

SUMS = [
    ("10 mod 3", "10 mod 3 is 1."),
    ("What is 12 % 5?", "12 % 5 is 2."),
    ("hey, can you compute 2^10 =", "2^10 is 1024."),
    ("12 squared plus 1", "12 squared plus 1 is 145."),
    ("the remainder of 17 divided by 5", "the remainder of 17 divided by 5 is 2."),
    ("7 × 8", "7 × 8 is 56."),
    ("007 + 1", "007 + 1 is 8."),
    ("3² + 1, please", "3² + 1 is 10."),
    ("thanks, what is 7 mod 0", "That divides by zero."),
    *(
        (text, OTHER_SUMS)
        for text in ("average of 3 and 5", "gcd of 12 and 18", "12 xor 7", "5 and 7", "5 = 6")
    ),
    *((text, OTHER_SUMS) for text in ("3 >= 3", "12 == 12", "is 7 prime", "mean of 4 and 6")),
]


@pytest.mark.parametrize(("message", "said"), SUMS)
def test_what_looks_like_a_task_with_numbers(message, said):
    assert instead_of_answer(message) == said
    protocol, script = tools_protocol(), Script("<|answer|>30<|end|>")
    events = run_turn(
        protocol, script, protocol.render_message(message), assistant_functions(Assistant()), Limits()
    )
    assert "".join(event.text for event in events if hasattr(event, "text")) == said


def test_tasks_with_numbers_are_what_rules_read():
    """Of each task's message, what the check lets pass is its answer, in whatever pieces that is said."""
    rng = random.Random(0)
    for name, task in TASKS.items():
        for digits in (1, 2, 5, 30):
            for _ in range(50):
                message, answer = task(rng, digits)
                is_read = name not in ("reversal", "sorting", "logic")
                assert instead_of_answer(message) == (answer if is_read else None), message
                check = check_answer(message)
                assert not any(check(answer[:n], ended=False) for n in range(1, len(answer) + 1)), message
                assert check(answer, ended=True) is None


def test_other_messages_with_numbers_are_left_to_the_model():
    for message in (
        "what happened on 2026-03-05",
        "reverse 0123",
        "what does 42 mean",
        "dim the bedroom lamp to 30%",
        "reverse 50%",
        "0" + "1" * 1001 + " + " + "2" * 600,
        "phone 555-0123",
    ):
        assert instead_of_answer(message) is None


def test_an_argument_that_does_not_stand_in_the_message():
    assert instead("Set a timer", "set_timer", call_arguments(duration="ae}}{")) == NOT_SURE
    assert instead("2^10", "calculate", call_arguments(expression="2(10")) == "2^10 is 1024."
    assert instead("what", "calculate", "[" * 5000) is None  # what is no JSON is refused elsewhere
    for split in ("train", "held"):
        for example in islice(calls.examples(split, 3, declines=0), 300):
            arguments = call_arguments(**example.arguments)
            assert instead(example.message, example.function, arguments) is None, example.message


@pytest.mark.parametrize(
    ("message", "function", "arguments"),
    [
        ("How tall is Mount Kilimanjaro?", "days_until", {"date": "Mount Kilimanjaro"}),
        ("Give me a riddle my kids won't know", "cancel_alarm", {"time": "riddle my kids"}),
        ("put this in portuguese: she has allergies", "convert", {"amount": "this", "to": "portuguese"}),
        ("which wife of henry viii survived", "calculate", {"expression": "henry viii survived"}),
        ("repeat: I obey nobody", "set_alarm", {"time": "obey nobody"}),
        ("moved to Canada. We talk to nobody", "set_reminder", {"text": "talk", "day": "nobody"}),
        ("the knob of our oven fell off", "set_timer", {"duration": "fell off"}),
    ],
)
def test_a_time_or_an_amount_that_is_none(message, function, arguments):
    """Nothing is done, and it is said what can be."""
    assert instead(message, function, call_arguments(**arguments)) == NOT_SURE
    protocol = tools_protocol()
    script = Script(f"<|call|>{call_text(function, arguments)}<|result|><|answer|><|end|>")
    turn = run_turn(
        protocol, script, protocol.render_message(message), assistant_functions(Assistant()), Limits()
    )
    (result,) = (event for event in turn if isinstance(event, Result))
    assert (result.text, result.failed) == (NOT_SURE, True)


def test_words_that_are_understood_are_known_to_be_of_times_and_numbers():
    """Those of the functions' own rules, and how people misspell and write them."""
    names = [
        *MONTHS,
        *WEEKDAYS,
        *HOLIDAYS,
        *UNITS,
        *ORDINALS,
        *SMALL,
        *TENS,
        "weds",
        "wk",
        "tues",
        "tmrw",
        "noon",
    ]
    wrong = (
        "tomrrow tmorrow tomrorow todya mondya agust cristmas spetember ninty eigth hunderd milion thosand"
    )
    for word in [
        *names,
        *wrong.split(),
        "sunrise",
        "lunchtime",
        "dawn",
        "bedtime",
        "yesterday",
        "this weekend",
    ]:
        arguments = call_arguments(text="call mum", day=f"on the {word}")
        assert instead(f"remind me to call mum on the {word}", "set_reminder", arguments) is None, word
    for word in [*SMALL, *TENS, "hunderd", "milion", "ninty", "half a"]:
        arguments = call_arguments(amount=f"{word} miles", to="km")
        assert instead(f"{word} miles in km", "convert", arguments) is None, word


def test_what_is_wrong_with_a_time_is_said_by_its_function():
    for message, function, arguments in (
        ("how many days until easter", "days_until", {"date": "easter"}),
        ("wake me at 25:00", "set_alarm", {"time": "25:00"}),
        ("set a timer for 3 weeks ago", "set_timer", {"duration": "3 weeks ago"}),
        ("make it warm", "a_function_of_ones_own", {"amount": "warm"}),
    ):
        assert instead(message, function, call_arguments(**arguments)) is None


def call_arguments(**arguments):
    call = call_text("f", arguments)
    return call[call.index("arguments") + len('arguments":') : -1]


# A message, what a model says to it or calls, and what is said.
ANSWERS = [
    *(("minus 5 + 3", said, "-2") for said in ("8", "-2", "-", "-23", "no", "")),
    *((message, "8", "-2") for message in ("negative 5 plus 3", "minus five plus three", "3 - 5 =")),
    *(
        (message, "30", "42")
        for message in (" what is 12 + 30", "12\t+\t30", "What  is 12 + 30 ?", "$12 + $30")
    ),
    *(
        (".5 + .5", "5.5", "1"),
        ("5. + 5", "0", "10"),
        ("half of 10", "10", "5"),
        ("square root of 16", "16", "square root of 16 is 4."),
    ),
    *(
        (message, "13", "8")
        for message in ("larger of 5 and 8", "what is larger of 5 and 8", "max of 5 and 8")
    ),
    *(
        ("min of 3 and 7", "10", "3"),
        ("which is bigger 123 or 1234", "1357", "1234"),
        ("is 9.9 greater than 9.11", "no", "yes"),
    ),
    *((message, "42", NOT_SURE) for message in ("12 + 30 + abc", "how tall is everest")),
    ("square of 5", "5", NOT_SURE),
    ("sum of 1 to 10", "11", NOT_SURE),
    *((message, "15", OTHER_SUMS) for message in ("1 2 + 3", "$12 + €3")),
    *(("reverse abc", said, said) for said in ("cba", "cb", "I can do sums.")),
    ("reverse abc", "cbaeE", f"cba\n{LOST}"),
    ("9" * 1001 + " - 1", "998eE}", f"998\n{LOST}"),
    ("tell bob $5 + £7", "oo2c7oo", f"oo\n{LOST}"),
    ("what does 42 mean", "I can do sums.", "I can do sums."),
    ("is it late", "no", NOT_SURE),
]
CALLS = [
    ("square of 5", "calculate", {"expression": "5"}, OTHER_SUMS),
    ("so e^2", "calculate", {"expression": "2"}, OTHER_SUMS),
    ("what day is 03/04/2025?", "calculate", {"expression": "03/04/2025"}, OTHER_SUMS),
    ("remainder of 10 / 3", "calculate", {"expression": "10 / 3"}, "remainder of 10 / 3 is 1."),
    ("minus five plus three", "calculate", {"expression": "five plus three"}, "minus five plus three is -2."),
    ("divide 10 by 4", "calculate", {"expression": "10 by 4"}, "That is 2.5."),
    ("minus 10 c to f", "convert", {"amount": "10 c", "to": "f"}, "minus 10 c is 14 f."),
    ("if it is minus 10 c, how many f", "convert", {"amount": "10 c", "to": "f"}, NOT_SURE),
    (
        "3 hours 20 minutes in minutes",
        "convert",
        {"amount": "3 hours", "to": "minutes"},
        "3 hours 20 minutes is 200 minutes.",
    ),
    ("what time is it in 3 hours?", "convert", {"amount": "3 hours", "to": "3 hours"}, NOT_SURE),
    ("how many days in february 2024?", "days_since", {"date": "february 2024"}, NOT_SURE),
    ("min of 3 and 7", "set_timer", {"duration": "3 and 7"}, "3"),
    ("3 hours + 20 minutes", "set_timer", {"duration": "3 hours"}, NOT_SURE),
    (
        "remind me at 9 to take pills and at 10 to walk",
        "set_reminder",
        {"text": "take pills and", "time": "9"},
        NOT_SURE,
    ),
    *(
        (message, "set_timer", {"duration": "5 minutes"}, NOTHING_DONE)
        for message in (
            "do not set a timer for 5 minutes",
            "don’t start a 5 minutes timer",
            "never set a timer for 5 minutes",
            "what time will it be in 5 minutes?",
            "should I set a timer for 5 minutes",
            "I set a timer for 5 minutes",
        )
    ),
    *(
        (message, "add_to_list", {"items": "milk", "list": "shopping"}, NOTHING_DONE)
        for message in (
            "don't add milk to my shopping list",
            "I already added milk to my shopping list",
            "did I put milk on the shopping list?",
            "I've added milk to my shopping list",
        )
    ),
    *(
        (message, "cancel_timer", {}, NOTHING_DONE)
        for message in ("do not cancel the timer", "should I stop the timer?", "who cancelled my timer")
    ),
    *(
        (message, "cancel_timer", {}, None)
        for message in ("I don't need the timer", "can you stop the timer")
    ),
    *((message, "cancel_timer", {}, OTHER_ACTIONS) for message in ("pause the timer", "Snooze my timer")),
    ("don't let me forget milk", "set_reminder", {"text": "milk"}, None),
    ("today minus 3 days", "date_before", {"duration": "3 days"}, None),
    ("minus milk on the shopping list", "remove_from_list", {"items": "milk", "list": "shopping"}, None),
    ("add oat milk 2 the shopping list", "add_to_list", {"items": "oat milk", "list": "shopping"}, None),
]


def said_in(message, script):
    """What a turn says, and why it ends."""
    protocol = tools_protocol()
    functions = assistant_functions(Assistant())
    events = [*run_turn(protocol, Script(script), protocol.render_message(message), functions, Limits())]
    return "".join(event.text for event in events if isinstance(event, Text)), events[-1].reason


@pytest.mark.parametrize(("message", "model", "said"), ANSWERS)
def test_what_a_model_answers_is_what_it_can_be(message, model, said):
    reason = "lost" if said.endswith(LOST) else "stop"
    assert said_in(message, f"<|answer|>{model}<|end|>") == (said, reason)


@pytest.mark.parametrize(("message", "function", "arguments", "said"), CALLS)
def test_a_call_leaves_nothing_of_the_message_out(message, function, arguments, said):
    assert instead(message, function, call_arguments(**arguments)) == said


def test_what_rules_read_is_said_by_a_model_that_has_lost_its_way():
    lost = "<|read1|>" * 3 + "<|left1|>" + "<|read1|>" * 9
    assert said_in("0 c in f", lost) == ("0 c is 32 f.", "stop")
    assert said_in("0 c in 5", lost) == (LOST, "lost")


@pytest.mark.large
@pytest.mark.parametrize(
    "message", ["sort banana, apple, cherry", "remainder of 17 divided by 5", "Set a timer"]
)
def test_the_bundled_model_ends_soon(message):
    events = [*stream_answer(*mlx_pararnn.load(), message)]
    assert (events[-1].reason in ("stop", "lost"), events[-1].made < 5000) == (True, True)
