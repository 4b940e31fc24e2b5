"""The loop of tools, over scripts in place of a model: what is fed, what is told, where it ends."""

import json
import time

import numpy as np
import pytest

from mlx_pararnn import PararnnError
from mlx_pararnn.pocket.events import (
    Call,
    CommandGiven,
    Finish,
    Observation,
    Result,
    Text,
    Thought,
)
from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.loop import LOST, MOST_COMMANDS, MOST_EDGES, External, Limits, run_turn
from mlx_pararnn.text.grammars import Grammars
from tests.support.scripted import Script, tokens_of, tools_protocol, tools_tokenizer


def double(number: int, loud: bool = False) -> str:
    """Twice a number."""
    return f"{2 * number}{'!' if loud else ''}"


def play(script, message="12", functions=(double,), limits=None, held=False, **options):
    """The events of a turn, and all that the source was given to read."""
    source = script if isinstance(script, Script) else Script(script)
    grammars = Grammars(tools_tokenizer(), source.vocab_size) if held else None
    functions = functions if isinstance(functions, Functions) else Functions(functions)
    prefix = tools_protocol().render_message(message)
    events = list(
        run_turn(
            tools_protocol(), source, prefix, functions, limits or Limits(), grammars=grammars, **options
        )
    )
    return events, source.taken


def kinds(events):
    return [type(event).__name__ for event in events]


def text_of(events, kind=Text):
    return "".join(event.text for event in events if isinstance(event, kind))


def test_a_turn_of_pointers_thoughts_and_an_answer():
    script = "<|right1|><|read1|>k<|read2|><|last2|><|read2|><|answer|>1<|left1|><|read1|>é<|end|>"
    events, taken = play(script)
    assert taken == tokens_of(
        "<|user|>12<|end|><|right1|><|read1|>1k<|read2|><|user|><|last2|><|read2|>k"
        "<|answer|>1<|left1|><|read1|><|user|>é"
    )
    assert kinds(events) == [
        *("CommandGiven", "CommandGiven", "Observation", "Thought", "CommandGiven", "Observation"),
        *("CommandGiven", "CommandGiven", "Observation", "Text", "CommandGiven", "CommandGiven"),
        *("Observation", "Text", "Finish"),
    ]
    assert [event.name for event in events if isinstance(event, Observation)] == [
        *("'1'", "<|user|>", "'k'", "<|user|>")
    ]
    assert text_of(events, Thought) == "k"
    assert text_of(events) == "1é"
    assert events[-1].reason == "stop"
    assert (events[-1].tokens, events[-1].made) == (len(taken) + 1, len(taken) + 1 - 4 - 4)
    # What stands in the script, and what the loop has made of it, is one turn of the protocol.
    turn = [*taken, tools_protocol().end]
    made = [n for n, made in enumerate(tools_protocol().loss_mask(turn)) if made]
    assert [turn[n] for n in made] == tokens_of(script)


