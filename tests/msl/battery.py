"""A small set of checks that a broken kernel must not pass; the whole numeric table is test_numbers.py's.

In this order, the first objection counts:
  language     the lint, and clang where there is one
  compile      g++ and the shim
  semantics    all checks of the harness, in three lane orders
  convergence  hidden, last and returned states against the sequential answer in float64
  iterates     the same after exactly 1 and 2 iterations, against Newton's iterates in float64: a wrong scan
               or Jacobian still converges to the right answer, but on another way
  bookkeeping  the iterations counted, and the gap left between chunks
  wild         weights for which the Jacobian overflows: bit for bit the sequential kernel's answer
  chaotic      single channels whose differences grow a million times: within 1e-5 of the sequential answer
  promised     at a loose tolerance: hidden of 16 bits within it, all else far closer to the sequential answer
  contained    NaN and inf in one channel change no other, and end
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mlx_pararnn.compute.gpu import SHAPES, Launch
from tests.support import oracle

from ..support.msl.build import CompileError
from ..support.msl.harness import KernelError, run
from ..support.msl.instances import DTYPES, Instance, instance
from ..support.msl.wrap import wrap
from . import language
from .lint import lint

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}  # of hidden; states are float32 always
FORGET = {"gru": (0, -2.0), "lstm": (0, 2.0), "nlru": (0, 2.0), "slstm": (1, 2.0)}  # gate, bias: long memory
CHAOTIC = {
    "gru": [(8.0, "wide", 6), (8.0, "wide", 113)],
    "lstm": [(8.0, "wide", 7), (4.0, "narrow", 2)],
}  # scale, shape, seed
ALL = 1000  # iterations: more than there are chunks

Objection = tuple[str, str]  # kind, message
Change = Callable[[Launch], Launch]


class Case:
    """An instance with data, its u a strided view as a projection leaves it, in one sequence of heads."""

    def __init__(self, made: Instance, tiling: str | None, every: int = 0) -> None:
        rng = np.random.default_rng(7)
        B, heads, T, gates, W = made.u_shape
        self.made, self.tiling, self.every = made, tiling, every
        gate, bias = FORGET[made.cell.name]
        wide = rng.normal(0, 1, (B, T, gates, heads, W + 1)).astype(np.float32)
        wide[:, :, gate] += np.float32(bias)
        typed = mx.array(wide).astype(DTYPES[made.dtype])
        values = np.array(typed.astype(mx.float32))
        stored = np.array(typed.view(mx.uint16) if made.dtype == "bfloat16" else typed)
        # every second number of an array, so that no axis has neighbours side by side
        self.u = np.repeat(stored[..., :W], 2, axis=-1)[..., ::2].transpose(0, 3, 1, 2, 4)
        self.values = values[..., :W].reshape(B, T, gates, heads * W)
        P, slots, D = len(made.cell.params), len(made.cell.slots), heads * W
        # of its own numbers, so that the others do not depend on it
        shift = np.random.default_rng(8).normal(0, 0.2, (heads, gates * W)).astype(np.float32)
        typed = mx.array(shift).astype(DTYPES[made.dtype])
        self.bias = np.array(typed.view(mx.uint16) if made.dtype == "bfloat16" else typed)
        exact = np.array(typed.astype(mx.float32)).reshape(heads, gates, W)
        self.shift = exact.swapaxes(0, 1).reshape(gates, heads * W)
        self.params = rng.uniform(-0.7, 0.7, (P, D)).astype(np.float32)
        self.initial = rng.uniform(0.1, 0.7, (B, slots, D)).astype(np.float32)
        self.mask = rng.random((B, T)) < 0.8
        self.known: dict[tuple[int | None, str], dict[str, np.ndarray]] = {}

    def run(
        self, change: Change, iterations: int = ALL, tol: float = 1e-6, **options
    ) -> dict[str, np.ndarray]:
        inputs = {
            "u": self.u,
            "bias": self.bias,
            "params": self.params,
            "initial": self.initial,
            "tol": np.full(1, tol, np.float32),
            "max_iters": np.full(1, iterations, np.int32),
            "every": np.full(1, self.made.every, np.int32),
            "mask": self.mask,
        }
        launch = change(self.made.launch)
        inputs = {name: inputs[name] for name in launch.input_names}
        return run(
            launch, inputs, dtypes=dict.fromkeys(("u", "bias"), self.made.dtype), seconds=20.0, **options
        )

    def expected(self, iterations: int | None, dtype=np.float64) -> dict[str, np.ndarray]:
        """What the oracle says; iterations None: the sequential answer."""
        key = (iterations, np.dtype(dtype).name)
        if key not in self.known:
            self.known[key] = self._expected(iterations, dtype)
        return self.known[key]

    def _expected(self, iterations: int | None, dtype) -> dict[str, np.ndarray]:
        u, params, state = (a.astype(dtype) for a in (self.values, self.params, self.initial))
        u = u + self.shift.astype(dtype)
        mask = self.mask if self.made.masked else None
        cell = self.made.cell
        if iterations is None:
            states = oracle.sequential(cell, params, u, state, mask)
        else:
            assert self.tiling is not None
            CW, C, S = SHAPES[self.tiling]
            states = oracle.tiled_iterates(cell, params, u, S * 32 // CW * C, C, iterations, state, mask)
        hidden = states[cell.output_slot]
        if mask is not None:
            hidden = np.where(mask[:, :, None], hidden, 0)
        every = np.stack(states, axis=2)  # (B, T, slots, D)
        found = {"hidden": hidden, "last": every[:, -1]}
        if self.every:
            found["states"] = every[:, self.every - 1 :: self.every]
        return found

    def without_bias(self) -> "Case":
        self.bias, self.shift = np.zeros_like(self.bias), np.zeros_like(self.shift)
        return self

    def compare(self, got: dict[str, np.ndarray], iterations: int | None) -> str:
        """What differs, or ""."""
        for name, want in self.expected(iterations).items():
            array = mx.array(got[name])
            bits16 = name == "hidden" and self.made.dtype == "bfloat16"
            values = np.array((array.view(mx.bfloat16) if bits16 else array).astype(mx.float32))
            allowed = TOLERANCE[self.made.dtype if name == "hidden" else "float32"]
            size = np.maximum(1, np.abs(want))
            if iterations is not None:  # a first guess far off (sLSTM's is) is as far off in NumPy's float32
                single = self.expected(iterations, np.float32)[name]
                allowed = max(allowed, 30 * np.max(np.abs(single - want) / size))
            error = np.max(np.abs(values - want) / size)
            if not error <= allowed:
                return f"{name} is off by {error:.1e}"
        return ""


def newton_cases(cell: str) -> list[Case]:
    """Three tiles, two channel groups, ragged, heads of 20; all options, in the narrow shape and for rows."""
    plain = instance(cell, "float32", "wide", info=True, shape=(2, 2, 300, 20))
    options = {"masked": True, "every": 3, "info": True}
    # sLSTM's first iterates grow to 1e8 over many chunks, where float32 decides nothing: fewer for it
    steps = 60 if cell == "slstm" else 530
    rich = instance(cell, "bfloat16", "narrow", shape=(1, 1, steps, 9), **options)
    rows = instance(cell, "float16", "medium", masked=True, every=3, shape=(2, 1, 60, 9))
    return [Case(plain, "wide"), Case(rich, "narrow", every=3), Case(rows, "medium", every=3)]


def sequential_cases(cell: str) -> list[Case]:
    plain = instance(cell, "float32", None, shape=(2, 2, 20, 40))
    rich = instance(cell, "float16", None, masked=True, every=3, shape=(2, 1, 20, 9))
    short = instance(
        cell, "bfloat16", None, masked=True, shape=(1, 1, 3, 9)
    )  # fewer steps than are read ahead
    return [Case(plain, None), Case(rich, None, every=3), Case(short, None)]


def objection(cases: list[Case], change: Change) -> Objection | None:
    """The first thing wrong with the kernels `change` makes, None if they pass."""
    for kind, check in CHECKS.items():
        for case in cases:
            try:
                for message in check(case, change):
                    return kind, f"{case.made}: {message}"
            except CompileError as error:
                return "compile", f"{case.made}: {error}"
            except KernelError as error:
                return "semantics", f"{case.made}: {error}"
    return None


def _language(case: Case, change: Change) -> Iterator[str]:
    launch = change(case.made.launch)
    wrapped = wrap(launch, case.made.inputs)
    yield from lint(wrapped, launch.header)
    if language.clang():
        yield from language.address_spaces(launch, wrapped)


def _convergence(case: Case, change: Change) -> Iterator[str]:
    for order in (0, 1, 2):
        if difference := case.compare(case.run(change, order=order), None):
            yield difference


def _iterates(case: Case, change: Change) -> Iterator[str]:
    if case.tiling:
        for iterations in (1, 2):
            got = case.run(change, iterations, tol=0.0, check=False)
            if difference := case.compare(got, iterations):
                yield f"after {iterations} iterations {difference}"


def _bookkeeping(case: Case, change: Change) -> Iterator[str]:
    if "gap" not in case.made.launch.output_names:
        return
    for iterations in (1, 2):
        got = case.run(change, iterations, tol=0.0, check=False)
        if np.any(got["iterations_made"] != iterations):
            yield f"{np.max(got['iterations_made'])} iterations counted, not {iterations}"
        if iterations == 1 and not np.max(got["gap"]) > 1e-5:
            yield f"the gap after 1 iteration is {np.max(got['gap']):.1e}"
    got = case.run(change, check=False)
    if not np.max(got["gap"]) < 1e-4:  # (sLSTM's c and n are large)
        yield f"the gap at convergence is {np.max(got['gap']):.1e}"
    if not 3 <= np.max(got["iterations_made"]) <= 8:
        yield f"{np.max(got['iterations_made'])} iterations to convergence"
    if case.tiling == "wide":
        yield from _partly_filled(case.made.cell.name, change)


def _partly_filled(name: str, change: Change) -> Iterator[str]:
    """A tile most of whose chunks hold no steps."""
    whole = Case(instance(name, "float32", "narrow", info=True, shape=(1, 1, 48, 3)), "narrow")
    if difference := whole.compare(whole.run(change, 1, tol=0.0, check=False), 1):
        yield f"after 1 iteration on whole chunks {difference}"
    forgetful = Case(instance(name, "float32", "narrow", info=True, shape=(1, 1, 68, 3)), "narrow")
    gate, bias = FORGET[name]
    forgetful.u, forgetful.params = forgetful.u.copy(), np.zeros_like(forgetful.params)
    forgetful.u[:, :, :, gate] = -100 * bias  # the state is the last step's alone, as the guess takes it
    made = np.max(forgetful.run(change, check=False)["iterations_made"])
    if made != 1:
        yield f"{made} iterations from an exact guess"


def _wild(case: Case, change: Change) -> Iterator[str]:
    if not case.tiling or case.made.dtype != "float32":
        return
    B, heads, T, _, W = case.made.u_shape
    straight = instance(case.made.cell.name, "float32", None, shape=(B, heads, T, W))
    pair = Case(case.made, case.tiling).without_bias(), Case(straight, None).without_bias()
    params = np.random.default_rng(3).uniform(-60, 60, case.params.shape).astype(np.float32)
    u, initial = case.u * np.float32(0.1), case.initial.copy()
    # the first channels rest on 0, a fixed point so unstable that the Jacobian of a chunk there is infinite
    params[:, :5], u[..., :5], initial[:, :, :5] = 5000.0, 0.0, 0.0
    for one in pair:
        one.params, one.initial, one.u = params, initial, u
    got = pair[0].run(change, tol=0.0, check=False)
    want = pair[1].run(lambda launch: launch, check=False)
    for name in ("hidden", "last"):
        if not np.array_equal(got[name], want[name]):
            yield f"{name} is not the sequential kernel's"


def _chaotic(case: Case, change: Change) -> Iterator[str]:
    if case.tiling != "wide":
        return
    name = case.made.cell.name
    for scale, tiling, seed in CHAOTIC.get(name, []):
        shape = (1, 1, 1100, 1)
        one = Case(instance(name, "float32", tiling, info=True, shape=shape), tiling)
        straight = Case(instance(name, "float32", None, shape=shape), None)
        rng = np.random.default_rng(seed)
        params = (scale * rng.normal(size=one.params.shape)).astype(np.float32)
        u = rng.normal(size=one.u.shape).astype(np.float32)
        for each in (one.without_bias(), straight.without_bias()):
            each.params, each.u, each.initial = params, u, np.zeros_like(each.initial)
        got = one.run(change, check=False)["hidden"]
        want = straight.run(lambda launch: launch, check=False)["hidden"]
        if not np.max(np.abs(got - want)) <= 1e-5:
            yield f"hidden is off by {np.max(np.abs(got - want)):.1e}"


def _promised(case: Case, change: Change) -> Iterator[str]:
    if not case.tiling or case.made.cell.name == "slstm":
        return
    if difference := case.compare(case.run(change, tol=1e-3, check=False), None):
        yield f"at a tolerance of 1e-3 {difference}"
    if case.tiling != "narrow":
        return
    name = case.made.cell.name
    rounded = Case(instance(name, "bfloat16", "wide", shape=(1, 1, 128, 9)), "wide")
    off = np.max(np.abs(rounded.run(change, tol=0.1)["last"] - rounded.expected(None)["last"]))
    if not off <= 1e-4:
        yield f"at a tolerance of 0.1 the last state is off by {off:.1e}"
    rounded.run(change, tol=1e9)  # settled at once; and yet all is written
    if name == "gru":
        yield from _growing_on_the_way(change)


def _growing_on_the_way(change: Change) -> Iterator[str]:
    """In each chunk a difference grows 243 times in 5 steps, and then shrinks 300 times."""
    shape = (1, 1, 300, 1)
    one = Case(instance("gru", "float16", "wide", shape=shape), "wide").without_bias()
    straight = Case(instance("gru", "float32", None, shape=shape), None).without_bias()
    grows = np.arange(300) % 16 < 5
    u = np.zeros(one.u.shape, np.float16)
    u[0, 0, :, 0, 0] = np.where(grows, 10, -0.385)
    u[0, 0, :, 1, 0] = np.where(grows, 10, -20)
    u[0, 0, :, 2, 0] = np.where(grows, 3e-3 * np.random.default_rng(2).normal(size=300), 0)
    one.u, straight.u = u, u.astype(np.float32)
    for each in (one, straight):
        each.params, each.initial = np.array([[0], [0], [3]], np.float32), np.zeros_like(each.initial)
    got = one.run(change, tol=1e-2, check=False)["hidden"].astype(np.float32)
    off = np.max(np.abs(got - straight.run(lambda launch: launch, check=False)["hidden"]))
    if not off <= 1.1e-2:
        yield f"at a tolerance of 1e-2 hidden is off by {off:.1e}"


def _contained(case: Case, change: Change) -> Iterator[str]:
    if not case.tiling or case.made.dtype != "float32":
        return
    clean = case.run(change, check=False)
    for value, steps in ((np.nan, 40), (np.inf, 40), (np.nan, slice(None))):
        spoiled = Case(case.made, case.tiling)
        spoiled.u = spoiled.u.copy()
        spoiled.u[0, 0, steps, :, 3] = value
        got = spoiled.run(change, check=False)
        for name in ("hidden", "last"):
            others = np.ones_like(clean[name], bool)
            others[0, ..., 3] = False
            if name == "hidden" and steps == 40:
                others[0, :40, 3] = True  # what came before
            if not np.allclose(got[name][others], clean[name][others], rtol=0, atol=1e-5):
                yield f"{value} in one channel of u changes {name} where it must not"
        if steps == slice(None) and np.max(got["iterations_made"]) > np.max(clean["iterations_made"]):
            yield "a channel that is NaN throughout costs iterations"


CHECKS: dict[str, Callable[[Case, Change], Iterator[str]]] = {
    "language": _language,
    "convergence": _convergence,
    "iterates": _iterates,
    "bookkeeping": _bookkeeping,
    "wild": _wild,
    "chaotic": _chaotic,
    "promised": _promised,
    "contained": _contained,
}
