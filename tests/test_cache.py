"""The state among MLX-LM's own tools: batching, prompt caches, copies."""

import copy

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import can_trim_prompt_cache, load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_pararnn
from mlx_pararnn.cache import RecurrentCache
from tests.support.demo import DEMO
from tests.support.greedy_tokens import greedy, same_until_a_near_tie

PROMPTS = ["def main(", "import os\n\nclass Reader:\n    def read(self, ", "x", "for i in range(10):\n"]


@pytest.fixture(scope="module")
def demo():
    return mlx_pararnn.load(DEMO)


def test_mlx_lm_finds_the_class():
    assert mlx_lm_cache.RecurrentCache is RecurrentCache


def test_it_cannot_be_trimmed(demo):
    model, _ = demo
    assert not can_trim_prompt_cache(make_prompt_cache(model))


def test_batch_generate(demo):
    model, tokenizer = demo
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    texts = batch_generate(model, tokenizer, prompts, max_tokens=24).texts
    for prompt, text in zip(prompts, texts, strict=True):
        alone = greedy(model, prompt, 24)
        assert same_until_a_near_tie(model, prompt, alone, tokenizer.encode(text))


def test_rows_join_and_leave_a_running_batch(demo):
    """Continuous batching with histories: rows of different age, with saved states, come and go."""
    model, tokenizer = demo
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    histories, rests = [], []
    for n, prompt in enumerate(prompts):
        cache, cut = model.make_cache(), n if n < len(prompt) else 0
        if cut:
            model(mx.array([prompt[:cut]]), cache=cache)
        histories.append(cache)
        rests.append(prompt[cut:])
    generator = BatchGenerator(model, max_tokens=20, prefill_batch_size=2, completion_batch_size=3)
    limits = [5, 20, 11, 16]
    uids = generator.insert(rests[:3], max_tokens=limits[:3], caches=histories[:3])
    out = {uid: [] for uid in uids}
    done = {}
    while len(done) < 4:
        for r in generator.next_generated():
            out[r.uid].append(r.token)
            if r.finish_reason:
                done[r.uid] = r.prompt_cache
        if len(uids) == 3 and done:
            uids += generator.insert(rests[3:], max_tokens=limits[3:], caches=histories[3:])
            out[uids[3]] = []
    generator.close()
    for uid, prompt, limit in zip(uids, prompts, limits, strict=True):
        alone = greedy(model, prompt, limit)
        assert same_until_a_near_tie(model, prompt, alone, out[uid])
        assert done[uid][0].offset == len(prompt) + limit
        assert isinstance(done[uid][0], RecurrentCache)


def test_prompt_cache_files(demo, tmp_path):
    model, tokenizer = demo
    prompt = tokenizer.encode(PROMPTS[1])
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, cache, {"note": "yes"})
    loaded, metadata = load_prompt_cache(file, return_metadata=True)
    assert metadata == {"note": "yes"}
    assert loaded[0].offsets == cache[0].offsets
    assert greedy(model, prompt[-1:], 20, loaded) == greedy(model, prompt, 20)


def test_an_empty_cache_survives_a_file_too(demo, tmp_path):
    model, _ = demo
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, make_prompt_cache(model))
    assert load_prompt_cache(file)[0].empty()


def test_copies_are_independent(demo):
    model, tokenizer = demo
    cache = make_prompt_cache(model)
    model(mx.array([tokenizer.encode(PROMPTS[0])]), cache=cache)
    twin = copy.deepcopy(cache)
    before = mx.array(twin[0][0])
    model(mx.array([[1, 2, 3]]), cache=cache)
    assert mx.array_equal(twin[0][0], before)
    assert (twin[0].offset, cache[0].offset) == (9, 12)


def test_filter_extend_extract_merge():
    def row(value, offset):
        c = RecurrentCache()
        c[0], c[1] = mx.full((1, 2, 3), value), mx.full((1, 3, 3), value)
        c.offsets = [offset]
        return c

    merged = RecurrentCache.merge([row(1.0, 5), RecurrentCache(), row(3.0, 7)])
    assert merged.offsets == [5, 0, 7]
    assert merged[0][:, 0, 0].tolist() == [1, 0, 3]
    assert merged.batch_size == 3
    assert merged.nbytes == 3 * (6 + 9) * 4
    merged.filter([2, 0])
    assert merged.offsets == [7, 5]
    assert merged[1][:, 0, 0].tolist() == [3, 1]
    merged.extend(row(9.0, 1))
    assert merged.extract(2)[0].tolist() == row(9.0, 1)[0].tolist()
    assert merged.size() == 7
    empty = RecurrentCache.merge([RecurrentCache(), RecurrentCache()])
    assert empty.empty()
    assert empty.batch_size == 2
    empty.prepare(lengths=[1, 2])
    with pytest.raises(ValueError, match="pending"):
        merged.extend(empty)


def test_masks_count_down_from_piece_to_piece():
    cache = RecurrentCache(2)
    cache.prepare(left_padding=[3, 0], lengths=[6, 4])
    assert cache.make_mask(4).tolist() == [[False, False, False, True], [True] * 4]
    cache.advance(4)
    assert cache.offsets == [1, 4]
    assert cache.make_mask(2).tolist() == [[True, True], [False, False]]
    cache.advance(2)
    assert cache.offsets == [3, 4]
    cache.finalize()
    assert cache.make_mask(2) is None


def test_mlx_lm_load_and_generate():
    model, tokenizer = mlx_lm.load(str(DEMO))
    assert type(model) is mlx_pararnn.Model
    text = mlx_lm.generate(model, tokenizer, "def main(", max_tokens=12)
    assert text == mlx_pararnn.generate(*mlx_pararnn.load(DEMO), "def main(", max_tokens=12)
