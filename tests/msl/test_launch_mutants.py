"""The Python that launches the kernels, broken on purpose, and the check that has to see each change."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import get_cell
from mlx_pararnn.compute import gpu, gpu_adjoint, recurrence
from tests.support.problems import problem

from ..support.msl import harness

pytestmark = [
    pytest.mark.harness,
    pytest.mark.skipif(bool(harness.missing()), reason=str(harness.missing())),
]


def strided(array):
    """The same numbers, in the order of columns."""
    return mx.contiguous(mx.array(array).swapaxes(0, -1)).swapaxes(0, -1)


def rows_that_differ():
    """The first row forgets at every step, so that Newton's guess is exact; the second does not."""
    cell, params, u, _ = problem("gru", T=60, scale=2.0)
    u[0, :, :, 0] = 200.0
    return cell, mx.array(params), mx.array(u)


def of_all_rows_the_most_iterations(module):
    cell, params, u = rows_that_differ()

    def iterations(rows):
        return module.recurrence(cell, params, rows, return_info=True)[-1].iterations

    alone = [iterations(u[:1]), iterations(u[1:])]
    assert alone[0] < alone[1]
    assert iterations(u) == alone[1]


def arrays_of_any_layout(module):
    cell, params, u, state = problem("gru", T=40, D=6, heads=2, state=True)
    rng = np.random.default_rng(0)
    mask, bias = rng.random((2, 40)) < 0.7, rng.normal(size=(2, 9)).astype(np.float32)
    whole = [mx.array(params), mx.array(u), mx.array(state)]
    options = {"mask": strided(mask), "bias": strided(bias)}
    given = module.recurrence(cell, strided(params), mx.array(u), strided(state), **options)
    options = {"mask": mx.array(mask), "bias": mx.array(bias)}
    wanted = recurrence.recurrence(cell, *whole, **options, backend="ops")
    for a, b in zip(given, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=5e-6)


def gradients_from_arrays_of_any_layout(module):
    cell, params, u, state = problem("gru", T=40, D=6, state=True)
    rng = np.random.default_rng(0)
    mask = mx.array(rng.random((2, 40)) < 0.7)
    boundaries = rng.normal(size=(2, 40 // gpu.CHUNK, 1, 6)).astype(np.float32)
    d_hidden = mx.array(rng.normal(size=(2, 40, 6)).astype(np.float32))
    d_last = rng.normal(size=(2, 1, 6)).astype(np.float32)
    arrays = [mx.array(a) for a in (params, state, boundaries, d_last)]
    found = []
    for layout in (mx.array, strided):
        p, s, b, d = map(layout, arrays)
        solve = module.solver("metal", "narrow")
        found.append(solve(cell, p, mx.array(u), s, layout(mask), b, d_hidden, d, None, 0, gpu.CHUNK))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))


def the_batch_counts(module):
    assert [module.tiling_for(B, 64) for B in (1, 8, 16)] == ["narrow", "medium", "wide"]


def a_full_gpu_goes_straight(module):
    """32 cores, as those of a GPU that is not known: 2048 channels are 64 for each, 1024 are 32."""
    cell = get_cell("gru")
    for dtype, most in ((mx.float16, 32), (mx.bfloat16, 32), (mx.float32, 16)):
        methods = [module.method_for(cell, B, 100, 64, dtype) for B in (1, most, most + 1)]
        assert methods == ["newton", "newton", "sequential"]
    for other, T in ((cell, 1), (get_cell("slstm"), 9)):
        assert module.method_for(other, 1, T, 64, mx.float16) == "sequential"


def nothing_computed(call):
    """The launches that `call` makes, and their arrays; they give zeros."""
    made, run = [], gpu.run

    def noted(launch, arrays, backend):
        made.append((launch, arrays))
        shapes = zip(launch.output_names, launch.output_shapes, launch.output_dtypes, strict=True)
        return {name: mx.zeros(shape, dtype) for name, shape, dtype in shapes}

    gpu.run = noted
    try:
        call()
    finally:
        gpu.run = run
    return made


