"""`mlx-pararnn lm COMMAND` runs MLX-LM's real command: quantizing with dwq, measuring on local data."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn.cli.app import app
from mlx_pararnn.cli.lm import names_a_model
from tests.support.demo import DEMO
from tests.support.golden import DATA

mx = pytest.importorskip("mlx.core")

# Shorter than what the commands cut them to; and the demo's tokenizer has no token to end them with.
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(24)]

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="MLX-LM reads data with the datasets package"
)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="mlx_lm.evaluate needs the lm-eval package"
)


@pytest.fixture
def lm(tmp_path, monkeypatch):
    """A function that runs a command in a folder of its own, with no network, and gives what it printed."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "mlx_pararnn.cli.app", "lm", *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.mark.large
@pytest.mark.parametrize(("bits", "group_size", "mode"), [(3, 32, "affine"), (4, 32, "mxfp4")])
def test_convert_quantizes_as_our_convert_does(bits, group_size, mode, lm, converted, tmp_path):
    plain = converted("trained/paragru/final.pt", tokenizer="bytes")
    options = {"q_bits": bits, "q_group_size": group_size, "q_mode": mode}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    lm("convert", "--hf-path", plain, "--mlx-path", "theirs", "-q", *flags)
    theirs = mx.load(str(tmp_path / "theirs" / "model.safetensors"))
    ours = mx.load(str(converted("trained/paragru/final.pt", quantize=True, **options) / "model.safetensors"))
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype, name
        assert mx.array_equal(theirs[name], value), name


