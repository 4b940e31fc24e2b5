"""The tokens of a text that is never held whole, where a token is a byte: a piece at a time."""

import json
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

PIECE = 4096  # characters


def has_bytes_alone(backend: Tokenizer | None) -> bool:
    """Whether a token is a byte or an added one, and what stands around a character does not matter."""
    if backend is None:
        return False
    model, alphabet = backend.model, set(pre_tokenizers.ByteLevel.alphabet())
    if not (
        isinstance(model, models.BPE)
        and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
        and backend.get_vocab_size(with_added_tokens=False) == len(alphabet)  # not asked for 150,000 names
    ):
        return False
    parts = backend.normalizer, backend.truncation, backend.padding
    return (
        backend.get_vocab(with_added_tokens=False).keys() == alphabet
        and not any((*parts, model.continuing_subword_prefix, model.end_of_word_suffix))
        and not backend.pre_tokenizer.add_prefix_space
        and (backend.post_processor is None or _adds_nothing(backend.post_processor))
        and not any(token.lstrip or token.rstrip or token.single_word for token in _added(backend))
    )


def encode_in_pieces(backend: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of the tokens of `texts`, which are one text, as they are in the whole.

    Args:
        backend: one of which `has_bytes_alone` is true.
        texts: read one after another, and not kept.
    """
    # What follows cannot change a token that ends the longest added one's length before the end.
    margin = max((len(token.content) for token in _added(backend)), default=1)
    held = ""
    for text in texts:
        for begin in range(0, len(text), PIECE):
            held += text[begin : begin + PIECE]
            if len(held) >= PIECE + margin:
                found = backend.encode(held)
                end = found.char_to_token(len(held) - margin) or 0
                yield found.ids[:end]
                held = held[found.offsets[end][0] :]
    yield backend.encode(held).ids


def _adds_nothing(processor: processors.PostProcessor) -> bool:
    """Whether it is the one of transformers that leaves a text's tokens as they are."""
    single = json.loads(processor.__getstate__()).get("single")
    return bool(single == [{"Sequence": {"id": "A", "type_id": 0}}])


def _added(backend: Tokenizer) -> list[AddedToken]:
    return list(backend.get_added_tokens_decoder().values())
