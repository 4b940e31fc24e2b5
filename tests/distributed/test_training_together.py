"""Training on several processes: as on one, whatever is killed."""

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.errors import PararnnError, is_lost
from mlx_pararnn.process.watchdog import ending_signals
from mlx_pararnn.training import checkpoints, tuning
from mlx_pararnn.training import run as runs
from mlx_pararnn.training.reporting import read_log
from mlx_pararnn.training.settings import Plan, Settings
from tests.support.ranks import PATIENCE, port_and_next, ranks, run_ranks, said
from tests.support.training_runs import SMALL, TEXT, losses, same, small_model, trainer

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


@pytest.mark.large
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


@pytest.mark.large
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


@pytest.mark.large
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


DIVIDED = ("--divide-model", "--sample-every", "0")


@pytest.fixture(scope="module")
def divided(given, tmp_path_factory):
    """The folder of a run whose model two processes divide."""
    folder = tmp_path_factory.mktemp("divided")
    run_ranks(2, folder, *TRAIN, *given, *DIVIDED, "-o", folder / "out")
    assert "M parameters in 2 processes" in said(folder, 0, "stderr")
    return folder / "out"


@pytest.mark.large
def test_a_divided_model_learns_what_a_whole_one_learns(divided, alone):
    joint, weights = trained(divided)
    single, weights_alone = alone
    close_to(joint, {step: [each for each in line if each[0] != "sample"] for step, line in single.items()})
    assert weights.keys() == weights_alone.keys()
    for name, weight in weights.items():
        assert mx.allclose(weight, weights_alone[name], rtol=0, atol=1e-5), name
    files = [*divided.glob("checkpoints/*/00000006/arrays.safetensors")]
    assert len(files) == 2
    for part in map(mx.load, map(str, files)):  # no process has more than its part of what is large
        assert part["weights/model.embed_tokens.weight"].shape == (128, 16)
        assert part["optimizer/0/model.layers.0.mlp.up_proj.weight/m"].shape == (12, 16)
    done = CliRunner().invoke(app, ["train", "--resume", "-o", str(divided), "--steps", "7"])
    assert done.exit_code == 1
    assert "this run is divided among 2 processes; start as many, by mlx.launch" in done.stderr


@pytest.mark.large
@pytest.mark.parametrize("rank", [0, 1])
def test_a_divided_run_that_was_killed_resumes_to_the_bit(rank, divided, given, tmp_path):
    out, folder = tmp_path / "out", place(tmp_path, "killed")
    assert killed(2, folder, [*TRAIN, *given, *DIVIDED, "-o", out], out, rank=rank, until=3) == [1]
    assert "the connection to another process was lost" in said(folder, 1 - rank, "stderr")
    run_ranks(2, place(tmp_path, "resumed"), *TRAIN, "--resume", "-o", out)
    (joint, weights), (resumed, weights_resumed) = trained(divided), trained(out)
    assert resumed == joint
    assert same(weights, weights_resumed)