@pytest.mark.large
def test_convert_leaves_float_what_the_group_size_does_not_divide(lm, tmp_path):
    """MLX-LM's rule; `mlx-pararnn convert -q` takes smaller groups there."""
    lm("convert", "--hf-path", DEMO, "--mlx-path", "out", "-q", "--q-group-size", 64)
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    packed = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    assert {name.split(".")[-1] for name in packed} == {
        "embed_tokens", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    model, tokenizer = mlx_pararnn.load(tmp_path / "out")
    assert len(mlx_pararnn.generate(model, tokenizer, "def main(", max_tokens=5)) == 5


@pytest.mark.large
@needs_datasets
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_dequantized_model_loads_and_gives_the_same_text(mode, lm, converted, tmp_path):
    packed = converted("trained/paragru/final.pt", tokenizer="bytes", quantize=True, q_mode=mode)
    lm("convert", "--hf-path", packed, "--mlx-path", "plain", "-d")
    model, config = mlx_pararnn.load_model(tmp_path / "plain")
    assert "quantization" not in config
    tokens = mx.array([list(b"def f(x):")])
    wanted = mlx_pararnn.load_model(packed)[0](tokens)
    assert mx.allclose(model(tokens), wanted, atol=1e-3 * mx.abs(wanted).max().item()).item()


@needs_datasets
@pytest.mark.large
def test_dwq_on_a_local_folder(lm, texts, tmp_path):
    """The packed numbers stay; their scales and biases are learned, and all that is not packed."""
    lm("convert", "--hf-path", DEMO, "--mlx-path", "before", "-q", "--q-bits", 2, "--q-group-size", 32)
    lm(
        "dwq", "--model", DEMO, "--quantized-model", "before", "--mlx-path", "after", "--data-path", texts,
        "--num-samples", 4, "--max-seq-length", 33, "--batch-size", 4, "--learning-rate", 1e-2,
    )  # fmt: skip
    before, after = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("before", "after"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.dtype == mx.uint32:
            assert mx.array_equal(after[name], value), name
        else:
            assert after[name].dtype == mx.bfloat16, name
            assert not mx.array_equal(after[name], value.astype(mx.bfloat16)), name
    model, tokenizer = mlx_pararnn.load(tmp_path / "after")
    assert mlx_pararnn.generate(model, tokenizer, "def main(", max_tokens=5)


@pytest.mark.large
@needs_datasets
def test_perplexity_is_that_of_the_texts_bytes(lm, texts, converted):
    folder = converted("trained/paragru/final.pt", tokenizer="bytes")  # float32, unlike the demo
    out = lm(
        "perplexity", "--model", folder, "--data-path", texts, "--sequence-length", 32, "--num-samples", 16,
        "--batch-size", 4,
    )  # fmt: skip
    printed = float(re.search(r"Perplexity: ([\d.]+)", out)[1])
    np.random.seed(123)
    order = np.random.permutation(len(TEXTS))
    data = np.frombuffer("".join(TEXTS[i] for i in order).encode(), np.uint8)[: 16 * 32].reshape(16, 32)
    model, _ = mlx_pararnn.load(folder)
    logits = model(mx.array(data[:, :-1].astype(np.int32)))
    chosen = mx.take_along_axis(logits, mx.array(data[:, 1:, None].astype(np.int32)), axis=-1)[..., 0]
    loss = (mx.logsumexp(logits, axis=-1) - chosen).mean().item()
    assert printed == pytest.approx(math.exp(loss), abs=1e-3)


@pytest.mark.large
@pytest.mark.parametrize("batch", [1, 3])
def test_benchmark(batch, lm):
    out = lm("benchmark", "--model", DEMO, "-p", 20, "-g", 6, "-n", 1, "-b", batch)
    assert re.search(r"Averages: prompt_tps=\d+.*generation_tps=\d+", out)


@needs_lm_eval
def test_evaluate_on_a_task_of_ones_own(lm, tmp_path):
    shutil.copytree(DATA / "task", tmp_path, dirs_exist_ok=True)
    lm("evaluate", "--model", DEMO, "--tasks", "lines.yaml", "--output-dir", "results")
    (results,) = (tmp_path / "results").iterdir()
    assert json.loads(results.read_text())["lines"]["acc,none"] == 1.0


@pytest.mark.large
def test_no_warning_of_our_model_type(tmp_path):
    result = subprocess.run(
        [*(sys.executable, "-m", "mlx_pararnn.cli.app", "lm", "generate", "--model", str(DEMO)),
         *("--prompt", "def main(", "--max-tokens", "2")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "pararnn" not in result.stderr


@pytest.mark.parametrize("command", ["awq", "benchmark", "chat", "dynamic_quant", "generate", "gptq"])
def test_a_model_is_asked_for_where_mlx_lm_would_download_one(command):
    for args in (["--prompt", "x"], ["--prompt=x", "--max-tokens", "3"]):
        result = CliRunner().invoke(app, ["lm", command, *args])
        assert result.exit_code == 2
        assert f"give lm {command} a --model" in result.output


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("generate", ["--model=x"]),
        ("generate", ["--prompt-cache-file", "x"]),
        ("generate", ["--prompt-c=x", "--prompt", "x"]),
        ("awq", ["-mx"]),
        ("gptq", ["-m", "x"]),
        ("chat", ["-h"]),
        ("chat", ["--help"]),
    ],
)
def test_a_model_that_is_named_is_not_asked_for(command, args):
    assert names_a_model(command, args)


@pytest.mark.parametrize(
    "option", [["--draft-model=y"], ["--draft-model", "y"], ["--draft", "y"], ["--dr=y"]]
)
def test_a_server_with_a_draft_is_refused(option):
    result = CliRunner().invoke(app, ["lm", "server", "--model", "x", *option])
    assert result.exit_code == 2
    assert "takes no --draft-model" in result.output


def train(texts, folder, *options):
    """`lm lora --train`, two steps: its exit code, and what it said on stderr."""
    (texts / "valid.jsonl").write_text((texts / "train.jsonl").read_text())
    command = [
        sys.executable, "-m", "mlx_pararnn", "lm", "lora", "--train", "--model", folder, "--data", texts,
        "--fine-tune-type", "full", "--num-layers", 3, "--batch-size", 2, "--iters", 2,
        "--steps-per-report", 1, "--adapter-path", texts.parent / "adapters", *options,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=texts.parent)
    return done.returncode, done.stderr


@pytest.mark.large
@needs_datasets
def test_full_fine_tuning_of_float16_weights_is_refused(lm, texts, tmp_path):
    """Left to itself the second loss is NaN; the bfloat16 copy that the sentence names trains."""
    code, said = train(texts, DEMO)
    assert code == 1
    assert "float16 weights, which full fine-tuning turns into NaN" in said
    assert "Traceback" not in said
    assert not (tmp_path / "adapters").exists()
    lm("convert", "--hf-path", DEMO, "--mlx-path", "copy", "--dtype", "bfloat16")
    code, said = train(texts, tmp_path / "copy")
    assert code == 0, said
    trained = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert all(mx.isfinite(value).all().item() for value in trained.values())


@pytest.mark.large
@needs_datasets
def test_a_loss_that_is_no_number_ends_training(texts, converted, tmp_path):
    folder = shutil.copytree(converted("trained/paragru/final.pt", tokenizer="bytes"), tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    name = next(name for name in weights if name.endswith("norm.weight"))
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, name: weights[name] * math.nan})
    code, said = train(texts, folder)
    assert code == 1
    assert "the validation loss is nan at iteration 0, so training has stopped" in said
    assert "Traceback" not in said
    assert not (tmp_path / "adapters" / "adapters.safetensors").exists()


@pytest.mark.large
@needs_datasets
def test_a_training_loss_that_becomes_nan_ends_training(texts, converted):
    folder = converted("trained/paragru/final.pt", tokenizer="bytes")
    code, said = train(texts, folder, "--learning-rate", "1e38", "--optimizer", "sgd", "--iters", 6)
    assert code == 1
    assert "at iteration" in said
    assert "Traceback" not in said


@pytest.mark.large
@pytest.mark.parametrize("command", [["convert", "--hf-path"], ["generate", "--model"]])
def test_a_model_without_a_tokenizer_is_one_sentence(command, converted, tmp_path):
    model = converted("trained/paragru/final.pt", tokenizer="none")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pararnn.cli.app", "lm", *command, str(model)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"error: no tokenizer in {model}; mlx-pararnn add-tokenizer" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.large
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "no/such/folder"], "no such model folder: no/such/folder; give one that"),
        (["convert", "--hf-path=nowhere"], "no such model folder: nowhere; give one that"),
        (["chat", "--model", "model/config.json"], "model/config.json is a file, not a model folder"),
        (["generate", "--model", "model", "--adapter-path", "none"], "none: no such folder of adapters"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_mlx_lm_cannot_use_is_one_sentence(arguments, said, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")

    def run(*more):
        return subprocess.run(
            [sys.executable, "-m", "mlx_pararnn.cli.app", "lm", *arguments, *more],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip

    done = run()
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" in run("--debug").stderr
