"""The pocket model's messages and calls: every call fits its schema, and does what the message asks for."""

import json
import subprocess
import sys
from datetime import datetime
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pocket import calls
from examples.pocket.call_cases import Case, decline_rate, handwritten, held_out, measure, out_of_scope
from examples.pocket.call_traces import LOOK_AHEAD, call_of, kinds, trace
from examples.pocket.fillers import FOLDER, in_words, sections
from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.functions import Functions
from tests.support.pocket_traces import follow

NOW = datetime(2026, 11, 29, 4, 12)
# Their arguments are copied as they are; of the others every word is understood.
FREE_TEXT = ("name", "text", "items", "list", "to")


def an_assistant():
    assistant = Assistant(lambda: NOW)
    for time in ("9:00", "5:00 pm"):
        assistant.set_alarm(time)
    return assistant


def some(split, n, seed=0, **options):
    return list(islice(calls.examples(split, seed, **options), n))


def result(function, arguments):
    outcome = Functions(an_assistant().functions()).call(function, json.dumps(arguments))
    assert not outcome.failed, outcome.text
    return outcome.text


@pytest.mark.large
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["train", "held"]))
def test_calls_run_and_mean_what_the_generator_meant(seed, split):
    for example in some(split, 5, seed, declines=0):
        said = {name: example.message[slice(*span)] for name, span in example.spans.items()}
        assert said == example.arguments
        plain = example.plain | {name: said[name] for name in FREE_TEXT if name in said}
        a, b = result(example.function, example.arguments), result(example.function, plain)
        # "twelve plus seven is 19": the question is repeated, and may be said in two ways.
        assert a.split(" is ")[-1] == b.split(" is ")[-1], example


def test_functions_json_is_what_the_assistant_offers():
    schemas = [schema["function"] for schema in Functions(Assistant().functions()).schemas]
    assert json.loads((FOLDER / "functions.json").read_text()) == schemas


def test_every_function_has_phrasings_of_each_kind():
    for split in ("train", "held"):
        assert set(calls.phrasings(split)) == {*calls.ARGUMENTS, calls.DECLINE}
        assert all(calls.phrasings(split).values())
    for function in calls.phrasings("train"):
        held, learned = (set(calls.phrasings(split)[function]) for split in ("held", "train"))
        assert not held & learned, function


def test_the_plainest_phrasings_are_learned_from():
    plain, held = sections("plain.txt"), calls.phrasings("held")
    assert set(plain) == set(held)
    for function, lines in plain.items():
        assert not set(lines) & set(held[function]), function
    drawn = some("train", 600, declines=0, plain=1)
    assert {example.function for example in drawn} == set(calls.ARGUMENTS)
    assert all(example.arguments.keys() <= set(calls.ARGUMENTS[example.function]) for example in drawn)
    assert any("set a timer for " in example.message.lower() for example in drawn)


def test_a_seed_gives_the_same_examples():
    assert some("train", 50, 3) == some("train", 50, 3)
    assert some("train", 50, 3) != some("train", 50, 4)
    assert some("train", 50, 3) != some("held", 50, 3)


def test_a_split_that_is_none():
    with pytest.raises(ValueError, match="there are train and held"):
        some("test", 1)


def test_declines_want_no_call():
    declines = [example for example in some("train", 400) if example.function is None]
    assert 60 < len(declines) < 180
    assert all(example.call is None and example.message.strip() for example in declines)
    assert len({example.message for example in declines}) > 0.7 * len(declines)


@pytest.mark.parametrize("n", [0, 7, 10, 19, 20, 21, 99, 100, 101, 120, 999, 1000, 1005, 1100, 12345, 999999])
def test_numbers_in_words(n):
    from mlx_pararnn.pocket.number_words import number

    assert number(in_words(n)) == n


