"""The interpreter the other tests trust: its ops against coremltools, and how it reads a saved package."""

import numpy as np
import pytest

ct = pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, types  # noqa: E402

from tests.support.coreml.interpreter import MODES, Package  # noqa: E402
from tests.support.coreml.mil_operations import OPS  # noqa: E402

IOS18 = ct.target.iOS18
random = np.random.default_rng(0)


def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)


X, Y, POSITIVE, FLAGS = normal(2, 3, 4), normal(3, 1), np.abs(normal(2, 3, 4)) + 0.1, normal(2, 3, 4) > 0
IDS = np.array([[2, 0], [1, 1]], np.int32)
TIMES, TAPS = normal(1, 6, 9), normal(6, 1, 4)


def convolved(x, weight, bias, groups, pad=(0, 0), pad_type="valid", **_):
    """Convolution by its definition."""
    x = np.pad(x, [(0, 0), (0, 0), tuple(pad)])
    out, inner, width = weight.shape
    y = np.zeros((1, out, x.shape[2] - width + 1))
    for o in range(out):
        first = o // (out // groups) * inner
        for t in range(y.shape[2]):
            y[0, o, t] = (weight[o] * x[0, first : first + inner, t : t + width]).sum() + bias[o]
    return y


# op, arguments that are inputs of the program, constant arguments; and what it gives where coremltools
# does not compute it itself
CASES = [
    *((op, {"x": X}, {}) for op in ("abs", "erf", "exp", "floor", "identity", "relu", "sigmoid")),
    *((op, {"x": X}, {}) for op in ("sign", "softplus", "square", "tanh")),
    ("sigmoid", {"x": np.array([-200, -90, 0, 90, 200], np.float32)}, {}),
    ("softplus", {"x": np.array([-200, 200], np.float32)}, {}, np.array([0.0, 200])),
    ("silu", {"x": X}, {}, X / (1 + np.exp(-X))),
    *(("gelu", {"x": X}, {"mode": mode}) for mode in ("EXACT", "TANH_APPROXIMATION")),
    ("elu", {"x": X}, {"alpha": 0.5}),
    ("leaky_relu", {"x": X}, {"alpha": 0.01}),
    ("clip", {"x": X}, {"alpha": -0.5, "beta": 0.25}),
    ("sqrt", {"x": POSITIVE}, {}),
    ("rsqrt", {"x": POSITIVE}, {}),
    ("rsqrt", {"x": POSITIVE}, {"epsilon": 0.5}),
    ("inverse", {"x": POSITIVE}, {}),
    ("inverse", {"x": POSITIVE}, {"epsilon": 0.5}),
    ("log", {"x": POSITIVE}, {}),
    ("log", {"x": POSITIVE}, {"epsilon": 0.5}),
    *((op, {"x": X, "y": Y}, {}) for op in ("add", "sub", "mul", "maximum", "minimum", "real_div")),
    *((op, {"x": X}, {"y": Y}) for op in ("add", "sub", "real_div")),
    *((op, {"y": Y}, {"x": X}) for op in ("sub", "real_div")),
    ("pow", {"x": POSITIVE, "y": Y}, {}),
    *((op, {"x": np.round(X), "y": np.round(Y)}, {}) for op in ("equal", "not_equal", "greater", "less")),
    *((op, {"x": np.round(X), "y": np.round(Y)}, {}) for op in ("greater_equal", "less_equal")),
    *((op, {"x": FLAGS, "y": FLAGS[::-1]}, {}) for op in ("logical_and", "logical_or")),
    ("logical_not", {"x": FLAGS}, {}),
    ("select", {"cond": FLAGS, "a": X, "b": -X}, {}),
    ("cast", {"x": 3 * X}, {"dtype": "int32"}),
    ("cast", {"x": IDS}, {"dtype": "fp32"}),
    *((op, {"x": X}, {"axes": [-1], "keep_dims": True}) for op in ("reduce_mean", "reduce_sum")),
    *((op, {"x": X}, {"axes": [0, 2]}) for op in ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min")),
    ("reduce_l2_norm", {"x": X}, {"axes": [-1], "keep_dims": True}),
    ("reduce_argmax", {"x": X}, {"axis": -1, "keep_dims": True}),
    ("reduce_argmax", {"x": X}, {"axis": 1}),
    ("topk", {"x": X}, {"k": 2, "axis": -1}),
    ("softmax", {"x": X}, {"axis": 1}),
    ("cumsum", {"x": X}, {"axis": 1}),
    ("layer_norm", {"x": X}, {"axes": [-1], "gamma": normal(4), "beta": normal(4), "epsilon": 0.1}),
    ("layer_norm", {"x": X}, {"axes": [1, 2]}),
    ("linear", {"x": X}, {"weight": normal(5, 4), "bias": normal(5)}),
    ("linear", {"x": X}, {"weight": normal(5, 4)}),
    ("matmul", {"x": X}, {"y": normal(1, 4, 2)}),
    ("matmul", {"x": X, "y": normal(2, 2, 3)}, {"transpose_x": True, "transpose_y": True}),
    *(
        ("conv", {"x": TIMES}, kwargs, convolved(TIMES, **kwargs))
        for kwargs in (
            {"weight": TAPS, "bias": normal(6), "groups": 6, "pad_type": "valid"},
            {"weight": TAPS, "bias": normal(6), "groups": 6, "pad_type": "custom", "pad": [3, 0]},
            {"weight": normal(4, 3, 2), "bias": normal(4), "groups": 2, "pad_type": "valid"},
            {"weight": normal(4, 6, 1), "bias": normal(4), "groups": 1, "pad_type": "valid"},
        )
    ),
    ("gather", {"x": X}, {"indices": IDS, "axis": 1}),
    ("gather", {"indices": IDS}, {"x": normal(5, 4), "axis": 0}),
    ("gather_along_axis", {"x": X}, {"indices": np.ones((2, 3, 1), np.int32), "axis": 2}),
    ("reshape", {"x": X}, {"shape": [2, -1]}),
    ("transpose", {"x": X}, {"perm": [2, 0, 1]}),
    ("expand_dims", {"x": X}, {"axes": [0, 2]}),
    ("squeeze", {"x": X[:1]}, {"axes": [0]}),
    ("squeeze", {"x": X[:1]}, {}),
    ("concat", {"values": [X, -X]}, {"axis": -1}),
    ("stack", {"values": [X, -X]}, {"axis": 1}),
    ("split", {"x": X}, {"num_splits": 2, "axis": -1}),
    ("split", {"x": X}, {"split_sizes": [1, 2], "axis": 1}),
    ("tile", {"x": X}, {"reps": [1, 2, 3]}),
    ("pad", {"x": X}, {"pad": [1, 0, 0, 2], "constant_val": 0.5}),
    ("slice_by_size", {"x": X}, {"begin": [0, 1, 0], "size": [1, -1, 2]}),
    ("slice_by_index", {"x": X}, {"begin": [0, 1, 0], "end": [1, 3, 4]}),
    ("slice_by_index", {"x": X}, {"begin": [0, -2, 3], "end": [2, 0, 0], "stride": [1, 1, -2]}
     | {"end_mask": [False, True, True]}),
    ("slice_by_index", {"x": X}, {"begin": [0, 1, 0], "end": [0, 0, 0], "begin_mask": [True, False, True]}
     | {"end_mask": [True, False, True], "squeeze_mask": [False, True, False]}),
]  # fmt: skip
MIL_TYPES = {"f": types.fp32, "i": types.int32, "b": types.bool}


def saved(program, path, **options):
    options.setdefault("compute_precision", ct.precision.FLOAT32)
    model = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=IOS18, skip_model_load=True, **options
    )
    model.save(str(path))
    return path


