"""Inputs of hypothesis: what its strategies make of real ones is read, or refused as it should be."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pararnn.cli import chat_commands
from tests.fuzz.changes import VALUES
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

LEAVES = st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def inputs(draw: st.DrawFn, target: Target) -> bytes:
    """One of the target's inputs: its JSON with other values, or its bytes in pieces among its words."""
    seed = draw(st.sampled_from(target.seeds))
    content, put_back = target.inside(seed) if target.inside else (seed, lambda changed: changed)
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if isinstance(value, dict | list):
        for _ in range(draw(st.integers(1, 3))):
            value = draw(otherwise(value))
        return put_back(json.dumps(value).encode())
    begin, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    words = [st.sampled_from(target.words)] if target.words else []
    pieces = st.one_of(*words, st.binary(max_size=8), st.text(max_size=8).map(str.encode))
    return put_back(content[:begin] + b"".join(draw(st.lists(pieces, max_size=6))) + content[end:])


@st.composite
def otherwise(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value, one part of which is another, is absent, or has another name."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 0:
        return draw(JSON)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, copy = draw(st.sampled_from(keys)), value.copy()
    how = draw(st.sampled_from(("another", "another", "absent", "named")))
    if how == "absent":
        del copy[key]
    elif how == "named" and isinstance(value, dict):
        copy[draw(st.text(max_size=8))] = copy.pop(key)
    else:
        copy[key] = draw(otherwise(value[key]))
    return copy


@pytest.mark.parametrize(
    "name", ["config", "tokenizer", "tokenizer-files", "state", "template", "commands", "bodies", "training"]
)
def test_it_is_read_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_commands, "watched", chat_commands.watched)  # which a target changes
    target = TARGETS[name](tmp_path)

    @settings(max_examples=40, deadline=None)
    @given(inputs(target))
    def run(data):
        target.run(data)

    run()
