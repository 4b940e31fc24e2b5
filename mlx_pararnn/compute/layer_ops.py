"""The elementwise work around the recurrence: convolution, gates, norms, one token's step, the loss.

Each function is written in plain MLX ops, which differentiate, compile and are right everywhere. Where a GPU
kernel saves launches (metal/conv.metal, decode.metal, norm.metal), or a CPU's vector unit saves most of the
time (metal/cpu_elementwise.cpp), it has that too, with the derivatives of the ops or with gradients of its
own (metal/cpu_gradients.cpp); all compute in float32 whatever the dtype. For mx.vmap take backend="ops".

Letters in shapes: B sequences, T steps, D channels, K taps of the convolution, N tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models import activations

from ..cells import Cell
from ..errors import PararnnError
from . import cpu, cpu_gradients, gpu
from .adjoint import directional
from .choice import Choice, choose_elementwise, evaluation, works_here
from .recurrence import solve

GPU = ("metal", "cuda")
# More channels than a threadgroup of metal/decode.metal has threads: the trial's, where the call has more.
_MANY_CHANNELS = 1100

Arrays = tuple[mx.array, ...]


def conv_silu(
    x: mx.array,
    window: mx.array,
    weight: mx.array,
    bias: mx.array,
    spans: Sequence[tuple[int, int]] | None = None,
    *,
    backend: str = "ops",
) -> tuple[mx.array, mx.array]:
    """Causal depthwise convolution over [window, x], then SiLU; the convolution of the paper's Fig. 9.

    Args:
        x: (B, T, D).
        window: (B, K - 1, D), the inputs before x.
        weight: (D, K), the tap of the current input last.
        bias: (D,).
        spans: where each row's real tokens stand (`RecurrentCache.spans`); None if all are real. The window
            does not see padding.

    Returns:
        y (B, T, D) and the new window (B, K - 1, D).

    Raises:
        PararnnError: the window has another shape.
    """
    wanted = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if window.shape != wanted:  # from a cache of another model; a kernel would read beyond it
        raise PararnnError(
            f"the convolution's window has shape {window.shape}; with this x it must be {wanted}"
        )
    arrays = (x, window, weight, bias)
    if spans is not None or weight.shape[1] == 1:
        return _conv_ops(*arrays, spans)
    if backend in GPU and _uniform(arrays) and conv_works(backend, weight.shape[1], x.dtype):
        y, new_window = _conv_kernel(backend)(*arrays)
    elif taken_by_cpu(backend, *arrays):
        y, new_window = _conv_cpu()(*arrays)
    else:
        y, new_window = _conv_ops(*arrays)
    return y, new_window


def rms_norm(x: mx.array, weight: mx.array, eps: float, *, backend: str = "ops") -> mx.array:
    """RMSNorm of x (B, T, D) with weight (D,)."""
    if taken_by_cpu(backend, x, weight):
        (y,) = _rms_norm_cpu(eps)(x, weight)
        return cast(mx.array, y)
    return mx.fast.rms_norm(x, weight, eps)


def residual_sum(x: mx.array, added: mx.array, scale: mx.array | None = None) -> mx.array:
    """added + scale * x, all (B, T, D) but scale (1,); None for 1."""
    return added + (x if scale is None else scale * x)


def sum_and_norm(
    x: mx.array,
    added: mx.array,
    scale: mx.array | None,
    weight: mx.array,
    bias: mx.array | None,
    eps: float,
    *,
    backend: str = "ops",
) -> tuple[mx.array, mx.array]:
    """`residual_sum`, and RMSNorm of it with weight (D,), or with a bias (D,) LayerNorm; both (B, T, D)."""
    arrays = [a for a in (x, added, weight, bias, scale) if a is not None]
    kind = bias is not None, scale is not None
    D = min(x.shape[-1], _MANY_CHANNELS)
    if backend in GPU and _uniform(arrays) and norm_works(backend, *kind, x.dtype, D):
        total, y = _norm_kernel(*kind, eps, backend)(*arrays)
        return total, y
    total = residual_sum(x, added, scale)
    if bias is not None:
        return total, mx.fast.layer_norm(total, weight, bias, eps)
    return total, rms_norm(total, weight, eps, backend=backend)


def gated_norm(
    hidden: mx.array, gate: mx.array, weight: mx.array, eps: float, *, backend: str = "ops"
) -> mx.array:
    """RMSNorm(hidden) * silu(gate), all of shape (B, T, D) but weight (D,)."""
    if taken_by_cpu(backend, hidden, gate, weight):
        (y,) = _gated_norm_cpu(eps)(hidden, gate, weight)
        return cast(mx.array, y)
    return _gated_norm_ops(eps, hidden, gate, weight)


def swiglu(gate: mx.array, up: mx.array, *, backend: str = "ops") -> mx.array:
    """silu(gate) * up, any shape: one primitive, since MLX-LM compiles it."""
    if taken_by_cpu(backend, gate, up):
        (y,) = _swiglu_cpu()(gate, up)
        return cast(mx.array, y)
    return _swiglu_ops(gate, up)


def cross_entropy(logits: mx.array, targets: mx.array, *, backend: str | None = None) -> mx.array:
    """-log(softmax(logits)[target]) for every token.

    Args:
        logits: (..., V).
        targets: (...), whole numbers from 0 to V - 1.
        backend: "cpu", "ops", or None for the CPU backend where it can be used.

    Returns:
        The losses (...), float32.

    Raises:
        PararnnError: the shapes do not fit; or, where the CPU backend computes, a target is no place in V.
    """
    if targets.shape != logits.shape[:-1]:
        raise PararnnError(
            f"targets have shape {targets.shape}; with logits {logits.shape} it must be {logits.shape[:-1]}"
        )
    rows, places = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    backend = choose_elementwise(rows.size, lambda: [rows, places], backend)
    if taken_by_cpu(backend, rows) and _gradients_work(rows.dtype):
        losses = _cross_entropy_cpu()(rows, places.astype(mx.int32))[0]
    else:
        losses = _cross_entropy_ops(rows, places)[0]
    return cast(mx.array, losses).reshape(targets.shape)


def recurrence_and_norm(
    choice: Choice,
    cell: Cell,
    params: mx.array,
    u: mx.array,
    bias: mx.array,
    state: mx.array | None,
    mask: mx.array | None,
    every: int,
    *norm: Any,
) -> Arrays:
    """The recurrence, and where there is a `norm` that of its output, on the backends chosen.

    Args:
        params, u, bias, mask: as `recurrence` has them.
        state: (B, slots, D); None for zeros.
        every: `return_states` of `recurrence`.
        norm: nothing, or the gate (B, T, D), weight (D,) and eps of `gated_norm`.

    Returns:
        y (B, T, D), the last state (B, slots, D), and if every > 0 the states (B, T // every, slots, D).
    """
    if choice.step:
        if state is None:
            state = mx.zeros((u.shape[0], len(cell.slots), params.shape[1]))
        return decode(cell, params, u, bias, state, *norm, backend=choice.state)
    y, *states = solve(choice, cell, params, u, state, bias=bias, mask=mask, return_states=every)
    return gated_norm(y, *norm, backend=choice.output) if norm else y, *states


def decode(
    cell: Cell,
    params: mx.array,
    u: mx.array,
    bias: mx.array,
    state: mx.array,
    gate: mx.array | None = None,
    weight: mx.array | None = None,
    eps: float = 0.0,
    *,
    backend: str,
) -> tuple[mx.array, mx.array]:
    """One step of the cell; with `gate`, its output's gated norm too.

    Args:
        params: (P, D).
        u: (B, heads, 1, gates, D / heads), the input projection without its bias.
        bias: (heads, gates * D / heads).
        state: (B, slots, D).
        gate: (B, 1, D), with `weight` (D,) and `eps` as `gated_norm` has them; None for the cell alone.

    Returns:
        y (B, 1, D) and the new state (B, slots, D), float32.
    """
    # to float32 as in `recurrence`; MLX's CUDA side would not tell kernels for other dtypes apart
    exact = params.astype(mx.float32), state.astype(mx.float32)
    arrays = (u, bias, *exact) if gate is None or weight is None else (u, bias, *exact, gate, weight)
    D = state.shape[-1]
    if (
        backend in GPU
        and _uniform((u, bias, *arrays[4:]))
        and decode_works(cell, backend, u.dtype, len(arrays) > 4, min(D, _MANY_CHANNELS))
    ):
        y, last = _decode_kernel(cell, eps, backend)(*arrays)
    else:
        y, last = _decode_ops(cell, eps, backend, *arrays)
    return y, last


def taken_by_cpu(backend: str, *arrays: mx.array) -> bool:
    """Whether the CPU backend takes these arrays: all of one dtype, and it is right on this machine."""
    return backend == "cpu" and _uniform(arrays) and _elementwise_works(arrays[0].dtype)


def _uniform(arrays: Sequence[mx.array]) -> bool:
    """Whether all have the same dtype, one that the kernels write."""
    return arrays[0].dtype in gpu.DTYPES and all(a.dtype == arrays[0].dtype for a in arrays)


def _conv_ops(
    x: mx.array,
    window: mx.array,
    weight: mx.array,
    bias: mx.array,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[mx.array, mx.array]:
    T, K = x.shape[1], weight.shape[1]
    inputs = mx.concatenate([window, x], axis=1)
    if spans is None:
        # gathered from a prompt, where a view would hold on to the memory of all of it
        new_window = inputs[:, T:] if T == 1 else inputs[:, mx.arange(T, T + K - 1)]
    else:
        begin, end = (mx.array(side)[:, None] for side in zip(*spans, strict=True))
        # the window moves up to the row's first real token
        place = mx.arange(T + K - 1)
        source = mx.where(place < begin + K - 1, mx.maximum(place - begin, 0), place)
        inputs = mx.take_along_axis(inputs, source[..., None], axis=1)
        last = end + mx.arange(K - 1)
        new_window = mx.take_along_axis(inputs, last[..., None], axis=1)
    taps = [inputs[:, k : k + T] for k in range(K)]
    return _taps_silu(bias, *mx.split(weight.T, K), *taps), new_window


@partial(mx.compile, shapeless=True)
def _taps_silu(bias: mx.array, *weights_and_taps: mx.array) -> mx.array:
    # Shifted multiply-adds: MLX's depthwise conv1d takes four times as long on a CPU, and here SiLU joins in.
    K = len(weights_and_taps) // 2
    y = bias
    for weight, tap in zip(weights_and_taps[:K], weights_and_taps[K:], strict=True):
        y = y + weight * tap
    return y * mx.sigmoid(y)


def _decode_ops(cell: Cell, eps: float, backend: str, *arrays: mx.array) -> Arrays:
    u, bias, params, state, *gated = arrays
    _, heads, _, gates, width = u.shape
    u = u + bias.reshape(heads, 1, gates, width)
    hidden, last = solve(Choice(backend, backend), cell, params, u, state)
    if gated:
        gate, weight = gated
        hidden = gated_norm(hidden, gate, weight, eps)
    return hidden, last


@lru_cache(maxsize=8)
def _conv_kernel(backend: str) -> Callable[..., Any]:
    def launch(x: mx.array, window: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        arrays = {"x": x, "window": window, "weight": weight, "bias": bias}
        outputs = gpu.run(gpu.conv_launch(x.shape, weight.shape[1], x.dtype), arrays, backend)
        return [outputs["y"], outputs["new_window"]]

    return with_derivatives_of(_conv_ops, launch)


@lru_cache(maxsize=64)
def _decode_kernel(cell: Cell, eps: float, backend: str) -> Callable[..., Any]:
    epsilon = mx.array([eps], mx.float32)

    def launch(*arrays: mx.array) -> list[mx.array]:
        u, bias, params, state, *gated = arrays
        named = {"u": u, "bias": bias, "params": params, "initial": state}
        if gated:
            named |= {"gate": gated[0], "weight": gated[1], "eps": epsilon}
        outputs = gpu.run(gpu.decode_launch(cell, u.shape, u.dtype, gated=bool(gated)), named, backend)
        return [outputs["y"], outputs["last"]]

    return with_derivatives_of(partial(_decode_ops, cell, eps, "ops"), launch)


@lru_cache(maxsize=16)
def _norm_kernel(centered: bool, scaled: bool, eps: float, backend: str) -> Callable[..., Any]:
    epsilon = mx.array([eps], mx.float32)
    names = ["x", "added", "weight", *(["bias"] if centered else []), *(["scale"] if scaled else [])]

    def named(arrays: Sequence[mx.array]) -> dict[str, mx.array]:
        return dict(zip(names, arrays, strict=True))

    def launch(*arrays: mx.array) -> list[mx.array]:
        made = gpu.norm_launch(arrays[0].shape, arrays[0].dtype, centered=centered, scaled=scaled)
        outputs = gpu.run(made, named(arrays) | {"eps": epsilon}, backend)
        return [outputs["total"], outputs["y"]]

    def ops(*arrays: mx.array) -> Arrays:
        of = named(arrays)
        return sum_and_norm(of["x"], of["added"], of.get("scale"), of["weight"], of.get("bias"), eps)

    return with_derivatives_of(ops, launch)


def with_derivatives_of(
    ops: Callable[..., Arrays],
    launch: Callable[..., list[mx.array]],
    gradient: Callable[[Arrays, Arrays, Arrays], list[mx.array]] | None = None,
) -> Callable[..., Any]:
    """`launch`, which MLX cannot differentiate, with the derivatives of `ops`, backward and forward.

    Args:
        gradient: the CPU backend's vector-Jacobian product, of inputs, cotangents and outputs; None for that
            of `ops`.
    """
    function = mx.custom_function(launch)

    @function.vjp
    def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        arrays = (*primals, *cotangents, *outputs)
        if gradient is None or not _gradients_work(primals[0].dtype) or not evaluation(arrays):
            return _backward(ops, primals, cotangents)
        n, m = len(primals), len(primals) + len(cotangents)
        differentiable = with_derivatives_of(
            lambda *a: _backward(ops, a[:n], a[n:m]), lambda *a: gradient(a[:n], a[n:m], a[m:])
        )
        return tuple(differentiable(*arrays))

    @function.jvp
    def jvp(primals: Arrays, tangents: tuple[mx.array | None, ...]) -> Arrays:
        return directional(ops, primals, tangents)

    return function


def _backward(ops: Callable[..., Arrays], primals: Arrays, cotangents: Arrays) -> Arrays:
    return tuple(mx.vjp(lambda *a: [*ops(*a)], [*primals], [*cotangents])[1])


def _swiglu_ops(gate: mx.array, up: mx.array) -> mx.array:
    return activations.swiglu(gate, up)  # type: ignore[no-any-return]


def _gated_norm_ops(eps: float, hidden: mx.array, gate: mx.array, weight: mx.array) -> mx.array:
    return _swiglu_ops(gate, mx.fast.rms_norm(hidden, weight, eps))


def _cross_entropy_ops(logits: mx.array, targets: mx.array) -> Arrays:
    """The losses, and as constants what `cpu_gradients.cross_entropy` gives for its gradient."""
    exact = logits.astype(mx.float32)
    picked = mx.take_along_axis(exact, mx.stop_gradient(targets)[:, None], axis=-1)[:, 0]
    largest = mx.stop_gradient(exact).max(axis=-1)
    sums = mx.exp(mx.stop_gradient(exact) - largest[:, None]).sum(axis=-1)
    return mx.logsumexp(exact, axis=-1) - picked, largest, sums


@lru_cache(maxsize=1)
def _conv_cpu() -> Callable[..., Any]:
    def launch(x: mx.array, window: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        return [*cpu.conv_silu(x, window, weight.T, bias)]

    def gradient(inputs: Arrays, cotangents: Arrays, _: Arrays) -> list[mx.array]:
        (x, window, weight, bias), (slope, window_slope) = inputs, cotangents
        gradients = cpu_gradients.conv_silu_gradient(x, window, weight.T, bias, slope, window_slope)
        dx, d_window, d_weight, d_bias = gradients
        return [dx, d_window, d_weight.T, d_bias]

    return with_derivatives_of(_conv_ops, launch, gradient)


@lru_cache(maxsize=1)
def _swiglu_cpu() -> Callable[..., Any]:
    def gradient(inputs: Arrays, cotangents: Arrays, _: Arrays) -> list[mx.array]:
        (gate, up), (slope,) = inputs, cotangents
        return cpu_gradients.swiglu_gradient(gate, up, slope)

    return with_derivatives_of(lambda *a: (_swiglu_ops(*a),), lambda *a: [cpu.swiglu(*a)], gradient)


@lru_cache(maxsize=8)
def _rms_norm_cpu(eps: float) -> Callable[..., Any]:
    def launch(x: mx.array, weight: mx.array) -> list[mx.array]:
        return [cpu.rms_norm(x, weight, eps)]

    def gradient(inputs: Arrays, cotangents: Arrays, _: Arrays) -> list[mx.array]:
        (x, weight), (slope,) = inputs, cotangents
        return cpu_gradients.rms_norm_gradient(x, weight, slope, eps)

    return with_derivatives_of(lambda x, weight: (mx.fast.rms_norm(x, weight, eps),), launch, gradient)


@lru_cache(maxsize=8)
def _gated_norm_cpu(eps: float) -> Callable[..., Any]:
    def launch(hidden: mx.array, gate: mx.array, weight: mx.array) -> list[mx.array]:
        return [cpu.gated_norm(hidden, gate, weight, eps)]

    def gradient(inputs: Arrays, cotangents: Arrays, _: Arrays) -> list[mx.array]:
        (hidden, gate, weight), (slope,) = inputs, cotangents
        return cpu_gradients.gated_norm_gradient(hidden, gate, weight, slope, eps)

    return with_derivatives_of(lambda *a: (_gated_norm_ops(eps, *a),), launch, gradient)


@lru_cache(maxsize=1)
def _cross_entropy_cpu() -> Callable[..., Any]:
    def launch(logits: mx.array, targets: mx.array) -> list[mx.array]:
        ends = cast(list[int], mx.stack([targets.min(), targets.max()]).tolist())
        for target in ends:
            if not 0 <= target < logits.shape[-1]:
                raise PararnnError(f"target {target} is no place among {logits.shape[-1]} logits")
        return cpu_gradients.cross_entropy(logits, targets)

    def gradient(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        (logits, targets), (_, largest, sums), slope = inputs, outputs, cotangents[0]
        d_logits = cpu_gradients.cross_entropy_gradient(logits, targets, largest, sums, slope)
        return [d_logits, mx.zeros_like(targets)]

    return with_derivatives_of(_cross_entropy_ops, launch, gradient)


@lru_cache(maxsize=64)
def conv_works(backend: str, taps: int = 4, dtype: mx.Dtype = mx.float32) -> bool:
    """Try a GPU's kernel, the text and the threadgroup that a call is about to launch."""

    def outcomes() -> Iterator[tuple[Arrays, Arrays]]:
        for T in (1, 40):
            arrays = _waves(2, T, 80)[..., :72], _waves(2, taps - 1, 72), _waves(72, taps), _waves(72)
            rounded = [array.astype(dtype) for array in arrays]
            x, *rest = (array.astype(mx.float32) for array in rounded)
            yield _conv_kernel(backend)(*rounded), _conv_ops(x, rest[0], rest[1], rest[2])

    return works_here(f"the convolution, {taps} taps, {cpu.DTYPES[dtype]}", backend, outcomes)


@lru_cache(maxsize=256)
def decode_works(
    cell: Cell,
    backend: str,
    dtype: mx.Dtype = mx.float32,
    gated: bool = True,
    D: int = _MANY_CHANNELS,
) -> bool:
    """Try a GPU's kernel, the text and the threadgroup that a call is about to launch."""

    def outcomes() -> Iterator[tuple[Arrays, Arrays]]:
        heads, gates = 2 - D % 2, len(cell.gates)
        given = [_waves(heads, 2, 1, gates, D // heads).swapaxes(0, 1), _waves(heads, gates * D // heads)]
        rounded = [array.astype(dtype) for array in given]
        rounded += [0.3 * _waves(len(cell.params), D), 0.5 + 0.3 * _waves(2, len(cell.slots), D)]
        if gated:
            rounded += [_waves(2, 1, 2 * D)[..., :D].astype(dtype), _waves(D).astype(dtype)]
        wanted = _decode_ops(cell, 1e-6, "ops", *(array.astype(mx.float32) for array in rounded))
        yield _decode_kernel(cell, 1e-6, backend)(*rounded), wanted

    words = f"{cpu.DTYPES[dtype]}, {'gated' if gated else 'plain'}, {D} channels"
    return works_here(f"decoding with {cell.name!r}, {words}", backend, outcomes)


@lru_cache(maxsize=64)
def norm_works(
    backend: str,
    centered: bool = False,
    scaled: bool = False,
    dtype: mx.Dtype = mx.float32,
    D: int = _MANY_CHANNELS,
) -> bool:
    """Try a GPU's kernel, the text and the threadgroup that a call is about to launch."""

    def outcomes() -> Iterator[tuple[Arrays, Arrays]]:
        given = [_waves(2, 3, 2 * D)[..., :D], 1 - _waves(2, 3, D), _waves(D)]
        given += ([_waves(D)] if centered else []) + ([mx.array([0.7])] if scaled else [])
        rounded = [array.astype(dtype) for array in given]
        x, added, weight, *rest = rounded
        total = residual_sum(x, added, rest[-1] if scaled else None)  # whose rounding the norm sees
        exact, weight = total.astype(mx.float32), weight.astype(mx.float32)
        bias = rest[0].astype(mx.float32) if centered else None
        _, y = sum_and_norm(exact, mx.zeros_like(exact), None, weight, bias, 1e-6)
        yield _norm_kernel(centered, scaled, 1e-6, backend)(*rounded), (total, y)

    kind = ("LayerNorm" if centered else "RMSNorm") + (", scaled" if scaled else "")
    return works_here(f"the sum and {kind}, {cpu.DTYPES[dtype]}, {D} channels", backend, outcomes)


@lru_cache(maxsize=8)
def _elementwise_works(dtype: mx.Dtype) -> bool:
    def outcomes() -> Iterator[tuple[Arrays, Arrays]]:
        x, up, weight, matrix, taps = (
            array.astype(dtype)
            for array in (
                _waves(2, 20, 80)[..., :43],
                _waves(2, 20, 43),
                _waves(43),
                _waves(37, 43),
                _waves(43, 4),
            )
        )
        yield (cpu.swiglu(x, up),), _exactly(_swiglu_ops, x, up)
        yield (cpu.rms_norm(x, weight, 1e-6),), _exactly(partial(mx.fast.rms_norm, eps=1e-6), x, weight)
        yield (cpu.gated_norm(up, x, weight, 1e-6),), _exactly(partial(_gated_norm_ops, 1e-6), up, x, weight)
        yield (cpu.product(up, matrix),), _exactly(lambda x, matrix: x @ matrix.T, up, matrix)
        yield cpu.conv_silu(x, up[:, :3], taps.T, weight), _exactly(_conv_ops, x, up[:, :3], taps, weight)

    return works_here(f"elementwise work, {cpu.DTYPES[dtype]}", "cpu", outcomes)


@lru_cache(maxsize=8)
def _gradients_work(dtype: mx.Dtype) -> bool:
    def outcomes() -> Iterator[tuple[Sequence[mx.array], Arrays]]:
        x, up, weight, taps, slope = (
            array.astype(dtype)
            for array in (
                *(_waves(2, 80, 80)[..., :43], _waves(2, 80, 43), _waves(43), _waves(43, 4)),
                1 - _waves(2, 80, 43),
            )
        )
        window, targets = up[:, :3], mx.arange(160, dtype=mx.int32) % 43

        def wanted(function: Callable[..., Any], primals: Arrays, cotangents: Arrays) -> Arrays:
            return _exactly(
                lambda *a: _backward(function, a[: len(primals)], a[len(primals) :]), *primals, *cotangents
            )

        yield (
            cpu_gradients.swiglu_gradient(x, up, slope),
            wanted(lambda *a: (_swiglu_ops(*a),), (x, up), (slope,)),
        )
        norm = wanted(lambda x, weight: (mx.fast.rms_norm(x, weight, 1e-6),), (x, weight), (slope,))
        yield cpu_gradients.rms_norm_gradient(x, weight, slope, 1e-6), norm
        gated = wanted(lambda *a: (_gated_norm_ops(1e-6, *a),), (up, x, weight), (slope,))
        yield cpu_gradients.gated_norm_gradient(up, x, weight, slope, 1e-6), gated
        dx, d_window, d_taps, d_bias = cpu_gradients.conv_silu_gradient(
            x, window, taps.T, weight, slope, window
        )
        conv = wanted(_conv_ops, (x, window, taps, weight), (slope, window))
        yield (dx, d_window, d_taps.T, d_bias), conv
        logits, slope = x.reshape(160, 43), _waves(160)
        losses, largest, sums = cpu_gradients.cross_entropy(logits, targets)
        yield (losses, largest, sums), _exactly(lambda a: _cross_entropy_ops(a, targets), logits)
        d_logits = cpu_gradients.cross_entropy_gradient(logits, targets, largest, sums, slope)
        yield (d_logits,), wanted(lambda a: _cross_entropy_ops(a, targets)[:1], (logits,), (slope,))

    return works_here(f"the gradients of elementwise work, {cpu.DTYPES[dtype]}", "cpu", outcomes)


def _exactly(function: Callable[..., Any], *arrays: mx.array) -> Arrays:
    """What a function gives for the same numbers in float32."""
    given = function(*(array.astype(mx.float32) for array in arrays))
    return (given,) if isinstance(given, mx.array) else tuple(given)


def _waves(*shape: int) -> mx.array:
    """Numbers between -1 and 1."""
    count = 1
    for n in shape:
        count *= n
    return mx.sin(mx.arange(count)).reshape(shape)
