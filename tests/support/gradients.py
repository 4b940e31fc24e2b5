"""Gradients of the recurrence: a problem with slopes for all that is returned, and the oracle's answer."""

import mlx.core as mx
import numpy as np

from mlx_pararnn.compute.adjoint import adjoint, tile_of
from mlx_pararnn.compute.recurrence import recurrence
from tests.support import oracle
from tests.support.msl.instances import DTYPES
from tests.support.msl.problem import Problem, assert_close, rounded

NAMES = ("params", "u", "state")


class Slopes(Problem):
    """Inputs, and the loss's derivatives by hidden, last state and every n-th state."""

    def __init__(self, name, T, D, B=1, heads=1, dtype="float32", every=0, mask=None, **options):
        super().__init__(name, T, D, B, heads, dtype, state=True, **options)
        rng = np.random.default_rng(1)
        slots = len(self.cell.slots)
        self.every, self.mask = every, mask
        low, self.d_hidden = rounded(rng.normal(size=(B, T, D)).astype(np.float32), dtype)
        self.low_d_hidden = low
        self.d_last = rng.normal(size=(B, slots, D)).astype(np.float32)
        shape = (B, T // every if every else 0, slots, D)
        self.d_states = rng.normal(size=shape).astype(np.float32)

    def arrays(self):
        """params, u (a view, as the projection leaves it), state and mask."""
        u = self._low(np.ascontiguousarray(self.u.swapaxes(0, 1))).swapaxes(0, 1)
        return mx.array(self.params), u, mx.array(self.initial), self._mask()

    def slopes(self):
        """Of hidden, last and, if every > 0, states."""
        given = [self._low(self.low_d_hidden), mx.array(self.d_last)]
        return [*given, mx.array(self.d_states)] if self.every else given

    def differentiated(self, backend):
        """The gradients of params, u and state by MLX, as the oracle lays them out."""
        params, u, state, mask = self.arrays()

        def solve(params, u, state):
            options = {"mask": mask, "return_states": self.every, "backend": backend}
            return [*recurrence(self.cell, params, u, state, **options)]

        return self.laid_out(mx.vjp(solve, [params, u, state], self.slopes())[1])

    def called(self, backend):
        """The same by a direct call of `adjoint`, from the oracle's states at the boundaries."""
        params, u, state, mask = self.arrays()
        d_hidden, d_last, *rest = self.slopes()
        given = params, u, state, mask, mx.array(self.boundaries(tile_of(backend))), d_hidden, d_last
        d_states = rest[0] if self.every else None
        return self.laid_out(adjoint(self.cell, *given, d_states, every=self.every, backend=backend))

    def boundaries(self, tile):
        states = self.oracle()[1]
        return states[:, tile - 1 :: tile].astype(np.float32)

    def laid_out(self, gradients):
        d_params, d_u, d_state = gradients
        B, heads, T, gates, width = self.u.shape
        assert (d_u.shape, d_u.dtype) == ((B, heads, T, gates, width), DTYPES[self.dtype])
        assert d_params.dtype == d_state.dtype == mx.float32
        d_u = np.array(d_u.astype(mx.float32)).transpose(0, 2, 3, 1, 4).reshape(B, T, gates, heads * width)
        return np.array(d_params), d_u, np.array(d_state)

    def exact(self, kind=np.float64):
        g = np.zeros((*self.exact_u.shape[:2], len(self.cell.slots), self.params.shape[1]), kind)
        keep = 1 if self.mask is None else self.mask[..., None]
        g[:, :, self.cell.output_slot] += self.d_hidden * keep
        g[:, -1] += self.d_last
        if self.every:
            g[:, self.every - 1 :: self.every] += self.d_states
        params, u, state = (a.astype(kind) for a in (self.params, self.exact_u, self.initial))
        return oracle.adjoint(self.cell, params, u, state, self.mask, g)

    def check(self, gradients):
        """To float32's own rounding in this problem, four times; u's gradient to its dtype's."""
        wanted = zip(self.exact(), self.exact(np.float32), strict=True)
        for name, given, (exact, single) in zip(NAMES, gradients, wanted, strict=True):
            scale = max(1.0, np.abs(exact).max())
            tolerance = max(3e-6, 4 * np.abs(single - exact).max() / scale)
            dtype = self.dtype if name == "u" else "float32"
            assert np.abs(given).max() > 0 or not np.abs(exact).max(), name
            assert_close(given / scale, exact / scale, dtype, tolerance)

    def _low(self, array):
        return mx.array(array).view(mx.bfloat16) if self.dtype == "bfloat16" else mx.array(array)

    def _mask(self):
        return None if self.mask is None else mx.array(self.mask)


def masks(B, T):
    """By name: none, left and right padding, holes, a row of padding alone, padding alone."""
    steps = np.arange(T)[None]
    third = T // 3
    none_first = np.ones((B, T), bool)
    none_first[0] = False
    return {
        "none": None,
        "left": np.broadcast_to(steps >= third, (B, T)).copy(),
        "right": np.broadcast_to(steps < T - third, (B, T)).copy(),
        "holes": np.random.default_rng(2).random((B, T)) < 0.7,
        "one row": none_first,
        "all": np.zeros((B, T), bool),
    }
