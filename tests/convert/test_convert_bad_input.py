"""Bad input: one sentence that says what is wrong, exit code 1, and nothing left."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.converting import config, convert, weights
from tests.support.golden import golden_file
from tests.support.pt_writer import Call, write_archive, write_pt
from tests.support.small_models import apple_gru, babylm, torch_lm


@pytest.fixture
def model(tmp_path):
    return write_pt(tmp_path / "model.pt", apple_gru())


def test_no_such_file(refused, tmp_path):
    assert refused(tmp_path / "absent.pt") == f"{tmp_path}/absent.pt: no such file or folder"


@pytest.mark.parametrize("name", ["empty.pt", "empty.safetensors", "empty.bin"])
def test_an_empty_file(name, refused, tmp_path):
    (tmp_path / name).touch()
    assert refused(tmp_path / name) == f"{tmp_path}/{name}: the file is empty"


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("form", ["state_dict.pt", "model.safetensors"])
def test_a_truncated_file(form, kept, refused, tmp_path):
    content = (golden_file(f"lm/paragru_s64/{form}")).read_bytes()
    (tmp_path / form).write_bytes(content[: int(len(content) * kept)])
    assert "cut short" in refused(tmp_path / form)


def test_not_a_checkpoint_at_all(refused, tmp_path):
    (tmp_path / "notes.pt").write_text("dear diary, " * 20)
    assert "neither a safetensors file nor a PyTorch checkpoint" in refused(tmp_path / "notes.pt")
    write_archive(tmp_path / "other.zip", b"", {}).rename(tmp_path / "other.pt")
    assert "damaged" in refused(tmp_path / "other.pt")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(tmp_path / "lfs.safetensors")
    write_pt(tmp_path / "plain.pt", {"epoch": 3})
    assert "no state dict inside" in refused(tmp_path / "plain.pt")
    save_file({}, tmp_path / "none.safetensors")
    assert "no tensors inside" in refused(tmp_path / "none.safetensors")


def test_a_zip_file_without_a_pickle(refused, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("photos/cat.jpg", b"meow")
    assert "not a PyTorch checkpoint" in refused(tmp_path / "photos.pt")


def test_a_folder_without_or_with_several_checkpoints(refused, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no checkpoint inside" in refused(folder)
    for name in ("a.pt", "b.pth"):
        write_pt(folder / name, apple_gru())
    assert "several checkpoints inside (a.pt, b.pth); pass one of the files" in refused(folder)


def test_legacy_torchscript_and_quantized_checkpoints_say_how_to_resave(refused, tmp_path):
    resave = 'torch.save(model.state_dict(), "weights.pt")'
    (tmp_path / "legacy.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    message = refused(tmp_path / "legacy.pt")
    assert "old format" in message
    assert resave in message
    script = write_archive(
        tmp_path / "script.pt", b"\x80\x02}.", {"constants.pkl": b"\x80\x02).", "code/m.py": b""}
    )
    message = refused(script)
    assert "TorchScript" in message
    assert resave in message
    quantized = Call("torch._utils", "_rebuild_qtensor", (1,))
    message = refused(write_pt(tmp_path / "q.pt", {"embedding.weight": quantized}))
    assert "quantized" in message
    assert resave in message
    save_file({"layer.qweight": np.zeros((2, 2), np.int32)}, tmp_path / "gptq.safetensors")
    assert "quantized" in refused(tmp_path / "gptq.safetensors")
    save_file(apple_gru() | {"final_norm.weight": np.zeros(4, np.int8)}, tmp_path / "int8.safetensors")
    assert "quantized" in refused(tmp_path / "int8.safetensors")


def test_shapes_that_do_not_fit(refused, tmp_path):
    broken = apple_gru() | {"blocks.1.1.w2.weight": np.zeros((4, 5), np.float32)}
    message = refused(write_pt(tmp_path / "m.pt", broken))
    assert "wrong shape (1): blocks.1.1.w2.weight is (4, 5), expected (4, 6)" in message
    assert "families considered: ml-pararnn, babylm, pararnn-torch, bare-cell" in message
    broken = apple_gru() | {"lm_head.weight": np.zeros((255, 4), np.float32)}
    assert "lm_head.weight is (255, 4), expected (256, 4)" in refused(write_pt(tmp_path / "m.pt", broken))
    broken = apple_gru() | {"embedding.weight": np.zeros(4, np.float32)}
    assert "embedding.weight is (4)" in refused(write_pt(tmp_path / "m.pt", broken))


def test_a_layer_with_another_number_of_heads(refused, tmp_path):
    more = apple_gru() | {
        name.replace("blocks.0", "blocks.2").replace("blocks.1.", "blocks.3."): value
        for name, value in apple_gru(heads=4).items()
        if name.startswith("blocks.")
    }
    assert "num_heads=4" in refused(write_pt(tmp_path / "m.pt", more))


def test_missing_and_surplus_tensors_are_listed_ten_at_most(refused, tmp_path):
    broken = apple_gru() | {f"extra.{i:02}": np.zeros(1, np.float32) for i in range(25)}
    del broken["blocks.0.gate_norm.weight"], broken["blocks.1.0.weight"]
    message = refused(write_pt(tmp_path / "m.pt", broken))
    assert "missing (2): blocks.0.gate_norm.weight, blocks.1.0.weight;" in message
    assert "not expected (25): extra.00, " in message
    assert "extra.09 and 15 more" in message
    assert "extra.10" not in message


@pytest.mark.parametrize("missing", sorted(apple_gru()))
def test_each_missing_tensor_is_named(missing, refused, accepted, tmp_path):
    model = apple_gru()
    del model[missing]
    path = write_pt(tmp_path / "m.pt", model)
    if missing == "lm_head.weight":
        accepted(path)
    else:
        assert missing in refused(path)


@pytest.mark.parametrize("missing", sorted(torch_lm("lstm")))
def test_each_missing_tensor_of_pararnn_torch_is_named(missing, refused, tmp_path):
    model = torch_lm("lstm")
    del model[missing]
    assert missing in refused(write_pt(tmp_path / "m.pt", model))


def test_an_unknown_model_lists_its_tensors_and_the_families(refused, tmp_path):
    message = refused(
        write_pt(tmp_path / "m.pt", {f"layer.{i}.w": np.zeros(1, np.float32) for i in range(12)})
    )
    assert "considered: ml-pararnn, babylm, pararnn-torch, bare-cell" in message
    assert "12 tensors: layer.0.w," in message
    assert "and 2 more" in message


def test_a_forced_family_that_does_not_fit_or_is_unknown(refused, model):
    assert "does not fit the family babylm" in refused(model, "--family", "babylm", "--tokenizer", "none")
    assert "unknown family mamba; known: ml-pararnn, babylm" in refused(model, "--family", "mamba")


def test_a_layer_index_of_any_size_costs_nothing(refused, tmp_path):
    broken = apple_gru() | {"blocks.99999999999.norm.weight": np.zeros(4, np.float32)}
    assert "blocks.99999999999.norm.weight" in refused(write_pt(tmp_path / "m.pt", broken))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["final_norm.weight", "embedding.weight", "blocks.0.rnn_cell.A"])
def test_nan_and_inf_are_refused_unless_allowed(name, value, refused, accepted, tmp_path):
    broken = apple_gru()
    broken[name].reshape(-1)[1] = value
    path = write_pt(tmp_path / "m.pt", broken)
    message = refused(path)
    assert f"{name} holds NaN or infinite numbers" in message or name == "embedding.weight"
    assert "--allow-nonfinite" in message
    assert not all(
        np.isfinite(v).all()
        for v in weights(accepted(path, "--allow-nonfinite", "--tokenizer", "none")).values()
    )


def test_inf_before_a_clamp_and_in_bfloat16_is_found_too(refused, tmp_path):
    broken = torch_lm()
    broken["blocks.0.rnn.layers.0.R"][2, 1] = np.inf
    assert "layers.0.R holds NaN" in refused(write_pt(tmp_path / "m.pt", broken))
    bits = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in apple_gru().items()}
    bits["final_norm.weight"][0] = 0x7FC0
    assert "final_norm.weight holds NaN" in refused(write_pt(tmp_path / "b.pt", bits))


def test_an_inf_of_the_optimizer_is_nobodys_business(accepted, tmp_path):
    accepted(
        write_pt(
            tmp_path / "m.pt", {"model": apple_gru(), "optimizer": {"v": np.full(3, np.inf, np.float32)}}
        )
    )


@pytest.mark.parametrize("build", [apple_gru, babylm])
def test_tied_weights_that_differ(build, refused, accepted, tmp_path):
    model = build()
    embedding = "embedding.weight" if "embedding.weight" in model else "embed.weight"
    head = model[embedding].copy()
    same = write_pt(tmp_path / "same.pt", model | {"lm_head.weight": head})
    assert config(accepted(same))["tie_word_embeddings"] is True
    head = head.copy()
    head[0, 0] += 1
    path = write_pt(tmp_path / "differs.pt", model | {"lm_head.weight": head})
    message = refused(path)
    assert f"lm_head.weight and {embedding} are tied in this family but differ here" in message
    (tmp_path / "untied.json").write_text('{"tie_word_embeddings": false}')
    folder = accepted(path, "--config", tmp_path / "untied.json", "--tokenizer", "none")
    assert config(folder)["tie_word_embeddings"] is False
    assert np.array_equal(weights(folder)["lm_head.weight"], head)
    assert np.array_equal(weights(folder)["model.embed_tokens.weight"], model[embedding])


def test_untied_cannot_be_asked_for_without_a_head(refused, tmp_path):
    (tmp_path / "untied.json").write_text('{"tie_word_embeddings": false}')
    message = refused(write_pt(tmp_path / "m.pt", torch_lm()), "--config", tmp_path / "untied.json")
    assert "there is no lm_head.weight" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON object was expected"),
        ('{"hidden": 3, "cells": 1}', "unknown fields: hidden, cells; known: model_type, cell"),
        ('{"hidden_size": 5}', "--config says hidden_size is 5, but the tensors in"),
        ('{"vocab_size": 999}', "vocab_size is 999"),
        ('{"num_hidden_layers": 9}', "num_hidden_layers is 9"),
        ('{"intermediate_size": 7}', "intermediate_size is 7"),
        ('{"num_heads": 4}', "num_heads is 4"),
        ('{"cell": "lstm"}', "cell is 'lstm', but the tensors in"),
        ('{"model_type": "llama"}', "model_type 'llama'"),
        ('{"norm_eps": "small"}', "norm_eps cannot be 'small'"),
        ('{"mlp_residual": 1}', "mlp_residual cannot be 1"),
        ('{"eos_token_id": -1}', "eos_token_id cannot be -1"),
        ('{"eos_token_id": 256}', "outside the model's vocabulary of 256"),
    ],
)
def test_a_config_that_cannot_be_right(text, expected, refused, model, tmp_path):
    (tmp_path / "c.json").write_text(text)
    assert expected in refused(model, "--config", tmp_path / "c.json", "--tokenizer", "none")


def test_a_config_that_is_absent(refused, model, tmp_path):
    assert "no such file" in refused(model, "--config", tmp_path / "absent.json")


def test_config_fields_go_before_what_was_inferred(accepted, model, tmp_path):
    (tmp_path / "c.json").write_text(
        '{"norm_eps": 1e-5, "mlp_residual": true, "hidden_size": 4, "eos_token_id": [0, 7]}'
    )
    folder = accepted(model, "--config", tmp_path / "c.json", "--tokenizer", "bytes")
    assert {"norm_eps": 1e-5, "mlp_residual": True, "eos_token_id": [0, 7]}.items() <= config(folder).items()
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [0, 7]}


@pytest.mark.parametrize("name", ["R_head", "R_dense.weight", "A_z"])
def test_recurrent_matrices_that_mix_channels(name, refused, tmp_path):
    model = torch_lm() | {f"blocks.0.rnn.layers.0.{name}": np.zeros((4, 4), np.float32)}
    assert "only mix='diag'" in refused(write_pt(tmp_path / "m.pt", model))


def test_a_source_config_that_mixes_channels_or_is_broken(refused, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    save_file(torch_lm(), source / "model.safetensors")
    for text, expected in (
        ('{"mix": "head"}', "only mix='diag'"),
        ("{", "not valid JSON"),
        ('{"max_recurrent_norm": "x"}', "max_recurrent_norm must be"),
        ('{"rms_norm_eps": -1}', "rms_norm_eps must be"),
        ('{"model_type": "pararnn"}', "an MLX model already"),
        ('{"hidden_size": 8}', "config.json: it says hidden_size is 8, but the tensors in"),
        ('{"num_hidden_layers": 2}', "it says num_hidden_layers is 2, but the tensors in"),
        ('{"vocab_size": 1000}', "it says vocab_size is 1000, but the tensors in"),
    ):
        (source / "config.json").write_text(text)
        assert expected in refused(source)


def test_no_clamp_where_the_config_says_null(accepted, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    model = torch_lm()
    save_file(model, source / "model.safetensors")
    (source / "config.json").write_text('{"max_recurrent_norm": null, "rms_norm_eps": 1e-3}')
    folder = accepted(source)
    assert np.array_equal(
        weights(folder)["model.layers.0.mixer.cell.recurrent_weight"], model["blocks.0.rnn.layers.0.R"]
    )
    assert config(folder)["norm_eps"] == 1e-3


def header(content: object, data: bytes = b"\0" * 8) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: object) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x01", "cut short or damaged"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cut short or damaged"),
        (header(b"{"), "not valid JSON"),
        (header(b"[" * 100_000), "not valid JSON"),
        (header(b"[]"), "not a JSON object"),
        (header(b'{"w":{}, "w":{}}'), "not valid JSON"),
        (header(entry(dtype="F1")), "number format F1"),
        (header(entry(dtype=3)), "malformed"),
        (header(entry(shape=[-2])), "malformed"),
        (header(entry(shape=[True, 2])), "malformed"),
        (header(entry(shape=[3])), "shape and size of w disagree"),
        (header(entry(data_offsets=[8, 0])), "disagree"),
        (header(entry(data_offsets=[4, 12]), b"\0" * 12), "overlap or leave gaps"),
        (header(entry() | {"v": entry()["w"]}), "overlap or leave gaps"),
        (header(entry(), b"\0" * 4), "cut short"),
        (header(entry(), b"\0" * 12), "longer than its header says"),
        (header(entry() | {"__metadata__": {"a": 1}}), "metadata is not text"),
    ],
)
def test_a_malformed_safetensors_header(content, expected, refused, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(content)
    assert expected in refused(tmp_path / "m.safetensors")


def test_the_same_name_with_and_without_a_wrapper(refused, tmp_path):
    doubled = apple_gru() | {"module.final_norm.weight": np.zeros(4, np.float32)}
    assert "final_norm.weight is there twice" in refused(write_pt(tmp_path / "m.pt", doubled))


@pytest.mark.parametrize("build", [apple_gru, torch_lm, babylm])
def test_one_further_prefix_is_accepted(build, accepted, tmp_path):
    plain = accepted(write_pt(tmp_path / "plain.pt", build()))
    inner = {f"model.{name}" if name != "lm_head.weight" else name: value for name, value in build().items()}
    prefixed = accepted(write_pt(tmp_path / "prefixed.pt", inner))
    assert (plain / "model.safetensors").read_bytes() == (prefixed / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--unknown"],
        ["--dtype", "int4"],
        [],
        ["-q", "--q-bits", "7"],
        ["-q", "--q-mode", "gguf"],
        ["--q-bits", "4"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, model, tmp_path):
    out = [] if arguments == [] else ["-o", tmp_path / "out"]
    assert convert(model, *out, *arguments).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_installed_command_reports_in_one_line(tmp_path):
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "convert", "absent.pt", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "error: absent.pt: no such file or folder\n",
    )