def test_the_script_shows_examples():
    script = [sys.executable, "-m", "examples.pocket.calls", "--split", "held", "-n", "4"]
    root = FOLDER.parents[1]
    shown = subprocess.run(script, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 8
    assert [line.strip() for line in shown[1::2]] == [
        "-" if example.call is None else json.dumps(example.call, ensure_ascii=False)
        for example in some("held", 4)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_trace_is_what_the_pointer_memory_shows(seed):
    for example in some("train", 3, seed):
        turn = trace(example, "It is done.")
        follow(turn)
        assert call_of(turn.tokens) == example.call
        assert turn.tokens[-1] == "<|end|>"
        if example.function:
            assert turn.tokens[-2:] == ["<|answer|>", "<|end|>"]
            assert all(turn.tokens.count(f"<|left{k}|>") % LOOK_AHEAD == 0 for k in (2,))


@pytest.mark.parametrize(
    "text", ['say "hi" to bob', "back\\slash", "two\nlines", "crème brûlée", "mail 🙂 anna", "a\tb"]
)
def test_any_text_is_copied(text):
    message = f"remind me to {text} today"
    start, end = 13, 13 + len(text)
    spans = {"text": (start, end), "day": (end + 1, len(message))}
    example = calls.Example(message, "set_reminder", {"text": text, "day": "today"}, spans)
    turn = trace(example, "ok")
    follow(turn)
    assert call_of(turn.tokens) == example.call


def test_what_is_learned_is_what_the_model_writes():
    example = calls.Example("5 min timer", "set_timer", {"duration": "5 min"}, {"duration": (0, 5)})
    turn = trace(example, "Timer set.")
    fed = "".join(token for token, learned in zip(turn.tokens, turn.learned, strict=True) if not learned)
    kind = kinds()["set_timer", "duration"]
    assert fed == f"<|user|>5 min timer<|end|>5 mi{kind}5 min {kind}min time{kind}Timer set.<|end|>"


@pytest.mark.parametrize("looking", [False, True])
def test_a_pointer_looks_ahead_before_an_argument_or_only_within(looking):
    message = "a timer for tea of 5 minutes"
    example = calls.Example(message, "set_timer", {"duration": "5 minutes"}, {"duration": (19, 28)})
    turn = trace(example, looking=looking)
    assert call_of(turn.tokens) == example.call
    looks = turn.tokens.count("<|left2|>") // LOOK_AHEAD
    assert looks == (8 if looking else 2)  # at the beginning, six spaces and the end; a space and the end


# The bundled model knows its functions by these, whatever else is learned.
LETTERS = {
    "set_timer": "ab", "cancel_timer": "cd", "show_timers": "e", "set_alarm": "fg", "cancel_alarm": "hi",
    "show_alarms": "j", "set_reminder": "klmn", "cancel_reminder": "op", "show_reminders": "q",
    "add_to_list": "rs", "remove_from_list": "tu", "show_list": "vw", "clear_list": "xy", "date_after": "zA",
    "date_before": "BC", "days_until": "D", "days_since": "E", "days_between": "F", "weekday": "G",
    "convert": "H", "calculate": "I", "time_now": "J", "date_today": "K",
}  # fmt: skip
LAMP = (FOLDER / "lamp.json", FOLDER / "lamp.txt")


@pytest.fixture
def teach():
    """`calls.teach`, of which nothing is left after the test."""
    tables = (calls.ARGUMENTS, calls.REQUIRED, calls.ADDED, calls.FILLERS, calls.WHOLE_NUMBERS)
    before = [table.copy() for table in tables]
    yield calls.teach
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def letters():
    found = {}
    for (function, *_), letter in kinds().items():
        found[function] = found.get(function, "") + letter
    return found


def test_letters_of_functions_stay_when_one_is_added(teach):
    assert letters() == LETTERS
    teach(*LAMP)
    assert letters() == {**LETTERS, "set_lamp": "LM"}


def test_a_function_of_a_users_own_is_learned_beside_the_others(teach):
    before = some("train", 20)
    teach(*LAMP)
    drawn = some("train", 400)
    own = [example for example in drawn if example.function == "set_lamp"]
    assert 0.25 < len(own) / len(drawn) < 0.6
    assert {example.function for example in drawn} > {"set_timer", "calculate", None}
    assert not any("lamp" in example.message.lower() for example in drawn if example.function is None)
    assert some("train", 20) != before
    for example in own:
        turn = trace(example, "It is on.")
        follow(turn)
        assert call_of(turn.tokens) == example.call
        assert type(example.call["arguments"].get("brightness", 0)) is int


def taught(*required, **types):
    """A function f with arguments of these types."""
    properties = {name: {"type": kind} for name, kind in types.items()}
    return [{"name": "f", "parameters": {"properties": properties, "required": list(required)}}]


@pytest.mark.parametrize(
    ("functions", "phrasings", "said"),
    [
        ([{"name": "f", "parameters": {}}], "[g]\nx", "has no phrasings of f; write some under"),
        (
            [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}],
            "[f]\nx {a}",
            "nothing for {a}",
        ),
        (
            [{"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}}],
            "[f]\nx {a}",
            "f: a is neither",
        ),
        ([{"name": "f", "parameters": {}}], "[f]\nx {b}", r"has {b} under \[f\], which has no such argument"),
        (["f"], "[f]\nx", "is no list of functions with name and parameters"),
        ([{"name": "f"}], "[f]\nx", "is no list of functions with name and parameters"),
        (
            taught(a="integer", b="integer", c="integer", d="integer"),
            "[f]\nx",
            "f has 4 arguments; 3 are the most",
        ),
        (taught("a", a="integer"), "[f]\nx {a}\ny", "'y' has no {a}, which f needs"),
        (
            taught(a="integer"),
            "[f]\nx {a}\n[a]\n7\nseven",
            "f: a is a whole number, and what may fill its braces is more",
        ),
        (
            [
                {
                    "name": "f",
                    "parameters": {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}},
                }
            ],
            "[f]\nx {a}",
            "f: a has no whole number between its minimum and its maximum",
        ),
    ],
)
def test_what_cannot_be_taught_is_said(teach, tmp_path, functions, phrasings, said):
    (tmp_path / "f.json").write_text(json.dumps(functions))
    (tmp_path / "f.txt").write_text(phrasings)
    with pytest.raises(ValueError, match=said):
        teach(tmp_path / "f.json", tmp_path / "f.txt")


def test_there_are_no_more_kinds_than_letters(teach, tmp_path):
    optional = {name: {"type": "integer"} for name in "abc"}
    schemas = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": optional}}}
        for name in ("f", "g")
    ]
    (tmp_path / "f.json").write_text(json.dumps(schemas))
    (tmp_path / "f.txt").write_text("[f]\nx\n[g]\ny")
    teach(tmp_path / "f.json", tmp_path / "f.txt")
    with pytest.raises(ValueError, match="52 ways, these in 53"):
        kinds()


def test_what_may_be_a_sum_is_scanned_first():
    turn = trace(calls.Example("what is 1 + 2 + 3?"))
    fed = "".join(token for token, learned in zip(turn.tokens, turn.learned, strict=True) if not learned)
    assert fed == "<|user|>what is 1 + 2 + 3?<|end|>what <|user|>is <|user|>1 <|user|>+ 2 ++ 3?n<|end|>n."


def test_calls_that_are_none():
    assert call_of(["<|user|>", "a", "<|end|>", "<|answer|>", "<|end|>"]) is None
    assert call_of(["<|call|>", *"{broken", "<|result|>"]) is None


def test_handwritten_calls_are_right():
    """They fit the schemas, run, and their arguments are pieces of the messages."""
    cases = handwritten()
    assert len(cases) >= 150
    assert len({case.message.lower() for case in cases}) == len(cases)
    assert {call["name"] for case in cases for call in case.calls} == set(calls.ARGUMENTS)
    for case in cases:
        for call in case.calls:
            result(call["name"], call["arguments"])
            assert all(piece in case.message for piece in call["arguments"].values()), case
            order = [name for name in calls.ARGUMENTS[call["name"]] if name in call["arguments"]]
            assert list(call["arguments"]) == order


def test_out_of_scope_messages_are_many_and_of_many_kinds():
    messages = out_of_scope()
    assert len(messages) >= 500
    assert len({message.lower() for message in messages}) == len(messages)
    kinds = [json.loads(line)["kind"] for line in (FOLDER / "out_of_scope.jsonl").read_text().splitlines()]
    assert len(set(kinds)) >= 8
    wanted = {case.message.lower() for case in handwritten()}
    assert not wanted & {message.lower() for message in messages}


def test_few_handwritten_messages_can_be_generated():
    """A message as short as "what time is it?" is: what is measured must not be learned by heart."""

    def plain(message):
        return " ".join("".join(c if c.isalnum() else " " for c in message.lower()).split())

    learned = {plain(example.message) for share in (0, 1) for example in some("train", 3000, plain=share)}
    by_hand = [case.message for case in handwritten()] + out_of_scope()
    known = [message for message in by_hand if plain(message) and plain(message) in learned]
    assert len(known) < 0.04 * len(by_hand), known


def test_measures():
    right = {"name": "set_timer", "arguments": {"duration": "5 min"}}
    other = {"name": "set_timer", "arguments": {"duration": "5"}}
    cases = [Case("a", [right, other]), Case("b", [right]), Case("c", [right]), Case("d", [right])]
    made = {"a": other, "b": other, "c": None, "d": {"name": "time_now", "arguments": {}}}
    assert measure(made.get, cases) == {"exact": 0.25, "function": 0.5, "declined": 0.25}
    assert decline_rate(made.get, ["a", "c"]) == 0.5
    for nothing in (lambda: measure(made.get, []), lambda: decline_rate(made.get, [])):
        with pytest.raises(ValueError, match="to measure with"):
            nothing()


def test_held_out_cases_are_calls():
    assert [case.calls[0]["name"] for case in held_out(30)] == [
        example.function for example in some("held", 30, declines=0)
    ]
