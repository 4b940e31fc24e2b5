"""`convert -q`: what MLX-LM's own quantization would have made, read by mlx_lm.load and by ours."""

import json
import shlex
from pathlib import Path

import mlx_lm.utils
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.readers import tensors
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.convert.writers.quantize import Plan, quantization
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.quantization_formats import MODES
from tests.support.converting import config, convert
from tests.support.golden import golden_file
from tests.support.pt_writer import write_pt
from tests.support.small_models import TORCH_CELLS, apple_gru, babylm, torch_lm

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

# 128 divides some widths, 64 and 32 others, none the rest.
GOLDEN = ["lm/paragru_s64/state_dict.pt", "lm/paralstm_s96/state_dict.pt", "trained/paragru/final.pt",
          "pararnn_torch/babylm_paragru", "pararnn_torch/paraslstm_causal_lm_1"]  # fmt: skip
CHOICES = [
    {}, {"q_bits": 8}, {"q_bits": 3, "q_group_size": 128}, {"q_bits": 2, "q_group_size": 32},
    {"q_bits": 5}, {"q_bits": 6}, {"q_mode": "mxfp4"}, {"q_mode": "nvfp4"}, {"q_mode": "mxfp8"},
]  # fmt: skip


def quantized_by_mlx(folder: Path, choice: dict, dtype: str | None) -> tuple[dict, dict]:
    """The plain model of `folder`, quantized by mlx_lm.utils.quantize_model: weights, config."""
    model, settings = mlx_pararnn.load_model(folder)
    asked = quantization(choice.get("q_bits"), choice.get("q_group_size"), choice.get("q_mode", "affine"))
    if dtype:
        keep = model.cast_predicate
        model.load_weights([
            (name, value.astype(getattr(mx, dtype) if keep(name) else mx.float32))
            for name, value in mlx_lm.utils.tree_flatten(model.parameters())
        ])  # fmt: skip

    def predicate(path, module):
        if not hasattr(module, "to_quantized") or not model.quant_predicate(path, module):
            return False
        own = asked.for_width(module.weight.shape[-1])
        if own is None:
            return False
        if own == asked:
            return True
        settings["quantization"][path] = {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}
        return settings["quantization"][path]

    settings["quantization"] = {"group_size": asked.group_size, "bits": asked.bits, "mode": asked.mode}
    nn.quantize(model, asked.group_size, asked.bits, mode=asked.mode, class_predicate=predicate)
    return dict(mlx_lm.utils.tree_flatten(model.parameters())), settings["quantization"]


@pytest.mark.sampled("large")
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("source", GOLDEN[:3])
def test_bits_scales_and_config_are_mlx_lms(source, dtype, choice, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 10_000)  # so that matrices are quantized in many blocks
    done = convert_to_mlx(
        golden_file(source), tmp_path / "q", tokenizer="none", quantize=True, dtype=dtype, **choice
    )
    expected, settings = quantized_by_mlx(converted(source), choice, dtype)
    ours = mx.load(str(tmp_path / "q" / "model.safetensors"))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == expected[name].dtype, name
        assert mx.array_equal(value, expected[name]), name
    assert config(tmp_path / "q")["quantization"] == settings
    assert config(tmp_path / "q")["quantization_config"] == settings
    # MLX-LM's own count leaves out what belongs to modules with modules inside, such as a cell's bias.
    stored = sum(value.nbytes for value in ours.values())
    plain = sum(value.size for value in mx.load(str(converted(source) / "model.safetensors")).values())
    assert done.bits_per_weight == stored * 8 / plain


@pytest.mark.sampled("large")
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("source", GOLDEN)
def test_mlx_lm_and_we_load_it_and_it_computes_nearly_the_same(source, choice, converted):
    plain, _ = mlx_pararnn.load_model(converted(source))
    folder = converted(source, quantize=True, **choice)
    ours, _ = mlx_pararnn.load_model(folder)
    theirs, _ = mlx_lm.utils.load_model(folder)
    ids = mx.array([[5, 1, 77, 8, 9, 3]])
    logits = ours(ids)
    assert mx.array_equal(logits, theirs(ids))
    if choice == {"q_bits": 8}:
        assert mx.abs(logits - plain(ids)).max() < 0.1 * mx.abs(plain(ids)).max()


