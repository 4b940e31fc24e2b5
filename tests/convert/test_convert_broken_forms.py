"""Forms of several files with a part missing, too many, or of another model."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_pararnn.convert.readers import dcp, pickle_names
from mlx_pararnn.convert.readers.pickles import load_pickle
from mlx_pararnn.errors import PararnnError
from tests.support.converting import weights
from tests.support.pt_writer import Call, Made, Named, write_pt
from tests.support.small_models import apple_gru, write_shards

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    return write_shards(tmp_path / "sharded", apple_gru())


@pytest.fixture
def ranks(tmp_path, data):
    return shutil.copytree(data / "lm/two_ranks/dcp", tmp_path / "ranks")


def test_missing_shards_are_named(refused, sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refused(sharded)
    assert f"{INDEX}: 1 of the 3 files it names are not there: model-00002-of-00003.safetensors" in message
    for path in sharded.glob("model-*"):
        path.unlink()
    assert "3 of the 3 files it names are not there" in refused(sharded)


def test_a_surplus_shard(refused, sharded):
    shutil.copyfile(
        sharded / "model-00001-of-00003.safetensors", sharded / "model-00001-of-00004.safetensors"
    )
    message = refused(sharded)
    assert "it does not name model-00001-of-00004.safetensors, which stand beside it" in message
    assert "delete them" in message


def test_shards_without_an_index(refused, sharded):
    (sharded / INDEX).unlink()
    message = refused(sharded)
    assert f"their index {INDEX} is missing" in message


def test_one_shard_alone(refused, sharded):
    shard = sharded / "model-00001-of-00003.safetensors"
    assert "one of several files that belong together; pass their folder" in refused(shard)


def test_an_index_of_another_model(refused, sharded):
    index = json.loads((sharded / INDEX).read_text())
    lost = index["weight_map"].pop("final_norm.weight")
    index["weight_map"]["other.weight"] = lost
    (sharded / INDEX).write_text(json.dumps(index))
    message = refused(sharded)
    assert f"{lost}: it lacks other.weight, and {INDEX} says otherwise" in message
    del index["weight_map"]["other.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{lost}: it holds final_norm.weight, and {INDEX} says otherwise" in refused(sharded)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object was expected"),
        ("{}", "which file holds which tensor"),
        ('{"weight_map": {"a": 3}}', "which file holds which tensor"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "which file holds which tensor"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which file holds which tensor"),
        ('{"weight_map": {}}', "it does not name model-00001-of-00003.safetensors"),
        (f'{{"weight_map": {{"a": "{"x" * 300}"}}}}', "1 of the 1 files it names are not there: xxx"),
    ],
)
def test_a_broken_index(text, expected, refused, sharded):
    (sharded / INDEX).write_text(text)
    assert expected in refused(sharded)


def test_an_index_that_names_nothing(refused, tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert "there are no tensors inside" in refused(tmp_path / INDEX)


def test_links_out_of_a_folder_are_not_followed(refused, accepted, sharded, ranks, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (
        sharded / "model-00003-of-00003.safetensors", sharded / INDEX, ranks / "__1_0.distcp",
        ranks / ".metadata",
    ):  # fmt: skip
        target = elsewhere / path.name
        path.rename(target)
        path.symlink_to(target)
        assert f"{path.name}: is a link out of its folder" in refused(path.parent)
        path.unlink()
        target.rename(path)
    single = tmp_path / "single"
    single.mkdir()
    save_file(apple_gru(), elsewhere / "model.safetensors")
    (single / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    assert "is a link out of its folder" in refused(single)
    accepted(single / "model.safetensors")  # the link itself, named by the user, is
    (single / "config.json").symlink_to(elsewhere / "config.json")
    assert "config.json: is a link out of its folder" in refused(single / "model.safetensors")


def test_links_inside_a_folder_are_followed(accepted, sharded):
    (sharded / "real").mkdir()
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.rename(sharded / "real" / shard.name)
    shard.symlink_to(f"real/{shard.name}")
    accepted(sharded)


def test_a_distributed_checkpoint_without_the_files_of_a_rank(refused, ranks):
    (ranks / "__1_0.distcp").unlink()
    message = refused(ranks)
    assert "__1_0.distcp, which holds a part of model." in message
    assert "copy the files of all ranks into one folder" in message


def test_a_distributed_file_of_another_run(refused, ranks):
    content = (ranks / "__1_0.distcp").read_bytes()
    (ranks / "__1_0.distcp").write_bytes(content[:1000])
    assert "cut short, or of another run than .metadata" in refused(ranks)
    (ranks / "__1_0.distcp").write_bytes(bytes(len(content)))
    assert "__1_0.distcp: this PyTorch file is cut short or damaged" in refused(ranks)
    shutil.copyfile(ranks / "__0_0.distcp", ranks / "__1_0.distcp")
    assert "__1_0.distcp" in refused(ranks)


def test_one_distributed_file_alone(refused, ranks):
    assert "one rank's part" in refused(ranks / "__0_0.distcp")


def first_of(storage, fqn):
    return next(index for index in storage if index.state["fqn"] == fqn)


NAME = "model.embedding.weight"


def drop_place(tensors, storage):
    del storage[first_of(storage, NAME)]


def drop_chunk(tensors, storage):
    tensors[NAME].state["chunks"].pop()


def repeat_chunk(tensors, storage):
    tensors[NAME].state["chunks"].append(tensors[NAME].state["chunks"][0])


def drop_chunks(tensors, storage):
    tensors[NAME].state["chunks"].clear()


def enlarge(tensors, storage):
    tensors[NAME].state["size"] = (6, 4)


def flatten(tensors, storage):
    tensors[NAME].state["size"] = (20,)


def leave_folder(tensors, storage):
    storage[first_of(storage, NAME)].state["relative_path"] = "../ranks/__0_0.distcp"


def name_too_long(tensors, storage):
    storage[first_of(storage, NAME)].state["relative_path"] = "x" * 300


def negative(tensors, storage):
    storage[first_of(storage, NAME)].state["offset"] = -1


def nothing(tensors, storage):
    tensors[NAME].state = None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop_place, "does not say where a part of model.embedding.weight is (at (0, 0))"),
        (drop_chunk, "the parts of model.embedding.weight do not make up its shape (5, 4)"),
        (repeat_chunk, "do not make up its shape (5, 4)"),
        (drop_chunks, "do not make up its shape (5, 4)"),
        (enlarge, "do not make up its shape (6, 4)"),
        (flatten, "do not make up its shape (20)"),
        (leave_folder, "../ranks/__0_0.distcp, which holds a part of model.embedding.weight, is not there"),
        (name_too_long, "xxx..., which holds a part of model.embedding.weight, is not there"),
        (negative, ".metadata is damaged or of an unknown version"),
        (nothing, ".metadata is damaged or of an unknown version"),
    ],
)
def test_metadata_that_does_not_fit_the_files(change, expected, ranks, monkeypatch):
    content = dcp.load_pickle((ranks / ".metadata").read_bytes(), "x")
    change(content.state["state_dict_metadata"], content.state["storage_data"])
    monkeypatch.setattr(dcp, "load_pickle", lambda data, where: content)
    with pytest.raises(PararnnError) as error:
        dcp.read_dcp(ranks)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}.", b"\x80\x02N.", b"\x80\x04cos\nsystem\n.", b"PK\x03\x04"]
)
def test_metadata_that_is_none(content, refused, ranks):
    (ranks / ".metadata").write_bytes(content)
    assert ".metadata" in refused(ranks)


def test_metadata_that_python_3_11_2_wrote(accepted, ranks):
    """It writes a member of an enumeration as getattr(class, name); all else about the file is the same."""
    metadata = (ranks / ".metadata").read_bytes()
    kind = b"h\x00\x8c\x14_MEM_FORMAT_ENCODING\x94\x93\x94"
    assert metadata.count(kind + b"K\x00\x85") == 1
    by_name = b"cbuiltins\ngetattr\n" + kind + b"\x8c\x14TORCH_CONTIGUOUS_FMT\x86"
    wanted = (accepted(ranks) / "model.safetensors").read_bytes()
    (ranks / ".metadata").write_bytes(metadata.replace(kind + b"K\x00\x85", by_name))
    assert (accepted(ranks) / "model.safetensors").read_bytes() == wanted


def test_dtensors_of_several_devices_are_refused_with_the_reason(refused, data):
    message = refused(data / "lm/two_ranks/dtensor.pt")
    assert "DTensor values of a run on 2 devices, so this file has one rank's part of the weights" in message
    assert "full_state_dict=True" in message


def mesh_of(devices: int) -> Made:
    ranks = np.arange(devices, dtype=np.int64)
    return Made("torch.distributed.device_mesh", "DeviceMesh", {"mesh": ranks})


def dtensor(home: str, size: tuple, mesh: Made | None) -> Call:
    """A DTensor with a local part of 4 ones, as torch 2.4 ("_tensor.api") and later ones pickle it."""
    kind = Named(home, "DTensor")
    spec = Made("torch.distributed._tensor.placement_types", "DTensorSpec", {"mesh": mesh})
    arguments = (kind, Named("torch", "float32"), size, (1,), 0, None, "cpu", False)
    state = (None, {"_local_tensor": np.ones(4, np.float32), "_spec": spec})
    function = Named("torch._utils", "_rebuild_wrapper_subclass")
    return Call("torch._tensor", "_rebuild_from_type_v2", (function, kind, arguments, state))


HOMES = ["torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._tensor.api"]


@pytest.mark.parametrize("home", HOMES)
def test_dtensors_of_one_device_are_read_in_the_older_layouts_too(home, accepted, tmp_path):
    model = apple_gru() | {"final_norm.weight": dtensor(home, (4,), mesh_of(1))}
    folder = accepted(write_pt(tmp_path / "d.pt", model))
    assert np.array_equal(weights(folder)["model.norm.weight"], np.ones(4, np.float32))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    ("size", "mesh", "expected"),
    [
        ((4,), mesh_of(2), "a run on 2 devices"),
        ((8,), mesh_of(1), "a run on 1 devices"),
        ((4,), None, "a run on several devices"),
    ],
)
def test_dtensors_that_are_not_whole(home, size, mesh, expected, refused, tmp_path):
    value = dtensor(home, size, mesh)
    assert expected in refused(write_pt(tmp_path / "d.pt", apple_gru() | {"final_norm.weight": value}))


def test_tensors_of_other_classes_are_refused(refused, tmp_path):
    value = Call("torch._tensor", "_rebuild_from_type_v2", (1, 2, (0, 0, (4,)), None))
    message = refused(write_pt(tmp_path / "d.pt", apple_gru() | {"final_norm.weight": value}))
    assert "tensors of a class of its own" in message
    value = Call("torch._tensor", "_rebuild_from_type_v2", (1, 2, (), None))
    assert "damaged" in refused(write_pt(tmp_path / "d.pt", {"embedding.weight": value}))
    value = Named("torch.distributed.fsdp", "FlatParameter")
    assert "not plain DTensors" in refused(write_pt(tmp_path / "d.pt", {"embedding.weight": value}))


def test_a_record_is_only_ever_data():
    for (module, attribute), allowed in pickle_names.ALLOWED.items():
        if allowed.is_record:
            assert allowed.call is None
            with pytest.raises(PararnnError, match="not a function"):
                load_pickle(f"\x80\x02c{module}\n{attribute}\n)R.".encode("latin1"), "x")
        else:
            with pytest.raises(PararnnError, match="makes an object"):
                load_pickle(f"\x80\x02c{module}\n{attribute}\n)\x81.".encode("latin1"), "x")


def test_a_hub_cache_with_a_broken_link(refused, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    assert "no checkpoint inside" in refused(snapshot)
    assert os.path.islink(snapshot / "model.safetensors")
