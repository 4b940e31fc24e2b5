"""A prompt that is read piece by piece and not kept: the same bits and numbers as of the whole."""

import random
from itertools import count
from unittest import mock

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors

from mlx_pararnn import generation
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.generation import generate, stream_generate
from mlx_pararnn.loading import load
from tests.support.demo import DEMO
from tests.support.training_runs import small_model


@pytest.fixture(scope="module")
def pair():
    return small_model(), load(DEMO)[1]


def divided(text, seed=0):
    """The text in parts of any length."""
    draw, begin = random.Random(seed), 0
    while begin < len(text):
        end = begin + draw.randint(0, len(text) // 2 + 1)
        yield text[begin:end]
        begin = end


def said(model, tokenizer, prompt, **how):
    """Responses, the cache after them, and what the callback was told."""
    cache, told = model.make_cache(), []
    responses = stream_generate(
        model, tokenizer, prompt, 6, prompt_cache=cache,
        prompt_progress_callback=lambda done, total: told.append((done, total)), **how,
    )  # fmt: skip
    return list(responses), cache, told


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 9, 14, 15, 16, 100])
@pytest.mark.parametrize("kept", [3, 2048])
def test_it_is_continued_as_the_whole_bit_for_bit(length, kept, pair, monkeypatch):
    """With a penalty on the last tokens, and text that goes on in the middle of a character or not."""
    monkeypatch.setattr(generation, "KEPT", kept)
    text = "".join(random.Random(length).choices("ab \n\0é日🙂", k=length))[:length]
    penalty = make_logits_processors(repetition_penalty=1.5, repetition_context_size=kept)
    how = {"prefill_step_size": 7, "logits_processors": penalty}
    with mock.patch("mlx_pararnn.text.pieces.PIECE", 5):
        pieces, ours, told = said(*pair, divided(text), **how)
    whole, theirs, told_of_whole = said(*pair, text, **how)
    for mine, other in zip(pieces, whole, strict=True):
        assert (mine.token, mine.text, mine.finish_reason) == (other.token, other.text, other.finish_reason)
        assert mx.array_equal(mine.logprobs, other.logprobs)
        assert mine.prompt_tokens == other.prompt_tokens == len(text.encode())
        assert mine.prompt_tps > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.offset == other.offset
        assert all(mx.array_equal(*arrays) for arrays in zip(mine.cache, other.cache, strict=True))
    # the places are the same; how many there are is known at the end
    assert list(dict.fromkeys(done for done, _ in told)) == list(
        dict.fromkeys(done for done, _ in told_of_whole)
    )
    assert told[0] == (0, None)
    assert told[-1] == told_of_whole[-1]


def test_a_schema_is_kept_to_after_it(pair):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    text = "x" * 3000
    whole = generate(*pair, text, json_schema=schema)
    assert generate(*pair, divided(text), json_schema=schema) == whole
    assert whole in ('{"a":true}', '{"a":false}')


def test_a_conversation_goes_on_with_it(pair):
    cache = pair[0].make_cache()
    for text in ("a" * 20, "b" * 20):
        for _ in stream_generate(*pair, divided(text), 1, prompt_cache=cache, prefill_step_size=8):
            pass
    whole = pair[0].make_cache()
    for text in ("a" * 20, "b" * 20):
        for _ in stream_generate(*pair, text, 1, prompt_cache=whole, prefill_step_size=8):
            pass
    assert all(mx.array_equal(a, b) for a, b in zip(cache[0].cache, whole[0].cache, strict=True))


def test_what_is_wrong_is_said_as_soon_as_it_is_read(pair):
    tokenizer = pair[1]
    endless = ("a" * 3000 for _ in count())
    with pytest.raises(PararnnError, match="of the model's 5000 learned positions"):
        generate(small_model(max_position_embeddings=5000), tokenizer, endless)
    with pytest.raises(PararnnError, match="holds token id 97, but the model has ids 0 to 89"):
        generate(small_model(vocab_size=90), tokenizer, endless)
    with pytest.raises(PararnnError, match="not UTF-8"):
        generate(*pair, iter(["a" * 5000, "\udcff", *["a"] * 5]))
    with pytest.raises(PararnnError, match="the schema"):
        generate(*pair, endless, json_schema={"$ref": "#/nowhere"})
    for empty in ([], [""], ["", ""]):
        with pytest.raises(PararnnError, match="the prompt is empty"):
            generate(*pair, iter(empty))


def test_where_it_cannot_be_read_in_pieces_it_is_joined(pair):
    model, tokenizer = pair
    whole = generate(model, tokenizer, "ab" * 50, max_tokens=9)
    with mock.patch.object(generation, "has_bytes_alone", return_value=False):
        assert generate(model, tokenizer, divided("ab" * 50), max_tokens=9) == whole
    assert generate(model, tokenizer, divided("ab" * 50), max_tokens=9, draft_model=small_model(1)) == whole
