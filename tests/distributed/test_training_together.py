"""Training on several processes: as on one, whatever is killed."""

import json
import math
import signal
import time

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.training.reporting import read_log
from tests.support.ranks import PATIENCE, ranks, run_ranks, said
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


@pytest.fixture
def given(tmp_path):
    """DATA and the options that describe a run."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "config.yaml").write_text(json.dumps(SETTINGS))
    return tmp_path / "text.txt", "--config", tmp_path / "config.yaml"


def trained(out):
    return losses(read_log(out)), mx.load(str(out / "model.safetensors"))


def place(folder, name):
    (folder / name).mkdir()
    return folder / name


def in_this_process(*arguments):
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
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


@pytest.fixture(autouse=True)
def handlers():
    """The command takes Ctrl-C for itself."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_two_processes_learn_what_one_learns_and_resume_to_the_bit(given, tmp_path):
    together, alone, interrupted = (tmp_path / name for name in ("together", "alone", "interrupted"))
    run_ranks(2, place(tmp_path, "a"), *TRAIN, *given, "-o", together)
    in_this_process(*given, "-o", alone)
    joint, weights = trained(together)
    single, weights_alone = trained(alone)
    assert joint.keys() == single.keys()
    for step, told in joint.items():
        for (name, value), (_, wanted) in zip(told, single[step], strict=True):
            assert value == wanted or math.isclose(value, wanted, rel_tol=2e-6), (step, name)
    for name, weight in weights.items():
        assert mx.allclose(weight, weights_alone[name], rtol=0, atol=1e-5), name

    folder = place(tmp_path, "c")
    codes = killed(2, folder, [*TRAIN, *given, "-o", interrupted], interrupted, rank=1, until=3)
    assert codes == [1]
    assert "the connection to another process was lost" in said(folder, 0, "stderr")
    run_ranks(2, place(tmp_path, "d"), *TRAIN, "--resume", "-o", interrupted)
    resumed, weights_resumed = trained(interrupted)
    assert resumed == joint
    assert same(weights, weights_resumed)
    in_this_process("--resume", "-o", together, "--steps", "7")  # what began on two goes on alone
    assert losses(read_log(together))[7]
