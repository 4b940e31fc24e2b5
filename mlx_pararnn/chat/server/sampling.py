"""How a request's tokens are chosen: samplers, penalties, and grammars that an answer must keep."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import llguidance
import llguidance.hf
import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc, make_sampler

from ...errors import PararnnError


@lru_cache(maxsize=256)
def shared_sampler(
    temp: float, xtc_special_tokens: tuple[int, ...] = (), **settings: Any
) -> Callable[[mx.array], mx.array]:
    """MLX-LM's sampler; one object for equal settings, for rows that share one are sampled together."""
    return make_sampler(temp, xtc_special_tokens=list(xtc_special_tokens), **settings)


class SeededSampler:
    """A sampler whose choice depends on the seed, the position and the logits alone, not on other rows.

    Attributes:
        position: how many tokens it has chosen; set back where a row is read again.
    """

    def __init__(
        self,
        seed: int,
        *,
        temp: float,
        top_p: float,
        top_k: int,
        min_p: float,
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        xtc_special_tokens: tuple[int, ...] = (),
    ) -> None:
        self._seed, self._temp = seed, temp
        self._top_p, self._top_k, self._min_p = top_p, top_k, min_p
        self._xtc = xtc_probability, xtc_threshold, list(xtc_special_tokens)
        self.position = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Tokens (B,) for log probabilities (B, V)."""
        # Multiplied by an odd constant the positions of neighbouring seeds do not meet.
        key = mx.random.key((self._seed + self.position * 0x9E3779B97F4A7C15) % 2**64)
        self.position += 1
        gate, key = mx.random.split(key)
        if 0 < self._top_p < 1:
            logprobs = apply_top_p(logprobs, self._top_p)
        if self._min_p > 0:
            logprobs = apply_min_p(logprobs, self._min_p)
        probability, threshold, special = self._xtc
        if probability > 0 and cast(float, mx.random.uniform(key=gate).item()) < probability:
            logprobs = apply_xtc(logprobs, 1.0, threshold, special)
        if self._top_k > 0:
            logprobs = apply_top_k(logprobs, self._top_k)
        return mx.random.categorical(logprobs * (1 / self._temp), key=key)


class Grammars:
    """Compiles grammars for one tokenizer, when first asked for."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: llguidance.LLTokenizer | None = None

    def json(self, schema: dict[str, Any]) -> str:
        """The grammar of JSON texts that fit a schema, without spaces between their parts."""
        return str(
            llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
        )

    def calls(self, functions: list[dict[str, Any]], start: str, end: str, required: bool) -> str:
        """The grammar of text with calls of tools in it, or of one call and nothing else.

        Args:
            functions: OpenAI's: name, parameters.
            start, end: what stands around a call.
            required: whether the answer must be a call.
        """
        bodies = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": function.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in functions
        ]
        special = start in self._tokenizer.all_special_tokens
        first, last = (tag if special else json.dumps(tag) for tag in (start, end))
        any_call = json.dumps({"anyOf": bodies, "x-guidance": {"whitespace_flexible": False}})
        if required:
            return f'start: {first} "\\n"? call "\\n"? {last}\ncall: %json {any_call}\n'
        tag = llguidance.StructTag(trigger=start, begin=start, grammar=any_call, end="" if special else end)
        return str(llguidance.StructTag.to_grammar([tag], assume_special=special))

    def compile(self, grammar: str) -> "llguidance.LLMatcher":
        """A matcher at the beginning of an answer.

        Raises:
            PararnnError: the grammar, or this tokenizer, cannot be used.
        """
        try:
            if self._compiled is None:
                self._compiled = llguidance.hf.from_tokenizer(
                    getattr(self._tokenizer, "_tokenizer", self._tokenizer), n_vocab=self._vocab_size
                )
        except Exception as error:
            raise PararnnError(f"this model's tokenizer cannot keep to a grammar ({error})") from error
        matcher = llguidance.LLMatcher(self._compiled, grammar, log_level=0)
        if matcher.is_error():
            said = matcher.get_error().splitlines()[0] if matcher.get_error() else "unknown"
            raise PararnnError(f"the schema cannot be kept to ({said})")
        return matcher


class GrammarProcessor:
    """Lets a row choose only tokens that its grammar allows; a logits processor."""

    def __init__(self, matcher: "llguidance.LLMatcher", prompt_length: int) -> None:
        self._matcher, self._read = matcher, prompt_length

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits (1, V), -inf where the grammar does not allow a token; `tokens` are prompt and answer."""
        fresh = cast(list[int], tokens[self._read :].tolist())
        self._read += len(fresh)
        for token in fresh:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise PararnnError(f"the grammar cannot be kept to ({self._matcher.get_error()})")
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
        if not allowed.any():
            return logits
        return mx.where(mx.array(allowed), logits, -mx.inf)