def the_batch_is_told(module):
    """By a call: 16 rows of 64 channels are enough for the widest threadgroups."""
    cell, params, u, _ = problem("gru", T=20, D=64, B=16)
    made = nothing_computed(lambda: mx.eval(module.recurrence(cell, mx.array(params), mx.array(u))))
    assert [dict(launch.constants)["CW"] for launch, _ in made] == [32]


def newton_is_told_when_to_stop(module):
    """By hidden's dtype; returned states go on from there, in float32. A tolerance of 0 is one."""
    cell, params, u, _ = problem("gru", T=20)
    for dtype, fitting in ((mx.float32, 1e-6), (mx.float16, 2e-5), (mx.bfloat16, 1e-4)):
        for every, tol, most in ((0, None, None), (3, None, 2), (0, 0.0, None), (3, 0.5, None)):
            options = {"return_states": every, "tol": tol, "max_iters": most, "method": "newton"}
            arrays = mx.array(params), mx.array(u).astype(dtype)
            ((_, told),) = nothing_computed(lambda: mx.eval(module.recurrence(cell, *arrays, **options)))  # noqa: B023
            wanted = tol if tol is not None else 1e-6 if every else fitting
            assert told["tol"].tolist() == [np.float32(wanted)]
            assert told["max_iters"].tolist() == [most or 2**31 - 1]


def a_trial_is_of_more_than_one_of_each(module):
    """Tiles, groups of channels, rows and heads, none of them whole: else most of a kernel is not tried."""
    for method, tiling in (("newton", "wide"), ("newton", "narrow"), ("sequential", "wide")):
        is_of_more_than_one_of_each(module.trial, get_cell("gru"), "metal", method, mx.float32, tiling)


def is_of_more_than_one_of_each(trial, *call):
    def tried():
        with pytest.warns(RuntimeWarning, match="other numbers"):
            trial(*call)

    ((launch, arrays),) = nothing_computed(tried)
    B, heads, T, _, W = arrays["u"].shape
    constants = dict(launch.constants)
    tile = constants["RING"] if "RING" in constants else gpu.tile_steps(call[-1])
    assert B > 1
    assert heads > 1
    assert tile < T
    assert T % tile
    assert heads * W > constants.get("CW", 1)
    assert heads * W % constants.get("CW", launch.threadgroup[0])
    assert mx.abs(arrays["bias"]).max().item() > 0


def threads_that_every_gpu_allows(module):
    """MLX raises where registers do not fit: an M2 Ultra refused 1024 where an M4 Max did not."""
    for name in gpu.CELLS:
        cell = get_cell(name)
        for D in (40, 1024, 4096):
            shape = 1, 1, 1, len(cell.gates), D
            assert module.decode_launch(cell, shape, mx.float32, gated=True).threadgroup[0] <= 512


def as_mlx_is_told(module, backend):
    """What `backend`'s kernel is made with."""
    told, name = [], f"{backend}_kernel"
    real = getattr(mx.fast, name)

    def kernel(**options):
        told.append(options)
        return lambda **call: [mx.zeros(shape) for shape in call["output_shapes"]]

    setattr(mx.fast, name, kernel)
    try:
        launch = module.sequential_launch(get_cell("gru"), (1, 1, 4, 3, 32), mx.float32)
        module.run(launch, dict.fromkeys(launch.input_names, mx.zeros(1)), backend)
    finally:
        setattr(mx.fast, name, real)
    return told[0]


def exact_arithmetic(module):
    """Metal's fast mode has another tanh, and no NaN and infinities, on which Newton's guarantee rests."""
    assert as_mlx_is_told(module, "metal").get("compile_options") == {"math_mode": "safe"}


def nothing_is_copied(module):
    """Of a projection's view MLX would make a copy at each call, as large as u."""
    assert as_mlx_is_told(module, "metal")["ensure_row_contiguous"] is False
    assert as_mlx_is_told(module, "cuda")["ensure_row_contiguous"] is False


