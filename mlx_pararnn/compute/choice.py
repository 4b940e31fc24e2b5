"""Which backend computes a call: decided here, once, and handed down.

Four backends exist. "metal" and "cuda" are the fused kernels of a GPU, "cpu" is the machine's vector unit
through its C++ compiler, "ops" is plain MLX: the reference, right everywhere and under every
transformation. A GPU's kernels are recorded like any operation of MLX. The CPU backend computes at once, so
it needs to know whether MLX allows evaluation, and must not compute what nobody asks for.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import mlx.core as mx

from ..cells import Cell
from ..errors import PararnnError
from . import cpu, gpu
from .cpu_build import NoCompilerError, was_told_before
from .texts import has_kernel

BACKENDS = ("metal", "cuda", "cpu", "ops")
CHUNK = gpu.CHUNK  # steps of a chunk, in ops as in the kernels


class Solver(NamedTuple):
    """How the recurrence shall be solved; `recurrence` has these arguments."""

    method: str = "auto"
    chunk: int = CHUNK
    tol: float | None = None
    max_iters: int | None = None


class Choice(NamedTuple):
    """Who computes what in one call, and how.

    Attributes:
        state: the backend of what makes the state: the convolution and the recurrence.
        output: that of what only the output needs: norms and gates.
        head: that of the last matrix product, to the logits.
        step: a GPU's kernel for one token takes the cell and its gated norm.
        one_call: the CPU backend may take all layers of a token in one call.
        eager: MLX allows evaluation.
        gradient: a derivative may be asked for.
        asked: the caller named the backend: the recurrence's kernels run untried and raise their errors.
        output_wanted: the caller reads for the output, not for the state alone.
        solver: how the caller wants the recurrence solved.
    """

    state: str
    output: str
    head: str = "ops"
    step: bool = False
    one_call: bool = False
    eager: bool = True
    gradient: bool = False
    asked: bool = False
    output_wanted: bool = False
    solver: Solver = Solver()

    def deferred(self) -> "Choice":
        """For the last layer: what its output alone needs is recorded, not computed at once.

        Whoever reads a prompt for its state, as all but the last piece of a prompt are read, never asks for
        that output, and MLX never computes what is not asked for. A derivative asks for all.
        """
        if self.output != "cpu" or self.output_wanted or self.gradient:
            return self
        return self._replace(output="ops")


PLAIN = Choice("ops", "ops")
TRIALS: dict[str, str] = {}  # what was tried in this process -> why it is not used, "" where it is right


class Evaluation(IntEnum):
    """What MLX allows at this place."""

    NEVER = 0  # inside mx.compile or mx.vmap
    GRADIENT = 1  # inside mx.grad: values are known, but a result needs a derivative
    FREE = 2


def evaluation(arrays: Sequence[mx.array]) -> Evaluation:
    """What MLX allows for results of these arrays. It has no other way to ask than to try."""
    if not arrays or _untraced(arrays):
        return Evaluation.FREE
    # A new array: of one that was evaluated before, async_eval would not notice that mx.grad traces it.
    probe = mx.depends([arrays[0]], [*arrays[1:]]) if len(arrays) > 1 else [mx.stop_gradient(arrays[0])]
    for allowed, evaluate in ((Evaluation.FREE, mx.async_eval), (Evaluation.GRADIENT, mx.eval)):
        try:
            evaluate(probe)
            return allowed
        except ValueError:
            continue
    return Evaluation.NEVER


_noted = threading.local()


@mx.compile
def _note(*arrays: mx.array) -> mx.array:
    _noted.called = True
    return arrays[0]


def _untraced(arrays: Sequence[mx.array]) -> bool:
    """Whether no transformation traces any of these arrays; False may also mean their shapes are new.

    MLX calls a compiled function's Python again where an input is traced, else only for new shapes. Nothing
    is evaluated: that would wake MLX's thread, which costs more than a small model's token.
    """
    _noted.called = False
    _note(*arrays)
    return not _noted.called


def choose(
    cell: Cell,
    reads: Callable[[], Sequence[mx.array]],
    *,
    rows: int,
    tokens: int,
    width: int,
    trial: Callable[[Cell, str], bool],
    padded: bool = False,
    divided: bool = False,
    backend: str | None = None,
    output_wanted: bool = False,
    **solver: Any,
) -> Choice:
    """Decide once for a call on `rows` sequences of `tokens` tokens, `width` channels each.

    Args:
        reads: gives the arrays that the results depend on; asked only where it matters.
        trial: whether the CPU backend gives, for this cell on this machine, what ops give. A GPU's kernels
            are tried one by one, where they are launched.
        padded: whether some tokens are padding.
        divided: whether this process has a part of each layer, so that a token is no single call.
        backend: what the caller asks for; the environment variable MLX_PARARNN_BACKEND goes before None.
        output_wanted, solver: see `Choice`; and the fields of `Solver`.

    Raises:
        PararnnError: a backend was asked for that is unknown, not on this machine, or unable to do this.
    """
    asked = _asked(backend)
    here = gpu.available_backend() or "cpu"
    if asked not in (None, "ops", here):
        raise PararnnError(f"backend {asked!r} is not available on {mx.default_device()}; choose 'ops'")
    how = Solver(**solver)
    plain = PLAIN._replace(output_wanted=output_wanted, solver=how)
    plain_token = tokens == 1 and not padded and how == Solver()

    if asked != "ops" and here != "cpu":
        if how.chunk == CHUNK and (asked or has_kernel(cell)):
            return plain._replace(state=here, output=here, step=plain_token, asked=asked is not None)
        if asked:
            raise PararnnError(
                f"backend {asked!r} has chunks of {CHUNK} steps; choose 'ops' for chunk={how.chunk}"
            )
    elif asked != "ops" and (asked or (how.method != "newton" and has_kernel(cell))):
        one_call = plain_token and not divided and 0 < rows <= cpu.FEW_ROWS
        on_cpu = plain._replace(state="cpu", head="cpu", one_call=one_call)
        if cpu.is_large(rows * tokens * width):
            on_cpu = on_cpu._replace(output="cpu")
        elif asked is None and tokens == 1:
            # Few numbers: a token that cannot be one call is MLX's, which does not wait in the middle.
            return on_cpu._replace(state="ops") if trial(cell, here) else plain
        if asked and how.method == "newton":
            raise PararnnError("backend 'cpu' goes straight through time; choose 'ops' for method='newton'")
        if allowed := evaluation(reads()):
            if asked or trial(cell, here):
                return on_cpu._replace(gradient=allowed == Evaluation.GRADIENT)
        elif asked:
            raise PararnnError(
                "backend 'cpu' runs at once, not inside mx.compile or mx.vmap; choose 'ops' there"
            )
        else:
            return plain._replace(eager=False)
    if tokens == 1:
        return plain
    eager = evaluation(reads()) > Evaluation.NEVER
    if how.method == "auto" and eager and _on_a_gpu() and len(cell.slots) < 4:
        plain = plain._replace(solver=how._replace(method="newton"))
    return plain._replace(eager=eager)


def choose_elementwise(size: int, reads: Callable[[], Sequence[mx.array]], backend: str | None = None) -> str:
    """The backend of elementwise work on `size` numbers that belongs to no recurrence: "cpu" or "ops".

    Args:
        reads: gives the arrays that the results depend on; asked only where it matters.
        backend: what the caller asks for, whatever the size; None for the CPU backend where it is faster.

    Raises:
        PararnnError: MLX_PARARNN_BACKEND is unknown.
    """
    if _asked(backend) not in (None, "cpu"):
        return "ops"
    wanted = backend or (not _on_a_gpu() and cpu.is_large(size))
    return "cpu" if wanted and evaluation(reads()) else "ops"


def _on_a_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def _asked(backend: str | None) -> str | None:
    """The backend that the caller or the environment asks for."""
    asked = backend or os.environ.get("MLX_PARARNN_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        raise PararnnError(f"unknown backend {asked!r}; choose one of {', '.join(BACKENDS)}")
    return asked


def works_here(
    what: str, backend: str, outcomes: Callable[[], Iterable[tuple[Sequence[mx.array], Sequence[mx.array]]]]
) -> bool:
    """Whether a backend gives, on small problems, what plain MLX ops give; if not, a warning says so.

    That there is no compiler is said once for all programs, after which `doctor` says it.

    Nobody has run it on every machine there is: where one does not take it, ops still give the answer.
    `TRIALS` keeps what came of it.

    Args:
        what: what is tried, as the warning names it.
        outcomes: pairs of (what the backend gave, what ops gave). Where a backend's array has 16 bits, one
            rounding more is allowed.
    """
    try:
        for given, wanted in outcomes():
            for a, b in zip(given, wanted, strict=True):
                rounding = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}.get(a.dtype, 0.0)
                pair = a.astype(mx.float32), b.astype(mx.float32)
                if not mx.allclose(*pair, rtol=1e-4 + rounding, atol=1e-4).item():
                    raise RuntimeError("it gives other numbers than plain MLX ops")
        TRIALS[f"{backend}: {what}"] = ""
    except Exception as error:  # of every type: MLX raises ValueError for a threadgroup that a GPU refuses
        TRIALS[f"{backend}: {what}"] = f"{error}"
        if isinstance(error, NoCompilerError) and was_told_before(error):
            return False
        # Of what is wrong with the machine one text, from one line: Python shows such a warning once.
        known = isinstance(error, PararnnError)
        reason, plea = (f"{error}", "") if known else (f"{what}: {error}", "; please report this")
        warnings.warn(
            f"the {backend} backend does not work here ({reason}); plain MLX ops are used, which is "
            f"slower{plea}",
            RuntimeWarning,
            stacklevel=1,
        )
        return False
    return True
