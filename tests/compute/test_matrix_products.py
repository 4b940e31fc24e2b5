"""Linear layers and heads on a CPU: half precision, quantized weights, and products for few rows."""

import copy
import resource
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.mla import MultiLinear

from mlx_pararnn.compute import cpu, layer_ops, matrix_products
from tests.support.demo import DEMO
from tests.support.msl.instances import DTYPES
from tests.support.random_models import TOKENS, by_token, distance, exact, make, numbers

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear_in_half_precision(dtype, rows):
    """Within a rounding of float32, quantized or not, with a bias or heads."""
    rng, step = np.random.default_rng(0), {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    x = mx.array(rng.normal(size=(2, rows, 128))).astype(DTYPES[dtype])
    modules = [nn.Linear(128, 192), nn.Linear(128, 192, bias=False), MultiLinear(128, 64, 2)]
    modules.append(nn.Embedding(64, 128))
    for module in modules:
        module.update(tree_map(lambda a: a.astype(DTYPES[dtype]), module.parameters()))
        for m in (module, module.to_quantized(group_size=64, bits=4)):
            given = matrix_products.linear(m, x)
            widened = copy.deepcopy(m)
            float32 = [
                (p, a if a.dtype == mx.uint32 else a.astype(mx.float32))
                for p, a in tree_flatten(m.parameters())
            ]
            widened.update(tree_unflatten(float32))
            wanted = getattr(widened, "as_linear", widened)(x.astype(mx.float32))
            assert given.dtype == DTYPES[dtype]
            assert distance(numbers(given), numbers(wanted)) < 1.01 * step


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantized_weights_are_unpacked_in_pieces(mode, monkeypatch):
    """Any number of rows at a time gives the same numbers, with a ragged last piece, heads and a bias."""
    form = {"group_size": 32, "bits": 4, "mode": mode}
    for module in (nn.Linear(64, 75), nn.Embedding(75, 64), MultiLinear(64, 75, 3)):
        packed = module.to_quantized(**form)
        x = mx.random.normal((1, 3, 5, 64))
        whole = matrix_products.linear(packed, x)
        for rows in (1, 10):
            monkeypatch.setattr(matrix_products, "_UNPACKED_AT_ONCE", rows * 64 * 3)
            pieces = matrix_products.linear(packed, x)
            assert pieces.shape == whole.shape
            np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


def test_linear_promotes_as_mlx_does():
    for x_type in DTYPES.values():
        for w_type in DTYPES.values():
            for module in (nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Embedding(8, 8)):
                module.update(tree_map(lambda a, t=w_type: a.astype(t), module.parameters()))
                x = mx.ones((2, 3, 8), x_type)
                wanted = getattr(module, "as_linear", module)(x)
                assert matrix_products.linear(module, x).dtype == wanted.dtype, (x_type, w_type)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 5), (72, 301), (200, 1000)])
@pytest.mark.parametrize("module", [nn.Linear, nn.Embedding])
def test_head(dtype, size, module, monkeypatch):
    width, height = size
    rng = np.random.default_rng(0)
    made = nn.Linear(width, height, bias=False) if module is nn.Linear else nn.Embedding(height, width)
    made.weight = mx.array(rng.normal(size=(height, width))).astype(DTYPES[dtype])
    at_once = []
    product = cpu.product
    monkeypatch.setattr(cpu, "product", lambda *a: at_once.append(1) or product(*a))
    monkeypatch.setattr(cpu, "_LARGE", 0)
    layer_ops._elementwise_works(DTYPES[dtype])
    for shape in ((1, 1), (2, 1), (1, 3), (4, 1), (cpu.FEW_ROWS + 1, 1)):
        x = mx.array(rng.normal(size=(*shape, width))).astype(DTYPES[dtype])
        wanted = numbers(x) @ numbers(made.weight).T
        step = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        for weight in (made.weight, mx.contiguous(made.weight.T).T):
            made.weight = weight
            at_once.clear()
            given = matrix_products.head(made, x, backend="cpu")
            assert bool(at_once) == (shape[1] == 1 and shape[0] <= cpu.FEW_ROWS)
            assert given.shape == (*shape, height)
            assert given.dtype == DTYPES[dtype]
            assert distance(numbers(given), wanted) < 1.01 * step
            monkeypatch.setattr(cpu, "threads", lambda: 3)


