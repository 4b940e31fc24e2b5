"""Grammars that generated text must keep, for one tokenizer: JSON schemas and calls of functions."""

import json
import math
from collections.abc import Iterator
from copy import copy
from decimal import Decimal
from functools import lru_cache
from typing import Any, cast

import llguidance
import mlx.core as mx
import numpy as np

from ..errors import PararnnError, one_line
from ..mlx_lm_internals import plain_tokenizer

MOST_MULTIPLE = 10_000  # llguidance takes some 50 ms for it, and the time grows with its square
LONGEST_FORMAT = 64  # characters of a name that are looked up, and kept; none that is known has so many


class Grammars:
    """Compiles grammars for one tokenizer, when first asked for."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: llguidance.LLTokenizer | None = None

    def json(self, schema: dict[str, Any]) -> str:
        """The grammar of JSON texts that fit a schema, without spaces between their parts."""
        text = _schema_text(prepared(schema))
        try:
            return str(
                llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
            )
        except ValueError as error:  # nested more deeply than its parser goes
            raise PararnnError(f"the schema cannot be kept to ({one_line(error)})") from error

    def calls(self, functions: list[dict[str, Any]], start: str, end: str, required: bool) -> str:
        """The grammar of text with calls of tools in it, or of one call and nothing else.

        Args:
            functions: OpenAI's: name, parameters.
            start, end: what stands around a call.
            required: whether the answer must be a call.
        """
        bodies = []
        for n, function in enumerate(functions):
            parameters = function.get("parameters") or {"type": "object"}
            place = f"#/anyOf/{n}/properties/arguments"
            properties = {"name": {"const": function["name"]}, "arguments": prepared(parameters, place)}
            body = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
            bodies.append({**body, "additionalProperties": False})
        first, last = (tag if self._is_special(tag) else json.dumps(tag) for tag in (start, end))
        any_call = _schema_text({"anyOf": bodies, "x-guidance": {"whitespace_flexible": False}})
        tool = f'tool: {first} "\\n"? call "\\n"? {last}\ncall: %json {any_call}\n'
        if required:
            return f"start: tool\n{tool}"
        if self._is_special(start):  # no text of a grammar matches it, so a call is the end of a text
            return f"start: (TEXT? tool)* TEXT?\nTEXT: /(.|\\n)+/\n{tool}"
        tag = llguidance.StructTag(
            trigger=start, begin=start, grammar=any_call, end="" if self._is_special(end) else end
        )
        return str(llguidance.StructTag.to_grammar([tag], assume_special=False))

    def compile(self, grammar: str) -> "llguidance.LLMatcher":
        """A matcher at the beginning of an answer.

        Raises:
            PararnnError: the grammar, or this tokenizer, cannot be used.
        """
        matcher = llguidance.LLMatcher(self._tokens(), grammar, log_level=0)
        if matcher.is_error():
            raise PararnnError(f"the schema cannot be kept to ({_reason(matcher)})")
        return matcher

    def _tokens(self) -> "llguidance.LLTokenizer":
        try:
            if self._compiled is None:
                self._compiled = self._for_llguidance()
        except Exception as error:
            raise PararnnError(f"this model's tokenizer cannot keep to a grammar ({error})") from error
        return self._compiled

    def _is_special(self, tag: str) -> bool:
        """Whether llguidance takes it for one special token, which no text of a grammar matches.

        It takes `<tool_call>` for one wherever it was added to a vocabulary, special for transformers or not.
        """
        tokens = self._tokenizer.encode(tag, add_special_tokens=False)
        return len(tokens) == 1 and bool(self._tokens().is_special_token(tokens[0]))

    def _for_llguidance(self) -> "llguidance.LLTokenizer":
        """As `llguidance.hf` makes it, which imports transformers."""
        tokenizer = plain_tokenizer(self._tokenizer)
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return llguidance.LLTokenizer(
            backend.to_str(), n_vocab=self._vocab_size, eos_token=tokenizer.eos_token_id
        )

    def call_name(self, names: list[str] | None = None) -> str:
        """The grammar of a call's JSON up to its arguments, as the protocol of tools has it.

        Args:
            names: the functions to choose from; None for any name.
        """
        choice = "/[A-Za-z0-9_.-]{1,64}/"
        if names is not None:
            choice = " | ".join(json.dumps(json.dumps(name)[1:-1]) for name in names)
        before, after = json.dumps('{"name":"'), json.dumps('","arguments":')
        return f"start: {before} NAME {after}\nNAME: {choice}\n"

    def call_arguments(self, schema: dict[str, Any]) -> str:
        """The grammar of the rest: arguments that fit a schema, without spaces, and the closing brace."""
        compact = {**prepared(schema), "x-guidance": {"whitespace_flexible": False}}
        return f'start: arguments "}}"\narguments: %json {_schema_text(compact)}\n'


class GrammarProcessor:
    """Lets a row choose only tokens that its grammar allows; a logits processor.

    Args:
        matcher: at the beginning of an answer; nobody else's.
        prompt_length: how many tokens stand before the answer.
    """

    def __init__(self, matcher: "llguidance.LLMatcher", prompt_length: int) -> None:
        self._matcher, self._read = matcher, prompt_length

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits (1, V), -inf where the grammar does not allow a token; `tokens` are prompt and answer.

        Raises:
            PararnnError: no token of the tokenizer can follow.
        """
        fresh = cast(list[int], tokens[self._read :].tolist())
        self._read += len(fresh)
        for token in fresh:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise PararnnError(f"the grammar cannot be kept to ({_reason(self._matcher)})")
        if self._matcher.is_stopped():
            return logits
        allowed = allowed_tokens(self._matcher, logits.shape[-1])
        if not allowed.any():
            raise PararnnError("the grammar cannot be kept to (no token of this model can follow)")
        return mx.where(mx.array(allowed), logits, -mx.inf)


