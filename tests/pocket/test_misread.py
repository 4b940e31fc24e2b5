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
from mlx_pararnn.pocket.events import Result
from mlx_pararnn.pocket.loop import Limits, run_turn
from mlx_pararnn.pocket.misread import NOT_SURE, OTHER_SUMS, instead, instead_of_answer
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


def test_tasks_with_numbers_are_left_to_the_model():
    rng = random.Random(0)
    for task in TASKS.values():
        for digits in (1, 2, 5, 30):
            for _ in range(50):
                message = task(rng, digits)[0]
                assert instead_of_answer(message) is None, message
    for message in (
        "what happened on 2026-03-05",
        "reverse 0123",
        "what does 42 mean",
        "dim the bedroom lamp to 30%",
        "reverse 50%",
        "0" + "1" * 600 + " + " + "2" * 600,
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


@pytest.mark.large
@pytest.mark.parametrize(
    "message", ["sort banana, apple, cherry", "remainder of 17 divided by 5", "Set a timer"]
)
def test_the_bundled_model_ends_soon(message):
    events = [*stream_answer(*mlx_pararnn.load(), message)]
    assert (events[-1].reason, events[-1].made < 5000) == ("stop", True)
