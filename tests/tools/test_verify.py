"""`verify`, `doctor` and `lm` as a user has them."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.cli.app import app
from mlx_pararnn.compute import gpu
from mlx_pararnn.convert.original import source_logits
from mlx_pararnn.tools.quantization_cost import bundled_tokens, model_logits, quantization_cost
from tests.support.demo import DEMO
from tests.support.golden import golden_file


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "mlx_pararnn.cli.app", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


@pytest.fixture
def exported(data, tmp_path):
    """Golden logits in a file as a user would export it."""
    golden = mx.load(str(data / "trained/paragru/golden.safetensors"))
    file = tmp_path / "reference.safetensors"
    mx.save_safetensors(str(file), {k: golden[k] for k in ("input_ids", "logits")})
    return file


def test_a_matrix_of_zeros_is_no_weight(converted, tmp_path):
    """A copy that was cut short can have its length: what was not written is zero."""
    folder = shutil.copytree(converted("trained/paragru/final.pt", tokenizer="bytes"), tmp_path / "zeroed")
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    mx.save_safetensors(str(file), {**weights, name: mx.zeros_like(weights[name])})
    result = run("verify", folder)
    assert result.exit_code == 1
    assert f"matrices: {name}" in result.stdout


@pytest.mark.parametrize("quantize", [False, pytest.param(True, marks=pytest.mark.large)])
@pytest.mark.parametrize("noted", [True, False])
def test_a_page_of_zeros_in_the_weights(converted, tmp_path, noted, quantize):
    """Its SHA-256 tells a file that convert wrote; of others, as MLX-LM's, a stretch of zeros is seen."""
    options = {"quantize": True, "q_group_size": 32} if quantize else {}
    folder = shutil.copytree(
        converted("trained/paragru/final.pt", tokenizer="bytes", **options), tmp_path / "model"
    )
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    if not noted:
        mx.save_safetensors(str(file), weights)
    assert run("verify", folder).exit_code == 0
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    with open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(length))[name]["data_offsets"]
        opened.seek(8 + length + begin + 1000)
        opened.write(bytes(min(4096, end - begin - 1000)))
    result = run("verify", folder)
    assert result.exit_code == 1
    if noted:
        assert f"{file}: its weights are not those that were written there; copy" in result.stderr
    else:
        assert f"matrices: {name}" in result.stdout
    with open(file, "r+b") as opened:  # one bit elsewhere
        opened.seek(-1, 2)
        last = opened.read(1)[0]
        opened.seek(-1, 2)
        opened.write(bytes([last ^ 1]))
    assert run("verify", folder).exit_code == 1


def test_zeros_of_the_checkpoint_itself_are_no_damage(tmp_path):
    """Pruned rows, tokens that never came."""
    torch = pytest.importorskip("torch")
    content = torch.load(golden_file("trained/paragru/final.pt"), weights_only=False)
    state = content["model_state_dict"]
    state["blocks.1.1.w1.weight"][:8] = 0
    state["embedding.weight"][-8:] = 0
    torch.save(state, tmp_path / "pruned.pt")
    done = run("convert", tmp_path / "pruned.pt", "-o", tmp_path / "model", "--tokenizer", "bytes")
    assert done.exit_code == 0, done.output
    result = run("verify", tmp_path / "model")
    assert result.exit_code == 0, result.output


def test_a_good_model_passes(converted, exported):
    folder = converted("trained/paragru/final.pt", tokenizer="bytes")
    result = run("verify", folder, "--logits", exported)
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("Same numbers.")
    against = run("verify", folder, "--against", golden_file("trained/paragru/final.pt"))
    assert [line for line in against.stdout.splitlines() if len(line) > 79] == []
    assert "44 tensors as in the source" in against.stdout
    checks = json.loads(run("verify", folder, "--logits", exported, "--json").stdout)
    assert checks["passed"] is True
    assert [c["name"] for c in checks["checks"]] == [
        "Newton against sequential",
        f"{gpu.available_backend() or 'cpu'} against ops",
        "token by token against at once",
        "logits of reference.safetensors",
    ]
    assert all(c["difference"] <= 5e-5 for c in checks["checks"])