def test_counts_never_fall_and_the_last_is_the_whole():
    events, taken = play("<|read1|>ab<|answer|>c<|end|>")
    counts = [event.tokens for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == len(taken) + 1


def test_outside_the_memory_stands_the_edge():
    _, taken = play("<|left3|><|left3|><|read3|><|right3|><|read3|><|answer|><|end|>")
    fed = tokens_of("<|edge|>")[0]
    assert taken.count(fed) == 1
    assert taken[-2:] == tokens_of("<|user|><|answer|>")


def test_thoughts_answers_and_calls_can_be_read_again_and_commands_cannot():
    call = '<|call|>{"name":"double","arguments":{"number":6}}<|result|>'
    events, _ = play(f"<|right1|>t{call}<|answer|>a" + "<|right2|><|read2|>" * 60 + "<|end|>", "m")
    seen = [event.token for event in events if isinstance(event, Observation)]
    memory = tokens_of(f"m<|end|>t{call}12<|end|><|answer|>a")
    assert seen[: len(memory)] == memory
    assert set(seen[len(memory) :]) == {tools_protocol().edge}


@pytest.mark.parametrize("held", [False, True])
def test_a_call_is_run_and_its_result_fed(held):
    call = '<|call|>{"name":"double","arguments":{"number":21,"loud":true}}<|result|>'
    events, taken = play(f"{call}<|answer|>42!<|end|>", held=held)
    assert kinds(events)[:2] == ["Call", "Result"]
    assert (events[0].name, json.loads(events[0].arguments)) == ("double", {"number": 21, "loud": True})
    assert (events[1].text, events[1].failed) == ("42!", False)
    assert taken == tokens_of(f"<|user|>12<|end|>{call}42!<|end|><|answer|>42!")
    assert events[-1].calls == 1


@pytest.mark.parametrize("held", [False, True])
def test_pointers_move_inside_a_call(held):
    inside = (
        '<|call|>{"name":"double","arguments":{"number":<|right1|><|read1|>1<|right1|><|read1|>2}}<|result|>'
    )
    events, taken = play(f"{inside}<|answer|><|end|>", held=held)
    assert [type(event) for event in events[:6]] == [CommandGiven, CommandGiven, Observation] * 2
    (call,) = [event for event in events if isinstance(event, Call)]
    assert json.loads(call.arguments) == {"number": 12}
    assert text_of(events) == "24"
    made = [token for token, own in zip(taken, tools_protocol().loss_mask(taken), strict=True) if own]
    assert made == tokens_of(f"{inside}<|answer|>")


def test_an_answer_without_text_is_the_last_result():
    call = '<|call|>{"name":"double","arguments":{"number":%d}}<|result|>'
    events, _ = play(f"{call % 1}{call % 21}<|answer|><|end|>")
    assert text_of(events) == "42"
    assert text_of(play(f"{call % 21}<|answer|>so<|end|>")[0]) == "so"
    assert text_of(play("x<|answer|><|end|>")[0]) == LOST  # a message is never left without an answer
    events, _ = play(f"{call % 21}<|answer|><|right1|>", limits=Limits(steps=100))
    assert events[-1].reason == "steps"


def test_several_calls_follow_each_other():
    call = '<|call|>{"name":"double","arguments":{"number":1}}<|result|>'
    events, _ = play(f"{call}{call}x{call}<|answer|>ok<|end|>")
    assert kinds(events) == [*["Call", "Result"] * 2, "Thought", "Call", "Result", "Text", "Text", "Finish"]
    assert events[-1].calls == 3


@pytest.mark.parametrize(
    ("json_text", "said"),
    [
        ('{"name":"print","arguments":{}}', "there is no function 'print'; there are: double"),
        ('{"name":"double","arguments":{"number":"x"}}', "number: input should be a valid integer"),
        ('{"name":"double","arguments":{"number":1,"other":2}}', "other: extra inputs"),
        ('{"name":"double"}', "that is no call"),
        ('["double"]', "that is no call"),
        ("", "that is no call"),
        ('{"name":', "that is no call"),
        ("[" * 100_000, "that is no call"),
    ],
)
def test_a_wrong_call_runs_nothing_and_the_model_reads_why(json_text, said):
    events, taken = play(f"<|call|>{json_text}<|result|><|answer|>sorry<|end|>")
    result = next(event for event in events if isinstance(event, Result))
    assert result.failed
    assert said in result.text
    assert tools_protocol().decode(taken).endswith(f"{result.text}sorry")
    assert text_of(events) == "sorry"


def test_a_function_that_fails_does_not_end_the_turn():
    def fail() -> None:
        raise RuntimeError("no\nway <|end|><|answer|>")

    events, taken = play(
        '<|call|>{"name":"fail","arguments":{}}<|result|><|answer|>no<|end|>', functions=[fail]
    )
    assert events[1] == Result(events[1].tokens, "error: RuntimeError: no way <|end|><|answer|>", True)
    # What looks like special tokens is text.
    assert taken.count(tools_protocol().answer) == 1
    assert text_of(events) == "no"


class Greedy(Script):
    """Takes what the script wants where it may, else the first token that is allowed."""

    def choose(self, allowed):
        token = super().choose(allowed)
        return token if allowed[token] else int(np.flatnonzero(allowed)[0])


@pytest.mark.parametrize(
    "wanted", ["{", "[", "x", "0", "}", '"', "\\", "é", "<|answer|>", "<|read1|>", "<|end|>"]
)
def test_the_json_of_a_call_is_valid_whatever_the_model_wants(wanted):
    """The name is the model's choice; from then on the function's own schema holds."""
    given = []

    def tell(number: int, kind: str, many: list[bool]) -> None:
        given.append((number, kind, many))

    head = '<|call|>{"name":"tell","arguments":'
    events, _ = play(
        Greedy(tokens_of(head) + tokens_of(wanted)), functions=[tell], held=True, limits=Limits(steps=400)
    )
    calls = [event for event in events if isinstance(event, Call)]
    if calls:
        assert isinstance(json.loads(calls[0].arguments), dict)
        assert not events[1].failed
        assert isinstance(given[0][0], int)
    else:  # a string without end
        assert events[-1].reason == "steps" or text_of(events) == LOST


def test_without_a_function_of_that_name_any_object_is_taken_and_answered_with_an_error():
    call = '<|call|>{"name":"set_alarm","arguments":{"at":"7"}}<|result|>'
    events, _ = play(f"{call}<|answer|>I cannot.<|end|>", held=True)
    assert (events[0].name, events[0].arguments) == ("set_alarm", '{"at":"7"}')
    assert "there is no function 'set_alarm'" in events[1].text


def test_a_schema_that_no_grammar_knows_is_only_checked(monkeypatch):
    functions = Functions([double])
    functions["double"].parameters["properties"]["number"]["pattern"] = "(?=x)("
    call = '<|call|>{"name":"double","arguments":{"number":2}}<|result|>'
    functions["double"].parameters["properties"]["number"]["type"] = "string"
    events, _ = play(f"{call}<|answer|>4<|end|>", functions=functions, held=True)
    assert events[1].text == "4"


@pytest.mark.parametrize(
    ("script", "limits", "reason"),
    [
        ("<|answer|>abc", Limits(answer=10), "length"),
        ("<|right1|>", Limits(steps=100), "steps"),
        ("<|read1|>", Limits(steps=100), "steps"),
        ("x", Limits(steps=100), "steps"),
        ("<|call|>x", Limits(steps=100), "steps"),
        ("<|answer|><|read1|>", Limits(steps=100), "steps"),
        ("x", Limits(seconds=0.05), "time"),
    ],
)
def test_a_turn_without_end_is_ended(script, limits, reason):
    begin = time.monotonic()
    events, taken = play(script, limits=limits)
    assert events[-1].reason == reason
    assert kinds(events).count("Finish") == 1
    assert time.monotonic() - begin < 5
    if reason == "steps":
        assert 100 <= len(taken) - 4 <= 101
    if reason == "length":
        assert text_of(events) == "abcccccccc"


@pytest.mark.parametrize(
    ("script", "commands"),
    [("ab<|left1|><|read1|>", MOST_EDGES + 1), ("a<|right1|>", 41 * MOST_COMMANDS + 1)],
    ids=["nothing is there", "without a word"],
)
def test_a_model_that_has_lost_its_way_says_so(script, commands):
    events, _ = play(script, message="x" * 38)
    assert [event.reason for event in events if isinstance(event, Finish)] == ["lost"]
    assert text_of(events) == LOST
    assert sum(isinstance(event, CommandGiven) for event in events) in range(commands, commands + 2)


def test_so_many_calls_are_run_and_no_more():
    ran = []

    def ring() -> None:
        ran.append(1)

    call = '<|call|>{"name":"ring","arguments":{}}<|result|>'
    events, _ = play(call * 5 + "<|answer|>x<|end|>", functions=[ring], limits=Limits(calls=2))
    assert len(ran) == 2
    results = [event for event in events if isinstance(event, Result)]
    assert [result.failed for result in results] == [False, False, True, True, True]
    assert "no more than 2 calls" in results[2].text
    assert events[-1].calls == 2


def test_an_answer_that_ends_within_a_character_is_whole():
    tokens = [*tokens_of("<|answer|>a"), 0xC3]
    events, _ = play(Script(tokens), limits=Limits(answer=2))
    assert text_of(events) == "a�"


def test_a_source_that_breaks_the_protocol_is_refused():
    with pytest.raises(PararnnError, match=r"<\|edge\|> was chosen"):
        play("<|edge|>")
    with pytest.raises(PararnnError, match=r"<\|end\|> was chosen"):
        play("<|end|>")


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused():
    source = Script("<|answer|><|end|>")
    source.vocab_size = 270
    with pytest.raises(PararnnError, match="token 277, but the model has ids 0 to 269"):
        play(source)


EXTERNAL = External(
    [{"name": "alarm", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}]
)


@pytest.mark.parametrize("held", [False, True])
def test_a_call_for_somebody_else_ends_the_turn_there(held):
    call = '<|call|>{"name":"alarm","arguments":{"at":"7"}}<|result|>'
    events, taken = play(f"hm{call}<|answer|>x<|end|>", held=held, external=EXTERNAL)
    assert kinds(events) == ["Thought", "Thought", "Call", "Finish"]
    assert (events[2].name, json.loads(events[2].arguments)) == ("alarm", {"at": "7"})
    assert events[-1].reason == "tool_calls"
    # And goes on from there.
    prefix = [*taken, *tools_protocol().render_result("set")]
    source = Script("<|last1|><|read1|><|answer|>done<|end|>")
    more = list(run_turn(tools_protocol(), source, prefix, Functions(), Limits()))
    assert text_of(more) == "done"
    assert source.taken[: len(prefix)] == prefix


def test_a_call_can_be_required():
    external = External(EXTERNAL.functions, required=["alarm"])
    events, _ = play(
        Greedy('<|answer|>{"name":"other","arguments":{}}<|result|>'), held=True, external=external
    )
    assert kinds(events) == ["Call", "Finish"]
    assert events[0].name == "alarm"
    assert events[0].arguments == "{}"


def test_the_user_can_leave_at_any_time():
    source = Script("<|right1|>")
    events = run_turn(tools_protocol(), source, tokens_of("<|user|>1<|end|>"), Functions(), Limits())
    assert isinstance(next(events), CommandGiven)
    events.close()
    assert source.made == 1


def test_a_turn_without_a_finish_is_no_turn():
    events, _ = play("<|answer|><|end|>")
    assert kinds(events) == ["Text", "Finish"]
    assert isinstance(events[-1], Finish)


class Random(Script):
    """Any of the allowed tokens; special ones as often as bytes."""

    def __init__(self, seed):
        super().__init__("")
        self.random = np.random.default_rng(seed)

    def choose(self, allowed):
        choices = np.flatnonzero(allowed)
        special = choices[choices > 255]
        few = special if len(special) and self.random.random() < 0.5 else choices
        return int(self.random.choice(few))


@pytest.mark.parametrize("held", [False, True])
def test_whatever_a_model_does_the_turn_keeps_the_protocol_and_ends(held):
    """The tokens of any turn can be taken apart, and what the loop told of them fits."""
    reasons = set()
    for seed in range(40):
        source = Random(seed)
        events, taken = play(source, held=held, external=EXTERNAL, limits=Limits(steps=300, answer=5))
        finish = events[-1]
        reasons.add(finish.reason)
        whole = [*taken, tools_protocol().end] if finish.reason in ("stop", "lost") else taken
        assert finish.tokens == len(whole)
        segments = tools_protocol().split(whole)
        assert sum(tools_protocol().loss_mask(whole)) == finish.made
        answer = [token for segment in segments if segment.kind == "answer" for token in segment.tokens]
        text = tools_protocol().decode(answer)
        shown = text_of(events)
        assert shown == text or (
            text == "" and shown in [LOST, *(e.text for e in events if isinstance(e, Result))]
        )
        assert sum(segment.kind == "command" for segment in segments) == kinds(events).count("CommandGiven")
    assert {"stop", "length"} <= reasons
