"""Calls of tools that a model writes and no client could read stay text."""

import json

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, pythonic
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mlx_pararnn.chat.server.choices import MessageParser


def parsed(parser, call):
    inner = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    start, end = parser.tool_call_start, parser.tool_call_end
    tokenizer = TokenizerWrapper(
        inner, tool_parser=parser.parse_tool_call, tool_call_start=start, tool_call_end=end
    )
    part = MessageParser(tokenizer, [], False).add(f"a{start}{call}{end}b", last=True)
    json.dumps(part.delta(), ensure_ascii=False, allow_nan=False).encode()  # as responses are written
    return part


@pytest.mark.parametrize(
    "call",
    [
        '{"name": 1, "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {}, "id": "\\ud800"}',
        '"f"',
    ],
)
def test_what_is_no_call_is_told_as_text(call):
    part = parsed(json_tools, call)
    assert (part.content, part.calls) == (f"a{call}b", [])
    part = parsed(pythonic, "[f(a={1})]")  # a set, which JSON does not have
    assert (part.content, part.calls) == ("a[f(a={1})]b", [])


def test_a_call_keeps_its_own_id_where_that_is_text():
    (call,) = parsed(json_tools, '{"name": "f", "arguments": {"a": "é"}, "id": "x"}').calls
    assert (call["id"], call["function"]) == ("x", {"name": "f", "arguments": '{"a": "é"}'})
    (call,) = parsed(json_tools, '{"name": "f", "arguments": {}, "id": 5}').calls
    assert call["id"].startswith("call_")