def test_npz_and_single_sequences_are_taken_too(converted, exported, tmp_path):
    folder = converted("trained/paragru/final.pt")
    arrays = {k: np.array(v)[0] for k, v in mx.load(str(exported)).items()}
    np.savez(tmp_path / "one.npz", **arrays)
    assert run("verify", folder, "--logits", tmp_path / "one.npz").exit_code == 0


@pytest.mark.parametrize("source", ["pararnn_torch/babylm_paralstm", "pararnn_torch/paraslstm_causal_lm_0"])
def test_models_without_tokenizer_or_with_few_positions(converted, source):
    result = run("verify", converted(source))
    assert result.exit_code == 0, result.output


def test_a_damaged_model_fails(converted, exported, tmp_path):
    folder = shutil.copytree(converted("trained/paragru/final.pt"), tmp_path / "damaged")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.1.mixer.cell.recurrent_weight"] *= 1.001
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    result = run("verify", folder, "--logits", exported)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert result.stdout.rstrip().endswith("The numbers differ by more than rounding.")


def test_not_a_number_is_no_pass(converted, tmp_path):
    folder = shutil.copytree(converted("trained/paragru/final.pt"), tmp_path / "nan")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] *= float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert run("verify", folder).exit_code == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "no such file; docs/converting.md shows how to export logits"),
        (lambda f: f.write_text("x"), "is no .safetensors or .npz file with input_ids and logits"),
        (lambda f: save(f, logits=mx.zeros((1, 3, 256))), "is no .safetensors or .npz file with input_ids"),
        (lambda f: save(f, [[1, 2, 3]], mx.zeros((1, 3, 255))), "do not fit; the model gives (1, 3, 256)"),
        (lambda f: save(f, [[1, 2, 256]], mx.zeros((1, 3, 256))), "beyond the model's vocabulary of 256"),
    ],
)
def test_wrong_logits_files(tmp_path, make, message):
    file = tmp_path / "x.safetensors"
    make(file)
    result = run("verify", DEMO, "--logits", file)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def save(file, ids=None, logits=None):
    arrays = {"logits": logits} if ids is None else {"logits": logits, "input_ids": mx.array(ids)}
    mx.save_safetensors(str(file), arrays)


def test_too_short_a_prompt():
    result = run("verify", "-p", "x")
    assert result.exit_code == 1
    assert "at least two tokens" in result.stderr


@pytest.mark.large
def test_a_quantized_model_is_told_what_that_cost(data, tmp_path, exported):
    """By convert, which notes it, and by verify: from the note, or against the original."""
    source, out = data / "trained/paragru/final.pt", tmp_path / "q"
    done = run("convert", source, "-o", out, "--tokenizer", "bytes", "-q")
    assert done.exit_code == 0, done.output
    cost = next(line for line in done.stdout.splitlines() if line.startswith("its cost on a bundled text: "))
    found = re.fullmatch(
        r".*perplexity (\S+) instead of (\S+) \(\S+ %\), KL divergence (\S+) nats a token, (\d+) of 511 .*",
        cost,
    )
    quantized, original, kl, same = map(float, found.groups())
    assert original < quantized < 1.1 * original
    assert 0.001 < kl < 0.1
    assert 400 < same < 511
    assert json.loads((out / "config.json").read_text())["quantization_cost"]["same"] == same

    plain = run("verify", out, "--logits", exported)
    assert plain.exit_code == 0, plain.output
    assert cost.removeprefix("its cost ") in plain.stdout.splitlines()[-1]
    assert "FAIL" not in plain.stdout
    assert "Same numbers" not in plain.stdout
    assert re.search(
        r"logits of reference.safetensors +\S+ +any +told .* KL divergence \S+ nats", plain.stdout
    )

    against = run("verify", out, "--against", source)
    assert against.exit_code == 0, against.output
    assert "19 tensors against the source, quantized again  none        none     ok" in against.stdout
    assert "25 tensors as in the source                     none        none     ok" in against.stdout
    assert cost.removeprefix("its cost ") in against.stdout.splitlines()[-1]
    looked_at = run("inspect", out).stdout
    assert re.search(f"what that cost +{re.escape(cost.removeprefix('its cost '))}", looked_at)
    assert "{" not in looked_at


