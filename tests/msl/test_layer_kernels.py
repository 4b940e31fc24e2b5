"""The kernels of the convolution and of decoding: text, language, numbers, and the functions around them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_pararnn import Model, ModelArgs, get_cell
from mlx_pararnn.compute import gpu, layer_ops

from ..support.msl import cuda
from ..support.msl.harness import missing
from ..support.msl.instances import CELLS, DTYPES
from ..support.msl.layer_kernels import all_calls, conv, decode, norm
from ..support.msl.wrap import wrap
from . import language
from .lint import lint
from .mlx_text import assert_same

needs_harness = pytest.mark.skipif(bool(missing()), reason=missing())
calls = pytest.mark.parametrize("call", list(all_calls()), ids=str)


@calls
def test_text(call, tmp_path, capfd):
    assert_same(call.launch, call.inputs, tmp_path, capfd)


@pytest.mark.sampled("harness", by=lambda call: [call.launch.name.split("_")[1]])
@calls
def test_language(call):
    wrapped = wrap(call.launch, call.inputs)
    assert lint(wrapped, call.launch.header) == []
    if language.clang():
        assert language.address_spaces(call.launch, wrapped) == []


@pytest.mark.toolchain
@pytest.mark.skipif(not cuda.nvcc(), reason="no nvcc")
@pytest.mark.parametrize(
    "call",
    [conv(2, 40, 9, dtype=dtype) for dtype in DTYPES]
    + [norm(2, 3, 9, dtype, centered=i > 0, scaled=i < 2) for i, dtype in enumerate(DTYPES)]
    + [
        decode(cell, 2, 18, dtype=dtype, gated=gated)
        for cell, dtype, gated in zip(
            CELLS, ("float32", "float16", "bfloat16", "float32"), (1, 1, 0, 0), strict=True
        )
    ],
    ids=str,
)
def test_cuda_twin_compiles(call):
    assert cuda.compile_ptx(cuda.cuda_twin(call.launch, call.inputs)) == []


@pytest.mark.sampled("harness", by=lambda T, dtype: [dtype, T] if T in (1, 15, 100) else [])
@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [2, 3, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 100])
def test_conv(T, K, dtype):
    for order, (B, D) in enumerate(((1, 1), (1, 64), (3, 65), (2, 200))):
        call = conv(B, T, D, K, dtype, seed=T + K)
        assert call.compare(call.run(order=order)) == ""


@pytest.mark.sampled(
    "harness", by=lambda cell, dtype, gated: [cell, dtype, gated] if cell in ("gru", "slstm") else []
)
@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("gated", [False, True])
def test_decode(cell, dtype, gated):
    sizes = (1, 1, 1), (1, 31, 1), (3, 33, 3), (1, 512, 4), (2, 513, 1), (2, 1100, 2), (1, 4096, 4)
    for i, (B, D, heads) in enumerate(sizes):
        call = decode(cell, B, D, heads, dtype, gated=gated, seed=i)
        got = call.run(order=i % 3, check=D < 4096)
        assert call.compare(got, tolerance=2e-5 if cell == "slstm" else 3e-6) == ""


@pytest.mark.sampled("harness")
@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_norm(scaled, centered, dtype):
    for i, (B, T, D) in enumerate(
        ((1, 1, 1), (2, 3, 31), (1, 2, 33), (3, 1, 512), (1, 2, 513), (2, 1, 1100))
    ):
        call = norm(B, T, D, dtype, centered=centered, scaled=scaled, seed=i)
        assert call.compare(call.run(order=i % 3)) == ""


@needs_harness
def test_metals_own_rounding():
    """exp off by the ulps that Metal's tables allow, fused multiply-add, no denormals."""
    for call in (conv(2, 40, 70), decode("gru", 2, 100), decode("lstm", 2, 600), norm(1, 2, 600)):
        assert call.compare(call.run(math="metal"), tolerance=1e-5) == ""


@needs_harness
def test_other_activations():
    call = decode("lstm", 2, 70, activations={"c": "gelu", "state": "silu"})
    assert call.compare(call.run()) == ""


