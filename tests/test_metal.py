"""On an Apple GPU: every instantiation of the kernels against the oracle, and under MLX's transformations."""

import mlx.core as mx
import numpy as np
import pytest
from test_recurrence import expected, loss_of, problem, solve

from mlx_pararnn import kernels
from mlx_pararnn.recurrence import recurrence

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(kernels.available_backend() is None, reason="needs a GPU that MLX can use"),
]

BACKEND = kernels.available_backend()


@pytest.mark.parametrize("name", ["gru", "lstm", "slstm", "nlru"])
@pytest.mark.parametrize("method", ["sequential", "newton"])
@pytest.mark.parametrize(("T", "D"), [(1, 9), (33, 33), (129, 256), (1000, 40), (4096, 1030)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_against_the_oracle(name, method, T, D, dtype):
    cell, params, u, state = problem(name, T=T, D=D, state=True)
    u = np.array(mx.array(u).astype(dtype).astype(mx.float32))
    mask = np.ones((2, T), bool)
    mask[0, : T // 4] = mask[1, T - T // 3 :] = False
    for masked in (None, mx.array(mask)):
        hidden, last, every = recurrence(
            cell,
            mx.array(params),
            mx.array(u).astype(dtype),
            mx.array(state),
            mask=masked,
            method=method,
            backend=BACKEND,
            return_states=7,
        )
        y, states = expected(cell, params, u, state, None if masked is None else mask)
        rounding = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
        slack = 1e-5 if name != "slstm" else 1e-3
        np.testing.assert_allclose(np.array(hidden.astype(mx.float32)), y, atol=slack + rounding)
        np.testing.assert_allclose(np.array(last), states[:, -1], atol=slack, rtol=slack)
        np.testing.assert_allclose(np.array(every), states[:, 6::7], atol=slack, rtol=slack)


@pytest.mark.parametrize("name", ["gru", "lstm", "nlru", "slstm"])
@pytest.mark.parametrize("tiling", kernels.SHAPES)
def test_iterations_end_and_the_answer_is_the_sequential_one(name, tiling, monkeypatch):
    monkeypatch.setattr(kernels, "_tiling", lambda B, D: tiling)
    for scale in (0.5, 8.0):
        cell, params, u, _ = problem(name, T=700, D=50, scale=scale)
        newton, _ = solve(cell, params, u, method="newton", backend=BACKEND, tol=0.0)
        straight, _ = solve(cell, params, u, method="sequential", backend=BACKEND)
        np.testing.assert_allclose(newton, straight, atol=1e-5 * max(1, np.abs(straight).max()))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_transformations(name):
    cell, params, u, state = problem(name, T=60, state=True)
    arrays = [mx.array(a) for a in (params, u, state)]
    loss, ops = loss_of(cell, {"backend": BACKEND}), loss_of(cell, {"backend": "ops"})
    wanted = mx.grad(ops, argnums=(0, 1, 2))(*arrays)
    for gradients in (mx.grad(loss, argnums=(0, 1, 2)), mx.compile(mx.grad(loss, argnums=(0, 1, 2)))):
        for a, b in zip(gradients(*arrays), wanted, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-3, atol=2e-4)
    stack = mx.stack([arrays[1], 0.5 * arrays[1]])
    mapped = mx.vmap(lambda v: recurrence(cell, arrays[0], v, backend=BACKEND)[0])(stack)
    one = recurrence(cell, arrays[0], stack[1], backend="ops")[0]
    np.testing.assert_allclose(np.array(mapped[1]), np.array(one), atol=1e-5)
