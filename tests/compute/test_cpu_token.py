"""Decoding on a CPU in one call: its numbers, what it reads and what it gives out."""

import contextlib
import copy
import gc
import threading
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.generate import BatchGenerator, generate_step

from mlx_pararnn import PararnnError, load_model
from mlx_pararnn.cache import held_arrays
from mlx_pararnn.compute import cpu
from tests.support.golden import GOLDEN, gap, golden_of
from tests.support.msl.instances import DTYPES
from tests.support.random_models import (
    KINDS,
    TOKENS,
    by_token,
    cell_of,
    distance,
    exact,
    make,
    numbers,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.sampled("large", by=lambda: ["one"])  # a library a cell is built: cells have tests of their own
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_float32(kind, calls):
    made = make(kind)
    cache, twin = made.make_cache(2), made.make_cache(2)
    given = by_token(made, TOKENS, cache)
    wanted, states = exact(made, TOKENS)
    assert calls == [True] * 5
    assert distance(numbers(given), wanted) < 1e-5
    for c, state in zip(cache, states, strict=True):
        assert c[0].dtype == mx.float32
        assert distance(numbers(c[0]), state) < 1e-5
    in_ops = by_token(made, TOKENS, twin, backend="ops")
    assert calls == [True] * 5
    assert given.dtype == in_ops.dtype
    assert distance(numbers(given), numbers(in_ops)) < 1e-5
    for a, b in zip(held_arrays(cache), held_arrays(twin), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert distance(numbers(a), numbers(b)) < 1e-5
    assert [c.offsets for c in cache] == [c.offsets for c in twin]


@pytest.mark.sampled("large", by=lambda dtype: [dtype])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_in_half_precision(kind, dtype, calls):
    """Nearer to exact than ops, or within a rounding of it."""
    made, step = make(kind, DTYPES[dtype]), {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    cache, twin = made.make_cache(2), made.make_cache(2)
    given, in_ops = by_token(made, TOKENS, cache), by_token(made, TOKENS, twin, backend="ops")
    wanted, states = exact(made, TOKENS)
    assert calls == [True] * 5
    assert given.dtype == in_ops.dtype == DTYPES[dtype]
    assert distance(numbers(given), wanted) <= max(step, distance(numbers(in_ops), wanted))
    for c, d, state in zip(cache, twin, states, strict=True):
        assert distance(numbers(c[0]), state) <= max(step, distance(numbers(d[0]), state))
        if c[1] is not None:
            assert c[1].dtype == d[1].dtype == DTYPES[dtype]
            assert distance(numbers(c[1]), numbers(d[1])) <= 8 * step


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    ("source", "folder", "prefix", "options"), GOLDEN, ids=[f"{g[1].split('/')[1]}-{g[2]}" for g in GOLDEN]
)
def test_golden_logits_token_by_token(converted, source, folder, prefix, options, calls):
    made, _ = load_model(converted(source, **options))
    golden = golden_of(folder, prefix)
    tokens = golden["input_ids"][:4, :50]
    assert gap(by_token(made, tokens), golden["logits"][:4, :50]) < 5e-5
    assert calls == [True] * tokens.shape[1]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_prompts_state(kind, calls):
    made = make(kind)
    cache, tokens = made.make_cache(2), mx.tile(TOKENS, (1, 2))
    made(tokens[:, :6], cache=cache)
    given = by_token(made, tokens[:, 6:], cache)
    assert distance(numbers(given), exact(made, tokens)[0][:, 6:]) < 1e-5
    assert calls == [True] * 4


@pytest.mark.sampled("large", by=lambda kind, dtype: {"gru": [dtype], "lstm, 4 heads": [kind]}.get(kind, []))
@pytest.mark.parametrize("kind", ["gru", "lstm, 4 heads", "slstm, layer norm", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_batch_is_the_row_alone(kind, dtype, calls):
    made = make(kind, DTYPES[dtype])
    too_many = cpu.FEW_ROWS + 1
    tokens = mx.random.randint(0, 37, (too_many, 3), key=mx.random.key(0))
    for B in (1, 2, 3, 4):
        cache = made.make_cache(B)
        together = by_token(made, tokens[:B], cache, head=False)
        for row in range(B):
            own = made.make_cache(1)
            alone = by_token(made, tokens[row : row + 1], own, head=False)
            assert mx.array_equal(alone, together[row : row + 1])
            for a, b in zip(held_arrays(own), held_arrays(cache), strict=True):
                assert mx.array_equal(a, b[row : row + 1])
    assert all(calls)
    calls.clear()
    in_mlx = by_token(made, tokens, head=False)
    assert not any(calls)
    if dtype == "float32":
        assert distance(numbers(in_mlx[:4]), numbers(together)) < 1e-5


# What it reads


def test_weights_that_change_between_tokens_are_seen(calls):
    made, other = make(), make(seed=1)
    cache, twin = made.make_cache(2), made.make_cache(2)
    others = dict(tree_flatten(other.parameters()))
    for t, path in enumerate(p for p, _ in tree_flatten(made.parameters())):
        made.update(tree_unflatten([(path, others[path])]))
        token = TOKENS[:, t % 5 : t % 5 + 1]
        given, wanted = made(token, cache=cache), made(token, cache=twin, backend="ops")
        assert distance(numbers(given), numbers(wanted)) < 1e-5, path
    made.model.layers[0].mlp.down_proj.weight[3] = 2.0
    made.model.layers[1].mixer.conv1d.bias *= 3
    given, wanted = made(token, cache=cache), made(token, cache=twin, backend="ops")
    assert distance(numbers(given), numbers(wanted)) < 1e-5
    assert all(calls)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", ["gru", "lstm, 4 heads", "ml-pararnn", "babylm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_any_layout(kind, dtype, calls):
    """Transposed, sliced out of a larger one, repeated; of weights, states and what comes in."""
    made, twin = make(kind, DTYPES[dtype]), make(kind, DTYPES[dtype])

    def strided(n, a):
        if n % 3 == 0:
            return mx.swapaxes(mx.contiguous(mx.swapaxes(a, 0, -1)), 0, -1)
        wide = mx.concatenate([a + 1, a, a - 1], axis=-1)
        return (
            wide[..., a.shape[-1] : 2 * a.shape[-1]]
            if n % 3 == 1
            else wide[..., ::-1][..., ::-1][..., a.shape[-1] : -a.shape[-1]]
        )

    paths = tree_flatten(made.parameters())
    made.update(tree_unflatten([(path, strided(n, a)) for n, (path, a) in enumerate(paths)]))
    cache, other = made.make_cache(2), made.make_cache(2)
    for t in range(3):
        token = TOKENS[:, t : t + 1]
        assert mx.array_equal(made.model(token, cache), twin.model(token, other))
        for c in cache:
            c.cache = [None if a is None else strided(t, a) for a in c.cache]
    x = mx.broadcast_to(mx.array(0.5).astype(DTYPES[dtype]), (2, 1, made.args.hidden_size))
    for made_of, c in ((made, cache), (twin, other)):
        for part in c:
            part.cache = [None if a is None else mx.broadcast_to(a[:1], a.shape) for a in part.cache]
        made_of.model.norm.weight = mx.broadcast_to(
            mx.array(2.0).astype(DTYPES[dtype]), (made.args.hidden_size,)
        )
    given = made.model(TOKENS[:, :1], cache, x)
    assert mx.array_equal(given, twin.model(TOKENS[:, :1], other, mx.contiguous(x)))
    assert mx.array_equal(given[0], given[1])
    assert all(calls)


def test_lazy_arrays(calls):
    made = make()
    wanted = by_token(made, TOKENS)
    made.update(tree_map(lambda a: (a.astype(mx.float32) * 2) / 2, made.parameters()))
    assert mx.array_equal(by_token(made, TOKENS), wanted)
    assert all(calls)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("kind", ["gru", "slstm, layer norm", "plain"])
def test_an_empty_cache_is_one_of_zeros(kind, calls):
    """Whatever stood in memory before."""
    made = make(kind, hidden_size=512)
    rubbish = [np.full((2, 8, 512), np.nan, np.float32) for _ in range(50)]
    del rubbish
    cache = made.make_cache(2)
    for c in cache:
        c.open(2)
        c[0] = mx.zeros((2, len(c_slots(made)), 512))
        if made.args.mixer == "gated_conv":
            c[1] = mx.zeros((2, made.args.conv_kernel - 1, 512))
    assert mx.array_equal(by_token(made, TOKENS), by_token(made, TOKENS, cache))
    half = made.make_cache(2)
    by_token(made, TOKENS[:, :1], half)
    for c in half:
        c[1] = None
    if made.args.mixer == "gated_conv":
        given = made(TOKENS[:, :1], cache=copy.deepcopy(half))
        assert distance(numbers(given), numbers(made(TOKENS[:, :1], cache=half, backend="ops"))) < 1e-5
    assert all(calls)


def c_slots(made):
    return cell_of(made).slots


def wrong_caches(made):
    D, slots = made.args.hidden_size, len(c_slots(made))
    yield "short", made.make_cache(2)[:1]
    yield "long", made.make_cache(2) + made.make_cache(2)
    for name, state, window in (
        ("narrow state", (2, slots, D - 8), (2, 3, D)),
        ("fewer slots", (2, 0, D), (2, 3, D)),
        ("fewer rows", (1, slots, D), (1, 3, D)),
        ("flat", (2 * slots * D,), (2, 3, D)),
        ("empty", (0,), (0,)),
        ("short window", (2, slots, D), (2, 1, D)),
        ("narrow window", (2, slots, D), (2, 3, 1)),
    ):
        cache = made.make_cache(2)
        for c in cache:
            c.open(2)
            c.cache = [mx.zeros(state), mx.zeros(window)]
        yield name, cache


def test_a_cache_that_is_another_models(calls):
    """Nothing is read beyond its arrays: MLX gets it, which refuses it or knows what to do."""
    made, refused = make(), 0
    for (name, given), (_, twin) in zip(wrong_caches(made), wrong_caches(made), strict=True):
        try:
            wanted = made(TOKENS[:, :1], cache=twin, backend="ops")
        except (PararnnError, ValueError, IndexError) as error:
            refused += 1
            with pytest.raises(type(error)):
                made(TOKENS[:, :1], cache=given)
        else:
            assert distance(numbers(made(TOKENS[:, :1], cache=given)), numbers(wanted)) < 1e-5, name
    assert refused >= 7
    assert not any(calls)
    cache = made.make_cache(2)
    by_token(made, TOKENS[:, :1], cache)
    for c in cache:
        c.cache = [a.astype(mx.float16) for a in c.cache]
    calls.clear()
    made(TOKENS[:, :1], cache=cache)
    assert not any(calls)


def test_weights_of_another_shape(calls):
    made = make()
    for path, a in tree_flatten(made.parameters()):
        if "embed" in path or path.startswith("lm_head"):
            continue
        for other in (a[: a.shape[0] // 2], a.reshape(-1), mx.zeros((0, *a.shape[1:])), a[None], a[..., :1]):
            if other.shape == a.shape:
                continue
            made.update(tree_unflatten([(path, other)]))
            with contextlib.suppress(ValueError, IndexError, PararnnError):
                mx.eval(made(TOKENS[:, :1]))
        made.update(tree_unflatten([(path, a)]))
    assert not any(calls)
    with pytest.raises(ValueError, match="empty"):
        made(mx.zeros((0, 1), mx.int32))
    with pytest.raises(ValueError, match="same size"):
        made(TOKENS[:, :1], input_embeddings=mx.zeros((2, 1, 40)))
    made(TOKENS[:, :1], input_embeddings=mx.zeros((2, 1, 72), mx.int32))
    assert not any(calls)


def test_many_layers(calls):
    made = make("tiny", num_hidden_layers=300)
    assert distance(numbers(by_token(made, TOKENS[:, :2])), exact(made, TOKENS[:, :2])[0]) < 1e-4
    assert all(calls)


# What it gives


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lstm, 4 heads", "plain"])
def test_arrays_given_out_stay_as_they_are(kind, dtype, calls):
    made = make(kind, DTYPES[dtype])
    cache, given = made.make_cache(2), []
    for t in range(12):
        y = made.model(TOKENS[:, t % 5 : t % 5 + 1], cache)
        given += [(a, numbers(a)) for a in (y, *held_arrays(cache))]
    gc.collect()
    for a, was in given:
        np.testing.assert_array_equal(numbers(a), was)
    places = sorted((cpu.address(a), a.nbytes) for a, _ in given)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))
    assert all(a.nbytes == a.size * a.dtype.size for a, _ in given)
    assert all(calls)


def test_caches_that_remember(calls):
    made = make("lstm, 4 heads")
    made.recent_steps, made.snapshot_spacing = 4, 3
    cache = made.make_cache(1)
    tokens, was = mx.random.randint(0, 37, (1, 14), key=mx.random.key(3)), []
    for t in range(14):
        made(tokens[:, t : t + 1], cache=cache)
        was.append([numbers(a) for a in held_arrays(cache)])
    twin = copy.deepcopy(cache)
    assert cache[0].positions() == [0, 3, 6, 9, 10, 11, 12, 13, 14]
    for back in (1, 3, 4):
        for c in cache:
            c.rewind(c.offset - (14 - back))
        for a, b in zip(held_arrays(cache), was[13 - back], strict=True):
            np.testing.assert_array_equal(numbers(a), b)
    for c in cache:
        c.rewind(1)
    for a, b in zip(held_arrays(cache), was[8], strict=True):
        np.testing.assert_array_equal(numbers(a), b)
    by_token(made, tokens[:, 9:], cache)
    for a, b, c in zip(held_arrays(cache), held_arrays(twin), was[13], strict=True):
        np.testing.assert_array_equal(numbers(a), c)
        np.testing.assert_array_equal(numbers(b), c)
    assert all(calls)


def test_models_are_copied_as_before(calls):
    made = make()
    wanted = by_token(made, TOKENS)
    again = copy.deepcopy(made)
    made.update(tree_map(lambda a: a * 0, made.parameters()))
    assert mx.array_equal(by_token(again, TOKENS), wanted)
    assert all(calls)


def test_python_threads(calls):
    made = make(hidden_size=200)
    tokens = mx.random.randint(0, 37, (4, 1, 20), key=mx.random.key(4))
    mx.eval(tokens)
    wanted = [by_token(made, row) for row in tokens]
    given, errors = {}, []

    def decode(n):
        try:
            for _ in range(3):
                with mx.stream(mx.default_stream(mx.default_device())):
                    given[n] = np.array(by_token(made, tokens[n]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=decode, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for n in range(4):
        np.testing.assert_array_equal(given[n], np.array(wanted[n]))
    assert all(calls)


def test_in_mlx_lms_generators(converted, calls, monkeypatch):
    """Greedy tokens, of a trained model: the same as in plain ops."""
    made, _ = load_model(converted("trained/paragru/final.pt"))
    prompts = [[int(t) for t in row] for row in golden_of("trained/paragru")["heldout_input_ids"][:3, :12]]

    def generated():
        tokens = [t for t, _ in generate_step(mx.array(prompts[0]), made, max_tokens=40)]
        generator = BatchGenerator(made, max_tokens=20)
        uids = generator.insert(prompts, max_tokens=[20, 9, 15])
        rows = {uid: [] for uid in uids}
        finished = 0
        while finished < 3:
            for r in generator.next_generated():
                rows[r.uid].append(r.token)
                finished += bool(r.finish_reason)
        generator.close()
        return tokens, [rows[uid] for uid in uids]

    given = generated()
    assert sum(calls) >= 55
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    calls.clear()
    assert generated() == given
    assert not calls
