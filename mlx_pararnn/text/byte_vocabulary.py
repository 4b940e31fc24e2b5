"""The tokens of a byte-level tokenizer as strings of bytes: a text's, and those that can go on from it."""

from bisect import bisect_left, bisect_right
from copy import copy
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import PararnnError
from ..mlx_lm_internals import plain_tokenizer
from .detokenizer import Tokens

_PROBE = "x\n é"


class ByteVocabulary:
    """The tokens of one tokenizer that a model has.

    Args:
        tokenizer: transformers' or MLX-LM's, byte-level.
        size: the model's vocabulary.

    Attributes:
        bytes: of each token, (V,); b"" of one that is no text: the end of a text, padding of the vocabulary.

    Raises:
        PararnnError: the bytes of this tokenizer's tokens are not those of the text.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        plain = plain_tokenizer(tokenizer)
        backend = getattr(plain, "backend_tokenizer", None)
        tokens = Tokens(plain)
        if backend is None or any(tokens.as_bytes(token) is None for token in range(size)):
            raise PararnnError(_unfit(tokenizer))
        self._name = tokenizer
        self._backend = copy(backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.normalizer = None
        self._backend.encode_special_tokens = True  # a file that names one has not come to its end
        added = self._backend.get_added_tokens_decoder()
        special = {token for token, description in added.items() if description.special}
        self.bytes = [b"" if token in special else tokens.as_bytes(token) or b"" for token in range(size)]
        order = sorted((name, token) for token, name in enumerate(self.bytes) if name)
        self._names = [name for name, _ in order]
        self._ids = np.array([token for _, token in order], np.int64)
        self._of_bytes = all(len(name) <= 1 for name in self.bytes)
        self.encode(_PROBE.encode())

    @property
    def beginning(self) -> list[int]:
        """The tokens that this tokenizer puts before every text."""
        encoded = self._backend.encode("x")
        return list(encoded.ids[: encoded.word_ids.index(0)])

    def encode(self, text: bytes) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text, UTF-8, and of each of its words, which are made into tokens one by one, where
        it begins: in bytes, and in tokens.

        Raises:
            PararnnError: their bytes are not the text's.
        """
        encoded = self._backend.encode(text.decode(), add_special_tokens=False)
        ids, words = encoded.ids, encoded.word_ids
        names = [self.bytes[token] if token < len(self.bytes) else b"" for token in ids]
        if b"".join(names) != text:
            raise PararnnError(_unfit(self._name))
        if self._of_bytes:  # each is a word, but for those of one character
            return ids, [(place, place) for place, byte in enumerate(text) if byte & 0xC0 != 0x80]
        places = accumulate(map(len, names), initial=0)
        begins = [
            (place, index)
            for index, (place, word) in enumerate(zip(places, words, strict=False))
            if index == 0 or word != words[index - 1]
        ]
        return ids, begins

    def beginning_with(self, text: bytes) -> np.ndarray:
        """The tokens that begin with a text, or are that text."""
        first = bisect_left(self._names, text)
        last = bisect_right(self._names, text, lo=first, key=lambda name: name[: len(text)])
        return self._ids[first:last]

    def within(self, text: bytes) -> list[int]:
        """The tokens that a text begins with, and does not end with."""
        found = []
        for length in range(1, len(text)):
            place = bisect_left(self._names, text[:length])
            if place < len(self._names) and self._names[place] == text[:length]:
                found.append(int(self._ids[place]))
        return found


def _unfit(tokenizer: Any) -> str:
    return (
        f"text cannot be completed with the tokenizer of {tokenizer.name_or_path}: it is not byte-level or "
        "changes what it reads; take a model with one as mlx-pararnn train --tokenizer bpe:2048 makes"
    )
