"""Training on several processes: as on one, whatever is killed."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.process.watchdog import ending_signals
from mlx_pararnn.training.reporting import read_log
from tests.support.ranks import PATIENCE, port_and_next, ranks, run_ranks, said
from tests.support.training_runs import SMALL, TEXT, losses, same

pytestmark = pytest.mark.large
SETTINGS = {"steps": 6, "batch_size": 4, "accumulate": 2, "length": 16, "warmup": 2, "report_every": 1} | {
    "eval_every": 3,
    "save_every": 2,
    "sample_every": 3,
    "sample_tokens": 4,
    "ema": 0.9,
    "model": SMALL,
}
TRAIN = ("-m", "mlx_pararnn", "train")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """DATA and the options that describe a run."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.yaml").write_text(json.dumps(SETTINGS))
    return folder / "text.txt", "--config", folder / "config.yaml"


def trained(out):
    return losses(read_log(out)), mx.load(str(out / "model.safetensors"))


def place(folder, name):
    (folder / name).mkdir()
    return folder / name


def close_to(told, wanted):
    """The same losses but for the order in which numbers were added."""
    assert told.keys() == wanted.keys()
    for step, line in told.items():
        for (name, value), (_, other) in zip(line, wanted[step], strict=True):
            assert value == other or math.isclose(value, other, rel_tol=2e-6), (step, name)


def in_this_process(*arguments):
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
    for number, handler in handlers.items():  # the command takes Ctrl-C for itself
        signal.signal(number, handler)
    assert done.exit_code == 0, done.output


def killed(count, folder, arguments, out, rank, until):
    """Start a run, kill one rank when the log has a step, and give how the others ended, and after what."""
    with ranks(count, folder, *arguments) as processes:
        begin = time.monotonic()
        while not any(line["step"] >= until for line in read_log(out)):
            assert time.monotonic() - begin < PATIENCE
            time.sleep(0.02)
        processes[rank].send_signal(signal.SIGKILL)
        others = [process for n, process in enumerate(processes) if n != rank]
        return [process.wait(20) for process in others]


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """Losses and weights of a run in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    in_this_process(*given, "-o", out)
    return trained(out)


@pytest.fixture(scope="module", params=[2, 4])
def together(request, given, tmp_path_factory):
    """How many processes, and the folder of their run."""
    folder = tmp_path_factory.mktemp("together")
    run_ranks(request.param, folder, *TRAIN, *given, "-o", folder / "out")
    return request.param, folder / "out"


def test_several_processes_learn_what_one_learns(together, alone, tmp_path):
    _, out = together
    joint, weights = trained(out)
    single, weights_alone = alone
    close_to(joint, single)
    for name, weight in weights.items():
        assert mx.allclose(weight, weights_alone[name], rtol=0, atol=1e-5), name
    copy = shutil.copytree(out, tmp_path / "copy")
    in_this_process("--resume", "-o", copy, "--steps", "7")  # what began on several goes on alone
    assert losses(read_log(copy))[7]


@pytest.mark.parametrize("last", [False, True], ids=["rank 0 is killed", "the last is killed"])
def test_one_killed_ends_the_others_and_they_resume_to_the_bit(last, together, given, tmp_path):
    count, finished = together
    rank, out, folder = count - 1 if last else 0, tmp_path / "out", place(tmp_path, "killed")
    codes = killed(count, folder, [*TRAIN, *given, "-o", out], out, rank=rank, until=3)
    assert codes == [1] * (count - 1)
    for other in {*range(count)} - {rank}:
        assert "the connection to another process was lost" in said(folder, other, "stderr")
    run_ranks(count, place(tmp_path, "resumed"), *TRAIN, "--resume", "-o", out)
    (joint, weights), (resumed, weights_resumed) = trained(finished), trained(out)
    assert resumed == joint
    assert same(weights, weights_resumed)


def test_mlx_launch_starts_it(given, alone, tmp_path):
    """As docs/distributed.md has it, on two processes of this machine."""
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [
            scripts / "mlx.launch", "-n", "2", "--backend", "ring", "--starting-port", str(port_and_next()),
            "--", sys.executable, *TRAIN, *given, "-o", tmp_path / "out",
        ],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"done; try it with: mlx-pararnn generate {tmp_path / 'out'}" in done.stdout + done.stderr
    close_to(trained(tmp_path / "out")[0], alone[0])
