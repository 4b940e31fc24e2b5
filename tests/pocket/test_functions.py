"""Functions that models call: described by their signatures, checked, limited, and never raising."""

import datetime as dt
import json
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from mlx_pararnn import PararnnError
from mlx_pararnn.pocket.functions import Functions, describe


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    street: str
    number: int = 1


def everything(
    text: str,
    count: int,
    share: float = 0.5,
    loud: bool = False,
    many: list[str] | None = None,
    kind: Literal["a", "b"] = "a",
    colour: Colour = Colour.RED,
    place: Place | None = None,
    day: dt.date = dt.date(2026, 1, 1),
    *,
    schema: Annotated[int, Field(ge=1, le=9, description="A digit.")] = 1,
    _hidden: int = 0,
) -> str:
    """Say it
    all.

    And more.
    """
    return f"{text} {count} {share} {loud} {many} {kind} {colour.value} {place} {day} {schema} {_hidden}"


def test_a_signature_becomes_a_schema():
    function = describe(everything)
    assert (function.name, function.description) == ("everything", "Say it all.")
    schema = function.parameters
    assert schema["required"] == ["text", "count"]
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == [
        *("text", "count", "share", "loud", "many", "kind", "colour", "place", "day", "schema", "_hidden")
    ]
    assert schema["properties"]["text"] == {"type": "string"}
    assert schema["properties"]["schema"]["maximum"] == 9
    assert schema["properties"]["kind"]["enum"] == ["a", "b"]
    (tool,) = Functions([everything]).schemas
    assert tool["function"]["parameters"] == schema


def test_arguments_come_as_their_types():
    functions = Functions([everything])
    arguments = {"text": "é", "count": 3, "many": ["x"], "colour": "blue", "place": {"street": "s"}}
    arguments |= {"day": "2026-11-29", "schema": 4, "_hidden": 2}
    text, failed = functions.call("everything", json.dumps(arguments))
    assert (text, failed) == ("é 3 0.5 False ['x'] a blue street='s' number=1 2026-11-29 4 2", False)
    assert functions.call("everything", '{"text":"t","count":1}').text.startswith("t 1 0.5 False None a red")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{", "invalid JSON"),
        ("[]", "object"),
        ('{"text":"t"}', "count: field required"),
        ('{"text":"t","count":"many"}', "count: input should be a valid integer"),
        ('{"text":"t","count":1,"other":1}', "other: extra inputs are not permitted"),
        ('{"text":"t","count":1,"schema":10}', "schema: input should be less than or equal to 9"),
        ('{"text":"t","count":1,"share":NaN}', "share"),
        ('{"text":"t","count":1,"place":{"number":1}}', "place.street: field required"),
    ],
)
def test_wrong_arguments_are_an_error_in_words_and_run_nothing(arguments, said):
    ran = []
    functions = Functions()

    @functions.add
    def everything(
        text: str,
        count: int,
        share: float = 0.0,
        schema: Annotated[int, Field(le=9)] = 1,
        place: Place | None = None,
    ) -> None:
        ran.append(text)

    text, failed = functions.call("everything", arguments)
    assert failed
    assert not ran
    assert text.startswith("error: ")
    assert said in text


def test_only_what_is_on_the_list_can_be_called():
    functions = Functions([everything])
    for name in ("print", "os.system", "__class__", "everything ", "", "x" * 10**6, "add"):
        text, failed = functions.call(name, "{}")
        assert failed
        assert "there is no function" in text
        assert text.endswith("there are: everything")
        assert len(text) < 200
    assert functions.call("x", "{}").failed
    assert Functions().call("f", "{}").text == "error: there is no function 'f'; there are: none"


class Odd:
    def __str__(self):
        return "odd"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "a\nb"),
        (None, "ok"),
        (True, "true"),
        (1.5, "1.5"),
        ({"a": [1, dt.date(2026, 1, 2)]}, '{"a":[1,"2026-01-02"]}'),
        (Place(street="s"), '{"street":"s","number":1}'),
        (Odd(), '"odd"'),
        ("\udcff", "?"),
    ],
)
def test_results_are_text(value, text):
    functions = Functions()
    functions.add(lambda: value, "f")
    assert functions.call("f", "{}") == (text, False)