@pytest.mark.large
def test_the_cost_of_a_model_that_mlx_lm_quantized(converted):
    """Nobody noted it: the model that is not quantized tells."""
    model = converted("trained/paragru/final.pt", tokenizer="bytes")
    out = converted("trained/paragru/final.pt", tokenizer="bytes", quantize=True)
    assert run("verify", out).stdout.endswith("Quantized; --against the original tells what that cost.\n")
    said = json.loads(run("verify", out, "--against", model, "--json").stdout)
    assert said["passed"]
    assert 0.001 < said["quantization_cost"]["kl"] < 0.1
    refused = run("verify", out, "--against", out)
    assert refused.exit_code == 1
    assert "is quantized too" in refused.stderr


@pytest.mark.large
def test_one_weight_that_differs_from_a_model_folder_is_seen(converted, tmp_path):
    """Of a recurrent weight, which is not quantized, and of one that is, which may have been fitted since."""
    model = converted("trained/paragru/final.pt", tokenizer="bytes")
    out = converted("trained/paragru/final.pt", tokenizer="bytes", quantize=True)
    assert "44 tensors as in the source" in run("verify", model, "--against", model).stdout
    for name, of_quantized in (
        ("model.layers.0.mixer.cell.recurrent_weight", r"25 tensors as in the source +1 numbers +none +FAIL"),
        (
            "model.layers.0.mixer.in_proj.weight",
            r"19 tensors against the source, quantized again +\d+ numbers +any +told",
        ),
    ):
        wrong = tmp_path / name
        shutil.copytree(model, wrong)
        tensors = mx.load(str(wrong / "model.safetensors"))
        assert name in tensors
        first = mx.arange(tensors[name].size).reshape(tensors[name].shape) == 0
        tensors[name] = tensors[name] + first
        mx.save_safetensors(str(wrong / "model.safetensors"), tensors, {"format": "mlx"})
        found = run("verify", model, "--against", wrong)
        assert found.exit_code == 1, found.output
        assert re.search(r"44 tensors as in the source +1 numbers +none +FAIL", found.stdout), found.stdout
        found = run("verify", out, "--against", wrong)
        assert found.exit_code == ("FAIL" in of_quantized), found.output
        assert re.search(of_quantized, found.stdout), found.stdout


def test_the_same_model_has_no_divergence():
    model, config = mlx_pararnn.load_model(DEMO)

    def cost(folder):
        tokens, is_text = bundled_tokens(folder, model.args, config)
        ours, theirs = (model_logits(mlx_pararnn.load_model(DEMO)[0], tokens[:-1]) for _ in range(2))
        return quantization_cost(ours, np.concatenate([*map(np.array, theirs)]), tokens, is_text)

    of_text = cost(DEMO)
    assert (of_text.kl, of_text.same) == (0, of_text.tokens)
    assert of_text.perplexity == of_text.original_perplexity > 1
    with_ids = cost(Path("nowhere"))
    assert with_ids.perplexity is None
    assert "no tokenizer" in with_ids.sentence()


@pytest.mark.parametrize(
    "checkpoint",
    ["lm/paralstm_s96/state_dict.pt", "pararnn_torch/babylm_paragru", "pararnn_torch/paraslstm_causal_lm_0"],
)
def test_logits_a_layer_at_a_time_are_the_models(checkpoint, converted, data):
    """Of a checkpoint as of a folder: norms of both kinds, learned positions, heads tied or not."""
    folder = converted(checkpoint)
    model, _ = mlx_pararnn.load_model(folder)
    tokens = [byte % model.args.vocab_size for byte in b"a layer at a time"]
    whole = np.array(model(mx.array([tokens]))[0])
    ours = np.concatenate([*model_logits(mlx_pararnn.load_model(folder, lazy=True)[0], tokens)])
    theirs = source_logits(model.args, golden_file(checkpoint), None, tokens)
    allowed = 1e-5 * np.abs(whole).max()
    np.testing.assert_allclose(ours, whole, rtol=0, atol=allowed)
    np.testing.assert_allclose(theirs, whole, rtol=0, atol=allowed)


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0
    for item in (
        "mlx-pararnn",
        "device",
        "BLAS",
        "matrix product",
        "TF32",
        "compiler",
        "backend metal",
        "model cache",
    ):
        assert item in result.stdout
    findings = {f["item"]: f for f in json.loads(run("doctor", "--json").stdout)}
    assert findings["mlx"]["value"] == mx.__version__
    assert findings["TF32"]["value"] == "off"  # tests/conftest.py


