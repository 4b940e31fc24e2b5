"""The weights' files: shards and their index, and that nothing is read or held that need not be."""

import json

import mlx_lm.utils
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import mlx_pararnn
from mlx_pararnn.convert.readers import tensors
from mlx_pararnn.convert.readers.dtypes import all_finite, cast, transposed
from mlx_pararnn.convert.readers.tensors import boxes
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.convert.writers import safetensors_writer
from mlx_pararnn.files.weights_digest import is_as_written
from tests.support.golden import golden_file

SOURCE = "lm/paragru_s64/state_dict.pt"


@pytest.fixture
def sharded(tmp_path):
    """A function that converts with shards of at most 100 kB."""

    def run(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(safetensors_writer, "MAX_SHARD_BYTES", 100_000)
            convert_to_mlx(golden_file(SOURCE), tmp_path / "sharded", tokenizer="none", **options)
        return tmp_path / "sharded"

    return run


@pytest.mark.parametrize("quantize", [False, True])
def test_shards_hold_what_one_file_holds(quantize, sharded, converted):
    folder = sharded(quantize=quantize, **({"q_bits": 8} if quantize else {}))
    whole = load_file(
        converted(SOURCE, **({"quantize": True, "q_bits": 8} if quantize else {})) / "model.safetensors"
    )
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(names)
    assert count >= 2
    assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_size": sum(value.nbytes for value in whole.values()),
        "total_parameters": 212_675,
    }
    assert list(index["weight_map"]) == sorted(whole)
    for name in names:
        part = load_file(folder / name)
        assert sum(value.nbytes for value in part.values()) <= 100_000
        for tensor, value in part.items():
            assert index["weight_map"][tensor] == name
            assert value.tobytes() == whole[tensor].tobytes()
        with safe_open(folder / name, "np") as file:
            assert file.metadata().keys() == {"format", "sha256"}
        assert is_as_written(folder / name)


@pytest.mark.parametrize("quantize", [False, True])
def test_mlx_lm_and_we_load_shards(quantize, sharded):
    mx = pytest.importorskip("mlx.core")
    folder = sharded(quantize=quantize)
    ids = mx.array([[1, 2, 3]])
    ours, theirs = mlx_pararnn.load_model(folder)[0], mlx_lm.utils.load_model(folder)[0]
    assert mx.array_equal(ours(ids), theirs(ids))


def test_a_small_model_is_one_file_without_an_index(converted):
    assert {path.name for path in converted(SOURCE).iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip


def test_progress_counts_every_byte_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 10_000)
    seen = []
    done = convert_to_mlx(
        golden_file(SOURCE), tmp_path / "out", tokenizer="none", progress=lambda *state: seen.append(state)
    )
    assert len(seen) > 50
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {done.nbytes}
    assert seen[-1][0] == done.nbytes


@pytest.mark.parametrize("options", [{}, {"quantize": True}, {"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_the_size_of_the_pieces_changes_nothing(options, converted, tmp_path, monkeypatch):
    whole = (converted(SOURCE, **options) / "model.safetensors").read_bytes()
    for piece_bytes in (1_000, 3_001, 60_000):
        monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
        out = tmp_path / str(piece_bytes)
        convert_to_mlx(golden_file(SOURCE), out, tokenizer="none", **options)
        assert (out / "model.safetensors").read_bytes() == whole


def test_boxes_are_in_c_order_and_bounded():
    for shape in ((), (0, 3), (7,), (5, 3), (2, 3, 4), (1, 1, 9), (4, 1, 2, 3)):
        array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        for piece_bytes in (4, 12, 20, 1000):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tensors, "PIECE_BYTES", piece_bytes)
                pieces = [array[tuple(slice(*span) for span in box)] for box in boxes(shape, 4)]
            row = 4 * shape[-1] if len(shape) > 1 else 4
            assert all(piece.nbytes <= max(piece_bytes, row) for piece in pieces)
            flat = np.concatenate([piece.reshape(-1) for piece in pieces] or [array.reshape(-1)])
            assert np.array_equal(flat, array.reshape(-1))


def test_long_arrays_are_cast_and_checked_like_short_ones():
    """Past the steps that fit a cache: the last number of each step and of the array."""
    array = np.random.default_rng(0).standard_normal(70_001).astype(np.float32)
    pieces = [cast(array[start : start + 999], "F32", "BF16") for start in range(0, array.size, 999)]
    assert np.array_equal(cast(array, "F32", "BF16"), np.concatenate(pieces))
    for place in (0, 32_767, 32_768, 70_000):
        for value in (np.nan, np.inf, -np.inf):
            for dtype in ("F32", "F64", "F16", "BF16"):
                broken = array.copy()
                broken[place] = value
                assert all_finite(cast(array, "F32", dtype), dtype)
                assert not all_finite(cast(broken, "F32", dtype), dtype)
                assert np.isnan(cast(cast(broken, "F32", dtype), dtype, "F64")[place]) == np.isnan(value)
    assert all_finite(np.zeros(0, np.float32), "F32")


def test_transposed():
    array = np.random.default_rng(0).standard_normal((3, 130, 2, 70)).astype(np.float32)
    for axes in ((0, 2, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)):
        assert np.array_equal(transposed(array, axes), array.transpose(axes))
        assert transposed(array, axes).flags.c_contiguous
