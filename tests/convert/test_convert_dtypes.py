"""--dtype: exact casts, float32 recurrent weights, and an error where a number does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from mlx_pararnn.convert.readers.dtypes import cast
from tests.support.converting import config, weights
from tests.support.golden import golden_file
from tests.support.pt_writer import write_pt
from tests.support.small_models import apple_gru, torch_lm

RECURRENT = "model.layers.0.mixer.cell.recurrent_weight"


def stored_dtypes(folder) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("dtype", "tag"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_every_weight_is_cast_but_the_recurrent_ones(dtype, tag, accepted, tmp_path):
    model = apple_gru()
    folder = accepted(write_pt(tmp_path / "m.pt", model), "--dtype", dtype, "--tokenizer", "none")
    tags = stored_dtypes(folder)
    assert tags.pop(RECURRENT) == "F32"
    assert set(tags.values()) == {tag}
    tensors = open_checkpoint(folder / "model.safetensors").tensors
    assert np.array_equal(tensors[RECURRENT].read(), model["blocks.0.rnn_cell.A"])
    embedding = tensors["model.embed_tokens.weight"].read()
    if dtype != "bfloat16":
        assert np.array_equal(embedding, model["embedding.weight"].astype(dtype))
    assert f"--dtype {dtype}" in (folder / "README.md").read_text()


def test_bfloat16_becomes_float32_exactly(converted):
    wide = weights(converted("lm/paragru_s64/ckpt_bf16.pt", dtype="float32"))
    bits = open_checkpoint(golden_file("lm/paragru_s64/ckpt_bf16.pt")).tensors["embedding.weight"].read()
    assert np.array_equal(wide["model.embed_tokens.weight"].view(np.uint32), bits.astype(np.uint32) << 16)


def test_a_clamp_is_baked_in_for_bfloat16_too(accepted, tmp_path):
    bits = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in torch_lm().items()}
    folder = accepted(write_pt(tmp_path / "m.pt", bits), "--dtype", "float32", "--tokenizer", "none")
    before = cast(bits["blocks.0.rnn.layers.0.R"], "BF16", "F32")
    assert np.array_equal(weights(folder)[RECURRENT], np.clip(before, -0.5, 0.5))
    assert np.abs(before).max() > 0.5


def test_float64_is_written_as_float32(accepted, tmp_path):
    model = apple_gru()
    wide = write_pt(tmp_path / "m.pt", {name: value.astype(np.float64) for name, value in model.items()})
    folder = accepted(wide)
    assert set(stored_dtypes(folder).values()) == {"F32"}
    assert np.array_equal(weights(folder)["model.norm.weight"], model["final_norm.weight"])


def test_formats_that_differ_within_one_cell_are_brought_together(accepted, tmp_path):
    model = apple_gru(lstm=True)
    model["blocks.0.rnn_cell.C"] = model["blocks.0.rnn_cell.C"].astype(np.float16)
    rows = weights(accepted(write_pt(tmp_path / "m.pt", model)))[RECURRENT]
    assert rows.dtype == np.float32
    assert np.array_equal(rows[3:], model["blocks.0.rnn_cell.C"].astype(np.float32))


def test_a_number_too_large_for_float16_is_refused_by_name(refused, accepted, tmp_path):
    model = apple_gru()
    model["final_norm.weight"][2] = 70000.0
    path = write_pt(tmp_path / "m.pt", model)
    options = ("--dtype", "float16", "--tokenizer", "none")
    assert "model.norm.weight holds numbers too large for float16" in refused(path, *options)
    assert "too large for float16" in refused(path, *options, "--allow-nonfinite")
    accepted(path, "--dtype", "bfloat16", "--tokenizer", "none")


def test_nan_survives_every_cast_where_it_is_allowed(accepted, tmp_path):
    model = apple_gru()
    model["final_norm.weight"][2] = np.nan
    model["final_norm.weight"][1] = -np.inf
    path = write_pt(tmp_path / "m.pt", model)
    folder = accepted(path, "--dtype", "float16", "--allow-nonfinite", "--tokenizer", "none")
    assert np.isnan(weights(folder)["model.norm.weight"][2])
    assert weights(folder)["model.norm.weight"][1] == -np.inf


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=64))
def test_bfloat16_is_the_nearest_and_even_of_two(values):
    exact = np.array(values, np.float32)
    rounded = cast(cast(exact, "F32", "BF16"), "BF16", "F32")
    assert np.array_equal(np.isnan(exact), np.isnan(rounded))
    for x, y in zip(exact[~np.isnan(exact)], rounded[~np.isnan(exact)], strict=True):
        below = np.uint32(x.view(np.uint32) >> 16)
        low, high = ((np.uint32(part) << np.uint32(16)).view(np.float32) for part in (below, below + 1))
        gaps = [abs(float(x) - float(low)), abs(float(high) - float(x))]
        if not np.isfinite(high) or not np.isfinite(x):
            assert y == x or y in (low, high)
        elif gaps[0] != gaps[1]:
            assert y == (low if gaps[0] < gaps[1] else high)
        else:
            assert y == (low if below % 2 == 0 else high)


def test_float16_is_numpys_bit_for_bit():
    """Every float16, its float32 neighbours, the midpoints and theirs; and any bits at all, NaN too."""
    exact = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    steps = (0, 1, -1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, -0x1000)
    near = [(exact + np.uint32(step & 0xFFFFFFFF)).view(np.float32) for step in steps]
    tiny = np.geomspace(1e-46, 1e-4, 100_000).astype(np.float32)
    anything = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    normal = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    normal[[0, 70_000, -1]] = 65519.99, -65520, np.inf  # the second is the smallest that overflows
    for values in (*near, tiny, -tiny, anything, normal, normal[1:69_999], normal[:0]):
        with np.errstate(over="ignore"):
            expected = values.astype(np.float16)
        assert np.array_equal(cast(values, "F32", "F16").view(np.uint16), expected.view(np.uint16))


def test_the_config_does_not_depend_on_the_dtype(converted):
    plain, narrow = (converted("lm/paragru_s64/ckpt.pt", **o) for o in ({}, {"dtype": "float16"}))
    assert config(plain) == config(narrow)


def test_mlx_reads_what_was_written(converted):
    mx = pytest.importorskip("mlx.core")
    loaded = mx.load(
        str(converted("lm/paragru_s64/ckpt_bf16.pt") / "model.safetensors"), return_metadata=True
    )
    assert loaded[1].pop("sha256")
    assert loaded[1] == {"format": "mlx"}
    assert {array.dtype for array in loaded[0].values()} == {mx.bfloat16}
