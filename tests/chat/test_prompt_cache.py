"""The server's prompt cache: random conversations and edits, held to recomputing."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.chat.prompt_cache import PromptCache

SPACING = 4
LETTERS = st.integers(1, 3)  # few, so that texts often share their beginnings


@pytest.fixture(scope="module")
def model():
    mx.random.seed(0)
    model = Model(ModelArgs(16, 2, 8, 16, cell="lstm"))
    model.snapshot_spacing = SPACING
    return model


def state_of(model, tokens):
    cache = model.make_cache()
    model(mx.array([tokens]), cache=cache)
    return cache


def same(a, b):
    return all(
        c.offsets == d.offsets and mx.allclose(x, y, atol=1e-5)
        for c, d in zip(a, b, strict=True)
        for x, y in zip(c.cache, d.cache, strict=True)
    )


def stored_in(prompts):
    """Texts and states, what was used last at the end."""
    return [(np.frombuffer(text, np.int32).tolist(), states) for (_, text), states in prompts._states.items()]


def texts_of(prompts):
    return [text for text, _ in stored_in(prompts)]


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.large
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_never_a_wrong_state_and_at_most_one_interval_again(model, data):
    """Conversations that are continued, cut, edited and begun anew, alone and in batches."""
    prompts = PromptCache(max_size=data.draw(st.sampled_from([3, 100])))
    texts = [[1]]  # all that was ever read
    longest = 1
    for _ in range(data.draw(st.integers(1, 8))):
        old = data.draw(st.sampled_from(texts))
        prompt = old[: data.draw(st.integers(0, len(old)))] + data.draw(st.lists(LETTERS, max_size=70))
        prompt = prompt or [2]
        stored = set(map(tuple, texts_of(prompts)))
        cache, rest = prompts.fetch_nearest_cache("model", prompt)
        read = len(prompt) - len(rest)
        assert 0 <= read < len(prompt)
        assert prompt[read:] == rest
        assert (cache is None) == (read == 0)
        if cache:
            assert same(cache, state_of(model, prompt[:read]))
        for text in stored:
            shared = min(common(text, prompt), len(prompt) - 1)
            assert shared - read < max(SPACING, 2 * (longest - shared) / 3)
            if shared == len(text):
                assert read >= shared
        generator = BatchGenerator(model, max_tokens=data.draw(st.integers(1, 30)))
        (uid,) = generator.insert([rest], caches=[cache], all_tokens=[prompt[:read]])
        beside = data.draw(st.booleans())
        if beside:
            generator.insert([[3, 3, 3, 1, 2]], max_tokens=[9])
        answer = None
        while answer is None:
            answer = next((r for r in generator.next_generated() if r.uid == uid and r.finish_reason), None)
        generator.close()
        assert same(answer.prompt_cache, state_of(model, answer.all_tokens))
        prompts.insert_cache("model", answer.all_tokens[:], answer.prompt_cache)
        texts.append(answer.all_tokens)
        longest = max(longest, len(answer.all_tokens))
        assert prompts.nbytes == sum(
            4 * len(text) + sum(c.nbytes for c in states) for text, states in stored_in(prompts)
        )
        assert len(prompts) <= prompts.max_size


def test_a_prompt_that_was_read_to_its_end_is_not_handed_out_whole(model):
    """MLX-LM's cache gives an empty rest then, on which its batch generator fails."""
    prompts = PromptCache()
    text = [1, 2, 3] * 10
    prompts.insert_cache("model", text, state_of(model, text))
    cache, rest = prompts.fetch_nearest_cache("model", text)
    assert (cache[0].offset, rest) == (28, text[28:])
    cache, rest = prompts.fetch_nearest_cache("model", [*text, 7])
    assert (cache[0].offset, rest) == (30, [7])
    assert prompts.fetch_nearest_cache("another", text) == (None, text)


def test_a_state_is_stored_for_what_it_has_read(model):
    prompts = PromptCache()
    text = [1, 2, 3] * 10
    prompts.insert_cache("model", [*text, 5], state_of(model, text))  # one token short, as after a draft
    assert texts_of(prompts) == [text]
    ahead = state_of(model, [*text, 5])
    prompts.insert_cache("model", text[:29], ahead)  # it has no state for 29 tokens
    prompts.insert_cache("model", text[:28], ahead)  # it has one for 28
    assert texts_of(prompts) == [text, text[:28]]
    prompts.insert_cache("model", [], model.make_cache())
    assert len(prompts) == 2
    for key, states in stored_in(prompts):
        assert same(states, state_of(model, key))


@pytest.mark.large
def test_what_was_used_last_stays(model):
    prompts = PromptCache(max_size=2)
    for letter in (1, 2):
        prompts.insert_cache("model", [letter] * 5, state_of(model, [letter] * 5))
    assert prompts.fetch_nearest_cache("model", [1] * 6)[1] == [1]
    prompts.insert_cache("model", [3] * 5, state_of(model, [3] * 5))
    assert texts_of(prompts) == [[1] * 5, [3] * 5]
    prompts.insert_cache("model", [1] * 5, state_of(model, [1] * 5))
    prompts.insert_cache("model", [4] * 5, state_of(model, [4] * 5), cache_type="system")
    assert texts_of(prompts) == [[1] * 5, [4] * 5]
    prompts.trim_to(n_bytes=0)
    assert (len(prompts), prompts.nbytes) == (0, 0)
    one = state_of(model, [1])
    small = PromptCache(max_bytes=2 * (4 + sum(c.nbytes for c in one)))
    for letter in range(5):
        small.insert_cache("model", [letter], state_of(model, [letter]))
    assert texts_of(small) == [[3], [4]]


def test_what_is_handed_out_is_nobody_elses(model):
    prompts = PromptCache()
    text = [1, 2, 3] * 10
    prompts.insert_cache("model", text, state_of(model, text))
    cache, _ = prompts.fetch_nearest_cache("model", [*text, 1])
    model(mx.array([[7] * 20]), cache=cache)
    again, _ = prompts.fetch_nearest_cache("model", [*text, 1])
    assert same(again, state_of(model, text))
    assert make_prompt_cache(model)[0].spacing == SPACING


def test_long_texts_take_what_is_counted(model):
    prompts = PromptCache()
    tracemalloc.start()
    try:
        for n in range(4):
            text = [n, *range(20_000)]
            prompts.insert_cache("model", text, state_ahead(model, len(text)))
        del text
        assert prompts.nbytes >= 4 * 4 * 20_000
        assert tracemalloc.get_traced_memory()[0] < 2 * prompts.nbytes
    finally:
        tracemalloc.stop()


def state_ahead(model, length):
    """A state that says to have read so many tokens."""
    cache = state_of(model, [1])
    for layer in cache:
        layer.offsets = [length]
    return cache