def test_doctor_gives_advice(tmp_path):
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    result = command("doctor", env=environment)
    assert "-> MLX_ENABLE_TF32=0 for float32 parity" in result.stdout
    if sys.platform == "linux":
        assert "no g++: MLX cannot fuse elementwise work\n" in result.stdout
        assert "-> install one, for example: apt install g++" in result.stdout


@pytest.mark.large
def test_lm_generate():
    result = command("lm", "generate", "--model", DEMO, "--prompt", "def main(", "--max-tokens", "12")
    assert result.returncode == 0, result.stderr
    assert "self, other)" in result.stdout


@pytest.mark.large
def test_lm_help_is_mlx_lms():
    result = command("lm", "generate", "--help")
    assert result.returncode == 0
    assert "LLM inference script" in result.stdout


@pytest.mark.large
def test_lm_chat():
    result = command("lm", "chat", "--model", DEMO, "--max-tokens", "11", input="q\n")
    assert result.returncode == 0, result.stderr


@pytest.mark.large
def test_lm_server():
    """MLX-LM's server answers a completion, and the same as `generate` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlx_pararnn.cli.app",
            "lm",
            "server",
            "--model",
            str(DEMO),
            "--port",
            str(port),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        body = json.dumps({"prompt": "def main(", "max_tokens": 11, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = json.load(answer)["choices"][0]["text"]
                break
            except OSError:
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.5)
        assert text == "self, other"
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.mark.large
def test_lm_prompt_caches(tmp_path):
    cache = tmp_path / "cache.safetensors"
    made = command(
        "lm", "cache_prompt", "--model", DEMO, "--prompt", "def main(", "--prompt-cache-file", cache
    )
    assert made.returncode == 0, made.stderr
    used = command(
        "lm",
        "generate",
        "--model",
        DEMO,
        "--prompt-cache-file",
        cache,
        "--prompt",
        "self",
        "--max-tokens",
        "8",
    )
    assert used.returncode == 0, used.stderr
    assert ", other)" in used.stdout


@pytest.mark.large
def test_lm_convert(tmp_path):
    """MLX-LM's own conversion: a new dtype, with the recurrent weights left in float32."""
    result = command(
        "lm", "convert", "--hf-path", DEMO, "--mlx-path", tmp_path / "out", "--dtype", "bfloat16"
    )
    assert result.returncode == 0, result.stderr
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, weight in weights.items():
        assert weight.dtype == (mx.float32 if name.endswith("recurrent_weight") else mx.bfloat16), name
    model, tokenizer = mlx_pararnn.load(tmp_path / "out")
    assert len(mlx_pararnn.generate(model, tokenizer, "def main(", max_tokens=5)) == 5


@pytest.mark.large
def test_lm_quantizes(tmp_path):
    out = tmp_path / "out"
    result = command(
        "lm", "convert", "--hf-path", DEMO, "--mlx-path", out, "-q", "--q-bits", "8", "--q-group-size", "32"
    )
    assert result.returncode == 0, result.stderr
    names = set(mx.load(str(out / "model.safetensors")))
    assert "model.layers.0.mixer.cell.input_proj.scales" in names
    assert "model.layers.0.mixer.conv1d.scales" not in names
    assert run("verify", out).exit_code == 0
    model, tokenizer = mlx_pararnn.load(out)
    assert mlx_pararnn.generate(model, tokenizer, "def main(", max_tokens=11) == "self, other"


@pytest.mark.large
def test_lm_lora(tmp_path):
    """A few steps of MLX-LM's fine-tuning on local data; it wants a tokenizer with an end-of-text token."""
    pytest.importorskip("datasets", reason="mlx_lm.lora needs the datasets package")
    model = shutil.copytree(DEMO, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "~"}))
    for split in ("train", "valid"):
        lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    result = command(
        "lm", "lora", "--model", model, "--train", "--data", tmp_path, "--iters", "3", "--batch-size", "2",
        "--num-layers", "2", "--adapter-path", tmp_path / "adapters", "--max-seq-length", "64",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_lm_refuses_what_mlx_lm_does_not_have():
    result = run("lm", "nothing")
    assert result.exit_code == 2
    assert "no MLX-LM command 'nothing'; one of: awq, benchmark" in result.stderr