def test_a_matrix_that_the_group_size_does_not_divide(converted):
    settings = config(converted("trained/paragru/final.pt", quantize=True, q_group_size=128))["quantization"]
    assert {key: settings[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 128, "bits": 4, "mode": "affine",
    }  # fmt: skip
    own = {key: value for key, value in settings.items() if "." in key}
    assert own == {
        f"model.layers.{i}.mixer.cell.input_proj": {"group_size": 32, "bits": 4, "mode": "affine"}
        for i in range(3)
    }


def test_the_summary_says_what_is_not_as_asked(tmp_path):
    def summary(source, *options):
        result = convert(
            golden_file(source), "-o", tmp_path / "out", "--tokenizer", "none", "--force", "-q", *options
        )
        assert result.exit_code == 0, result.output
        return next(line for line in result.stdout.splitlines() if line.startswith("quantized: "))

    assert summary("trained/paragru/final.pt") == (
        "quantized: 5.23 bits per weight (affine, 4 bits in groups of 64); "
        "model.layers.*.mixer.cell.input_proj in groups of 32 (3)"
    )
    assert summary("trained/paragru/final.pt", "--q-mode", "mxfp4") == (
        "quantized: 4.44 bits per weight (mxfp4, 4 bits in groups of 32)"
    )
    left = summary("pararnn_torch/babylm_paragru", "--q-bits", "8", "--q-group-size", "32")
    assert "model.embed_tokens left float (1)" in left
    assert "model.layers.*.mixer.cell.input_proj left float (2)" in left
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--q-mode affine --q-bits 8 --q-group-size 32" in card


@pytest.mark.sampled("large", by=lambda cell, build: [build.__name__] if cell in ("gru", "lstm") else [])
@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("build", [torch_lm, babylm])
def test_what_stays_float(cell, build, accepted, tmp_path):
    folder = accepted(
        write_pt(tmp_path / "m.pt", build(cell, d=64)), "-q", "--tokenizer", "none", "--dtype", "float16"
    )
    with safe_open(folder / "model.safetensors", "np") as file:
        tags = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for name, tag in tags.items():
        if "norm" in name or "conv" in name or "embed_positions" in name or name.endswith("bias"):
            assert tag == "F16", name
        if name.endswith("recurrent_weight"):
            assert tag == "F32", name
    assert tags["model.embed_tokens.weight"] == "U32"
    assert tags["model.layers.0.mixer.cell.input_proj.weight"] == "U32"
    assert tags["model.layers.0.mixer.cell.input_proj.scales"] == "F16"


@pytest.mark.parametrize(
    "build", [lambda: apple_gru(d=64), lambda: torch_lm(d=64), lambda: babylm("nlru", d=64)]
)
def test_the_converter_and_the_model_agree_on_what_is_a_matrix(build, accepted, tmp_path):
    untied = build()
    embedding = "embed.weight" if "embed.weight" in untied else "embedding.weight"
    untied["lm_head.weight"] = untied[embedding] + 1
    (tmp_path / "c.json").write_text('{"tie_word_embeddings": false}')
    folder = accepted(
        write_pt(tmp_path / "m.pt", untied), "--tokenizer", "none", "--config", tmp_path / "c.json"
    )
    model, _ = mlx_pararnn.load_model(folder)
    wanted = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and model.quant_predicate(path, module)
    }
    outputs = [
        type("Output", (), {"name": name, "shape": value.shape}) for name, value in load_file(
            folder / "model.safetensors").items()
    ]  # fmt: skip
    plan = Plan(outputs, quantization(4, 32, "affine"))
    assert set(plan.chosen) == wanted


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "expected"),
    [
        (7, None, "affine", "7 bits in groups of 64: MLX has bits 2, 3, 4, 5, 6, 8"),
        (4, 16, "affine", "group sizes 32, 64, 128"),
        (8, None, "mxfp4", "mxfp4 has 4 bits and group size 32, no others"),
        (None, 64, "nvfp4", "nvfp4 has 4 bits and group size 16, no others"),
        (4, 32, "mxfp8", "mxfp8 has 8 bits and group size 32, no others"),
        (None, None, "gguf", "choose one of affine, mxfp4, nvfp4, mxfp8"),
    ],
)
def test_what_mlx_does_not_have(bits, group_size, mode, expected):
    with pytest.raises(PararnnError, match=expected.replace("(", r"\(")):
        quantization(bits, group_size, mode)
    for name in MODES:
        assert quantization(None, None, name).mode == name


def test_a_single_cell_is_not_quantized(refused, data, tmp_path):
    golden = load_file(data / "cells/lstm_01_d16_h2.safetensors")
    save_file({name: golden[name] for name in "ABCb"}, tmp_path / "cell.safetensors")
    assert "a single cell is not quantized" in refused(tmp_path / "cell.safetensors", "-q")


def test_nan_is_found_before_it_is_quantized(refused, tmp_path):
    model = apple_gru(d=64)
    model["blocks.1.1.w1.weight"][3, 3] = np.nan
    assert "blocks.1.1.w1.weight holds NaN" in refused(
        write_pt(tmp_path / "m.pt", model), "-q", "--tokenizer", "none"
    )


def test_a_quantized_model_is_not_converted_again(refused, converted):
    folder = converted("trained/paragru/final.pt", quantize=True)
    assert "quantized" in refused(folder)
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == 4


def test_an_mlx_model_names_the_command_that_quantizes_or_unpacks_it(converted, refused, tmp_path):
    source = "lm/paragru_s64/state_dict.pt"
    folder, out = converted(source, tokenizer="bytes"), tmp_path / "packed model"
    how = ["-q", "--q-bits", "8", "--q-group-size", "32", "--dtype", "float16"]
    message = refused(folder, *how, "--tokenizer", "none", out=out)
    command = shlex.split(message.partition("to quantize it: mlx-pararnn ")[2])
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = json.loads((out / "config.json").read_text())["quantization"]
    assert (made["bits"], made["group_size"]) == (8, 32)
    assert "--q-mode mxfp4" in refused(folder, "-q", "--q-mode", "mxfp4", "--tokenizer", "none")
    packed = converted(source, quantize=True)
    assert f"lm convert --hf-path {packed} --mlx-path UNPACKED -d" in refused(packed)


def test_verify_against_another_checkpoint_than_the_quantized_models_own(accepted, tmp_path):
    packed = accepted(write_pt(tmp_path / "a.pt", apple_gru(d=32)), "-q", "--tokenizer", "none")
    other = write_pt(tmp_path / "b.pt", apple_gru(d=64))
    result = CliRunner().invoke(app, ["verify", str(packed), "--against", str(other)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "in the checkpoint" in result.stderr
    assert "--debug" not in result.stderr