def program(function, specs):
    """A program from function(**inputs); `mb.program` wants the names as its parameters."""
    scope = {"function": function}
    names = ", ".join(specs)
    exec(f"def main({names}): return function({', '.join(f'{n}={n}' for n in specs)})", scope)
    return mb.program(input_specs=list(specs.values()), opset_version=IOS18)(scope["main"])


def by_coremltools(op, arguments):
    """What coremltools computes for an op of constants; None where it does not."""
    with Function({}, opset_version=IOS18):
        result = getattr(mb, op)(**arguments)
        results = result if isinstance(result, (list, tuple)) else [result]
        values = [r.val for r in results]
    return None if any(v is None for v in values) else values


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory):
    """One package that runs every case, without a pass that could rewrite an op."""
    specs, feeds = {}, {}

    def declare(name, array):
        # Core ML has no boolean inputs
        feeds[name] = array.astype(np.int32) if array.dtype == bool else array
        specs[name] = mb.TensorSpec(array.shape, dtype=MIL_TYPES[feeds[name].dtype.kind])

    for i, (_, inputs, *_) in enumerate(CASES):
        for key, value in inputs.items():
            for j, array in enumerate(value if isinstance(value, list) else [value]):
                declare(f"in{i}_{key}_{j}", array)

    def main(**given):
        outputs = []
        for i, (op, inputs, constants, *_) in enumerate(CASES):
            arguments = {}
            for key, value in inputs.items():
                arrays = value if isinstance(value, list) else [value]
                variables = [
                    mb.cast(x=given[f"in{i}_{key}_{j}"], dtype="bool")
                    if a.dtype == bool
                    else given[f"in{i}_{key}_{j}"]
                    for j, a in enumerate(arrays)
                ]
                arguments[key] = variables if isinstance(value, list) else variables[0]
            results = getattr(mb, op)(**arguments, **constants)
            for j, y in enumerate(results if isinstance(results, (list, tuple)) else [results]):
                if y.dtype == types.bool:
                    y = mb.cast(x=y, dtype="int32")
                outputs.append(mb.identity(x=y, name=f"out{i}_{j}"))
        return outputs

    path = tmp_path_factory.mktemp("ops") / "ops.mlpackage"
    saved(program(main, specs), path, pass_pipeline=ct.PassPipeline.EMPTY)
    return Package(path), feeds