@pytest.mark.parametrize(
    "error", [ValueError("no\nsuch thing"), SystemExit(1), KeyboardInterrupt(), Exception()]
)
@pytest.mark.parametrize("seconds", [5, None])
def test_what_a_function_raises_is_told_in_one_line(error, seconds):
    def fail() -> None:
        raise error

    text, failed = Functions([fail], seconds=seconds).call("fail", "{}")
    assert failed
    assert text.startswith(f"error: {type(error).__name__}")
    assert "\n" not in text


def test_a_sentence_for_the_user_comes_as_it_is():
    def fail() -> None:
        raise PararnnError("There is no such timer.")

    assert Functions([fail]).call("fail", "{}") == ("There is no such timer.", True)


def test_a_function_that_does_not_end_is_interrupted():
    state = {"end": None}

    def loop() -> None:
        try:
            while True:
                pass
        finally:
            state["end"] = "interrupted"

    functions = Functions([loop], seconds=0.05)
    assert functions.call("loop", "{}") == ("error: loop took longer than 0.05 seconds", True)
    for _ in range(500):
        if state["end"]:
            break
        time.sleep(0.01)
    assert state["end"] == "interrupted"


def test_a_function_that_cannot_be_interrupted_is_not_started_again():
    started = []

    def stubborn() -> None:
        started.append(1)
        time.sleep(3)

    functions = Functions([stubborn], seconds=0.05)
    assert "took longer" in functions.call("stubborn", "{}").text
    assert functions.call("stubborn", "{}").text == "error: stubborn is still busy with an earlier call"
    assert started == [1]


def test_megabytes_are_cut_and_it_is_said():
    functions = Functions(result_bytes=10)
    functions.add(lambda: "é" * 10**6, "f")
    functions.add(lambda: list(range(10**5)), "g")
    assert functions.call("f", "{}") == ("ééééé [cut: 2,000,000 bytes in all]", False)
    assert functions.call("g", "{}").text.startswith("[0,1,2,3,4 [cut: ")
    functions.add(lambda: "aé" * 10, "h")
    assert functions.call("h", "{}").text == "aéaéaéa [cut: 30 bytes in all]"


def test_an_error_of_megabytes_is_cut():
    def fail() -> None:
        raise ValueError("x" * 10**6)

    assert len(Functions([fail]).call("fail", "{}").text) < 400


def untyped(a): ...
def starred(*a: int): ...
def keywords(**a: int): ...
def positional(a: int, /): ...
def unknown(a: "Missing"): ...  # noqa: F821
def no_schema(a: Odd): ...
def impossible(a: Callable[[], int]): ...
async def later(a: int): ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (untyped, "parameter a has no type"),
        (starred, "cannot be given by name"),
        (keywords, "cannot be given by name"),
        (positional, "cannot be given by name"),
        (unknown, "types cannot be read"),
        (no_schema, "no JSON schema"),
        (impossible, "no JSON schema"),
        (later, "async"),
        (lambda: 1, "no name for a function"),
    ],
)
def test_a_function_that_cannot_be_described_is_refused_by_name(function, said):
    with pytest.raises(PararnnError, match=said) as raised:
        describe(function)
    assert function.__name__ in str(raised.value)


def test_two_functions_of_one_name_are_refused():
    functions = Functions([everything])
    with pytest.raises(PararnnError, match="two functions 'everything'"):
        functions.add(everything)
    functions.add(everything, "other")
    assert "other" in functions
    assert len(functions) == 2
    assert [function.name for function in functions] == ["everything", "other"]


def test_without_a_limit_the_function_runs_in_the_calling_thread():
    functions = Functions(seconds=None)
    functions.add(lambda: threading.current_thread() is threading.main_thread(), "f")
    assert functions.call("f", "{}").text == "true"
