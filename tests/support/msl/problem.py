"""A recurrence's inputs in a kernel's form and in the oracle's, and its runs in the harness."""

import numpy as np

from mlx_pararnn import get_cell
from mlx_pararnn.compute.gpu import newton_launch, sequential_launch
from tests.support import oracle

from . import harness
from .instances import DTYPES


def rounded(array, dtype):
    """float32 -> what the kernel is given, and the same numbers in float64."""
    if dtype == "bfloat16":
        bits = (array.view(np.uint32) + 0x7FFF + ((array.view(np.uint32) >> 16) & 1)) >> 16
        return bits.astype(np.uint16), (bits << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    low = array.astype(dtype)
    return low, low.astype(np.float64)


def widened(array, dtype):
    return (
        (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array.astype(np.float64)
    )


def interval(every):
    return {"every": np.array([every], np.int32)} if every else {}


class Problem:
    """Inputs of one call, in the kernel's form and in the oracle's."""

    def __init__(
        self,
        name,
        T,
        D,
        B=1,
        heads=1,
        dtype="float32",
        state=False,
        masked=False,
        scale=0.5,
        memory=0.0,
        seed=0,
        bias=0.0,
    ):
        self.cell, self.dtype, self.masked = get_cell(name), dtype, masked
        rng = np.random.default_rng(seed)
        self.params = (scale * rng.normal(size=(len(self.cell.params), D))).astype(np.float32)
        u = rng.normal(size=(B, heads, T, len(self.cell.gates), D // heads)).astype(np.float32)
        if memory:
            gate, sign = {"gru": ("z", -1), "lstm": ("f", 1), "nlru": ("a", 1), "slstm": ("f", 1)}[name]
            u[:, :, :, self.cell.gates.index(gate)] += np.float32(sign * memory)
        # As the projection leaves it: heads outermost in memory, read by strides.
        given, exact = rounded(np.ascontiguousarray(u.swapaxes(0, 1)), dtype)
        self.u, exact = given.swapaxes(0, 1), exact.swapaxes(0, 1)
        self.exact_u = exact.transpose(0, 2, 3, 1, 4).reshape(B, T, len(self.cell.gates), D)
        # of its own numbers, so that the others do not depend on it
        shift = bias * np.random.default_rng(1000 + seed).normal(size=(heads, u.shape[3] * u.shape[4]))
        self.bias, self.exact_bias = rounded(shift.astype(np.float32), dtype)
        self.initial = np.zeros((B, len(self.cell.slots), D), np.float32)
        if state:
            self.initial[:] = 0.3 * rng.normal(size=self.initial.shape)
            if name == "slstm":
                self.initial[:, 1] = 1 + self.initial[:, 1] ** 2
        self.mask = None
        if masked:
            self.mask = np.ones((B, T), bool)
            for row in range(B):  # left padding in even rows, right padding in odd ones
                n = (T * (row + 1)) // 5
                self.mask[row, slice(0, n) if row % 2 == 0 else slice(T - n, T)] = False

    def oracle(self, kind=np.float64):
        """hidden (B, T, D) and all states (B, T, slots, D)."""
        states = oracle.sequential(
            self.cell,
            self.params.astype(kind),
            self._shifted_u(kind),
            self.initial.astype(kind),
            self.mask,
        )
        return self._hidden(states), np.stack(states, axis=2)

    def iterate(self, tile, chunk, iterations, kind=np.float64):
        with np.errstate(all="ignore"):
            states = oracle.tiled_iterates(
                self.cell,
                self.params.astype(kind),
                self._shifted_u(kind),
                tile,
                chunk,
                iterations,
                self.initial.astype(kind),
                self.mask,
            )
        return self._hidden(states)

    def _shifted_u(self, kind):
        (gates, D), heads = self.exact_u.shape[2:], len(self.exact_bias)
        shift = self.exact_bias.reshape(heads, gates, D // heads).swapaxes(0, 1).reshape(gates, D)
        return self.exact_u.astype(kind) + shift.astype(kind)

    def _hidden(self, states):
        hidden = states[self.cell.output_slot]
        return hidden if self.mask is None else np.where(self.mask[..., None], hidden, 0)

    def newton(self, *, tol=1e-6, max_iters=2**31 - 1, every=0, tiling="wide", info=True, **options):
        launch = newton_launch(
            self.cell,
            self.u.shape,
            DTYPES[self.dtype],
            masked=self.masked,
            every=every,
            tiling=tiling,
            info=info,
        )
        extra = {"tol": np.array([tol], np.float32), "max_iters": np.array([max_iters], np.int32)}
        return self._run(launch, extra | interval(every), **options)

    def sequential(self, *, every=0, **options):
        launch = sequential_launch(
            self.cell, self.u.shape, DTYPES[self.dtype], masked=self.masked, every=every
        )
        return self._run(launch, interval(every), **options)

    def _run(self, launch, extra, **options):
        inputs = {"u": self.u, "bias": self.bias, "params": self.params, "initial": self.initial, **extra}
        if self.masked:
            inputs["mask"] = self.mask
        out = harness.run(launch, inputs, dtypes={"u": self.dtype, "bias": self.dtype}, **options)
        out["hidden"] = widened(out["hidden"], self.dtype)
        return out


def assert_close(a, b, dtype="float32", tolerance=3e-6):
    """Absolute up to 1, relative above; hidden states in 16 bits are rounded once."""
    step = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(a, b, atol=tolerance + step, rtol=tolerance + step)
