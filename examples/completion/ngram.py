"""What a model is measured against: an n-gram over the same tokens, in as many bytes as the model's file.

Interpolated absolute discounting (Ney, Essen, Kneser 1994) over up to 5 tokens; the most frequent sequences
are kept. Counted at 4 bytes for each kept sequence, next token and share together, and for each context;
files of n-gram models take rather more.
"""

from typing import Any

import numpy as np

ORDER = 5  # tokens of a sequence: 5 of 12 bits in one number
BITS = 12
DISCOUNT = 0.75
SEQUENCE_BYTES = CONTEXT_BYTES = 4


class NGram:
    """Probabilities of the next token.

    Args:
        tokens: of all texts, with an end token between, (N,) below 4,096.
        size: bytes that it may take.
        vocab_size: how many tokens there are.
    """

    def __init__(self, tokens: np.ndarray, size: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        if vocab_size > 1 << BITS or size < SEQUENCE_BYTES * vocab_size:
            raise ValueError(f"{size} bytes for {vocab_size} tokens: too few, or too many tokens")
        counted = []
        keys = tokens.astype(np.int64)
        for order in range(1, ORDER + 1):
            if order > 1:
                keys = (keys[:-1] << BITS) | tokens[order - 1 :]
            counted.append(np.unique(keys, return_counts=True))
        least = 2
        while self._bytes(counted, least) > size:
            least += 1
        self.least, self.size = least, self._bytes(counted, least)
        # order - 1 -> context -> next tokens, and their discounted shares of all that follow it
        self.tables: list[dict[int, tuple[Any, Any]]] = []
        for order, (sequences, counts) in enumerate(counted, 1):
            contexts, begins = np.unique(sequences >> BITS, return_index=True)
            totals = np.add.reduceat(counts, begins)
            kept = counts >= (1 if order == 1 else least)
            sequences, counts = sequences[kept], counts[kept]
            shares = (counts - DISCOUNT) / totals[np.searchsorted(contexts, sequences >> BITS)]
            contexts, begins = np.unique(sequences >> BITS, return_index=True)
            ends = [*begins[1:], len(sequences)]
            followers = sequences & ((1 << BITS) - 1)
            self.tables.append(
                {
                    int(context): (followers[begin:end], shares[begin:end])
                    for context, begin, end in zip(contexts, begins, ends, strict=True)
                }
            )

    @staticmethod
    def _bytes(counted: list[tuple[Any, Any]], least: int) -> int:
        size = SEQUENCE_BYTES * len(counted[0][0])
        for sequences, counts in counted[1:]:
            kept = sequences[counts >= least]
            size += SEQUENCE_BYTES * len(kept) + CONTEXT_BYTES * len(np.unique(kept >> BITS))
        return size

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Probabilities (V,) of what follows tokens."""
        probabilities = np.full(self.vocab_size, 1 / self.vocab_size)
        context = 0
        for order, table in enumerate(self.tables):
            if order > len(tokens):
                break
            context = 0 if order == 0 else context | tokens[-order] << (BITS * (order - 1))
            if context not in table:
                break
            followers, shares = table[context]
            probabilities *= 1 - shares.sum()
            probabilities[followers] += shares
        return probabilities
