"""`mlx-pararnn train`, from the command line: whole runs, interrupted ones, and wrong usage."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.loading import load
from mlx_pararnn.training import run as runs
from mlx_pararnn.training.reporting import read_log
from mlx_pararnn.training.settings import Plan, Settings
from tests.support.training_runs import SMALL, TEXT, losses, same

COMMAND = [sys.executable, "-m", "mlx_pararnn", "train"]
SETTINGS = {"steps": 12, "batch_size": 2, "length": 32, "warmup": 2, "report_every": 1, "eval_every": 4} | {
    "save_every": 3,
    "sample_every": 5,
    "sample_tokens": 8,
    "ema": 0.9,
    "model": SMALL,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def config(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(json.dumps(SETTINGS | changes))  # JSON is YAML too
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture
def handlers():
    """The command takes Ctrl-C for itself."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_run_from_scratch_leaves_a_model(text, tmp_path):
    out = tmp_path / "out"
    options = ["--cell", "lstm", "--tokenizer", "bpe:300", "--import", "json"]
    done = run(text, "-o", out, "--config", config(tmp_path), *options)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.endswith(f"done; try it with: mlx-pararnn generate {out} --import json\n")
    assert done.stdout == ""
    for words in ("12 steps of 2 x 32 tokens", "step 12/12  loss", "tokens/s", "held-out loss", "sample:"):
        assert words in done.stderr
    log = read_log(out)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in log if "valid_loss" in line] == [4, 8, 12]
    assert [line["step"] for line in log if "sample" in line] == [5, 10]
    assert {"learning_rate", "gradient_norm", "tokens", "tokens_per_second", "peak_memory"} <= set(log[0])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load(out)
    assert (model.args.cell, model.args.vocab_size, model.args.hidden_size) == ("lstm", 300, 16)
    assert tokenizer.eos_token_id == json.loads((out / "config.json").read_text())["eos_token_id"]
    generated = CliRunner().invoke(app, ["generate", str(out), "-p", "import", "--max-tokens", "4", "--json"])
    assert generated.exit_code == 0, generated.stderr
    card = (out / "README.md").read_text()
    assert "new weights" in card
    assert "`text.txt`" in card
    assert str(tmp_path) not in card
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["00000009", "00000012"]
    assert not list(tmp_path.glob(".out*"))

    # from that model, with other data and no settings but options
    more = tmp_path / "more.jsonl"
    more.write_text(
        "".join(json.dumps({"prompt": f"{n} ", "completion": f"{n * n}"}) + "\n" for n in range(30))
    )
    second = tmp_path / "second"
    options = ("--steps", 3, "--batch-size", 4, "--length", 16, "--learning-rate", 1e-4, "--save-every", 0)
    done = run(more, "-o", second, "--init", out, *options, "--precision", "bfloat16")
    assert done.exit_code == 0, done.stderr
    tuned, _ = load(second)
    assert tuned.args == model.args
    assert str(tuned.model.embed_tokens.weight.dtype).endswith("bfloat16")
    assert str(tuned.layers[0].mixer.cell.recurrent_weight.dtype).endswith("float32")
    before = read_log(second)[-1]
    assert before["valid_tokens"] > 0


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("family", ["ml-pararnn", "pararnn-torch"])
def test_a_model_trained_as_the_page_says_goes_to_pytorch_and_comes_back(family, text, tmp_path):
    page = Path(__file__).parents[2].joinpath("docs/training.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page.split("## Back to PyTorch")[1], re.DOTALL)
    shape = yaml.safe_load(blocks[["ml-pararnn", "pararnn-torch"].index(family)])
    changes = {**shape, "model": SMALL | shape["model"], "steps": 2, "sample_every": 0}
    out, there, back = tmp_path / "out", tmp_path / "there", tmp_path / "back"
    assert run(text, "-o", out, "--config", config(tmp_path, **changes)).exit_code == 0
    done = CliRunner().invoke(app, ["convert", str(out), "--to", "torch", "-o", str(there)])
    assert done.exit_code == 0, done.stderr
    assert f"for {family}" in done.stdout
    done = CliRunner().invoke(app, ["convert", str(there), "-o", str(back)])
    assert done.exit_code == 0, done.stderr
    (trained, _), (returned, _) = load(out), load(back)
    assert returned.args == trained.args
    assert same(*(dict(tree_flatten(model.parameters())) for model in (trained, returned)))


def begun(text, tmp_path, **settings):
    kept = {"sample_every": 0, "eval_every": 0} | settings
    return runs.start(tmp_path / "out", Plan(text, model=SMALL, settings=Settings(**kept)))


def test_a_run_that_is_killed_has_a_plot_as_of_its_checkpoint(text, tmp_path):
    run = begun(text, tmp_path, steps=4, batch_size=2, length=32, report_every=1, save_every=2)
    plots = []
    make_step = run.trainer._make_step

    def killed(batch):
        plots.append((run.out / "loss.png").exists())
        if run.trainer.step == 3:
            raise MemoryError
        make_step(batch)

    run.trainer._make_step = killed
    with pytest.raises(MemoryError):
        run.run()
    assert plots == [False, False, True, True]


def test_a_run_that_diverges_has_a_plot(text, tmp_path):
    run = begun(text, tmp_path, batch_size=2, length=32, report_every=1, warmup=0, learning_rate=1e30)
    with pytest.raises(PararnnError, match="is no number at step"):
        run.run()
    assert (run.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def started(*arguments):
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def compared(out):
    return losses(read_log(out)), (out / "model.safetensors").read_bytes()


@pytest.mark.large
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_a_run_resumes_to_the_bit(seed, text, tmp_path, handlers):
    settings = config(
        tmp_path, cell=("gru", "lstm", "nlru", "slstm")[seed], states=("carried", "reset")[seed % 2]
    )
    # in a process of its own, as the parts are: what other tests tried here may have switched a backend off
    whole = started(text, "-o", tmp_path / "whole", "--config", settings)
    whole.communicate()
    assert whole.returncode == 0
    out = tmp_path / "parts"
    chance = random.Random(seed)
    moments = [chance.randrange(1, 11), chance.randrange(1, 11), None]
    for number, moment in enumerate(moments):
        begin = ("--resume", "-o", out) if number else (text, "-o", out, "--config", settings)
        process = started(*begin)
        for line in process.stderr:
            if moment and line.startswith(f"step {moment}/"):
                time.sleep(chance.random() / 50)
                process.kill()
                break
        process.stderr.read()
        assert process.wait() == (-signal.SIGKILL if moment and process.returncode else 0)
        process.stderr.close()
    assert compared(out) == compared(tmp_path / "whole")


@pytest.mark.large
def test_what_a_start_left_that_was_killed_is_removed_by_the_next(text, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mlx_pararnn.training import run\n"
        "from mlx_pararnn.training.settings import Plan, Settings\n"
        "write = Path.write_text\n"
        "def killed(path, *given, **options):\n"
        "    write(path, *given, **options)\n"
        "    if path.name == 'run.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.write_text = killed\n"
        "run.start(Path(sys.argv[2]), Plan(Path(sys.argv[1]), preset='1m'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, text, out], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out-*.partial")
    assert (left / "run.json").exists()
    runs.start(out, Plan(text, preset="1m"))
    assert not left.exists()
    assert (out / "run.json").exists()


@pytest.mark.large
def test_ctrl_c_writes_a_checkpoint_and_a_second_one_ends_at_once(text, tmp_path):
    out = tmp_path / "out"
    process = started(
        text, "-o", out, "--config", config(tmp_path, steps=100_000, save_every=0, eval_every=0)
    )
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "stopping after this step" in rest
    assert "go on with: mlx-pararnn train --resume" in rest
    assert len(list((out / "checkpoints").iterdir())) == 1
    assert (out / "model.safetensors").exists()


@pytest.mark.usefixtures("handlers")
def test_the_second_signal_ends_the_process(monkeypatch):
    from types import SimpleNamespace

    from mlx_pararnn.cli import train as command

    stops, ended = [], []
    monkeypatch.setattr(os, "_exit", ended.append)
    trainer = SimpleNamespace(stop=lambda: stops.append(1))
    command.stop_on_signals(trainer)
    os.kill(os.getpid(), signal.SIGINT)
    assert (len(stops), ended) == (1, [])
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]


@pytest.mark.usefixtures("handlers")
def test_resuming_changes_only_what_it_may(text, tmp_path):
    out = tmp_path / "out"
    assert run(text, "-o", out, "--config", config(tmp_path, steps=2)).exit_code == 0
    for arguments, code, words in [
        (("--resume", "-o", out, "--length", 16), 1, "length cannot be changed"),
        (("--resume", "-o", out, "--preset", "1m"), 2, "takes the run's own preset"),
        (("--resume", "-o", tmp_path), 1, "is no training run"),
        ((text, "-o", out), 1, "holds a training run; continue it with --resume"),
    ]:
        done = run(*arguments)
        assert (done.exit_code, words in " ".join(done.stderr.split())) == (code, True), done.stderr
    done = run("--resume", "-o", out, "--steps", 4, "--report-every", 2)
    assert done.exit_code == 0, done.stderr
    assert [line["step"] for line in read_log(out) if "loss" in line] == [1, 2, 4]
    text.write_text("other " + TEXT)
    assert "holds other tokens" in run("--resume", "-o", out, "--steps", 5).stderr
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT)
    assert run("--resume", moved, "-o", out, "--steps", 5).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{text}", "-o", "{folder}"], "already exists and is no training run"),
        (["{folder}", "-o", "{folder}/x"], "lies inside DATA"),
        (["-o", "{out}"], "give DATA"),
        (["{text}"], "give the run's folder"),
        (["-o", "{out}", "--config", "{empty}"], "must hold settings"),
        (["{text}", "-o", "{out}", "--preset", "5m"], "unknown preset '5m'; choose one of 1m, 4m"),
        (["{text}", "-o", "{out}", "--cell", "rnn"], "rnn"),
        (["{text}", "-o", "{out}", "--tokenizer", "bpe:100"], "at least 257"),
        (["{text}", "-o", "{out}", "--steps", "0"], "steps is 0; it must be a whole number, 1 or more"),
        (["{text}", "-o", "{out}", "--ema", "1"], "ema is 1.0; it must be a number above 0 and below 1"),
        (["{text}", "-o", "{out}", "--schedule", "step"], "schedule is 'step'; it must be one of cosine"),
        (["{text}", "-o", "{out}", "--batch-size", "500"], "fewer than one batch of 500 x 512"),
        (["{text}", "-o", "{out}", "--valid-share", "0.00001"], "leaves nothing to hold out"),
        (["{text}", "-o", "{out}", "--valid", "{empty}"], "the held-out text is empty"),
        (["{text}", "-o", "{out}", "--init", "{out}"], "no such model folder"),
        (["{text}", "-o", "{out}", "--init", "m", "--preset", "1m"], "preset is the model's own with --init"),
        (["{text}", "-o", "{out}", "--report-to", "x"], "--report-to x: choose from wandb"),
        (["{text}", "-o", "{out}", "--config", "{out}"], "no such file; --config takes a YAML file"),
        (["{text}", "-o", "{out}", "--config", "{yaml}"], "there is no setting 'step'"),
        (["{empty}", "-o", "{out}"], "DATA is empty"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(arguments, words, text, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.yaml").write_text("step: 1\n")
    names = {"text": text, "folder": folder, "out": tmp_path / "out", "empty": tmp_path / "empty.txt"}
    done = run(*(argument.format(**names, yaml=tmp_path / "bad.yaml") for argument in arguments))
    assert done.exit_code == (2 if "error: give" in done.stderr else 1), done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "empty.txt", "folder", "text.txt"]


def test_a_quantized_model_is_not_trained(text, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "pararnn", "quantization": {"bits": 4}}))
    assert "its weights are quantized" in run(text, "-o", tmp_path / "out", "--init", source).stderr


def test_yaml_numbers_and_paths(text, tmp_path):
    from mlx_pararnn.training.settings import read_plan

    path = tmp_path / "run.yaml"
    path.write_text("data: text.txt\nlearning_rate: 3e-4\nsteps: 7\nmodel:\n  mixer: plain\n")
    plan = read_plan(path, {"cell": "lstm"}, {"steps": 9})
    assert (plan.data, plan.cell, plan.model) == (text, "lstm", {"mixer": "plain"})
    assert (plan.settings.learning_rate, plan.settings.steps) == (3e-4, 9)
