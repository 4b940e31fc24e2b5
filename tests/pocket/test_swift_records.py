"""Turns, grammars and calculations that the Swift package is held to: what Python makes of them today.

`python -m tests.pocket.test_swift_records` writes the files of RECORDS in tests/data/tools again.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.loop import Limits, run_turn
from mlx_pararnn.pocket.misread import check_answer, instead, instead_of_answer
from mlx_pararnn.pocket.protocol import tokenizer_files
from mlx_pararnn.pocket.standard import calculate
from mlx_pararnn.text.grammars import Grammars, allowed_tokens
from tests.support.scripted import Script, as_recorded, tokens_of, tools_protocol, tools_tokenizer

FOLDER = Path(__file__).parents[1] / "data/tools"
RESULT_BYTES = 64
GREET = '<|call|>{"name":"greet","arguments":{"name":"Zo\\u001f\\"ë 日"}}<|result|>'
DOUBLE = '<|call|>{"name":"double","arguments":{"number":-21}}<|result|>'
# Name, message, what the model makes, limits.
TURNS = [
    ("two calls", "hé", f"<|last1|>a{DOUBLE}<|left1|><|read1|>{GREET}<|answer|>ok<|end|>", {}),
    ("a call with every argument", "x", '<|call|>{"name":"greet","arguments":{"name":"","polite":true,'
     '"tone":"warm"}}<|result|><|answer|><|end|>', {}),
    ("commands inside a call", "21", '<|call|>{"na<|right1|>me":"<|read1|>double","arguments":{"number":'
     '<|read1|>2<|right1|><|read1|>1}<|last4|>}<|result|><|answer|><|read1|>4<|end|>', {}),
    ("an error as text", "x", '<|call|>{"name":"fail","arguments":{"reason":"no such day"}}<|result|>'
     "<|answer|><|end|>", {}),
    ("a function that is not there", "x", '<|call|>{"name":"os.system","arguments":{"command":["rm",{"a":'
     '-1.5e+3,"b":null}]}}<|result|><|answer|>no<|end|>', {}),
    ("a result that is too long", "x", '<|call|>{"name":"repeat","arguments":{"count":40}}<|result|>'
     "<|answer|><|end|>", {}),
    ("no more calls", "x", f"{DOUBLE}{DOUBLE}<|answer|>a<|end|>", {"calls": 1}),
    ("no call at all", "tell me a joke", "<|answer|>I can do sums.<|end|>", {}),
    ("a long answer", "x", "<|answer|>abcdé", {"answer": 5}),
    ("too many steps", "x", "<|right1|>", {"steps": 7}),
    ("too many steps after a read", "x", "<|read1|>", {"steps": 4}),
    ("too many steps in a call", "x", f"a{DOUBLE}", {"steps": 20}),
    ("nothing is there", "x", "ab<|left1|>" + "<|read1|>" * 8, {}),
    ("no time", "x", "a", {"seconds": -1.0}),
    ("nothing said", "x", "<|answer|><|end|>", {}),
]  # fmt: skip
# Bytes that are no text, in a thought and in the answer.
BROKEN = [0xC3, 0xC3, 0xA9, 0xE6, 0x97, 258, 0xFF, 0xF0, 0x9F, 0x98, 0x41, 0xED, 0xA0, 0x80, 0xE2, 0x82, 257]


def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def greet(name: str, polite: bool = False, tone: Literal["warm", "short"] = "short") -> str:
    """Greet somebody."""
    return f"{'dear ' if polite else ''}{name}, {tone}"


def fail(reason: str) -> str:
    """Fail."""
    raise PararnnError(reason)


def repeat(count: int) -> str:
    """A long text."""
    return "é" * count


def turns():
    protocol = tools_protocol()
    functions = Functions([double, greet, fail, repeat], result_bytes=RESULT_BYTES)
    made = [(name, message, tokens_of(script), limits) for name, message, script, limits in TURNS]
    made.append(("bytes that are no text", "x", BROKEN, {}))
    found = []
    for name, message, tokens, limits in made:
        source = Script(tokens)
        turn = run_turn(
            protocol,
            source,
            protocol.render_message(message),
            functions,
            Limits(**limits),
            grammars=Grammars(tools_tokenizer(), source.vocab_size),
        )
        events = list(turn)
        found.append(
            {
                "name": name,
                "message": message,
                "limits": limits,
                "made": tokens,
                "read": source.taken,
                "events": [as_recorded(event) for event in events],
            }
        )
    return {
        "result_bytes": RESULT_BYTES,
        "functions": [
            {"name": f.name, "description": f.description, "parameters": f.parameters} for f in functions
        ],
        "turns": found,
    }


def _object(properties, required=()):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


# A schema, and texts that a model writes for it, with the brace that closes the call.
CALLS = [
    (
        _object(
            {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"enum": ["x", "yy", "é", 'q"q']}}, ["a"]
        ),
        ['{"a":-12,"b":"h\\n\\u001f\\u007f\\\\é","c":"yy"}}', '{"a":0,"c":"é"}}', '{"a":7}}'],
    ),
    (_object({"n": {"type": "number"}}), ['{"n":-0.5e+3}}', '{"n":12E3}}', "{}}"]),
    (
        _object({"s": {"type": "string"}}),
        ['{"s":"\u00e9 \u0800 \u65e5 \ud7ff \ue000 \ufffd \U00010000 \U0001f600 \U0010ffff"}}'],
    ),
    (_object({}), ["{}}"]),
    ({"type": "object"}, ['{"k":[1,{},[]],"z":null,"t":[true,false,"x"],"n":{"a":-1.5}}}', "{}}"]),
    (
        _object(
            {
                "l": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
                "m": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
            }
        ),
        ['{"l":[true,false],"m":"aé"}}', '{"m":null}}', '{"l":[false]}}'],
    ),
    (
        _object({"m": {"type": "array", "items": {"type": "integer"}, "maxItems": 1}}),
        ['{"m":[]}}', '{"m":[1]}}'],
    ),
    (_object({"s": {"type": "string", "minLength": 2, "maxLength": 3}}), ['{"s":"\\né日"}}']),
    (
        {"anyOf": [_object({"a": {"type": "integer"}}, ["a"]), _object({"b": {"const": "x"}}, ["b"])]},
        ['{"a":1}}', '{"b":"x"}}'],
    ),
]


def calls():
    grammars = Grammars(tools_tokenizer(), Script.vocab_size)
    found = []
    for schema, texts in CALLS:
        for text in texts:
            matcher = grammars.compile(grammars.call_arguments(schema))
            allowed = []
            for byte in text.encode():
                allowed.append(_hexadecimal(allowed_tokens(matcher, Script.vocab_size)))
                assert matcher.consume_token(byte), (schema, text, chr(byte))
            assert matcher.is_stopped(), (schema, text)
            found.append({"schema": json.dumps(schema, ensure_ascii=False), "text": text, "allowed": allowed})
    return found


def _hexadecimal(allowed):
    """The 256 bytes as bits, byte 0 being the lowest."""
    assert not allowed[256:].any()
    return f"{sum(1 << int(byte) for byte in allowed.nonzero()[0]):x}"


def tokenizer():
    made = json.loads(tokenizer_files()["tokenizer.json"])
    made["pre_tokenizer"]["trim_offsets"] = False  # as asked for, which tokenizers 0.22 does not hear
    return made


def functions():
    """What the functions of an assistant say, one after another, what the calculator computes, and for which
    messages none is called.

    The questions are those of the file.
    """
    recorded = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))
    now = datetime.fromisoformat(recorded["now"])
    assistant = Assistant(now=lambda: now)
    said = Functions(assistant.functions())
    for call in recorded["calls"]:
        outcome = said.call(call["name"], json.dumps(call["arguments"], ensure_ascii=False))
        call |= {"text": outcome.text, "failed": outcome.failed}
    for one in recorded["expressions"]:
        try:
            one["value"] = calculate(one["expression"])
        except ValueError:
            one["value"] = None
    for one in recorded["requests"]:
        one["instead"] = instead(one["message"], one["function"], one.get("arguments", "{}"))
    for one in recorded["cancels"]:
        one["instead"] = assistant.instead(one["message"], one["function"], one.get("arguments", "{}"))
    for one in recorded["misread"]:
        one["said"] = instead_of_answer(one["message"])
    for one in recorded["answers"]:
        one["instead"] = check_answer(one["message"])(one["said"], one["isAll"])
    return recorded


def memory():
    """What an assistant remembers after some calls, as text, and what it says as time goes on."""
    now = datetime(2026, 6, 1, 12, 0, 0, 250000)
    clock = [now]
    assistant = Assistant(now=lambda: clock[0])
    said = Functions(assistant.functions())
    calls = [
        ("set_timer", {"duration": "5 minutes"}),
        ("set_timer", {"duration": "an hour", "name": "pasta"}),
        ("set_alarm", {"time": "7 pm"}),
        ("set_reminder", {"text": "call José", "time": "3 pm"}),
        ("set_reminder", {"text": 'say "hi"'}),
        ("add_to_list", {"items": "milk, eggs and bread", "list": "Shopping"}),
        ("add_to_list", {"items": "laundry"}),
    ]
    for name, arguments in calls:
        assert not said.call(name, json.dumps(arguments)).failed
    begun, later = assistant.memory(), []
    for seconds in (299, 1, 3600, 4 * 3600, 86400):
        clock[0] += timedelta(seconds=seconds)
        later.append({"now": clock[0].isoformat(), "due": assistant.due(), "memory": assistant.memory()})
    assistant.recall(begun)
    later.append({"now": clock[0].isoformat(), "due": assistant.due(), "memory": assistant.memory()})
    recorded = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"now": now.isoformat(), "calls": recorded, "memory": begun, "later": later}


RECORDS = {
    "turns.json": turns,
    "calls.json": calls,
    "tokenizer.json": tokenizer,
    "functions.json": functions,
    "memory.json": memory,
}


@pytest.mark.parametrize("name", RECORDS)
def test_what_swift_is_held_to_is_what_python_makes(name):
    assert json.loads((FOLDER / name).read_text(encoding="utf-8")) == RECORDS[name]()


def test_python_recalls_what_swift_writes():
    """Swift's text has no spaces and characters as they are; its tests compare it with this one."""
    for moment in (memory(), *memory()["later"]):
        if moment["memory"]:
            compact = json.dumps(json.loads(moment["memory"]), ensure_ascii=False, separators=(",", ":"))
            assistant = Assistant()
            assistant.recall(compact)
            assert assistant.memory() == moment["memory"]


if __name__ == "__main__":
    for name, make in RECORDS.items():
        text = json.dumps(make(), ensure_ascii=False, separators=(",", ":"))
        (FOLDER / name).write_text(text + "\n", encoding="utf-8")