def test_head_of_a_model(calls):
    for tied in (False, True):
        made = make(vocab_size=1000, tie_word_embeddings=tied)
        assert distance(numbers(by_token(made, TOKENS)), exact(made, TOKENS)[0]) < 1e-5
    made.lm_head = nn.Linear(72, 1000, bias=True)
    made.args.tie_word_embeddings = False
    x = mx.ones((1, 1, 72))
    assert mx.allclose(matrix_products.head(made.lm_head, x, backend="cpu"), made.lm_head(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "with a bias", "embedding", "heads", "heads, other batch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_linear(kind, dtype):
    """MLX's own; and the weight's lies in memory as the weight does, which is what it is for."""
    rng = np.random.default_rng(0)
    module = {
        "linear": lambda: nn.Linear(12, 20, bias=False),
        "with a bias": lambda: nn.Linear(12, 20),
        "embedding": lambda: nn.Embedding(20, 12),
    }.get(kind, lambda: MultiLinear(12, 20, 3))()
    module.update(tree_map(lambda a: a.astype(DTYPES[dtype]), module.parameters()))
    shape = {"heads": (3, 40, 12), "heads, other batch": (2, 3, 40, 12)}.get(kind, (2, 30, 12))
    x = mx.array(rng.normal(size=shape).astype(np.float32)).astype(DTYPES[dtype])
    slope = mx.array(rng.normal(size=(*shape[:-1], 20)).astype(np.float32))

    def gradients(apply):
        def loss(parameters, x):
            module.update(parameters)
            return (apply(x).astype(mx.float32) * slope).sum()

        return mx.grad(loss, argnums=(0, 1))(module.parameters(), x)

    own = getattr(module, "as_linear", module)
    parameters, dx = gradients(lambda x: matrix_products.linear(module, x))
    # MLX's own products of halves round each term: its gradients are those of the same numbers in float32
    wanted, wanted_dx = gradients(lambda x: own(x.astype(mx.float32)))
    step = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    mx.eval(parameters, wanted)
    assert distance(numbers(dx), numbers(wanted_dx)) < step
    for (name, given), (_, expected) in zip(tree_flatten(parameters), tree_flatten(wanted), strict=True):
        assert given.dtype == DTYPES[dtype]
        assert distance(numbers(given), numbers(expected)) < step
        assert memoryview(given).c_contiguous or kind == "heads, other batch", name


@pytest.mark.compiled
def test_linear_has_forward_and_second_derivatives():
    module, x = nn.Linear(6, 5, bias=False), mx.random.normal((2, 20, 6), key=mx.random.key(0))
    along = mx.random.normal((2, 20, 6), key=mx.random.key(1))

    def derivatives(apply):
        def loss(weight, x):
            module.weight = weight
            return (apply(x) ** 3).sum()

        def slope(weight, x):
            return (mx.grad(loss, argnums=1)(weight, x) * along).sum()

        weight = module.weight
        second = mx.grad(slope, argnums=(0, 1))(weight, x)
        compiled = mx.compile(mx.grad(loss, argnums=(0, 1)))(weight, x)
        return [*mx.jvp(lambda x: [loss(weight, x)], [x], [along])[1], *second, *compiled]

    given = derivatives(lambda x: matrix_products.linear(module, x))
    for a, b in zip(given, derivatives(lambda x: x @ module.weight.T), strict=True):
        assert mx.abs(b).max().item() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="no system OpenBLAS is loaded elsewhere")
@pytest.mark.parametrize("room", [100, 300, 700, 1000, 1400, 1500, 1700, 4500])
def test_a_limit_of_the_address_space_ends_in_a_result_or_a_sentence(room):
    """OpenBLAS asks for its work memory again and again: without care the process spins until SIGXCPU."""

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (room * 10**6, room * 10**6))
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))

    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "generate", DEMO, "-p", "def main(", "-m", "4"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    assert (done.stdout == "self\n") if done.returncode == 0 else done.stderr.startswith("error: ")