def prepared(schema: dict[str, Any], place: str = "#") -> dict[str, Any]:
    """A schema as answers are held to it.

    Formats that llguidance does not know are left out: for JSON Schema they are comments. An object whose
    names are listed has no others unless the schema speaks of them, so that a weak model ends it; all that is
    said then still fits.

    Args:
        schema: a JSON schema.
        place: where in a larger schema it will stand; references to its own parts are moved there.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, inner in value.items():
            if name == "format" and isinstance(inner, str) and not _is_known_format(inner[:LONGEST_FORMAT]):
                continue
            if name == "$ref" and isinstance(inner, str) and (inner == "#" or inner.startswith("#/")):
                inner = place + inner[1:]
            kept[name] = inner if name in ("const", "enum", "default", "examples") else walk(inner)
        if closing and _has_listed_names(value):
            kept["additionalProperties"] = False
        return kept

    try:
        closing = not _is_combined(schema)
        return walk(schema)  # type: ignore[no-any-return]
    except RecursionError:
        raise PararnnError("the schema is nested too deeply") from None


def _schema_text(schema: dict[str, Any]) -> str:
    multiples = [*_multiples(schema)]
    if math.lcm(1, *multiples) > MOST_MULTIPLE or sum(multiples) > 10 * MOST_MULTIPLE:
        raise PararnnError(
            "the schema cannot be kept to (the numbers under its multipleOf have a common multiple above "
            f"{MOST_MULTIPLE:,}, or there are too many of them)"
        )
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise PararnnError("the schema holds NaN or an infinite number, which JSON does not have") from None


def _multiples(value: Any) -> Iterator[int]:
    """The numbers under multipleOf as whole ones: the automaton of what fits has about so many states.

    A decimal is taken times a power of ten, and a power of ten is as 1.
    """
    if isinstance(value, list):
        for item in value:
            yield from _multiples(item)
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if name == "multipleOf" and type(inner) in (int, float) and math.isfinite(inner):
            _, digits, exponent = Decimal(str(inner)).as_tuple()
            significant = "".join(map(str, digits)).rstrip("0") or "0"
            zeros = len(digits) - len(significant) + cast(int, exponent)
            yield int(significant) * 10 ** (max(zeros, 0) if significant != "1" else 0)
        else:
            yield from _multiples(inner)


def _reason(matcher: "llguidance.LLMatcher") -> str:
    """What llguidance says of an error, without the state that it adds."""
    return (matcher.get_error() or "unknown").splitlines()[0]


def _is_combined(value: Any) -> bool:
    """Whether one object of a schema is described in several places, each with names of its own."""
    if isinstance(value, list):
        return any(map(_is_combined, value))
    if not isinstance(value, dict):
        return False
    described = "properties" in value and not value.keys().isdisjoint({"$ref", "anyOf", "oneOf", "if"})
    return "allOf" in value or described or any(map(_is_combined, value.values()))


def _has_listed_names(schema: dict[str, Any]) -> bool:
    """Whether a schema lists an object's names, the required ones among them, and says nothing of others."""
    names, required = schema.get("properties"), schema.get("required", [])
    others = {"additionalProperties", "patternProperties", "minProperties", "unevaluatedProperties"}
    return (
        isinstance(names, dict)
        and schema.get("type") == "object"
        and isinstance(required, list)
        and set(map(str, required)) <= names.keys()
        and others.isdisjoint(schema)
    )


@lru_cache(maxsize=1024)
def _is_known_format(name: str) -> bool:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    return not llguidance.LLMatcher.validate_grammar(grammar)


def allowed_tokens(matcher: "llguidance.LLMatcher", vocab_size: int) -> np.ndarray:
    """Of each token (V,), whether the grammar allows it next."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
