"""Files written by torch itself; skipped where torch is not installed (extra `parity`)."""

import numpy as np
import pytest

from tests.support.converting import weights
from tests.support.small_models import apple_gru

torch = pytest.importorskip("torch", reason="needs torch (pip install 'mlx-pararnn[parity]')")
pytestmark = pytest.mark.toolchain


def state_dict() -> dict:
    model = {name: torch.from_numpy(value) for name, value in apple_gru().items()}
    return model | {"lm_head.weight": model["embedding.weight"]}


@pytest.fixture
def expected(accepted, tmp_path):
    torch.save(state_dict(), tmp_path / "expected.pt")
    folder = accepted(tmp_path / "expected.pt")
    assert np.array_equal(weights(folder)["model.embed_tokens.weight"], apple_gru()["embedding.weight"])
    return weights(folder)


def variants() -> dict:
    plain = state_dict()
    view = torch.zeros(4, 20)[:, 3:9]
    view.copy_(plain["blocks.1.1.w2.weight"])
    return {
        "parameters": {name: torch.nn.Parameter(value) for name, value in plain.items()},
        "transposed": plain | {"blocks.0.in_proj.weight": plain["blocks.0.in_proj.weight"].T.contiguous().T},
        "a view": plain | {"blocks.1.1.w2.weight": view},
        "a training checkpoint": {
            "model": plain,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
            "rng": torch.get_rng_state(), "dtype": torch.bfloat16, "device": torch.device("cpu"),
            "size": torch.Size([1, 2]), "seen": {1, 2}, "best": float("inf"),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", ["parameters", "transposed", "a view", "a training checkpoint"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read(name, protocol, expected, accepted, tmp_path):
    torch.save(variants()[name], tmp_path / "m.pt", pickle_protocol=protocol)
    ours = weights(accepted(tmp_path / "m.pt"))
    assert all(np.array_equal(ours[tensor], expected[tensor]) for tensor in expected)


def test_bfloat16_bits_are_torchs(accepted, tmp_path):
    torch.save(state_dict(), tmp_path / "m.pt")
    ours = accepted(tmp_path / "m.pt", "--dtype", "bfloat16", "--tokenizer", "none")
    from safetensors.torch import load_file

    theirs = state_dict()["embedding.weight"].bfloat16()
    assert torch.equal(load_file(ours / "model.safetensors")["model.embed_tokens.weight"], theirs)


def test_a_whole_module_is_refused_by_name(refused, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    message = refused(tmp_path / "m.pt")
    assert "torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict()" in message


def test_the_old_format_is_refused(refused, tmp_path):
    torch.save(state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert "old format" in refused(tmp_path / "m.pt")


def test_torchscript_is_refused(refused, tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "m.pt")
    assert "TorchScript" in refused(tmp_path / "m.pt")


def test_quantized_tensors_are_refused(refused, tmp_path):
    quantized = torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)
    torch.save(state_dict() | {"blocks.0.out_proj.weight": quantized}, tmp_path / "m.pt")
    assert "blocks.0.out_proj.weight is quantized" in refused(tmp_path / "m.pt")
    torch.save(state_dict() | {"fc._packed_params": (quantized, torch.zeros(4))}, tmp_path / "m.pt")
    assert "fc._packed_params is quantized" in refused(tmp_path / "m.pt")


@pytest.mark.parametrize("place", ["", "model", "model_state_dict"])
def test_what_torch_distributed_checkpoint_saves_is_read(place, expected, accepted, tmp_path):
    import torch.distributed.checkpoint as dcp

    plain = state_dict()
    optimizer = {"state": {"embedding.weight": {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {place: plain, "optimizer": optimizer, "optimizer_state_dict": optimizer, "step": 7,
               "scheduler": {"last_epoch": 3}, "cfg": {"lr": 0.1}} if place else plain  # fmt: skip
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    ours = weights(accepted(tmp_path / "dcp"))
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[tensor], expected[tensor]) for tensor in expected)
