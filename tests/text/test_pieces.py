"""The tokens of a text in pieces are those of the whole, and as few characters are held as said."""

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors

from mlx_pararnn.loading import load
from mlx_pararnn.text.pieces import encode_in_pieces, has_bytes_alone
from tests.support.demo import DEMO

BYTES = (DEMO / "tokenizer.json").read_text()
LETTERS = "aab🙂"


def with_added(contents, normalized):
    """The tokenizer of bytes with more tokens, every other one found before the rest or all at once."""
    backend = Tokenizer.from_str(BYTES)
    backend.add_tokens(
        [AddedToken(content, normalized=bool(normalized and n % 2)) for n, content in enumerate(contents)]
    )
    assert has_bytes_alone(backend)
    return backend


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=5, unique=True),
    texts=st.lists(st.text(LETTERS + "\0", max_size=12), max_size=12),
    normalized=st.booleans(),
    piece=st.integers(1, 6),
)
def test_tokens_are_those_of_the_whole(contents, texts, normalized, piece):
    backend = with_added(contents, normalized)
    with mock.patch("mlx_pararnn.text.pieces.PIECE", piece):
        found = [token for ids in encode_in_pieces(backend, texts) for token in ids]
    assert found == backend.encode("".join(texts)).ids


@pytest.mark.parametrize("text", ["a", "aaab", "<|end|>", "é", "\0"])
def test_a_piece_is_a_few_thousand_tokens_whatever_the_text(text):
    """Of a text whose every character may belong to an added token, too; read no further than asked for."""
    backend, taken = with_added(["<|end|>", "aa", "ab", "a<"], True), 0

    def texts():
        nonlocal taken
        while taken < 1_000_000:
            taken += 1000
            yield text * 1000

    ids = encode_in_pieces(backend, texts())
    for n in range(10):
        assert 0 < len(next(ids)) < 20_000
        assert taken < 10_000 * (n + 1)


@pytest.mark.parametrize(
    ("template", "may"), [("$A", True), ("$A $A", False), ("b $A", False), ("$A:1", False)]
)
def test_a_template_around_the_text_counts(template, may):
    backend = Tokenizer.from_str(BYTES)
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("b", 65)])
    assert has_bytes_alone(backend) == may


def test_the_tokenizer_that_python_loads_reads_in_pieces():
    assert has_bytes_alone(load(DEMO)[1].backend_tokenizer)
