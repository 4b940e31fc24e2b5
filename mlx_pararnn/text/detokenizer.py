"""Tokens to text, one at a time: the text before a token never changes and is never decoded again.

A byte-level tokenizer's token is a string of bytes, and so is a byte-fallback token (`<0xE2>`): these go
through an incremental UTF-8 decoder, which holds a character back until it is whole. Any other token's text
is what it adds to the decoded token before it, because decoders treat the first token of a text differently.
Either way the time a token takes does not depend on how many came before it.
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer
from tokenizers import pre_tokenizers

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# A character takes at most four bytes, so the tokens before the last four cannot hold the start of one.
CONTEXT = 4


class Detokenizer(StreamingDetokenizer):
    """The text of generated tokens: prompt and text, one after the other, are what decodes from all tokens.

    Two things are not as the tokenizer decodes the whole, since text that was given cannot be taken back.
    Where the prompt ends within a character, the text begins with that character, whole. And bytes that are
    no UTF-8 become U+FFFD one by one as in `bytes.decode`, whereas the decoders of byte-fallback tokenizers
    replace every byte token that joins them, whole characters too.

    It is one of MLX-LM's detokenizers: `add_token`, `last_segment`, and `finalize` at the end.

    Args:
        tokenizer: transformers' or MLX-LM's.
        context: the token ids that came before the first, the prompt's; its last few are enough.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokens = Tokens(tokenizer)
        self._context = [int(token) for token in context[-CONTEXT:]]
        self.reset()

    def reset(self) -> None:
        """Begin a new text, after the same context."""
        self.tokens: list[int] = []
        self.offset = 0
        self._parts: list[str] = []
        self._taken = 0  # parts that last_segment has given
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: int | None = None
        for token in self._context:
            self._next(token)
        # What the context's text ends with if it ends within a character.
        self._replaced = self._utf8.getstate()[0].decode(errors="replace")

    def add_token(self, token: int) -> None:
        """Read one more token."""
        self.tokens.append(token)
        self._add(self._next(token))

    def finalize(self) -> None:
        """The text is complete: a character that is not is replaced."""
        self._add(self._utf8.decode(b"", final=True))

    def _add(self, text: str) -> None:
        if text:
            self._parts.append(text.removeprefix(self._replaced))
            self._replaced = ""

    @property
    def text(self) -> str:  # type: ignore[override]
        """The text so far."""
        return "".join(self._parts)

    @property
    def last_segment(self) -> str:
        """The text since the last time this was asked for."""
        segment = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        self.offset += len(segment)
        return segment

    def _next(self, token: int) -> str:
        some_bytes = self._tokens.as_bytes(token)
        before, self._before = self._before, token
        if some_bytes == b" " and before is None:  # decoders may drop a space that a text begins with
            return self._tokens.added_text(None, token)
        if some_bytes is not None:
            return self._utf8.decode(some_bytes)
        broken = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return broken + self._tokens.added_text(before, token)


class StopMatcher:
    """Cuts a text, given in pieces, before the stop string that is complete first.

    Of several that end at one character the longest counts. Text that may be the beginning of a stop string
    is held back.

    Attributes:
        found: the stop string, once one has come; nothing more is given then.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [word for word in stop if word]
        self._borders = [_borders(word) for word in self._stop]
        self._matched = [0] * len(self._stop)  # how many characters of each the text ends with
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What of the text so far is known not to belong to a stop string and was not given yet."""
        if self.found is not None:
            return ""
        begin = len(self._held)
        text = self._held + text
        for end in range(begin, len(text)):
            self.found = self._advance(text[end])
            if self.found is not None:
                self._held = ""
                return text[: end + 1 - len(self.found)]
        safe = len(text) - max(self._matched, default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The text held back, when no more comes."""
        text, self._held = self._held, ""
        self._matched = [0] * len(self._stop)
        return text

    def _advance(self, character: str) -> str | None:
        """The longest stop string that ends with this character, if one does (Knuth, Morris and Pratt)."""
        found: str | None = None
        for i, (word, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
            length = self._matched[i]
            while length and word[length] != character:
                length = borders[length - 1]
            length += word[length] == character
            if length == len(word):
                found = max(found or "", word, key=len)
                length = borders[length - 1]
            self._matched[i] = length
        return found


def _borders(word: str) -> list[int]:
    """Of each beginning of a word, the longest proper beginning that it also ends with."""
    borders, length = [0], 0
    for character in word[1:]:
        while length and word[length] != character:
            length = borders[length - 1]
        length += word[length] == character
        borders.append(length)
    return borders


class Tokens:
    """What single tokens of a tokenizer stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoders = [] if backend is None or backend.decoder is None else _kinds(backend.decoder)
        self._byte_level = decoders == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in decoders or backend is None

    def bytes_in_text(self, token: int) -> bytes:
        """The bytes that a token stands for inside a text; those of a text's tokens join to its UTF-8."""
        some_bytes = self.as_bytes(token)
        return self.added_text(token, token).encode() if some_bytes is None else some_bytes

    def as_bytes(self, token: int) -> bytes | None:
        """The token's bytes if it is made of bytes, whole characters or not; None if it is text."""
        if not (self._byte_level or self._byte_fallback):
            return None
        name = self._tokenizer.convert_ids_to_tokens(token)
        if self._byte_level:
            if name is None:  # a vocabulary padded with ids that the tokenizer does not know
                return b""
            if not all(character in BYTES for character in name):  # an added token, which stands for itself
                return str(name).encode()
            return bytes(BYTES[character] for character in name)
        match = BYTE_TOKEN.fullmatch(name or "")
        return bytes([int(match[1], 16)]) if match else None

    def added_text(self, before: int | None, token: int) -> str:
        """What `token` adds to the text that ends with the token `before`."""
        if before is None:
            return self._decode([token])
        return self._decode([before, token])[len(self._decode([before])) :]

    def _decode(self, tokens: list[int]) -> str:
        # Cleaning up drops the space before punctuation, once it is known what follows it.
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _kinds(decoder: Any) -> list[str]:
    """The types of a decoder of the tokenizers library, in the order in which they work."""
    description = json.loads(decoder.__getstate__())
    return [part["type"] for part in description.get("decoders", [description])]


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's), turned round."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert alphabet.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


BYTES = _byte_alphabet()
