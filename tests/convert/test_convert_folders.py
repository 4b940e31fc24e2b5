"""Folders as file managers and distributed trainers leave them: read where they suffice, else named."""

import shutil

import numpy as np
import pytest

from mlx_pararnn.convert.readers.forms import find_weights, read_weights
from mlx_pararnn.errors import PararnnError
from tests.support.converting import convert
from tests.support.pt_writer import write_pt

WEIGHTS = {"A": np.ones((3, 4), np.float32), "B": np.ones((2, 2, 3, 2), np.float32)}


def refused(path):
    with pytest.raises(PararnnError) as error:
        read_weights(find_weights(path))
    return str(error.value)


@pytest.mark.parametrize("name", ["._weights.pt", ".DS_Store", ".hidden.safetensors"])
def test_hidden_files_do_not_count(name, tmp_path):
    write_pt(tmp_path / "weights.pt", WEIGHTS)
    (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert find_weights(tmp_path) == tmp_path / "weights.pt"
    (tmp_path / "weights.pt").unlink()
    assert "no checkpoint inside" in refused(tmp_path)


def test_a_folder_of_folders_says_which_have_weights(tmp_path):
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_pt(tmp_path / f"checkpoint-{step}" / "pytorch_model.bin", WEIGHTS)
    (tmp_path / "logs").mkdir()
    assert "checkpoint-10, checkpoint-20 in it have such files, pass the folder meant" in refused(tmp_path)


def test_parts_of_a_distributed_checkpoint_without_their_metadata(tmp_path):
    for rank in range(2):
        (tmp_path / f"__{rank}_0.distcp").write_bytes(b"PK\3\4")
    assert (
        "2 parts of a torch.distributed.checkpoint (__0_0.distcp, __1_0.distcp) without their .metadata"
        in (refused(tmp_path))
    )


def test_accelerates_parent_folder(data, tmp_path):
    source = data / "lm" / "two_ranks" / "dcp"
    shutil.copytree(source, tmp_path / "pytorch_model_fsdp_0")
    assert find_weights(tmp_path) == tmp_path / "pytorch_model_fsdp_0" / ".metadata"
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        write_pt(tmp_path / name, WEIGHTS)
    assert find_weights(tmp_path) == tmp_path / "pytorch_model_fsdp_0" / ".metadata"


def test_what_a_trainer_saves_beside_the_weights(tmp_path):
    for name in ("optimizer.pt", "rng_state_0.pth", "scaler.pt", "training_args.bin"):
        write_pt(tmp_path / name, WEIGHTS)
    assert "no weights inside, only what a trainer saves beside them (optimizer.pt," in refused(tmp_path)
    write_pt(tmp_path / "pytorch_model_fsdp.bin", WEIGHTS)
    assert find_weights(tmp_path) == tmp_path / "pytorch_model_fsdp.bin"


@pytest.mark.parametrize("left", ["latest", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_deepspeed_folder(left, tmp_path):
    (tmp_path / left).write_bytes(b"global_step100")
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"PK\3\4")
    assert "this is a DeepSpeed checkpoint" in refused(tmp_path)
    assert "python zero_to_fp32.py FOLDER OUT" in refused(tmp_path)
    result = convert(tmp_path, "-o", tmp_path.parent / "out")
    assert result.exit_code == 1


def test_a_zero_shard(tmp_path):
    shard = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    write_pt(shard, WEIGHTS)
    assert "one rank's part of a DeepSpeed ZeRO checkpoint" in refused(shard)
    file = tmp_path / "mp_rank_00_model_states.pt"
    write_pt(file, {name: np.zeros(0, np.float32) for name in ("embedding.weight", "final_norm.weight")})
    assert "2 of 2 tensors are empty (embedding.weight, final_norm.weight)" in refused(file)
