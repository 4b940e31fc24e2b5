"""A state that can go back: by steps, by snapshots; what that gives to speculative decoding and to files."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs, PararnnError
from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.chat.session import Chat
from tests.support.demo import DEMO
from tests.support.greedy_tokens import greedy, same_until_a_near_tie
from tests.support.memory import active_memory
from tests.support.serving import demo_in_float32

TEXT = b"import os\n\nclass Reader:\n    def read(self, name):\n        return open(name)\n" * 8


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = mlx_pararnn.load(DEMO)
    model.set_dtype(mx.float32)  # float16's rounding makes ties
    return model, tokenizer


def small(cell="gru", mixer="gated_conv", seed=0):
    mx.random.seed(seed)
    return Model(ModelArgs(32, 2, 256, 48, cell=cell, num_heads=2, mixer=mixer))


def remembering(model, **what):
    caches = model.make_cache()
    for cache in caches:
        cache.remember(**what)
    return caches


def read(model, tokens, caches):
    model(mx.array([list(tokens)]), cache=caches)


def rewind(caches, n):
    for cache in caches:
        cache.rewind(n)


def same(a, b, exactly=True):
    equal = mx.array_equal if exactly else lambda x, y: mx.allclose(x, y, atol=2e-5)
    return [c.offsets for c in a] == [c.offsets for c in b] and all(
        (x is None and y is None) or equal(x, y)
        for c, d in zip(a, b, strict=True)
        for x, y in zip(c.cache, d.cache, strict=True)
    )


MODELS = [("gru", "gated_conv"), ("lstm", "gated_conv"), ("slstm", "plain"), ("nlru", "plain")]


@pytest.mark.sampled("large", by=lambda cell, method: [cell, method] if cell in ("gru", "lstm") else [])
@pytest.mark.parametrize(("cell", "mixer"), MODELS)
@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_every_step_of_one_parallel_read_can_be_gone_back_to(cell, mixer, method):
    model = small(cell, mixer)
    tokens = TEXT[:40]
    for n in range(1, 9):
        caches = remembering(model, recent=8)
        model(mx.array([list(tokens)]), cache=caches, method=method)
        rewind(caches, n)
        plain = model.make_cache()
        model(mx.array([list(tokens[:-n])]), cache=plain, method=method)
        assert same(caches, plain, exactly=False), n
        read(model, tokens[-n:], caches)
        read(model, tokens[-n:], plain)
        assert same(caches, plain, exactly=False), n


@pytest.mark.parametrize("backend", ["ops", None])
def test_a_state_holds_no_more_memory_than_it_says(backend):
    """Where it is the end of an array of all steps, it would hold on to that."""
    model = small()

    def state():
        caches = remembering(model, spacing=64)
        mx.eval(model(mx.array([[1] * 1000]), cache=caches, backend=backend), [c.cache for c in caches])
        return caches

    states = [state()]
    before = active_memory()
    states.append(state())
    counted = sum(c.nbytes for c in states[1])
    assert counted <= active_memory() - before < counted + 2**15


def test_single_steps_are_gone_back_to_exactly(demo):
    model, _ = demo
    caches = remembering(model, recent=8)
    read(model, TEXT[:20], caches)
    states = []
    for token in TEXT[20:30]:
        states.append(copy.deepcopy(caches))
        read(model, [token], caches)
    for n in (3, 4, 1):  # once back, earlier steps can still be reached
        rewind(caches, n)
        assert same(caches, states[caches[0].offset - 20])
    read(model, TEXT[22:25], caches)
    rewind(caches, 2)
    assert caches[0].offset == 23


def test_all_or_nothing(demo):
    model, _ = demo
    caches = remembering(model, recent=4)
    read(model, TEXT[:20], caches)
    before = copy.deepcopy(caches)
    for n in (5, 19, 21, -1):
        with pytest.raises(
            PararnnError, match=f"cannot go back by {n} tokens: of 20 .* return to .0, 16, 17"
        ):
            caches[0].rewind(n)
        assert same(caches, before)
        with pytest.raises(PararnnError):
            caches[0].trim(n)
    rewind(caches, 20)  # the beginning is always known
    assert caches[0].empty()
    assert same(caches, model.make_cache())
    plain = model.make_cache()
    assert not plain[0].is_trimmable()
    read(model, TEXT[:20], plain)
    with pytest.raises(PararnnError, match="remember makes it keep more"):
        plain[0].rewind(1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_snapshots_of_any_way_of_reading(data):
    """Whatever the pieces: the same positions, a plain run's states, none further apart than promised."""
    model, spacing = small(), 4
    length = data.draw(st.integers(1, 300))
    tokens = (TEXT * 2)[:length]
    caches = remembering(model, spacing=spacing)
    done = 0
    while done < length:
        n = data.draw(st.one_of(st.just(1), st.integers(1, length - done)))
        read(model, tokens[done : done + n], caches)
        done += n
    whole = remembering(model, spacing=spacing)
    read(model, tokens, whole)
    positions = whole[0].positions()
    assert caches[0].positions() == caches[1].positions() == positions
    assert len(positions) <= 4 + 2 * length.bit_length()
    for d in range(length + 1):
        nearest = max(p for p in positions if p <= length - d)
        assert length - d - nearest < max(spacing, 2 * d / 3)
    position = data.draw(st.sampled_from(positions))
    rewind(caches, length - position)
    plain = model.make_cache()
    if position:
        read(model, tokens[:position], plain)
    assert same(caches, plain, exactly=False)