class Rank:
    """A group of which this process is one, and that says nothing."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_rank_0_writes_the_whole_model(tmp_path, monkeypatch):
    """The file of a divided model is that of the whole one, in bfloat16 but for what stays exact."""
    plan = Plan(tmp_path, settings=Settings(precision="bfloat16"))
    told = []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: told.append(x) or x)
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: mx.concatenate([x, x]))
    for rank in (1, 0):
        model = small_model()
        model.shard(Rank(rank, 2))
        folder = place(tmp_path, str(rank))
        tuning.write(model, plan, folder)
        others = iter([*told])
        monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group, others=others: x + next(others))
    assert [*place(tmp_path, "whole").parent.glob("1/*")] == []
    tuning.write(small_model(), plan, tmp_path / "whole")
    wanted, found = (mx.load(str(tmp_path / name / tuning.WEIGHTS)) for name in ("whole", "0"))
    assert {weight.dtype for weight in wanted.values()} == {mx.bfloat16, mx.float32}
    assert same(found, wanted)
    assert {name: w.dtype for name, w in found.items()} == {name: w.dtype for name, w in wanted.items()}

    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: mx.zeros_like(x))  # the other has ended
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: mx.concatenate([x, mx.zeros_like(x)]))
    before = (folder / tuning.WEIGHTS).read_bytes()
    with pytest.raises(PararnnError, match="connection to another process was lost"):
        tuning.write(model, plan, folder)
    assert (folder / tuning.WEIGHTS).read_bytes() == before


def test_who_is_lost_while_the_model_is_written_is_no_full_disk(given, tmp_path, monkeypatch):
    run = runs.start(tmp_path / "out", Plan(given[0], model=SMALL))

    def fails(reason):
        monkeypatch.setattr(tuning, "write", Mock(side_effect=RuntimeError(reason)))
        with pytest.raises((RuntimeError, OSError)) as raised:
            run._write_model()
        return raised.value

    assert is_lost(fails("[ring] Receiving failed with errno 2"))
    assert isinstance(fails("[save] Failed to write"), OSError)


class Machines:
    """The ranks of a divided model in one process, of which each has its own thread and checkpoints."""

    def __init__(self, folder, monkeypatch, count=2):
        self.folders = [folder / str(rank) for rank in range(count)]
        self.ranks = [Rank(rank, count) for rank in range(count)]
        self.told, self.barrier = [None] * count, threading.Barrier(count)
        monkeypatch.setattr(mx.distributed, "all_gather", self.gather)

    def gather(self, own, group):
        self.told[group.rank()] = own
        self.barrier.wait(PATIENCE)
        everyones = mx.concatenate([*self.told])
        self.barrier.wait(PATIENCE)
        return everyones

    def save(self, rank, step, previous, run_id="ours", keep=2):
        """As `rank` saves alone; what it deletes does not wait for the others."""
        state = {"previous": previous, "run": run_id}
        checkpoints.save(self.folders[rank], step, {"a": mx.zeros(1)}, state, keep)

    def steps(self):
        return [*map(checkpoints.steps, self.folders)]

    def resumed(self, run_id="ours"):
        """The step at which each goes on, 0 for the beginning, or what it says instead."""

        def resume(group):
            model = small_model()
            model.shard(group)
            made = trainer(model=model, folder=self.folders[group.rank()], group=group, run_id=run_id)
            made._restore = lambda arrays, state: setattr(made, "step", state["step"])
            try:
                assert made.resume() == bool(made.step)
            except PararnnError as error:
                return str(error)
            return made.step

        with ThreadPoolExecutor(len(self.ranks)) as threads:
            return [*threads.map(resume, self.ranks)]


# Of each rank its checkpoints; where all go on, and what each has then.
WENT_BACK = {
    "all wrote": (([2, 4], [2, 4]), 4, [2, 4]),
    "one was killed while the others wrote": (([10, 20], [10]), 10, [10]),
    "one has deleted and the other has not": (([15, 20], [10, 15, 20]), 20, None),
    "what was left of a run that went back": (([15, 20], [10, 15, 18]), 15, None),
    "one folder was put back": (([5, 15], [15, 20, 25]), 15, None),
    "the first is on one alone": (([2], []), 0, []),
    "a new run": (([], []), 0, []),
}


@pytest.mark.parametrize("case", WENT_BACK)
def test_parts_of_a_run_go_back_to_a_step_that_all_have(case, tmp_path, monkeypatch):
    machines = Machines(tmp_path, monkeypatch)
    had, step, left = WENT_BACK[case]
    for rank, steps in enumerate(had):
        for previous, each in zip([0, *steps], steps, strict=False):
            machines.save(rank, each, previous, keep=9)
    assert machines.resumed() == [step, step]
    assert all(max(steps, default=0) == step for steps in machines.steps())
    assert left is None or machines.steps() == [left, left]
    assert not [*tmp_path.glob("*/*.partial")]
    aside = [f"{file.name}" for file in tmp_path.glob("*/*.aside")]  # where nothing would be left
    assert aside == ([f"{had[0][0]:08d}.aside"] if step == 0 and had[0] else [])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_can_go_back_again(keep, tmp_path, monkeypatch):
    """Saved at 10, killed between two files of 20, stopped at 13, and killed again while 18 is saved."""
    machines = Machines(tmp_path, monkeypatch)
    machines.save(0, 10, 0, keep=keep)
    machines.save(1, 10, 0, keep=keep)
    machines.save(0, 20, 10, keep=9)  # rank 0 waits for the other before it deletes
    assert machines.resumed() == [10, 10]
    machines.save(0, 13, 10, keep=keep)
    machines.save(1, 13, 10, keep=keep)
    assert machines.resumed() == [13, 13]
    machines.save(1, 18, 13, keep=9)
    assert machines.resumed() == [13, 13]
    assert machines.steps() == [[10, 13][-keep:]] * 2


def test_parts_that_do_not_go_together_are_a_sentence_and_stay(tmp_path, monkeypatch):
    lost = "connection to another process was lost"
    for number, (had, words) in enumerate(
        (
            (([(2, "ours"), (4, "ours")], []), ("put back the checkpoints of each", lost)),
            (([(4, "ours"), (6, "ours")], [(2, "ours")]), ("put back the checkpoints of each", lost)),
            (([], [(10, "another's")]), (lost, "holds checkpoints of another run")),
            (([(10, "ours")], [(10, "another's")]), (lost, "holds checkpoints of another run")),
        )
    ):
        machines = Machines(place(tmp_path, str(number)), monkeypatch)
        for rank, checkpoints_of_it in enumerate(had):
            previous = 0
            for step, run_id in checkpoints_of_it:
                machines.save(rank, step, previous, run_id)
                previous = step
        before = machines.steps()
        for said_by_it, wanted in zip(machines.resumed(), words, strict=True):
            assert wanted in said_by_it
        assert machines.steps() == before


def test_a_divided_model_without_a_folder_has_nothing_to_resume():
    model = small_model()
    model.shard(Rank(0, 2))
    assert not trainer(model=model).resume()


@pytest.mark.parametrize("arrived", [[7, 0], [0, 7], [7, 9], [7, 7]])
def test_a_checkpoint_is_whole_only_when_all_said_the_same(arrived, tmp_path, monkeypatch):
    """MLX may give anything where a process has ended, what was sent last too: nothing is deleted then."""
    model = small_model()
    model.shard(Rank(0, 2))
    made = trainer({"keep": 1}, model=model, folder=tmp_path, group=Rank(0, 2))
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: mx.concatenate([x, x]))
    made.save()
    made.step = 6
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: mx.array(arrived))
    with pytest.raises(PararnnError, match="connection to another process was lost"):
        made.save()
    assert checkpoints.steps(tmp_path) == [0, 6]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--divide-model"], "--divide-model is for several processes"),
        (["--divide-model", "--resume"], "--resume takes the run's own divide-model"),
    ],
)
def test_a_model_is_not_divided_alone(options, words, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = CliRunner().invoke(
        app, ["train", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out"), *options]
    )
    assert done.exit_code in (1, 2)
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"tune": "lora", "init": "m"}, {"settings": Settings(sample_every=2)}])
def test_what_a_divided_run_does_not_do_is_a_sentence(fields, tmp_path):
    with pytest.raises(PararnnError, match="model that is divided"):
        Plan(tmp_path, divided=2, **fields)