Check = Callable[[ModuleType], None]


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in a module, replaced by `new`."""

    module: ModuleType
    old: str
    new: str
    check: Check

    def __str__(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}: {self.new}"

    def made(self, new: str) -> ModuleType:
        """The module again, with `new` in the place of `old` and nothing kept from earlier calls."""
        text = inspect.getsource(self.module)
        assert text.count(self.old) == 1, self.old
        again = ModuleType(self.module.__name__)
        again.__package__, again.__file__ = self.module.__package__, self.module.__file__
        exec(compile(text.replace(self.old, new), str(self), "exec"), vars(again))
        if self.module is recurrence:
            again.trial = again.kernel_works.__wrapped__
            again.kernel_works = lambda *_: True
        return again


FAULTS = [
    Fault(
        recurrence,
        'outputs["iterations_made"].max()',
        'outputs["iterations_made"].min()',
        of_all_rows_the_most_iterations,
    ),
    *(
        Fault(recurrence, f"mx.contiguous({array}.astype({dtype}))", f"{array}.astype({dtype})", check)
        for check in [arrays_of_any_layout]
        for array, dtype in (("params", "mx.float32"), ("state", "mx.float32"), ("mask", "mx.bool_"))
    ),
    *(
        Fault(gpu_adjoint, f"mx.contiguous({array})", array, gradients_from_arrays_of_any_layout)
        for array in ("array.astype(mx.float32)", "mask")
    ),
    Fault(gpu, "B * -(-D // channels) >= gpu_cores()", "-(-D // channels) >= gpu_cores()", the_batch_counts),
    Fault(gpu, "few = B * D", "few = D", a_full_gpu_goes_straight),
    Fault(gpu, "B * D / gpu_cores()", "B * D", a_full_gpu_goes_straight),
    Fault(
        gpu, "FULL_CORE.get(dtype, FULL_CORE[mx.float32])", "FULL_CORE[mx.float16]", a_full_gpu_goes_straight
    ),
    Fault(recurrence, "gpu.tiling_for(B, ", "gpu.tiling_for(1, ", the_batch_is_told),
    Fault(gpu, "_NORM_THREADS = 512", "_NORM_THREADS = 1024", threads_that_every_gpu_allows),
    Fault(gpu, '"math_mode": "safe"', '"math_mode": "fast"', exact_arithmetic),
    Fault(gpu, 'compile_options={"math_mode": "safe"}', "compile_options={}", exact_arithmetic),
    *(
        Fault(
            gpu,
            f"ensure_row_contiguous=False,\n{after}",
            f"ensure_row_contiguous=True,\n{after}",
            nothing_is_copied,
        )
        for after in ("            compile_options", "    )\n\n\ndef _launch")
    ),
    Fault(recurrence, "mx.contiguous(shift)", "shift", arrays_of_any_layout),
    *(
        Fault(recurrence, old, new, newton_is_told_when_to_stop)
        for old, new in (
            ("TOLERANCE if every else _TOLERANCES", "_TOLERANCES"),
            ("TOLERANCE if every else _TOLERANCES[u.dtype]", "TOLERANCE"),
            ("mx.float16: 2e-5, mx.bfloat16: 1e-4", "mx.float16: 1e-4, mx.bfloat16: 2e-5"),
            ("fitting if plan.tol is None else plan.tol", "plan.tol or fitting"),
            ("plan.max_iters or 2**31 - 1", "2**31 - 1"),
        )
    ),
    *(
        Fault(recurrence, old, new, a_trial_is_of_more_than_one_of_each)
        for old, new in (
            ('23 + (gpu.tile_steps(tiling) if method == "newton" else 128)', "23"),
            ("B, heads, W = 2, 2, 21", "B, heads, W = 1, 2, 21"),
            ("B, heads, W = 2, 2, 21", "B, heads, W = 2, 1, 42"),
            ("B, heads, W = 2, 2, 21", "B, heads, W = 2, 2, 20"),
        )
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_seen(fault, request):
    if fault.module is not gpu:  # which is not to be replaced by the harness here
        request.getfixturevalue("launched")
    fault.check(fault.made(fault.old))
    with pytest.raises(AssertionError):
        fault.check(fault.made(fault.new))