def test_the_number_of_snapshots_is_bounded():
    cache = RecurrentCache()
    cache.remember(spacing=1)
    for length in (300_001, 2**20):
        assert len([p for p in range(1, length) if cache._wanted(p, length)]) <= 2 * 15 + 4


def test_what_is_remembered_is_counted_and_let_go(demo):
    model, _ = demo
    caches = remembering(model, recent=8, spacing=16)
    read(model, TEXT[:100], caches)
    cache = caches[0]
    one = cache.state_nbytes
    assert cache.nbytes == len(cache.positions()[1:]) * one
    assert sum(c.nbytes for c in model.make_cache()) == 0
    assert 100 - 8 in cache.positions()
    for joined in (RecurrentCache.merge([cache, cache]), cache.extract(0)):
        assert not joined.is_trimmable()
        assert joined.positions(0) == [0, 32, 48, 64, 80, 96, 100]  # 16 is too far back for its interval
    merged = RecurrentCache.merge([cache, cache])
    merged.filter([1])
    merged.extend(RecurrentCache())
    assert merged.positions() == [0, 32, 48, 64, 80, 96, 100]
    assert merged.positions(1) == [0]
    with pytest.raises(PararnnError):
        merged.rewind(1)
    cache.remember()
    assert cache.nbytes == one


def test_rows_of_a_padded_batch_keep_their_own_snapshots():
    """What BatchGenerator does: rows of different length, padded on the right, read together."""
    model = small()
    texts = [TEXT[:50], TEXT[50:83], TEXT[100:110]]
    model.snapshot_spacing = 8
    batch = [RecurrentCache.merge([c] * 3) for c in make_prompt_cache(model)]
    for piece in (slice(0, 30), slice(30, 60)):
        parts = [t[piece] for t in texts]
        width = max(map(len, parts))
        for c in batch:
            c.prepare(lengths=[len(p) for p in parts])
        model(mx.array([[*p, *[0] * (width - len(p))] for p in parts]), cache=batch)
        for c in batch:
            c.finalize()
    for token in range(20):
        model(mx.array([[token]] * 3), cache=batch)
    for row, text in enumerate(texts):
        alone = [c.extract(row) for c in batch]
        full = bytes([*text, *range(20)])
        assert alone[0].offset == len(full)
        for position in alone[0].positions()[1:]:
            plain = model.make_cache()
            read(model, full[:position], plain)
            assert same([c.at(position) for c in alone], plain, exactly=False)