def test_every_op_has_a_case(all_ops):
    package, _ = all_ops
    assert set(OPS) == {op for op, *_ in CASES}
    assert set(OPS) <= set(package.op_types())


@pytest.mark.parametrize("mode", MODES)
def test_ops(all_ops, mode):
    package, feeds = all_ops
    outputs = package.function(mode=mode)(feeds)
    for i, (op, inputs, constants, *given) in enumerate(CASES):
        expected = given or by_coremltools(op, inputs | constants)
        assert expected is not None, f"{op}: coremltools computes no value, the case must bring one"
        for j, y in enumerate(expected):
            ours = outputs[f"out{i}_{j}"]
            assert ours.shape == np.shape(y), (op, i)
            np.testing.assert_allclose(ours, y, rtol=2e-6, atol=2e-6, err_msg=f"{op}, case {i}")


def test_an_unknown_op_is_named(tmp_path):
    path = saved(program(lambda x: mb.sinh(x=x), {"x": mb.TensorSpec((2,))}), tmp_path / "sinh.mlpackage")
    with pytest.raises(NotImplementedError, match="does not know the op sinh"):
        Package(path).function()


HALF = mb.TensorSpec((1, 4), dtype=types.fp16)


def test_float16_is_rounded_where_the_program_says_so(tmp_path):
    """1 + 2^-11 is not a float16, 300 * 300 is beyond it; what the program does in float32 stays exact."""

    def main(x):
        wide = mb.mul(x=mb.add(x=mb.cast(x=x, dtype="fp32"), y=np.float32(2**-11)), y=np.float32(2))
        return [
            mb.add(x=x, y=np.float16(2**-11), name="half"),
            mb.identity(x=wide, name="single"),
            mb.mul(x=x, y=np.float16(300), name="product"),
        ]

    path = tmp_path / "half.mlpackage"
    saved(
        program(main, {"x": HALF}),
        path,
    )
    x = np.array([[1, 300, -300, 0.5]], np.float16)
    exact, wide, half = (Package(path).function(mode=mode)({"x": x}) for mode in MODES)
    assert exact["half"].dtype == np.float64
    np.testing.assert_array_equal(exact["half"], x.astype(float) + 2**-11)
    assert wide["half"][0, 0] == np.float32(1 + 2**-11)
    assert wide["product"][0, 1] == 90_000
    np.testing.assert_array_equal(half["half"], x + np.float16(2**-11))
    assert half["half"][0, 0] == 1
    assert half["product"][0, 1] == np.inf
    for outputs in (exact, wide, half):
        np.testing.assert_array_equal(outputs["single"], 2 * (x.astype(float) + 2**-11))