@needs_harness
def test_offsets_beyond_32_bits():
    """Inputs whose rows, heads or steps stand 2^30 numbers apart: three are more than an int counts."""
    far = np.zeros(2 * 2**30 + 4096, np.float16)  # only the pages that are touched take memory

    def spread(call, name, axis):
        array = call.given[name]
        strides = [n // 2 for n in np.empty(array.shape, np.float16).strides]
        strides[axis] = 2**30
        view = np.lib.stride_tricks.as_strided(far, array.shape, tuple(2 * n for n in strides))
        view[...] = array
        call.given[name] = view

    for axis, (B, T) in enumerate(((3, 1), (1, 3))):
        call = conv(B, T, 9, dtype="float16")
        spread(call, "x", axis)
        assert call.compare(call.run()) == ""
    for name, axis, (B, heads) in (("u", 0, (3, 1)), ("u", 1, (1, 3)), ("gate", 0, (3, 1))):
        call = decode("gru", B, 9, heads, "float16")
        spread(call, name, axis)
        assert call.compare(call.run()) == ""
    for name, axis, (B, T) in (("x", 0, (3, 1)), ("added", 0, (3, 1)), ("x", 1, (1, 3))):
        call = norm(B, T, 9, "float16")
        spread(call, name, axis)
        assert call.compare(call.run()) == ""


@needs_harness
def test_a_spoiled_channel_spoils_no_other():
    call = conv(2, 40, 70)
    clean = call.run()["y"]
    call.given["x"] = call.given["x"].copy()
    call.given["x"][0, 5, 3] = np.nan
    y = call.run()["y"]
    assert np.isnan(y[0, 5:9, 3]).all()
    y[0, 5:9, 3] = clean[0, 5:9, 3]
    np.testing.assert_array_equal(y, clean)


# By way of the model's functions, with the harness in the GPU's place.


def arrays_of(call):
    """The call's inputs as MLX arrays, by name."""
    return {
        name: mx.array(array).view(mx.bfloat16) if call.dtypes[name] == "bfloat16" else mx.array(array)
        for name, array in call.given.items()
    }


def by_decode(call, cell, backend, **changed):
    a = arrays_of(call) | changed
    norm = (a["gate"], a["weight"], 0.01) if "gate" in a else ()
    return layer_ops.decode(
        get_cell(cell), a["params"], a["u"], a["bias"], a["initial"], *norm, backend=backend
    )


def by_norm(call, backend, **changed):
    a = arrays_of(call) | changed
    arrays = a["x"], a["added"], a.get("scale"), a["weight"], a.get("bias")
    return layer_ops.sum_and_norm(*arrays, 0.01, backend=backend)


@needs_harness
def test_kernels_are_tried_once_and_then_used(mac):
    for _ in range(2):
        by_norm(norm(1, 1, 8), "metal")
        layer_ops.conv_silu(*arrays_of(conv(1, 3, 8)).values(), backend="metal")
        by_decode(decode("gru", 1, 8), "gru", "metal")
    assert [name.split("_")[1] for name in mac] == [
        *("norm", "norm", "conv", "conv", "conv", "decode", "decode"),
        *("norm", "conv", "decode"),
    ]


@needs_harness
@pytest.mark.parametrize("fault", ["raises", "wrong numbers"])
def test_kernels_that_do_not_work_here_are_not_used(mac, monkeypatch, fault):
    working = gpu.run

    def broken(launch, arrays, backend):
        outputs = working(launch, arrays, backend)
        if "recurrence" in launch.name or "sequential" in launch.name:
            return outputs
        if fault == "raises":
            raise RuntimeError("Unable to build metal library")
        return {name: array + 1 for name, array in outputs.items()}

    monkeypatch.setattr(gpu, "run", broken)
    call = conv(2, 5, 8)
    with pytest.warns(RuntimeWarning, match="does not work here .the convolution"):
        y, window = layer_ops.conv_silu(*arrays_of(call).values(), backend="metal")
    assert call.compare({"y": np.array(y), "new_window": np.array(window)}) == ""
    call = decode("gru", 2, 8)
    with pytest.warns(RuntimeWarning, match="does not work here .decoding with 'gru'"):
        y, last = by_decode(call, "gru", "metal")
    assert call.compare({"y": np.array(y), "last": np.array(last)}) == ""
    call = norm(2, 1, 8, centered=True, scaled=True)
    with pytest.warns(RuntimeWarning, match="does not work here .the sum and LayerNorm, scaled"):
        total, y = by_norm(call, "metal")
    assert call.compare({"total": np.array(total), "y": np.array(y)}) == ""


@pytest.mark.sampled("harness", by=lambda dtype: [dtype] if dtype != "bfloat16" else [])
@needs_harness
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_functions_give_what_the_kernels_do(launched, dtype):
    call = conv(2, 20, 30, dtype=dtype)
    y, window = layer_ops.conv_silu(*arrays_of(call).values(), backend="metal")
    step = decode("lstm", 2, 30, 3, dtype)
    z, last = by_decode(step, "lstm", "metal")
    sums = [norm(2, 3, 30, dtype, centered=bool(n), scaled=n < 2) for n in range(3)]
    given = [by_norm(one, "metal") for one in sums]
    assert [name.split("_")[1] for name in launched] == ["conv", "decode", *["norm"] * 3]
    assert {y.dtype, window.dtype, z.dtype, *(a.dtype for pair in given for a in pair)} == {DTYPES[dtype]}
    for one, got in (
        (call, {"y": y, "new_window": window}),
        (step, {"y": z, "last": last}),
        *((one, {"total": total, "y": y}) for one, (total, y) in zip(sums, given, strict=True)),
    ):
        stored = {n: np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for n, a in got.items()}
        assert one.compare(stored) == ""


@needs_harness
def test_kernels_see_one_dtype_of_weights_and_state(launched, monkeypatch):
    """MLX's CUDA side keeps compiled kernels by name and template, where those dtypes do not stand."""
    seen = []
    working = gpu.run

    def run(launch, arrays, backend):
        seen.append((arrays["params"].dtype, arrays["initial"].dtype))
        return working(launch, arrays, backend)

    monkeypatch.setattr(gpu, "run", run)
    call = decode("gru", 1, 8)
    changed = {name: arrays_of(call)[name].astype(mx.float16) for name in ("params", "initial")}
    y, _ = by_decode(call, "gru", "metal", **changed)
    assert seen == [(mx.float32, mx.float32)]
    np.testing.assert_allclose(y, by_decode(call, "gru", "ops", **changed)[0], atol=1e-5)


@needs_harness
def test_gradients(launched):
    """The ops' own, through the kernels' results."""
    conv_arrays = [*arrays_of(conv(2, 20, 6)).values()]
    decode_call = decode("lstm", 2, 6, 3)
    names = ("params", "u", "bias", "initial", "gate", "weight")
    step_arrays = [arrays_of(decode_call)[name] for name in names]

    def conv_loss(backend):
        def loss(*arrays):
            y, window = layer_ops.conv_silu(*arrays, backend=backend)
            return (y**2).sum() + (window**3).sum()

        return loss

    def step_loss(backend):
        def loss(*arrays):
            y, last = by_decode(decode_call, "lstm", backend, **dict(zip(names, arrays, strict=True)))
            return (y**2).sum() + (last**3).sum()

        return loss

    norm_call = norm(2, 3, 6, centered=True, scaled=True)
    norm_names = ("x", "added", "weight", "bias", "scale")
    norm_arrays = [arrays_of(norm_call)[name] for name in norm_names]

    def norm_loss(backend):
        def loss(*arrays):
            total, y = by_norm(norm_call, backend, **dict(zip(norm_names, arrays, strict=True)))
            return (y**3).sum() + (total**2).sum()

        return loss

    for loss, arrays in (
        (conv_loss, conv_arrays),
        (step_loss, step_arrays),
        (norm_loss, norm_arrays),
    ):
        every = list(range(len(arrays)))
        given = mx.grad(loss("metal"), argnums=every)(*arrays)
        wanted = mx.grad(loss("ops"), argnums=every)(*arrays)
        for a, b in zip(given, wanted, strict=True):
            assert mx.abs(b).max() > 1e-3
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert [name.split("_")[1] for name in launched] == ["conv", "decode", "norm"]


@needs_harness
def test_what_the_kernels_do_not_take_runs_in_ops(launched):
    """Padding, one tap, dtypes that differ: the same answer, and no kernel of this file is launched."""
    x, window, weight, bias = arrays_of(conv(2, 20, 6)).values()
    half = weight.astype(mx.float16)
    for arrays, spans in (
        ((x, window, weight, bias), [(0, 20), (3, 20)]),
        ((x, window[:, :0], weight[:, :1], bias), None),
        ((x, window, half, bias), None),
    ):
        given = layer_ops.conv_silu(*arrays, spans, backend="metal")
        for a, b in zip(given, layer_ops.conv_silu(*arrays, spans), strict=True):
            assert mx.array_equal(a, b)
    call = decode("gru", 2, 6)
    gate = arrays_of(call)["gate"].astype(mx.float16)
    given = by_decode(call, "gru", "metal", gate=gate)
    for a, b in zip(given, by_decode(call, "gru", "ops", gate=gate), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert [name.split("_")[1] for name in launched] == ["sequential"]


@needs_harness
@pytest.mark.parametrize("mixer", ["gated_conv", "plain"])
def test_a_model_decodes_as_in_ops(launched, mixer):
    mx.random.seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 32}
    model = Model(ModelArgs(cell="lstm", num_heads=3, mixer=mixer, **sizes))
    cache, twin = model.make_cache(2), model.make_cache(2)
    for tokens in ([[1, 2, 3], [4, 5, 6]], [[7], [8]], [[9], [10]]):
        logits = model(mx.array(tokens), cache=cache)
        np.testing.assert_allclose(logits, model(mx.array(tokens), cache=twin, backend="ops"), atol=2e-5)
    for one, two in zip(cache, twin, strict=True):
        for a, b in zip(one.cache, two.cache, strict=True):
            assert (a is None) == (b is None)
            assert a is None or mx.allclose(a, b, atol=2e-5)
    assert sum("decode" in name for name in launched) == 4
    model(mx.array([[1], [2]]), cache=cache, method="newton")  # a wish about how to solve: not decode's
    assert sum("decode" in name for name in launched) == 4
