"""Speculative decoding of a batch: each row gets its own greedy tokens, whatever the draft guesses."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_map

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs, PararnnError, generate_with_draft
from mlx_pararnn.cache import RecurrentCache
from tests.support.demo import DEMO
from tests.support.greedy_tokens import greedy, same_until_a_near_tie

TEXTS = b"def main(", b"x", b"import os\nimport sys\n\nclass ", b"for n in range("
PROMPTS = [list(text) for text in TEXTS]


@pytest.fixture(scope="module")
def demo():
    model, _ = mlx_pararnn.load(DEMO)
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="module")
def drafts(demo):
    """The model itself (all guesses are right), noise (few are), a blend (some are), and another shape."""
    noise = Model(demo.args)
    noise.update(tree_map(lambda w: 0.1 * w, noise.parameters()))
    blend, _ = mlx_pararnn.load(DEMO)
    mx.random.seed(3)
    blend.update(tree_map(lambda w: w + 0.02 * mx.random.normal(w.shape), blend.parameters()))
    blend.set_dtype(mx.float32)
    tiny = Model(replace(demo.args, num_hidden_layers=1, hidden_size=64, num_heads=1))
    return {"itself": demo, "noise": noise, "blend": blend, "tiny": tiny}


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("draft", ["itself", "noise", "blend", "tiny"])
@pytest.mark.parametrize("guesses", [1, 3, 8])
def test_each_row_gets_its_own_greedy_tokens(demo, drafts, draft, guesses):
    rows = generate_with_draft(demo, drafts[draft], PROMPTS, 25, num_draft_tokens=guesses)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len(row.tokens) == 25
        assert same_until_a_near_tie(demo, prompt, greedy(demo, prompt, 25), row.tokens)
    guessed = [row.guessed for row in rows]
    if draft == "itself":
        assert [row.rounds for row in rows] == [-(-25 // (guesses + 1))] * 4
    if draft == "noise":
        assert max(guessed) < 15
    if draft == "blend":
        assert len(set(guessed)) > 1  # the rows went on by different steps


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm", "nlru"])
@pytest.mark.parametrize("mixer", ["gated_conv", "plain"])
def test_each_cell(cell, mixer):
    mx.random.seed(1)
    model = Model(ModelArgs(16, 2, 32, 16, cell=cell, mixer=mixer))
    model.update(tree_map(lambda w: 3 * w, model.parameters()))
    draft = Model(ModelArgs(8, 1, 32, 8, cell=cell, mixer=mixer))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    rows = generate_with_draft(model, draft, prompts, 12, num_draft_tokens=2)
    for prompt, row in zip(prompts, rows, strict=True):
        assert same_until_a_near_tie(model, prompt, greedy(model, prompt, 12), row.tokens)


def test_the_state_is_what_it_was_after_each_rows_text(demo, drafts, monkeypatch):
    """Rewound by a row's own number, it is bit for bit the one that was computed there."""
    rewind, seen = RecurrentCache.rewind, []

    def checked(cache, n):
        kept = [dict(row) for row in cache.kept]
        now = [cache._row(row) for row in range(cache.batch_size)]
        rewind(cache, n)
        seen.append(len(set(n)) > 1)
        for row, (step, offset) in enumerate(zip(n, cache.offsets, strict=True)):
            before = kept[row][offset] if step else now[row]
            for a, b in zip(cache._row(row), before, strict=True):
                assert mx.array_equal(a, b)

    monkeypatch.setattr(RecurrentCache, "rewind", checked)
    generate_with_draft(demo, drafts["blend"], PROMPTS, 15)
    assert any(seen)


def test_rows_end_by_themselves(demo, drafts):
    wanted = [greedy(demo, prompt, 30) for prompt in PROMPTS]
    ends = {wanted[0][7]}
    rows = generate_with_draft(demo, drafts["blend"], PROMPTS, 30, end_tokens=ends)
    for tokens, row in zip(wanted, rows, strict=True):
        length = next((n + 1 for n, token in enumerate(tokens) if token in ends), 30)
        assert row.tokens == tokens[:length]
    assert len(rows[0].tokens) <= 8
    assert generate_with_draft(demo, drafts["blend"], [], 30) == []


def test_learned_positions_are_not_passed():
    mx.random.seed(2)
    model = Model(ModelArgs(16, 1, 32, 16, max_position_embeddings=12))
    draft = Model(ModelArgs(8, 1, 32, 8, max_position_embeddings=16))
    rows = generate_with_draft(model, draft, [[1] * 3, [2] * 11, [3] * 7], 100, num_draft_tokens=5)
    assert [len(row.tokens) for row in rows] == [9, 1, 5]
    for prompt, row in zip([[1] * 3, [2] * 11, [3] * 7], rows, strict=True):
        assert same_until_a_near_tie(model, prompt, greedy(model, prompt, len(row.tokens)), row.tokens)
    with pytest.raises(PararnnError, match="no room to generate"):
        generate_with_draft(model, draft, [[1], [1] * 12])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": [[1], []]}, "the prompt is empty"),
        ({"prompts": [[256]]}, "token id 256"),
        ({"num_draft_tokens": 0}, "must be at least 1"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"draft": Model(ModelArgs(8, 1, 32, 8))}, "a vocabulary of 32 tokens"),
    ],
)
def test_what_cannot_be_asked(demo, arguments, said):
    with pytest.raises(PararnnError, match=said):
        generate_with_draft(**{"model": demo, "draft": demo, "prompts": [[1]], **arguments})


def test_a_rewind_of_each_row_is_all_or_nothing(demo):
    cache = RecurrentCache.merge([state_of(demo, [1, 2, 3])[0], state_of(demo, [4, 5, 6, 7])[0]])
    cache.remember(2)
    before = list(cache.offsets)
    with pytest.raises(PararnnError, match="cannot go back by 2 tokens: of 4"):
        cache.rewind([0, 2])
    with pytest.raises(PararnnError, match="cannot go back by -1 tokens"):
        cache.rewind([-1, 0])
    assert cache.offsets == before
    cache.rewind([0, 0])
    assert cache.offsets == before
    cache.rewind([3, 4])  # all at their start
    assert (cache.offsets, cache.cache) == ([0, 0], [None, None])


def state_of(model, tokens):
    cache = model.make_cache()
    model(mx.array([tokens]), cache=cache)
    return cache