def counter(x, h):
    """h' = h + x, and twice h' as the output; coremltools lets the product read h' back from the state."""
    new = mb.add(x=mb.read_state(input=h), y=x)
    mb.coreml_update_state(state=h, value=new)
    twice = mb.mul(x=new, y=np.float16(2), name="twice")
    mb.coreml_update_state(state=h, value=mb.add(x=new, y=np.float16(1)))
    return twice


def test_reads_and_writes_of_a_state_keep_their_order(tmp_path):
    specs = {"x": HALF, "h": mb.StateTensorSpec((1, 4), dtype=types.fp16)}
    path = tmp_path / "state.mlpackage"
    saved(
        program(counter, specs),
        path,
    )
    package = Package(path)
    kinds = [op.type for op in package.block().operations if op.type in ("read_state", "write_state")]
    assert kinds.count("write_state") == 2
    assert kinds[1:3] == ["write_state", "read_state"]  # what coremltools did to the product
    run = package.function()
    assert run.states == {"h": (1, 4)}
    state = run.new_state()
    x = np.array([[1, 2, 3, 4]], np.float16)
    for n in range(1, 4):
        twice = run({"x": x}, state)["twice"]
        np.testing.assert_array_equal(twice, 2 * (n * x + n - 1))
        np.testing.assert_array_equal(state["h"], n * (x + 1))
    other = run.new_state()
    np.testing.assert_array_equal(run({"x": x}, other)["twice"], 2 * x)
    np.testing.assert_array_equal(state["h"], 3 * (x + 1))


