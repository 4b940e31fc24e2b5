"""A model divided among processes computes what it computes in one."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.compute.module_arrays import named_arrays
from mlx_pararnn.errors import PararnnError
from tests.support import compare_shards
from tests.support.compare_shards import CASES, TOKENS, WIDE, made
from tests.support.ranks import run_ranks


class Rank:
    """A group of which this process is one, and that says nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.large
@pytest.mark.parametrize("count", [2, 4])
def test_logits_states_and_gradients_are_those_of_one_process(count, tmp_path):
    names = list(CASES)[:: 3 if count == 2 else 1]
    for text in run_ranks(count, tmp_path, "-m", compare_shards.__name__, *names):
        assert [line.split(":")[0] for line in text.splitlines()] == names


@pytest.mark.parametrize("name", ["lstm, one head, tied", "gru, 4 bits"])
def test_logits_are_those_of_one_process_where_threads_are_the_processes(name, monkeypatch):
    form, bits = CASES[name]
    barrier, computing, told = Barrier(2, timeout=60), Lock(), {}

    def exchanged(x: mx.array, group: Rank) -> list[mx.array]:
        mx.eval(x)
        told[group.rank()] = x
        computing.release()
        barrier.wait()
        both = [told[0], told[1]]
        barrier.wait()
        computing.acquire()
        return both

    def logits(rank: int) -> np.ndarray:
        with computing:
            part = made(form | {"num_hidden_layers": 1}, bits)
            part.shard(Rank(rank, 2))
            cache = part.make_cache(2)
            pieces = [part(tokens, cache=cache) for tokens in (TOKENS[:, :10], TOKENS[:, 10:])]
            return np.array(mx.concatenate(pieces, axis=1))

    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: sum(exchanged(x, group)))
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: mx.concatenate(exchanged(x, group)))
    with ThreadPoolExecutor(2) as threads:
        given = [*threads.map(logits, range(2))]
    wanted = np.array(made(form | {"num_hidden_layers": 1}, bits)(TOKENS))
    assert np.array_equal(*given)
    assert np.abs(given[0] - wanted).max() < 5e-5


def test_the_parts_are_the_whole():
    form, bits = CASES["gru, 4 bits"]
    whole = dict(named_arrays(made(form, bits).parameters()))
    parts = []
    for rank in range(4):
        part = made(form, bits)
        part.shard(Rank(rank, 4))
        parts.append(dict(named_arrays(part.parameters())))
    assert all(part.keys() == whole.keys() for part in parts)
    for name, array in whole.items():
        pieces = [part[name] for part in parts]
        if pieces[0].shape == array.shape:
            assert all(mx.array_equal(piece, array) for piece in pieces)
            assert array.ndim == 1, name  # norms are in every process
        elif ".in_proj." in name:
            halves = [mx.split(piece, 2) for piece in pieces]
            assert mx.array_equal(mx.concatenate([half[n] for n in (0, 1) for half in halves]), array)
        else:
            axes = [a for a in range(array.ndim) if pieces[0].shape[a] != array.shape[a]]
            assert mx.array_equal(mx.concatenate(pieces, axis=axes[0]), array), name


@pytest.mark.parametrize(
    ("name", "size"), [("gru, 4 bits", 4), ("lstm, one head, tied", 2), ("lstm, plain, uneven heads", 4)]
)
def test_a_weight_is_put_together_again(name, size, monkeypatch):
    form = CASES[name][0]
    whole, told = dict(named_arrays(made(form, 0).parameters())), []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: told.append(np.array(x)) or x)
    names = {}
    for rank in range(size):
        part = made(form, 0)
        part.shard(Rank(rank, size))
        for key, array in named_arrays(part.parameters()):
            before = len(told)
            joined = part.part.joined(key, array)
            if len(told) > before:
                names.setdefault(key, []).append(told[-1])
            else:
                assert mx.array_equal(joined, whole[key])
    assert len(names) > len(whole) / 2
    for key, parts in names.items():
        assert sum(parts).tobytes() == np.array(whole[key]).tobytes(), key


@pytest.mark.parametrize("path", ["", "model", "model.layers.1", "model.layers.1.mixer.out_proj"])
def test_a_weight_of_which_nothing_says_how_it_is_divided_is_refused(path):
    model = made({"num_heads": 4}, 0)
    dict(model.named_modules())[path].bias = mx.zeros(4)
    before = [(name, array.shape) for name, array in named_arrays(model.parameters())]
    with pytest.raises(PararnnError, match=rf"{path}\.?bias cannot be divided"):
        model.shard(Rank(1, 2))
    assert model.group is None
    assert before == [(name, array.shape) for name, array in named_arrays(model.parameters())]


@pytest.mark.parametrize(
    ("form", "bits", "words"),
    [
        ({"num_heads": 3, "hidden_size": 27}, 0, "3 heads"),
        (WIDE | {"num_heads": 1, "hidden_size": 320}, 4, "quantization group"),
        ({"vocab_size": 3}, 0, "vocabulary"),
    ],
)
def test_what_cannot_be_divided_is_a_sentence_and_stays_whole(form, bits, words):
    model = made(form, bits)
    before = [(name, array.shape) for name, array in named_arrays(model.parameters())]
    with pytest.raises(PararnnError, match=f"{words}.*divided"):
        model.shard(Rank(1, 4))
    assert model.group is None
    assert before == [(name, array.shape) for name, array in named_arrays(model.parameters())]