@pytest.fixture(scope="module")
def drafts(demo):
    """The model itself (all its guesses are right), noise (none is), and both layers of a blend."""
    model, _ = demo
    noise = Model(model.args)
    noise.update(tree_map(lambda w: 0.1 * w, noise.parameters()))
    blend, _ = mlx_pararnn.load(DEMO)
    mx.random.seed(3)
    blend.update(tree_map(lambda w: w + 0.02 * mx.random.normal(w.shape), blend.parameters()))
    tiny = Model(replace(model.args, num_hidden_layers=1, hidden_size=64, num_heads=1))
    return {"itself": model, "noise": noise, "blend": blend, "tiny": tiny}


@pytest.mark.sampled("large")
@pytest.mark.parametrize("draft", ["itself", "noise", "blend", "tiny"])
@pytest.mark.parametrize("guesses", [1, 3, 8])
def test_mlx_lms_speculative_decoding_gives_the_greedy_tokens(demo, drafts, draft, guesses, monkeypatch):
    model, tokenizer = demo
    prompt = tokenizer.encode("def main(")
    wanted = greedy(model, prompt, 40)
    monkeypatch.setattr(Model, "recent_steps", 8)  # the function makes the caches itself
    steps = list(
        speculative_generate_step(
            mx.array(prompt), model, drafts[draft], num_draft_tokens=guesses, max_tokens=40
        )
    )
    tokens = [token for token, _, _ in steps]
    assert same_until_a_near_tie(model, prompt, wanted, tokens)
    taken = sum(from_draft for _, _, from_draft in steps)
    assert {"itself": taken >= 40 * guesses // (guesses + 1), "noise": taken < 10}.get(draft, True)


@pytest.mark.parametrize("stream_generate", [mlx_lm.stream_generate, mlx_pararnn.stream_generate])
def test_a_draft_in_stream_generate(demo, drafts, stream_generate):
    model, tokenizer = demo
    draft = drafts["blend"]
    wanted = [r.token for r in mlx_pararnn.stream_generate(model, tokenizer, "import os\n", 30)]
    caches = None
    if stream_generate is mlx_lm.stream_generate:
        caches = remembering(model, recent=8) + remembering(draft, recent=8)
    given = list(stream_generate(model, tokenizer, "import os\n", 30, draft_model=draft, prompt_cache=caches))
    assert same_until_a_near_tie(model, list(b"import os\n"), wanted, [r.token for r in given])
    assert any(r.from_draft for r in given)


def test_a_draft_leaves_the_state_after_what_it_said(demo, drafts):
    """Stopped anywhere, the caches hold a prefix of the text; the model's goes on with the greedy tokens."""
    model, tokenizer = demo
    prompt = tokenizer.encode("class Reader:\n")
    wanted = greedy(model, prompt, 30)
    for stop in range(1, 12):
        caches = remembering(model, recent=8) + remembering(drafts["blend"], recent=8)
        tokens = []
        steps = mlx_pararnn.stream_generate(
            model, tokenizer, prompt, 30, draft_model=drafts["blend"], prompt_cache=caches, num_draft_tokens=4
        )
        for response in steps:
            tokens.append(response.token)
            if len(tokens) == stop:
                break
        steps.close()
        full = prompt + tokens
        offset = caches[0].offset
        assert len(full) - 1 <= offset <= len(full)
        rest = full[offset:] or full[-1:]
        if offset == len(full):
            rewind(caches[: len(model.layers)], 1)
        more = greedy(model, rest, 10, caches[: len(model.layers)])
        assert same_until_a_near_tie(model, full, wanted[stop : stop + 10], more)


def test_what_a_draft_cannot_be(demo):
    model, tokenizer = demo
    with pytest.raises(PararnnError, match="draft has a vocabulary of 100 tokens and the model one of 256"):
        next(
            mlx_pararnn.stream_generate(
                model, tokenizer, "x", draft_model=Model(replace(model.args, vocab_size=100))
            )
        )
    with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
        next(mlx_lm.stream_generate(model, tokenizer, "x", draft_model=model))
    caches = remembering(model, recent=2) + remembering(model, recent=2)
    with pytest.raises(PararnnError, match="cannot go back"):  # and not a wrong text
        list(
            speculative_generate_step(
                mx.array([1, 2]), model, small_like(model), prompt_cache=caches, num_draft_tokens=6
            )
        )


def small_like(model):
    mx.random.seed(9)
    return Model(model.args)


def lm(*args, **kwargs):
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "lm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.large
def test_lm_generate_with_a_draft(tmp_path):
    """MLX-LM's command, with more guesses than are remembered by default."""
    folder = demo_in_float32(tmp_path / "demo")
    command = ("generate", "--model", folder, "--prompt", "def main(", "-m", "20", "--verbose", "False")
    plain = lm(*command)
    assert plain.returncode == 0, plain.stderr
    drafted = lm(*command, "--draft-model", DEMO, "--num-draft-tokens", "12")
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert plain.stdout.startswith("self")


@pytest.mark.large
def test_mlx_lms_prompt_cache_both_ways(tmp_path):
    """`lm cache_prompt` -> our /load and Python; our /save -> `lm generate --prompt-cache-file`."""
    model, tokenizer = mlx_pararnn.load(DEMO)
    file = tmp_path / "prompt.safetensors"
    made = lm("cache_prompt", "--model", str(DEMO), "--prompt", "def main(", "--prompt-cache-file", str(file))
    assert made.returncode == 0, made.stderr
    cache = load_prompt_cache(str(file))
    read_too = cache[0].offset  # MLX-LM reads one token on
    assert read_too >= 9
    conversation = Chat(model, tokenizer)
    conversation.load(file)
    assert conversation.tokens == read_too
    assert same(conversation.cache, cache)

    conversation = Chat(*mlx_pararnn.load(DEMO))
    list(conversation.respond("import os\n\n", max_tokens=4))
    saved = conversation.save(tmp_path / "conversation")
    expected = "".join(r.text for r in conversation.respond("def ", max_tokens=12))
    result = lm(
        *("generate", "--prompt-cache-file", str(saved), "--model", str(DEMO)),
        *("--prompt", "def ", "-m", "12", "--verbose", "False"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected + "\n"


def test_a_state_of_the_400m_model_is_under_a_megabyte(tmp_path):
    for cell in ("gru", "lstm"):
        args = replace(ModelArgs.preset("400m", cell), vocab_size=8, intermediate_size=8)
        model = Model(args)
        model.update(tree_map(mx.zeros_like, model.parameters()))
        caches = remembering(model, recent=8, spacing=4)
        model(mx.array([[1] * 9]), cache=caches)
        assert sum(c.nbytes for c in caches) > 3_000_000
        file = tmp_path / f"{cell}.safetensors"
        save_prompt_cache(str(file), caches)
        assert 300_000 < os.path.getsize(file) < 1_000_000


def test_going_on_from_a_file_is_going_on(tmp_path):
    """Bit for bit, and the file holds the current state and those before the last turns."""
    conversation = Chat(*mlx_pararnn.load(DEMO))
    for _ in range(3):
        list(conversation.respond("def main(", max_tokens=20))
    file = conversation.save(tmp_path / "conversation")
    assert os.path.getsize(file) < (1 + 3) * conversation.nbytes + 5000
    other = Chat(*mlx_pararnn.load(DEMO))
    other.load(file)
    assert same(other.cache, conversation.cache)
    answers = [
        [(r.token, r.logprobs) for r in t.respond("import", max_tokens=30)] for t in (conversation, other)
    ]
    for (a, x), (b, y) in zip(*answers, strict=True):
        assert a == b
        assert mx.array_equal(x, y)
    assert same(other.cache, conversation.cache)


def test_a_state_of_other_weights_is_refused(tmp_path):
    """The same shapes, norms and recurrent weights: one projection differs, as after fine-tuning."""
    conversation = Chat(*mlx_pararnn.load(DEMO))
    list(conversation.respond("def", max_tokens=2))
    file = conversation.save(tmp_path / "conversation")
    tuned, tokenizer = mlx_pararnn.load(DEMO)
    tuned.layers[-1].mlp.down_proj.weight += 1e-3
    with pytest.raises(PararnnError, match="was saved with another model"):
        Chat(tuned, tokenizer).load(file)