def test_functions_share_weights_and_state(tmp_path):
    weight = normal(64, 64).astype(np.float16)
    specs = {n: mb.StateTensorSpec((1, 64), dtype=types.fp16) for n in "h"}

    def step(x, h, factor):
        new = mb.linear(
            x=mb.add(x=mb.read_state(input=h), y=mb.mul(x=x, y=np.float16(factor))), weight=weight
        )
        mb.coreml_update_state(state=h, value=new)
        return mb.identity(x=new, name="y")

    whole = ct.utils.MultiFunctionDescriptor()
    specs = {"x": mb.TensorSpec((1, 64), dtype=types.fp16), **specs}
    for name, factor in (("once", 1), ("thrice", 3)):
        part = tmp_path / f"{name}.mlpackage"
        saved(
            program(lambda x, h, f=factor: step(x, h, f), specs),
            part,
        )
        whole.add_function(str(part), src_function_name="main", target_function_name=name)
    whole.default_function_name = "once"
    ct.utils.save_multifunction(whole, str(tmp_path / "both.mlpackage"))
    package = Package(tmp_path / "both.mlpackage")
    assert package.functions == ["once", "thrice"]
    assert package.default == "once"
    once, thrice = package.function("once", "float64"), package.function("thrice", "float64")
    x, w, state = normal(1, 64), weight.astype(float), once.new_state()
    h = x.astype(np.float64) @ w.T
    np.testing.assert_allclose(once({"x": x}, state)["y"], h, rtol=1e-12, atol=1e-12)
    h = (h + 3 * x.astype(np.float64)) @ w.T
    np.testing.assert_allclose(thrice({"x": x}, state)["y"], h, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(state["h"], thrice({"x": 0 * x}, {"h": state["h"]})["y"] * 0 + state["h"])


def test_calls_are_checked(tmp_path):
    specs = {"x": HALF, "h": mb.StateTensorSpec((1, 4), dtype=types.fp16)}
    path = tmp_path / "state.mlpackage"
    saved(
        program(counter, specs),
        path,
    )
    run = Package(path).function()
    x = np.zeros((1, 4), np.float16)
    for inputs, state, message in (
        ({}, run.new_state(), "inputs"),
        ({"x": x, "y": x}, run.new_state(), "inputs"),
        ({"x": x[0]}, run.new_state(), "input x"),
        ({"x": x.astype(np.int32)}, run.new_state(), "input x"),
        ({"x": x}, None, "states"),
        ({"x": x}, {"g": x}, "states"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs, state)
    with pytest.raises(ValueError, match="choose one of float64"):
        Package(path).function(mode="bfloat16")


def test_gather_beyond_its_table_is_an_error(tmp_path):
    specs = {"ids": mb.TensorSpec((1, 2), dtype=types.int32)}
    path = tmp_path / "gather.mlpackage"
    saved(program(lambda ids: mb.gather(x=normal(5, 4), indices=ids, axis=0), specs), path)
    run = Package(path).function()
    (y,) = run({"ids": np.array([[4, 0]], np.int32)}).values()
    assert y.shape == (1, 2, 4)
    with pytest.raises(IndexError, match=r"outside 0\.\.4"):
        run({"ids": np.array([[5, 0]], np.int32)})


SCHEMES = {
    "int8 per channel": ("linear", {"dtype": "int8"}),
    "int8 asymmetric": ("linear", {"dtype": "int8", "mode": "linear"}),
    "uint8 per tensor": ("linear", {"dtype": "uint8", "mode": "linear", "granularity": "per_tensor"}),
    "int4 per block": ("linear", {"dtype": "int4", "granularity": "per_block", "block_size": 32}),
    "uint4 per block": (
        "linear",
        {"dtype": "uint4", "mode": "linear", "granularity": "per_block", "block_size": 16},
    ),
    **{f"{bits} bit palette": ("palette", {"nbits": bits, "mode": "uniform"}) for bits in (1, 2, 3, 4, 6, 8)},
    "4 bit palettes of 16 rows": (
        "palette",
        {"nbits": 4, "mode": "uniform", "granularity": "per_grouped_channel", "group_size": 16},
    ),
}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """Two matrices and a convolution, each large enough to be compressed."""
    first, second, table = (normal(*s).astype(np.float16) for s in ((96, 64), (64, 96), (80, 64)))

    def main(ids):
        x = mb.gather(x=table, indices=ids, axis=0)
        x = mb.add(x=x, y=mb.linear(x=mb.tanh(x=mb.linear(x=x, weight=first)), weight=second))
        return mb.linear(x=x, weight=table, name="y")

    path = tmp_path_factory.mktemp("matrices") / "model.mlpackage"
    specs = {"ids": mb.TensorSpec((1, 3), dtype=types.int32)}
    return saved(
        program(main, specs),
        path,
    )


@pytest.mark.sampled("large", by=lambda scheme: [SCHEMES[scheme][0]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_are_what_coremltools_makes_of_them(matrices, tmp_path, scheme):
    coreml = ct.optimize.coreml
    kind, options = SCHEMES[scheme]
    if kind == "linear":
        options = {"mode": "linear_symmetric", "weight_threshold": 0, **options}
        config, compress = coreml.OpLinearQuantizerConfig(**options), coreml.linear_quantize_weights
    else:
        options = {"weight_threshold": 0, **options}
        config, compress = coreml.OpPalettizerConfig(**options), coreml.palettize_weights
    model = ct.models.MLModel(str(matrices), skip_model_load=True)
    small = compress(model, coreml.OptimizationConfig(global_config=config))
    small.save(str(tmp_path / "small.mlpackage"))
    coreml.decompress_weights(small).save(str(tmp_path / "plain.mlpackage"))
    small, plain = (Package(tmp_path / f"{n}.mlpackage") for n in ("small", "plain"))
    assert sum(n for op, n in small.op_types().items() if op.startswith("constexpr")) == 3
    assert not any(op.startswith("constexpr") for op in plain.op_types())
    equal = 0
    ours = {v.tobytes() for v in small.constants().values() if isinstance(v, np.ndarray) and v.size > 1000}
    for value in plain.constants().values():
        if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype == np.float16:
            assert value.tobytes() in ours
            equal += 1
    assert equal == 3
    ids = np.array([[3, 79, 0]], np.int32)
    for mode in MODES:
        a, b = (p.function(mode=mode)({"ids": ids})["y"] for p in (small, plain))
        np.testing.assert_array_equal(a, b)
