"""AdamW's update of several weights, and the answer in float64."""

import mlx.core as mx
import numpy as np

from mlx_pararnn.compute import cpu_gradients
from tests.support.random_models import numbers

NUMBERS = mx.array([0.9, 0.1, 0.95, 0.05, 2e-2, 1.7, 1e-3, 0.97, 0.3])  # large enough that each is seen
# of a stretch of metal/cpu_gradients.cpp, one more, one number, none of a vector's whole
SHAPES = ((128, 128), (16385,), (1,), (7, 3, 11), (3, 16384))


def problem(shapes=SHAPES, seed=0):
    """Gradients, weights, first and second moments; some gradients and moments are 0."""
    rng = np.random.default_rng(seed)
    kinds = [[rng.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(4)]
    for gradient, first, second in zip(kinds[0], kinds[2], kinds[3], strict=True):
        second **= 2
        for array in (gradient, first, second):
            array.reshape(-1)[::5] = 0
    return [[mx.array(array) for array in kind] for kind in kinds]


def exact(gradients, weights, firsts, seconds):
    """New weights, first and second moments."""
    beta1, rest1, beta2, rest2, rate, root, epsilon, kept, factor = (
        n.item() for n in np.array(NUMBERS, np.float64)
    )
    made: list[list[np.ndarray]] = [[], [], []]
    for arrays in zip(gradients, weights, firsts, seconds, strict=True):
        gradient, weight, first, second = (numbers(array).astype(np.float64) for array in arrays)
        gradient = factor * gradient
        first, second = beta1 * first + rest1 * gradient, beta2 * second + rest2 * gradient**2
        made[0].append(kept * weight - rate * first / (np.sqrt(second) * root + epsilon))
        made[1].append(first)
        made[2].append(second)
    return made


def check(kinds):
    """Each number to a few roundings of float32."""
    for given, wanted in zip(cpu_gradients.adamw(NUMBERS, *kinds), exact(*kinds), strict=True):
        for a, b in zip(given, wanted, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(numbers(a), b, rtol=1e-6, atol=1e-6)
