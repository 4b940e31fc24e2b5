"""Overflowing inputs, large batches, extreme sampling: finite, and as the oracle has it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn.cli.sampling import Sampling, sampler
from mlx_pararnn.compute.recurrence import recurrence
from tests.support import oracle
from tests.support.problems import problem

LOGPROBS = mx.array([[-3.0, -0.2, -2.0, -9.0]])


@pytest.mark.parametrize("temp", [1e-30, 1e-45, 5e-324, 0.0])
def test_a_temperature_that_float32_cannot_divide_by_takes_the_likeliest(temp):
    choose = sampler(Sampling(temp=temp, seed=1), 4)["sampler"]
    assert [choose(LOGPROBS).item() for _ in range(20)] == [1] * 20


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"temp": 100.0}, {0, 1, 2, 3}),
        ({"temp": 1.0, "top_p": 1e-30}, {1}),
        ({"temp": 1.0, "min_p": 1.0}, {1}),
    ],
)
def test_other_extremes_are_defined(given, wanted):
    choose = sampler(Sampling(seed=2**64 - 1, **given), 4)["sampler"]
    assert {choose(LOGPROBS).item() for _ in range(50)} == wanted


@pytest.mark.parametrize("penalty", [1e-30, 100.0])
def test_a_penalty_leaves_numbers(penalty):
    (process,) = sampler(Sampling(repetition_penalty=penalty), 4)["logits_processors"]
    assert not mx.isnan(process(mx.array([0, 1, 2]), LOGPROBS)).any()


def test_a_seed_draws_the_same_again():
    def drawn():
        choose = sampler(Sampling(temp=1.0, seed=7), 4)["sampler"]
        return [choose(LOGPROBS).item() for _ in range(50)]

    assert drawn() == drawn()


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", ["gru", "lstm", "nlru", "slstm"])
def test_inputs_that_overflow_the_activations_give_numbers(name):
    """Gates of 1e30, and of the largest float32: sigmoid and tanh end at 0 and 1, and so do the states."""
    cell, params, u, _ = problem(name, T=12, D=6)
    for size in (1e4, 1e30, 3e38):
        if name == "slstm" and size > 1e4:
            continue  # its gates are exponentials of sums: beyond float32 there is no right value
        for method in ("sequential", "newton"):
            hidden, last = recurrence(
                cell, mx.array(params), mx.array(np.sign(u) * np.float32(size)), method=method
            )
            assert mx.isfinite(hidden).all(), (size, method)
            assert mx.isfinite(last).all()


@pytest.mark.large
@pytest.mark.parametrize("name", ["gru", "lstm", "nlru", "slstm"])
def test_a_batch_of_64_with_lengths_of_1_to_4096_is_the_oracles(name):
    cell, params, u, _ = problem(name, T=4096, D=2, B=64)
    lengths = np.unique(np.geomspace(1, 4096, 64).round().astype(int))
    lengths = np.sort(np.concatenate([lengths, np.arange(2, 2 + 64 - len(lengths))]))
    mask = np.arange(4096) >= 4096 - lengths[:, None]  # padded on the left, as a batch is
    hidden, last = recurrence(cell, mx.array(params), mx.array(u), mask=mx.array(mask))
    plain = u.transpose(0, 2, 3, 1, 4).reshape(64, 4096, len(cell.gates), 2).astype(np.float64)
    states = oracle.sequential(cell, params.astype(np.float64), plain, None, mask)
    wanted = np.where(mask[..., None], states[cell.output_slot], 0)
    scale = max(1, np.abs(wanted).max())
    assert np.abs(np.array(hidden) - wanted).max() < 2e-5 * scale
    ends = np.stack([state[:, -1] for state in states], axis=1)
    assert np.abs(np.array(last) - ends).max() < 2e-5 * max(1, np.abs(ends).max())
