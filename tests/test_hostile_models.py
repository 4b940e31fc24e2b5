"""Small files that would take the machine, end the process or pass for others: one sentence."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.inspection import inspect
from mlx_pararnn.convert.readers.forms import PACKAGE_KINDS
from mlx_pararnn.loading import load_cell, load_states
from tests.support.demo import DEMO
from tests.support.memory import active_memory

MEMORY = 3 << 30  # bytes of data that a child may take


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def changed(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def refusal(folder) -> str:
    with pytest.raises(PararnnError) as error:
        mlx_pararnn.load(folder)
    return str(error.value)


LOAD_EACH = """
import sys, mlx_pararnn
for folder in sys.argv[1:]:
    try:
        mlx_pararnn.load(folder)
    except mlx_pararnn.PararnnError as error:
        print(error)
"""


def test_what_would_take_the_machine_or_end_the_process(tmp_path):
    """Without the checks 7 GB, a signal and 3 GB."""
    folders = [Path(shutil.copytree(DEMO, tmp_path / str(n))) for n in range(3)]
    changed(folders[0], num_hidden_layers=100_000)
    changed(folders[1], quantization={"group_size": 0, "bits": 4})
    (folders[2] / "config.json").write_text("[" + "[]," * 20_000_000 + "0]")

    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    command = [sys.executable, "-c", LOAD_EACH, *folders]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 0, (done.returncode, done.stderr)
    first, second, third = done.stdout.splitlines()
    assert "num_hidden_layers is 100000, and they have 3 layers" in first
    assert "quantization group_size is 0" in second
    assert "larger than any model's" in third


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": {"group_size": 0, "bits": 4}}, "quantization group_size is 0"),
        ({"quantization": {"group_size": 64, "bits": 0}}, "quantization bits is 0"),
        ({"quantization": {"group_size": 16, "bits": 4}}, "quantization group_size is 16"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "nvfp4"}}, "quantization group_size is 64"),
        ({"quantization": {"group_size": 64, "bits": 4, "lm_head": {"group_size": -1}}}, "group_size is -1"),
        ({"quantization": 7}, "quantization group_size is 7"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, and they have 3 layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "packed as 'awq' does it"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "packed as 'gptq' does it"),
        ({"hidden_size": 2**30}, "do not fit its config.json"),
        ({"hidden_size": 2**40}, f"hidden_size is {2**40}; it must be a whole number"),
        ({"vocab_size": 2**200}, "and at most 2147483647"),
        ({"norm_eps": 2**2000}, "norm_eps is 1148130695"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"eos_token_id": -1}, "eos_token_id holds -1"),
        ({"eos_token_id": [0, 2**70]}, f"eos_token_id holds {2**70}"),
        ({"eos_token_id": "end"}, "eos_token_id holds 'end'"),
    ],
)
def test_configs(fields, said, folder):
    assert said in refusal(changed(folder, **fields))


@pytest.mark.parametrize("end", [-1, 2**70])
def test_end_ids_of_a_generation_config(end, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert f"generation_config.json: eos_token_id holds {end}" in refusal(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("text", ["null", "5", "[" * 100_000, "[" + "[]," * 1_500_000 + "0]", None])
def test_configs_that_mlx_lm_reads_of_its_own_accord(name, text, folder):
    (folder / name).unlink(missing_ok=True)
    if text is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_text(text)
    said = refusal(folder)
    assert said.startswith(f"{folder / name} ")
    assert len(said) < 500


@pytest.mark.parametrize("text", ["", "[", "{'a': 1}"])
def test_a_generation_config_that_is_no_json_is_passed_over_as_by_mlx_lm(text, folder):
    (folder / "generation_config.json").write_text(text)
    mlx_pararnn.load(folder)


def test_weights_packed_by_another_program(folder):
    (folder / "hf_quant_config.json").write_text('{"quant_method": "awq"}')
    assert "hf_quant_config.json: the weights are packed as 'awq' does it" in refusal(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="a file that fails to be read")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_cannot_be_read(name, folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")
    assert f"{name} cannot be read (Input/output error)" in refusal(folder)


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 100_000}, {"eos_token_id": -1}, {"conv_kernel": 2**31}]
)
def test_inspect_believes_no_config_that_load_does_not(fields, folder):
    said = refusal(changed(folder, **fields))
    with pytest.raises(PararnnError, match=re.escape(said)):
        inspect(folder)


def with_a_large_header(path):
    """A sound safetensors file of 280,000 tensors without numbers; safetensors takes six times as many."""
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % n for n in range(280_000)) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("where", ["model", "cell", "adapters", "conversation", "states"])
def test_headers_that_unfold(where, folder, tmp_path):
    chat = Chat(*mlx_pararnn.load(DEMO)) if where == "conversation" else None
    name = "adapters.safetensors" if where == "adapters" else "model.safetensors"
    with_a_large_header(folder / name)
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    changed(folder, model_type="pararnn_cell" if where == "cell" else "pararnn")
    read = {
        "model": lambda: mlx_pararnn.load(folder),
        "cell": lambda: load_cell(folder),
        "adapters": lambda: mlx_pararnn.load_model(DEMO, adapter_path=folder),
        "conversation": lambda: chat.load(folder / name),
        "states": lambda: load_states(mlx_pararnn.load_model(DEMO)[0], folder / name),
    }
    with pytest.raises(PararnnError, match=rf"{name} cannot be read: its header is larger than any model's"):
        read[where]()


NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "merges.txt",
)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", *NAMES])
def test_a_pipe(name, folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "not a regular file" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "not a regular file" in refusal(folder)


@pytest.mark.parametrize("kind", PACKAGE_KINDS, ids=lambda kind: kind.title)
@pytest.mark.parametrize("name", ["reference.safetensors", "PACKAGE/Data/weights/weight.bin"])
def test_a_pipe_in_a_package(kind, name, tmp_path):
    place = tmp_path / name.replace("PACKAGE", kind.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "pararnn.json").write_text(json.dumps({"format": kind.format}))
    os.mkfifo(place)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"{place} cannot be read: not a regular file" in result.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_what_git_and_the_hubs_cache_leave_of_a_file(name, folder):
    (folder / name).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    assert f"{name} is a Git LFS pointer, not the file itself; run: git lfs pull" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/0")
    assert f"{name} is a link to a file that is not there" in refusal(folder)


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.complex64])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_floating_point_numbers(dtype, name, folder):
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    mx.save_safetensors(str(file), {**weights, name: weights[name].astype(dtype)})
    assert f"{name} holds " in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_json_that_unfolds(name, folder):
    (folder / name).write_text("[" + "[]," * 1_500_000 + "0]")
    assert f"{name} cannot be read: larger than any model's" in refusal(folder)


def test_a_chat_template_that_unfolds(folder):
    (folder / "chat_template.jinja").write_text("{{a}}" * 100_000)
    assert "the chat template in" in refusal(folder)
    (folder / "chat_template.jinja").write_text("{{a}}" * 1000)
    mlx_pararnn.load(folder)


LORA = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 2**30, "scale": 1, "dropout": 0},
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (json.dumps(LORA), "its adapters are not whole (model.layers."),  # some TB, if they were made
        (
            json.dumps({**LORA, "fine_tune_type": "full"}),
            "its adapters are not whole (every weight is missing)",
        ),
        ("[" + "[]," * 1_500_000 + "0]", "adapter_config.json cannot be read: larger than any model's"),
        ("5", "adapter_config.json is not a JSON object"),
    ],
)
def test_adapters_that_unfold(config, said, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {})
    with pytest.raises(PararnnError, match=re.escape(said)):
        mlx_pararnn.load_model(DEMO, adapter_path=tmp_path)


def test_a_folder_whose_name_is_not_utf8(folder):
    other = folder.with_name(os.fsdecode(b"model\xff"))
    try:
        folder.rename(other)
    except OSError:  # macOS has no such names
        return
    assert refusal(other).endswith("a name that is not UTF-8, and MLX loads nothing from there; rename it")


def saved(tmp_path):
    chat = Chat(*mlx_pararnn.load(DEMO))
    list(chat.respond("def main(", max_tokens=3))
    return chat, chat.save(tmp_path / "state")


def rewritten(path, change):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    arrays = load_file(path)
    change(arrays, metadata)
    save_file(arrays, path, metadata)


@pytest.mark.sampled("large", by=lambda where, key: [where, len(key) > 20])
@pytest.mark.parametrize("where", ["arrays", "metadata"])
@pytest.mark.parametrize("key", ["3000000000", "0.99999999", "0." * 200 + "0", "1.2." + "9" * 5000])
def test_keys_of_a_saved_state_that_unfold(where, key, tmp_path):
    chat, path = saved(tmp_path)

    def change(arrays, metadata):
        if where == "arrays":
            arrays[key] = np.zeros(1, np.float32)
        else:
            metadata[key] = "0"

    rewritten(path, change)
    before = active_memory()
    messages, tokens = list(chat.messages), chat.tokens
    with pytest.raises(PararnnError, match=r"state\.safetensors is not a"):
        chat.load(path)
    assert (chat.messages, chat.tokens) == (messages, tokens)
    assert active_memory() < before + (1 << 20)


def test_damaged_states_leave_the_conversation(tmp_path):
    """Bytes of the header and of the numbers, one at a time."""
    chat, path = saved(tmp_path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    messages, tokens = list(chat.messages), chat.tokens
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, 2500 if rng.random() < 0.9 else len(whole), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged[: len(damaged) if rng.random() < 0.9 else rng.integers(0, len(damaged))])
        said = "state.safetensors"
        try:
            chat.load(path)
        except PararnnError as error:
            said, refused = str(error), refused + 1
        else:
            path.write_bytes(whole)
            chat.load(path)
        assert "state.safetensors" in said
        assert (chat.messages, chat.tokens) == (messages, tokens)
    assert refused > 100
    assert "".join(r.text for r in chat.respond("x", max_tokens=3))
