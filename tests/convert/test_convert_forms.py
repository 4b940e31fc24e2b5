"""Forms of several files: shards with an index, distributed folders, Hugging Face folders and names."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from tests.support.converting import config, convert, weights
from tests.support.pt_writer import View, write_pt
from tests.support.small_models import apple_gru, babylm, tokenizer_json, torch_lm, write_shards


def same(folder, expected) -> bool:
    ours, theirs = weights(folder), weights(expected)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("build", [apple_gru, torch_lm, babylm])
def test_shards_give_the_weights_of_one_file(suffix, build, accepted, tmp_path):
    plain = accepted(write_pt(tmp_path / "plain.pt", build()))
    folder = write_shards(tmp_path / "sharded", build(), suffix)
    assert same(accepted(folder), plain)
    assert same(accepted(next(folder.glob("*.index.json"))), plain)


def test_a_shard_with_the_metadata_of_a_tied_head(accepted, tmp_path):
    folder = write_shards(tmp_path / "sharded", torch_lm(), count=1)
    (shard,) = folder.glob("*.safetensors")
    save_file(torch_lm(), shard, {"lm_head.weight": "embed.weight"})
    assert config(accepted(folder))["tie_word_embeddings"] is True


def test_two_ranks_make_one_model(accepted, data, tmp_path):
    plain = accepted(write_pt(tmp_path / "plain.pt", apple_gru(vocab=5)))
    folder = accepted(data / "lm/two_ranks/dcp")
    assert same(folder, plain)
    assert "| Source | `dcp` (Apple's ml-pararnn" in (folder / "README.md").read_text()


def test_boxes_that_cross_the_parts_of_a_distributed_tensor(data):
    tensor = open_checkpoint(data / "lm/two_ranks/dcp").tensors["blocks.1.1.w2.weight"]
    whole = apple_gru(vocab=5)["blocks.1.1.w2.weight"]
    assert np.array_equal(tensor.read(), whole)
    for rows, columns in (((1, 3), (2, 5)), ((0, 4), (3, 4)), ((2, 3), (0, 3)), ((0, 1), (3, 6))):
        assert np.array_equal(tensor.load((rows, columns)), whole[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", ["babylm_paragru", "babylm_paralstm", "babylm_paraslstm", "babylm_paranlru"])
def test_published_folders(name, prefix, converted, data, accepted, tmp_path):
    """As on the hub: weights with or without a prefix, a config.json of no use, a tokenizer, Python."""
    source = tmp_path / name
    source.mkdir()
    model = load_file(data / "pararnn_torch" / name / "model.safetensors")
    save_file({prefix + key: value for key, value in model.items()}, source / "model.safetensors")
    (source / "tokenizer.json").write_text(tokenizer_json(160, {"</s>": 2}))
    (source / "config.json").write_text('{"model_type": "paragru", "vocab_size": 160, "hidden_act": "x"}')
    (source / "modeling.py").write_text("raise SystemExit")
    folder = accepted(source, "--force")
    assert same(folder, converted(f"pararnn_torch/{name}"))
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into an otherwise empty Hugging Face cache, without a network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def publish(name, folder):
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        for made in (snapshot, repository / "blobs", repository / "refs"):
            made.mkdir(parents=True)
        (repository / "refs/main").write_text("0" * 40)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copyfile(path, repository / "blobs" / f"{number:040}")
            (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")

    return publish


@pytest.mark.parametrize("form", ["one file", "shards", "bin", "pt", "distributed"])
def test_a_hub_name(form, hub, accepted, data, tmp_path, monkeypatch):
    plain = accepted(write_pt(tmp_path / "plain.pt", apple_gru(vocab=5)))
    source = tmp_path / "source"
    source.mkdir()
    match form:
        case "one file":
            save_file(apple_gru(vocab=5), source / "model.safetensors")
        case "shards":
            write_shards(source, apple_gru(vocab=5))
        case "bin" | "pt":
            write_pt(source / {"bin": "pytorch_model.bin", "pt": "final.pt"}[form], apple_gru(vocab=5))
        case _:
            shutil.copytree(data / "lm/two_ranks/dcp", source, dirs_exist_ok=True)
    (source / "tokenizer.json").write_text(tokenizer_json(5))
    hub("someone/babylm-x", source)
    monkeypatch.chdir(tmp_path)
    folder = accepted("someone/babylm-x", "--force")
    assert same(folder, plain)
    assert (folder / "tokenizer.json").read_text() == tokenizer_json(5)
    assert "`someone/babylm-x`" in (folder / "README.md").read_text()


def test_a_folder_here_goes_before_the_hub(accepted, tmp_path, monkeypatch):
    (tmp_path / "someone/model").mkdir(parents=True)
    save_file(apple_gru(), tmp_path / "someone/model/model.safetensors")
    monkeypatch.chdir(tmp_path)
    accepted("someone/model")


def test_python_files_and_the_like_are_not_asked_for(hub, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("someone/model", "-o", tmp_path / "out")
    assert "model*.safetensors" in asked
    assert {"*.pt", ".metadata", "*.distcp"} <= set(asked)
    assert not any(pattern in ("*", "*.*") or pattern.endswith(".py") for pattern in asked)


def test_a_name_that_is_not_in_the_cache_and_no_network(hub, refused):
    message = refused("someone/else")
    assert message.startswith("someone/else: not a folder here, and Hugging Face could not be reached; ")
    assert message.endswith("check the name and the network, or pass a file or folder with the weights")


def test_no_network_at_all(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", "someone/model", "-o", tmp_path / "out"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(
        "error: someone/model: not a folder here, and Hugging Face could not be reached"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["no such thing", "owner/name/more", "my-model", "a b/c", "~/model", "../m/x"]
)
def test_neither_a_path_nor_a_hub_name(name, refused):
    assert refused(name).startswith(f"{os.path.expanduser(name)}: no such file or folder")


def test_a_path_with_a_weights_name_is_never_looked_for_on_the_hub(refused, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert refused("runs/final.pt") == "runs/final.pt: no such file or folder"


def test_strides_read_in_pieces_are_what_pytorch_sees(accepted, monkeypatch, tmp_path):
    """A transposed matrix, a column slice and heads of a B, with pieces smaller than any of them."""
    from mlx_pararnn.convert.readers import tensors

    model = apple_gru(d=16, width=40)
    plain = weights(accepted(write_pt(tmp_path / "plain.pt", model)))
    turned = dict(model)
    backing = np.ascontiguousarray(model["blocks.1.1.w2.weight"].T)
    turned["blocks.1.1.w2.weight"] = View(backing, 0, (16, 40), (1, 16))
    wide = np.zeros((40, 50), np.float32)
    wide[:, 7:23] = model["blocks.1.1.w1.weight"]
    turned["blocks.1.1.w1.weight"] = View(wide, 7, (40, 16), (50, 1))
    for piece_bytes, cost in ((64, 1 << 20), (64, 1), (4, 1), (1000, 16)):
        monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(tensors, "_READ_COST", cost)
        pieced = weights(accepted(write_pt(tmp_path / "turned.pt", turned)))
        assert all(np.array_equal(plain[name], pieced[name]) for name in plain)


def test_a_header_whose_size_begins_like_a_pickle(accepted, tmp_path):
    """640, 896, 1152 or 1408 bytes more than a multiple of 65536."""
    raw = save(apple_gru())
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].ljust(0x10580)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert path.read_bytes()[:2] == b"\x80\x05"
    assert "model.norm.weight" in weights(accepted(path))
