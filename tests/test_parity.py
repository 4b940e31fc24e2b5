"""Against PyTorch and pararnn-torch, on fresh weights; golden data stands in where they are absent."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_pararnn
from mlx_pararnn import get_cell
from mlx_pararnn.compute.recurrence import recurrence
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.convert.to_torch import convert_to_torch
from tests.support.peers import PEERS

torch = pytest.importorskip("torch", reason="needs torch (pip install 'mlx-pararnn[parity]')")
pararnn = pytest.importorskip("pararnn", reason="needs pararnn-torch (pip install 'mlx-pararnn[parity]')")

pytestmark = pytest.mark.toolchain

D = 24


def peer_and_ours(name, seed=0):
    """A pararnn-torch layer with weights inside its clamp, and the same as (cell, params, weight, bias)."""
    torch.manual_seed(seed)
    kind, order, rows = PEERS[name]
    peer = getattr(pararnn, kind)(D, D)
    weights = []
    with torch.no_grad():
        for row in rows:
            parameter = getattr(peer, row)
            parameter.uniform_(-0.45, 0.45)
            weights.append(parameter.reshape(-1, D))
        weight = peer.W_x.weight.reshape(-1, D, D)[list(order)].numpy()
        bias = peer.W_x.bias.uniform_(-0.5, 0.5).reshape(-1, D)[list(order)].numpy()
        params = torch.cat(weights).numpy()
    return peer, (get_cell(name), mx.array(params), mx.array(weight), mx.array(bias))


def project(x, weight, bias):
    """u (B, 1, T, gates, D)."""
    return (mx.einsum("bti,goi->btgo", mx.array(x), weight) + bias)[:, None]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_layers(name, method):
    peer, (cell, params, weight, bias) = peer_and_ours(name)
    x = torch.randn(2, 50, D)
    with torch.no_grad():
        expected = pararnn.ParaRNN(peer, solver="sequential")(x)
        expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    hidden, _ = recurrence(cell, params, project(x.numpy(), weight, bias), method=method)
    assert np.abs(np.array(hidden) - expected).max() < 3e-6


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("method", ["auto", "newton"])
@pytest.mark.parametrize("steps", [30, 150])
def test_gradients(name, method, steps):
    """Of input, projection, bias and weights, against autograd through pararnn-torch's sequential unroll."""
    peer, (cell, *weights) = peer_and_ours(name)
    _, order, rows = PEERS[name]
    x = torch.randn(2, steps, D, requires_grad=True)
    weighting = torch.randn(2, steps, D)
    out = pararnn.ParaRNN(peer, solver="sequential")(x)
    ((out[0] if isinstance(out, tuple) else out) * weighting).sum().backward()
    wanted = [
        x.grad,
        torch.cat([getattr(peer, row).grad.reshape(-1, D) for row in rows]),
        peer.W_x.weight.grad.reshape(-1, D, D)[list(order)],
        peer.W_x.bias.grad.reshape(-1, D)[list(order)],
    ]
    target = mx.array(weighting.numpy())

    def loss(x, params, weight, bias):
        u = (mx.einsum("bti,goi->btgo", x, weight) + bias)[:, None]
        return (recurrence(cell, params, u, method=method)[0] * target).sum()

    given = mx.grad(loss, argnums=(0, 1, 2, 3))(mx.array(x.detach().numpy()), *weights)
    for a, b in zip(given, wanted, strict=True):
        scale = max(1.0, b.abs().max().item())
        np.testing.assert_allclose(np.array(a) / scale, b.numpy() / scale, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_save_pretrained_folder(tmp_path, tied):
    from pararnn.models import ParaSLSTMConfig, ParaSLSTMForCausalLM

    torch.manual_seed(1)
    config = ParaSLSTMConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=tied)
    peer = ParaSLSTMForCausalLM(config).eval()
    peer.save_pretrained(tmp_path / "peer")
    convert_to_mlx(tmp_path / "peer", tmp_path / "ours", tokenizer="none")
    model, _ = mlx_pararnn.load_model(tmp_path / "ours")
    ids = torch.randint(0, 99, (2, 40))
    with torch.no_grad():
        expected = peer(ids).numpy()
    assert np.abs(np.array(model(mx.array(ids.numpy()))) - expected).max() < 5e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_tuned_here_loads_there(tmp_path, tied):
    from pararnn.models import ParaSLSTMForCausalLM

    args = {"cell": "slstm", "mixer": "plain", "mlp_bias": True, "tie_word_embeddings": tied}
    config = {"model_type": "pararnn", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}
    config |= {"intermediate_size": 80, "norm": "rms", "norm_eps": 1e-5, **args}
    mx.random.seed(3)
    model = mlx_pararnn.Model(mlx_pararnn.ModelArgs.from_dict(config))
    for layer in model.layers:  # beyond the clamp that is pararnn-torch's default
        layer.mixer.cell.recurrent_weight = mx.random.uniform(-0.8, 0.8, (4, 32))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "ours" / "model.safetensors"), dict(tree_flatten(model.parameters())))
    convert_to_torch(tmp_path / "ours", tmp_path / "theirs")
    peer = ParaSLSTMForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = np.random.default_rng(0).integers(0, 99, (2, 40))
    with torch.no_grad():
        given = peer(torch.from_numpy(ids)).numpy()
    assert np.abs(np.array(model(mx.array(ids))) - given).max() < 5e-5


def test_bfloat16_rounding_is_torchs(tmp_path):
    """Converting to bfloat16 and float16 rounds as torch does."""
    torch.manual_seed(2)
    values = torch.cat(
        [torch.randn(4000), torch.randn(4000) * 1e-6, torch.tensor([0.0, -0.0, 65504.0, 3e38])]
    )
    state = {"cell.A": values[:3].repeat(8, 1).T.contiguous(), "cell.b": torch.zeros(3, 8)}
    state["cell.B"] = values[: 8 * 3 * 8].reshape(1, 8, 3, 8)
    torch.save(state, tmp_path / "cell.pt")
    for dtype in ("bfloat16", "float16"):
        convert_to_mlx(tmp_path / "cell.pt", tmp_path / dtype, dtype=dtype)
        ours = mx.load(str(tmp_path / dtype / "model.safetensors"))["input_proj.weight"]
        theirs = state["cell.B"].to(getattr(torch, dtype)).float().permute(0, 2, 3, 1).reshape(1, 24, 8)
        assert np.array_equal(np.array(ours.astype(mx.float32)), theirs.numpy())
