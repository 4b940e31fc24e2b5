"""The recurrence: checks the arguments and solves on the backend chosen. Its gradient: adjoint.py."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ..cells import Cell
from ..errors import PararnnError
from . import cpu, gpu
from .adjoint import adjoint, directional, states_adjoint, tile_of
from .choice import CHUNK, Choice, Solver, choose, works_here
from .newton import Solution, biased, laid_out, newton, outputs, sequential, unstack

METHODS = ("auto", "sequential", "newton")
TOLERANCE = 1e-6
# Of Newton, by the dtype of hidden, which is rounded: below half a step of a value of 0.1.
_TOLERANCES = {mx.float32: TOLERANCE, mx.float16: 2e-5, mx.bfloat16: 1e-4}


class NewtonInfo(NamedTuple):
    """How Newton went.

    Attributes:
        iterations: how many were made; 0 for the sequential method.
        residual: largest absolute difference between a chunk's end and the start of the next, a scalar array.
    """

    iterations: int
    residual: mx.array


class _Plan(NamedTuple):
    """Everything about a call that is not an array: what a differentiable function is cached by."""

    cell: Cell
    method: str
    chunk: int
    tol: float | None
    max_iters: int | None
    masked: bool
    asked: bool = False  # of the caller: its kernels run untried


def recurrence(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: mx.array | None = None,
    *,
    bias: mx.array | None = None,
    mask: mx.array | None = None,
    return_states: int = 0,
    method: str = "auto",
    backend: str | None = None,
    chunk: int = CHUNK,
    tol: float | None = None,
    max_iters: int | None = None,
    return_info: bool = False,
) -> tuple[Any, ...]:
    """Solve s_t = step(s_{t-1}, u_t; params) for a whole sequence.

    With B sequences, T steps, D channels: computed in float32 whatever the inputs' dtype.

    Args:
        cell: the cell, as `get_cell` gives it.
        params: (P, D), the recurrent weight, one row for each of `cell.params`.
        u: (B, heads, T, gates, D / heads), the input projection, as the projection leaves it (a strided view
            is fine).
        state: (B, slots, D), the state before the first step; None for zeros.
        bias: (heads, gates * D / heads), added to u at every step; the fused kernels add it as they read.
        mask: (B, T), bool; where False the state passes through unchanged and hidden is 0.
        return_states: if n > 0, also return the state after every n-th step.
        method: "sequential", "newton", or "auto": on a GPU what suits B x D and its cores
            (`gpu.method_for`), else sequential.
        backend: "metal" or "cuda", the fused kernels; "cpu", the cell compiled for the machine's vector unit,
            sequential; "ops", plain MLX; None takes the device's own where the cell has it, else ops. The
            environment variable MLX_PARARNN_BACKEND goes before None.
        chunk: Newton's chunk length C; 1 is the paper's scheme, Newton on the whole sequence. Any other than
            the default runs in ops.
        tol: Newton stops when no chunk start s moved by more than tol * max(1, |s|); the kernels weigh the
            movement by how much a difference has grown so far. None: 1e-6; in the kernels, unless states are
            returned, 2e-5 where hidden is float16 and 1e-4 where it is bfloat16, below their rounding.
        max_iters: at most so many iterations. Without it the answer is the sequential one whatever the
            weights. With tol=0 it is the number of iterations made, as in the paper (which makes 3).
            Of a cell whose `few_iterations` is False (sLSTM) a few give numbers of no use.
        return_info: also return a `NewtonInfo`. It costs one more pass over the sequence if chunk is 1, and
            gradients then go through the solver.

    Returns:
        hidden (B, T, D) in u's dtype; last state (B, slots, D), float32; then, if asked for, the states
        (B, T // n, slots, D), float32, and the `NewtonInfo`.

    Raises:
        PararnnError: an argument has the wrong shape or an unknown value.

    The kernels differentiate and compile; for mx.vmap take backend="ops", and ask for `return_info` outside
    of transformations.

    Inside mx.compile and mx.vmap nothing may be evaluated: there a CPU runs ops, "auto" is sequential, and
    Newton makes min(max_iters, T / chunk) iterations. GPU kernels need no evaluation and stop by themselves.
    """
    _check_input(cell, u)
    inputs = [params, u, *(a for a in (state, bias, mask) if a is not None)]
    B, heads, T, gates, width = u.shape
    solver: dict[str, Any] = {"method": method, "chunk": chunk, "tol": tol, "max_iters": max_iters}
    sizes = {"rows": B, "tokens": T, "width": gates * heads * width}
    choice = choice_for(cell, u.dtype, lambda: inputs, **sizes, backend=backend, **solver)
    options: dict[str, Any] = {"bias": bias, "mask": mask, "return_info": return_info}
    return solve(choice, cell, params, u, state, return_states=return_states, **options)


def choice_for(cell: Cell, dtype: mx.Dtype, reads: Callable[[], Sequence[mx.array]], **call: Any) -> Choice:
    """`choice.choose` for a call with this cell and dtype, which the CPU backend tries at its first use."""
    return choose(cell, reads, trial=lambda cell, backend: _kernels_agree(cell, backend, dtype), **call)


def choice_for_layers(
    cell: Cell, x: mx.array, mask: mx.array | None, reads: Callable[[], Sequence[mx.array]], **options: Any
) -> Choice:
    """`choose` for the layers of a model with this cell, that read x (B, T, D) with a mask (B, T) or None.

    Raises:
        PararnnError: as `choose`; and `max_iters` is given, where a few iterations are of no use.
    """
    if options.get("max_iters") is not None and not cell.few_iterations:
        raise PararnnError(
            f"max_iters={options['max_iters']}: for cell {cell.name!r} the states after a few Newton "
            "iterations are of no use; leave max_iters out, and Newton ends with the sequential answer"
        )
    B, T, D = x.shape
    return choice_for(cell, x.dtype, reads, rows=B, tokens=T, width=D, padded=mask is not None, **options)


def solve(
    choice: Choice,
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: mx.array | None = None,
    *,
    bias: mx.array | None = None,
    mask: mx.array | None = None,
    return_states: int = 0,
    return_info: bool = False,
) -> tuple[Any, ...]:
    """`recurrence` as the caller chose: its backend and solver; arguments and results as there."""
    _check(cell, params, u, state, bias, mask, choice.solver, return_states)
    B, heads, T, gates, width = u.shape
    if state is None:
        state = mx.zeros((B, len(cell.slots), heads * width))
    backend = choice.state
    on_gpu = backend in ("metal", "cuda")
    if bias is not None and not (on_gpu and bias.dtype == u.dtype in gpu.DTYPES):
        u, bias = biased(u, bias), None
    solver = choice.solver
    if solver.method == "auto":
        method = gpu.method_for(cell, B, T, heads * width, u.dtype) if on_gpu else "sequential"
        solver = solver._replace(method=method)
    plan = _Plan(cell, *solver, masked=mask is not None, asked=choice.asked)
    if backend != "ops":
        arrays: tuple[mx.array, ...] = (
            mx.contiguous(params.astype(mx.float32)),
            u if u.dtype in gpu.DTYPES else u.astype(mx.float32),
            mx.contiguous(state.astype(mx.float32)),
            mx.zeros((B, 0)) if mask is None else mx.contiguous(mask.astype(mx.bool_)),
        )
        if on_gpu:
            shift = mx.zeros((heads, gates * width), arrays[1].dtype) if bias is None else bias
            arrays = (*arrays, mx.contiguous(shift))
        if return_info:
            return _launch(plan, backend, return_states, *arrays, info=True)
        # where a gradient may follow, what it starts from is kept: the states at the boundaries of tiles
        tile = tile_of(backend)
        every = return_states or (tile if choice.gradient and tile <= T else 0)
        returned = _differentiable_kernel(plan, backend, every)(*arrays)
        return tuple(returned[: 3 if return_states else 2])

    arrays = laid_out(params, u, state, mask)
    if return_info:
        solution = _solve(plan, *arrays, eager=choice.eager, want_residual=True)
        residual = mx.array(0.0) if solution.residual is None else solution.residual
        info: tuple[NewtonInfo, ...] = (NewtonInfo(solution.iterations, residual),)
        states = mx.stack([*solution.states])
    else:
        info = ()
        states = _differentiable(plan, choice.eager)(*arrays)
    return (*outputs(cell, states, mask, return_states, u.dtype), *info)


@lru_cache(maxsize=64)
def _kernels_agree(cell: Cell, backend: str, dtype: mx.Dtype) -> bool:
    """Try the CPU backend on a small problem, once a cell, dtype and process: `choice.works_here`."""
    if dtype not in cpu.DTYPES:
        return False
    width, T = 40, 150
    params = 0.3 * mx.cos(mx.arange(len(cell.params) * width)).reshape(-1, width)
    u = mx.sin(mx.arange(2 * T * len(cell.gates) * width)).reshape(2, 1, T, len(cell.gates), width)
    u = u.astype(dtype)

    def outcomes() -> Iterator[tuple[tuple[mx.array, ...], tuple[mx.array, ...]]]:
        wanted = recurrence(cell, params, u, method="sequential", backend="ops")
        yield recurrence(cell, params, u, method="sequential", backend=backend), wanted

    return works_here(f"the recurrence of {cell.name!r}, {cpu.DTYPES[dtype]}", backend, outcomes)


@lru_cache(maxsize=256)
def kernel_works(
    cell: Cell,
    backend: str,
    method: str,
    dtype: mx.Dtype,
    tiling: str,
    masked: bool = False,
    states: bool = False,
    info: bool = False,
) -> bool:
    """Try one kernel of a GPU, once a process: the text and the threadgroup that a call is about to launch.

    On a small problem of more than one tile, one group of channels and one row, ragged in all three.

    Args:
        method: "sequential" or "newton".
        dtype: that of u.
        tiling: Newton's shape, one of `gpu.SHAPES`.
        masked, states, info: as the call has a mask, returned states and a `NewtonInfo`.
    """
    B, heads, W = 2, 2, 21
    T = 23 + (gpu.tile_steps(tiling) if method == "newton" else 128)

    def waves(*shape: int) -> mx.array:
        return mx.sin(mx.arange(math.prod(shape))).reshape(shape)

    params, state = 0.3 * waves(len(cell.params), heads * W), 0.5 + 0.3 * waves(B, len(cell.slots), heads * W)
    u = waves(heads, B, T, len(cell.gates), W).astype(dtype).swapaxes(0, 1)
    bias = 0.1 * waves(heads, len(cell.gates) * W)[:, ::-1].astype(dtype)
    mask = mx.arange(T) < mx.array([[T], [T - 20]])
    every = 3 if states else 0

    def outcomes() -> Iterator[tuple[Sequence[mx.array], Sequence[mx.array]]]:
        wanted = recurrence(
            cell,
            params,
            u.astype(mx.float32),
            state,
            bias=bias.astype(mx.float32),
            mask=mask if masked else None,
            return_states=every,
            method="sequential",
            backend="ops",
        )
        plan = _Plan(cell, method, CHUNK, None, None, masked, asked=True)
        arrays = params, u, state, mask, mx.contiguous(bias)
        given = _launch(plan, backend, every, *arrays, info=info, tiling=tiling)
        if info:
            given, wanted = (*given[:-1], given[-1].residual), (*wanted, mx.array(0.0))
        yield given, wanted

    words = [method, cpu.DTYPES[dtype], *([tiling] if method == "newton" else [])]
    words += [word for word, there in (("masked", masked), ("states", states), ("info", info)) if there]
    return works_here(f"the recurrence of {cell.name!r}, {' '.join(words)}", backend, outcomes)


def _check(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    state: mx.array | None,
    bias: mx.array | None,
    mask: mx.array | None,
    solver: Solver,
    return_states: int,
) -> None:
    _check_input(cell, u)
    B, heads, T, gates, width = u.shape
    D, slots = heads * width, len(cell.slots)
    expected: list[tuple[str, mx.array, tuple[int, ...]]] = [("params", params, (len(cell.params), D))]
    if state is not None:
        expected.append(("state", state, (B, slots, D)))
    if bias is not None:
        expected.append(("bias", bias, (heads, gates * width)))
    if mask is not None:
        expected.append(("mask", mask, (B, T)))
    for name, array, shape in expected:
        if array.shape != shape:
            raise PararnnError(
                f"{name} has shape {array.shape}; with this u, cell {cell.name!r} needs {shape}"
            )
    method, chunk, _, max_iters = solver
    if method not in METHODS:
        raise PararnnError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if chunk < 1 or (max_iters is not None and max_iters < 1):
        raise PararnnError(f"chunk and max_iters must be at least 1 (got {chunk} and {max_iters})")
    if max_iters is not None and max_iters >= 2**31:
        raise PararnnError(f"max_iters is {max_iters}; it must be below 2**31; leave it out for no limit")
    if not 0 <= return_states < 2**31:
        raise PararnnError(f"return_states is {return_states}; it must be 0 or a number of steps below 2**31")


def _check_input(cell: Cell, u: mx.array) -> None:
    gates = len(cell.gates)
    if u.ndim != 5 or u.shape[3] != gates or 0 in u.shape:
        raise PararnnError(
            f"u has shape {u.shape}; cell {cell.name!r} needs (batch, heads, T, {gates}, channels / heads), "
            "none of them 0"
        )


@lru_cache(maxsize=256)
def _differentiable(plan: _Plan, eager: bool) -> Callable[..., Any]:
    """(params, u, state, mask) -> states (slots, B, heads, T, W), with its own vector-Jacobian product."""

    @mx.custom_function
    def solve(params: mx.array, u: mx.array, state: mx.array, mask: mx.array) -> mx.array:
        return mx.stack([*_solve(plan, params, u, state, mask, eager=eager).states])

    @solve.vjp
    def solve_vjp(
        primals: tuple[mx.array, ...], cotangent: mx.array, states: mx.array
    ) -> tuple[mx.array, ...]:
        params, u, state, mask = primals
        steps = mask if plan.masked else None
        return *states_adjoint(plan.cell, params, u, state, steps, states, cotangent), mx.zeros_like(mask)

    return solve


@lru_cache(maxsize=256)
def _differentiable_kernel(plan: _Plan, backend: str, every: int) -> Callable[..., Any]:
    """(params, u, state, mask, bias) -> hidden, last[, states] by the fused kernel, with gradients.

    The CPU backend's takes no bias.
    """

    @mx.custom_function
    def solve(*arrays: mx.array) -> list[mx.array]:
        return [*_launch(plan, backend, every, *arrays)]

    @solve.vjp
    def solve_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], returned: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        params, u, state, mask, *bias = primals
        tile = tile_of(backend)
        if every == tile:
            boundaries = returned[2]
        elif u.shape[2] < tile:
            boundaries = mx.zeros((state.shape[0], 0, *state.shape[1:]))
        else:  # not by _launch: a second derivative goes through them
            boundaries = _differentiable_kernel(plan, backend, tile)(*primals)[2]
        steps = mask if plan.masked else None
        gradients = adjoint(
            plan.cell,
            params,
            u,
            state,
            steps,
            boundaries,
            *cotangents,
            bias=bias[0] if bias else None,
            every=every,
            backend=backend,
        )
        return *gradients[:3], mx.zeros_like(mask), *gradients[3:]

    @solve.jvp
    def solve_jvp(
        primals: tuple[mx.array, ...], tangents: tuple[mx.array | None, ...]
    ) -> tuple[mx.array, ...]:
        mask = primals[3] if plan.masked else None

        def in_ops(params: mx.array, u: mx.array, state: mx.array, *bias: mx.array) -> list[mx.array]:
            options: dict[str, Any] = {"mask": mask, "return_states": every, "backend": "ops"}
            options["bias"] = bias[0] if bias else None
            return [*recurrence(plan.cell, params, u, state, method="sequential", **options)]

        return directional(in_ops, (*primals[:3], *primals[4:]), (*tangents[:3], *tangents[4:]))

    return solve


def _launch(
    plan: _Plan,
    backend: str,
    every: int,
    params: mx.array,
    u: mx.array,
    state: mx.array,
    mask: mx.array,
    bias: mx.array | None = None,
    *,
    info: bool = False,
    tiling: str | None = None,
) -> tuple[Any, ...]:
    """hidden, last[, states][, info] by the fused kernel, or by the CPU's.

    A kernel of a GPU that fails its trial is not used: in Newton's place then the sequential one, else ops.
    """
    if backend == "cpu":
        solved = cpu.solve(plan.cell, params, u, state, mask if plan.masked else None, every)
        return (*solved, NewtonInfo(0, mx.array(0.0))) if info else solved
    cell, masked = plan.cell, plan.masked
    B, heads, _, _, W = u.shape
    tiling = tiling or gpu.tiling_for(B, heads * W)
    flags = masked, every > 0
    methods = ["newton", "sequential"] if plan.method == "newton" else ["sequential"]
    works = (
        m
        for m in methods
        if plan.asked or kernel_works(cell, backend, m, u.dtype, tiling, *flags, info and m == "newton")
    )
    method = next(works, None)
    if method is None:
        return recurrence(
            cell,
            params,
            u,
            state,
            bias=bias,
            mask=mask if masked else None,
            return_states=every,
            method=plan.method,
            backend="ops",
            tol=plan.tol,
            max_iters=plan.max_iters,
            return_info=info,
        )
    assert bias is not None, "a GPU's kernels have one"
    arrays = {"u": u, "bias": bias, "params": params, "initial": state, "mask": mask}
    arrays["every"] = mx.array([every], mx.int32)
    if method == "sequential":
        launch = gpu.sequential_launch(cell, u.shape, u.dtype, masked=masked, every=every)
    else:
        options: dict[str, Any] = {"masked": masked, "every": every, "info": info, "tiling": tiling}
        launch = gpu.newton_launch(cell, u.shape, u.dtype, **options)
        fitting = TOLERANCE if every else _TOLERANCES[u.dtype]  # states are float32 and go on from there
        arrays["tol"] = mx.array([fitting if plan.tol is None else plan.tol], mx.float32)
        arrays["max_iters"] = mx.array([plan.max_iters or 2**31 - 1], mx.int32)
    outputs = gpu.run(launch, arrays, backend)
    result: tuple[Any, ...] = (outputs["hidden"], outputs["last"])
    if every:
        result += (outputs["states"],)
    if info:
        made = outputs["iterations_made"].max().item() if "gap" in outputs else 0
        gap = outputs["gap"].max() if "gap" in outputs else mx.array(0.0)
        result += (NewtonInfo(cast(int, made), gap),)
    return result


def _solve(
    plan: _Plan,
    params: mx.array,
    u: mx.array,
    state: mx.array,
    mask: mx.array,
    *,
    eager: bool,
    want_residual: bool = False,
) -> Solution:
    slots = unstack(state.swapaxes(0, 1))
    steps = mask if plan.masked else None
    if plan.method == "sequential":
        return sequential(plan.cell, params, u, slots, steps, eager=eager)
    return newton(
        plan.cell,
        params,
        u,
        slots,
        steps,
        chunk=plan.chunk,
        tol=TOLERANCE if plan.tol is None else plan.tol,
        max_iters=plan.max_iters,
        eager=eager,
        want_residual=want_residual,
    )
