"""Where the model goes: whole or not at all, and never over something else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.convert.writers import output_folder
from tests.support.converting import convert
from tests.support.disks import small_disk
from tests.support.golden import golden_file
from tests.support.pt_writer import write_pt
from tests.support.small_models import apple_gru, torch_lm


@pytest.fixture
def model(tmp_path):
    return write_pt(tmp_path / "model.pt", apple_gru())


def test_out_exists_already(refused, accepted, model, tmp_path):
    folder = accepted(model)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert f"{folder}: already exists" in refused(model, out=folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("x")
    assert "already exists" in refused(model, out=tmp_path / "file")


def test_force_replaces_a_model_folder_after_the_new_one_is_complete(refused, model, accepted, tmp_path):
    folder = accepted(model)
    before = (folder / "config.json").read_bytes()
    broken = write_pt(
        tmp_path / "nan.pt", apple_gru() | {"final_norm.weight": np.full(4, np.nan, np.float32)}
    )
    refused(broken, "--force", "--tokenizer", "none", out=folder)
    assert (folder / "config.json").read_bytes() == before
    assert not (folder / "tokenizer.json").exists()
    assert convert(model, "-o", folder, "--force", "--tokenizer", "bytes").exit_code == 0
    assert (folder / "tokenizer.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_force_does_not_replace_what_is_not_a_model_or_holds_the_source(refused, model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    options = ("--force", "--tokenizer", "none")
    assert "holds thesis.tex, which no conversion wrote" in refused(model, *options, out=home)
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused(model, *options, out=tmp_path / "file")
    (tmp_path / "link").symlink_to(home)
    assert "is not a folder" in refused(model, *options, out=tmp_path / "link")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file(torch_lm(), source / "model.safetensors")
    assert "holds the checkpoint" in refused(source, *options, out=source)


@pytest.mark.parametrize("name", ["notes.txt", "deep/file", "train.py"])
def test_force_does_not_delete_what_a_user_put_there(refused, accepted, model, name):
    folder = accepted(model)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    message = refused(model, "--force", "--tokenizer", "none", out=folder)
    assert f"holds {name.split('/')[0]}, which no conversion wrote" in message
    assert (folder / name).read_text() == "mine"


def test_force_replaces_what_a_killed_run_left_of_a_file(accepted, model):
    folder = accepted(model)
    (folder / ".partial.config.json").write_text("{")
    result = convert(model, "-o", folder, "--force", "--tokenizer", "none")
    assert (result.exit_code, list(folder.glob(".*"))) == (0, [])


def test_force_does_not_replace_a_pytorch_folder_or_another_project(refused, model, data, tmp_path):
    hf = shutil.copytree(data / "pararnn_torch/paraslstm_causal_lm_0", tmp_path / "hf")
    assert "config.json of another kind" in refused(model, "--force", "--tokenizer", "none", out=hf)
    assert (hf / "model.safetensors").exists()


def test_an_empty_folder_may_be_filled(model, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(model, "-o", tmp_path / "out", "--tokenizer", "none").exit_code == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_the_source_under_another_spelling(refused, accepted, model, tmp_path):
    """As on a file system that does not tell case apart: a link stands for the other spelling."""
    folder = accepted(model)
    inside = shutil.copy(model, folder / "model-00001-of-00001.safetensors")
    (tmp_path / "OTHER").symlink_to(folder)
    message = refused(tmp_path / "OTHER" / inside.name, "--force", "--tokenizer", "none", out=folder)
    assert "holds the checkpoint that is being converted" in message


def test_parents_are_made_and_taken_away_again_after_a_failure(refused, model, tmp_path):
    broken = write_pt(
        tmp_path / "nan.pt", apple_gru() | {"final_norm.weight": np.full(4, np.nan, np.float32)}
    )
    refused(broken, out=tmp_path / "new" / "deeper" / "out")
    assert convert(model, "-o", tmp_path / "new/deeper/out", "--tokenizer", "none").exit_code == 0


def test_out_that_cannot_be_written(refused, model, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused(model, out=tmp_path / "file" / "out")
    assert "cannot write there" in refused(model, out="/proc/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_in_a_folder_that_is_read_only(refused, model, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot write there (Permission denied)" in refused(model, out=locked / "out")


def test_an_interrupt_between_two_tensors_leaves_nothing(model, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    (tmp_path / "work").mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert_to_mlx(model, tmp_path / "work/new/out", tokenizer="none", progress=interrupt)
    assert list((tmp_path / "work").iterdir()) == []


SLOW = """
import time
from pathlib import Path
import mlx_pararnn.convert.writers.safetensors_writer as safetensors_writer
put = safetensors_writer._put
def slowly(*arguments):
    time.sleep(0.1)
    return put(*arguments)
safetensors_writer._put = slowly
from mlx_pararnn.cli.app import main
main()
"""


def test_ctrl_c_in_the_middle(model, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", model, "-o", work / "out", "--tokenizer", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in work.glob(".out-*/model.safetensors")):
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert list(work.iterdir()) == []


def test_out_inside_the_checkpoints_folder(refused, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file(torch_lm(), source / "model.safetensors")
    assert "lies inside the checkpoint's own folder" in refused(source, out=source / "mlx")
    (tmp_path / "link").symlink_to(source)
    assert "lies inside the checkpoint's own folder" in refused(source, out=tmp_path / "link" / "mlx")
    assert "lies inside the checkpoint's own folder" in refused(tmp_path / "link", out=source / "a" / "b")


def test_out_beside_a_checkpoint_file_is_fine(model, tmp_path):
    assert convert(model, "-o", tmp_path / "out", "--tokenizer", "none").exit_code == 0


def test_out_that_not_even_root_can_write(refused, model, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "deeper" / "out", "/proc/self/out", "/dev/null/out"):
        message = refused(model, out=out)
        assert "cannot write there" in message or "is not a folder" in message


def test_a_disk_without_room_is_found_out_before_the_work(refused, model, monkeypatch):
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    assert "the model takes 0 MB and the disk has 0 MB left; make room" in refused(model)


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # Python ignores SIGXFSZ: writing fails with EFBIG
from mlx_pararnn.cli.app import main
main()
"""


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("options", [[], ["--quantize"]])
def test_a_disk_that_fills_up(options, model, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    arguments = [model, "-o", work / "new/out", "--tokenizer", "none", *options]
    done = subprocess.run(
        [sys.executable, "-c", FULL, "convert", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {work}/new/out: it could not be written (File too large); make room, or choose another "
        "output folder\n"
    )
    assert list(work.iterdir()) == []


def test_a_file_system_that_is_really_full(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "64k") as disk:
        convert_to_it(disk.path, monkeypatch)


def convert_to_it(disk, monkeypatch):
    # Room is promised and not there, as when another program fills the disk meanwhile.
    monkeypatch.setattr(output_folder, "_check_room", lambda *_: None)
    result = convert(golden_file("lm/paragru_s64/state_dict.pt"), "-o", disk / "out", "--tokenizer", "none")
    assert result.exit_code == 1
    assert "it could not be written (No space left on device); make room" in result.stderr
    assert list(disk.iterdir()) == []
    monkeypatch.undo()
    result = convert(golden_file("lm/paragru_s64/state_dict.pt"), "-o", disk / "out", "--tokenizer", "none")
    assert "the model takes 1 MB and the disk has 0 MB left" in result.stderr


STARTED = """
import sys, time
from pathlib import Path
import mlx_pararnn.convert.writers.output_folder as output_folder
place, work = output_folder._put_in_place, Path(sys.argv.pop(1))
def when_told(*arguments):
    (work / f"ready-{time.monotonic_ns()}").touch()
    while not (work / "go").exists():
        time.sleep(0.01)
    return place(*arguments)
output_folder._put_in_place = when_told
from mlx_pararnn.cli.app import main
main()
"""


@pytest.fixture
def waiting(tmp_path):
    """A function that starts conversions which wait before their last step, and one that lets them go on."""
    work = tmp_path / "signals"
    work.mkdir()
    running = []

    def start(count, *arguments):
        for _ in range(count):
            command = [sys.executable, "-c", STARTED, work, "convert", *arguments, "--tokenizer", "none"]
            running.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        deadline = time.monotonic() + 120
        while len(list(work.glob("ready-*"))) < len(running):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in running), running[0].communicate()
            time.sleep(0.01)
        return running

    def go():
        (work / "go").touch()
        return sorted((process.communicate(timeout=60)[1], process.returncode) for process in running)

    yield start, go
    for process in running:
        process.kill()


FORMS = pytest.mark.parametrize("form", [[], ["--to", "coreml"]], ids=["mlx", "coreml"])


def needs(form):
    if form:
        pytest.importorskip("coremltools")


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    ("form", "name", "force"),
    [
        ([], "notes.txt", []),
        ([], "config.json", []),
        ([], "notes.txt", ["--force"]),
        ([], "config.json", ["--force"]),
        (["--to", "coreml"], "notes.txt", []),
    ],
)
def test_what_is_put_into_out_meanwhile_is_kept(form, name, force, waiting, model, tmp_path):
    needs(form)
    start, go = waiting
    start(1, model, "-o", tmp_path / "work/out", *form, *force)
    (tmp_path / "work/out").mkdir()
    (tmp_path / "work/out" / name).write_text("mine")
    [(message, code)] = go()
    assert code == 1
    assert message.startswith(f"error: {tmp_path}/work/out: ")
    assert message.count("\n") == 1
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    assert (tmp_path / "work/out" / name).read_text() == "mine"


@pytest.mark.large
@FORMS
def test_of_two_conversions_into_one_folder_one_succeeds(form, waiting, model, tmp_path):
    needs(form)
    start, go = waiting
    start(2, model, "-o", tmp_path / "work/out", *form)
    (_, first), (message, second) = go()
    assert (first, second) == (0, 1)
    assert "something else was written there during the conversion and is kept" in message
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def test_only_what_no_living_process_writes_is_removed(waiting, model, accepted, tmp_path):
    start, go = waiting
    out = accepted(model)
    dead = out.parent / f".{out.name}-00c0ffee.partial"
    dead.mkdir()
    (dead / "model.safetensors").write_text("half")
    of_an_export = out.parent / f".{out.name}-00c0ffe2.partial"
    (of_an_export / ".mlx-00c0ffe3.partial").mkdir(parents=True)
    (of_an_export / ".mlx-00c0ffe3.partial/model.safetensors").write_text("half")
    theirs = out.parent / f".{out.name}-00c0ffe1.partial"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    start(1, model, "-o", out, "--force")
    [alive] = {path.name for path in out.parent.iterdir()} - {out.name, theirs.name}  # both others are gone
    assert convert(model, "-o", out, "--tokenizer", "none", "--force").exit_code == 0
    assert {path.name for path in out.parent.iterdir()} == {out.name, theirs.name, alive}
    assert go()[0][1] == 0
    assert {path.name for path in out.parent.iterdir()} == {out.name, theirs.name}


def test_what_a_killed_run_moved_aside_is_put_back_and_not_replaced(model, accepted):
    out = accepted(model)
    there = sorted(path.name for path in out.iterdir())
    out.rename(out.parent / f".{out.name}-00c0ffee.old")
    said = convert(model, "-o", out, "--tokenizer", "none")
    assert "already exists; choose another output folder or pass --force" in said.stderr
    assert sorted(path.name for path in out.iterdir()) == there
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# At each moment at which the converter opens, makes, renames or removes something, a process of its own is
# killed. Prints the moment at which nothing was left to be killed at.
KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.convert.writers import exchange, output_folder

new, out, by_two_renames = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
if by_two_renames:
    output_folder.exchange = lambda a, b: False
files = ("config.json", "model.safetensors", "README.md")
old = {name: (out / name).read_bytes() for name in files}

def at(moment):
    left = moment
    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir",
                     "shutil.rmtree", "ctypes.dlsym") and (event == "ctypes.dlsym" or any(
                         str(out.parent) in str(argument) for argument in arguments)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    convert_to_mlx(new, out, tokenizer="none", force=True)
    os._exit(0)

seen, moment = set(), 0
while True:
    moment += 1
    if (child := os.fork()) == 0:
        at(moment)
    status = os.waitpid(child, 0)[1]
    if by_two_renames and not out.exists():
        output_folder._finish_killed_runs(out)
    now = {name: (out / name).read_bytes() for name in files}
    seen.add("old" if now == old else "new")
    if now != old:
        assert now["model.safetensors"][:8] == old["model.safetensors"][:8]
        assert now["config.json"] == old["config.json"] and len(now) == 3
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
print(moment, sorted(seen), [path.name for path in out.parent.iterdir()])
"""


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("by_two_renames", [False, True])
def test_kill_9_at_every_moment_of_a_replacement(by_two_renames, model, accepted, tmp_path):
    """Out is whole then, old or new; and the next conversion leaves nothing of it beside out."""
    out = accepted(model)
    other = write_pt(tmp_path / "other.pt", apple_gru() | {"final_norm.weight": np.ones(4, np.float32)})
    arguments = [sys.executable, "-c", KILLED, other, out, str(by_two_renames)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    moments, rest = done.stdout.split(maxsplit=1)
    assert int(moments) > 10
    assert rest == f"['new', 'old'] ['{out.name}']\n"


CUT = """
import os, signal, sys
event, times = sys.argv.pop(1), int(sys.argv.pop(1))
def hook(name, arguments):
    global times
    if name == event and ".out-" in str(arguments[0]):
        times -= 1
        if not times:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from mlx_pararnn.cli.app import main
main()
"""


@pytest.mark.large
@pytest.mark.parametrize("moment", [("os.rename", 2), ("shutil.rmtree", 2)])
def test_kill_9_of_an_export(moment, model, tmp_path):
    needs("coreml")
    out = tmp_path / "work/out"
    arguments = ["convert", model, "-o", out, "--to", "coreml", "--tokenizer", "none", "--chunk", "2"]
    assert convert(*arguments[1:]).exit_code == 0
    before = (out / "pararnn.json").read_bytes()
    command = [sys.executable, "-c", CUT, moment[0], str(moment[1]), *arguments, "--force", "--argmax"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(list(out.parent.iterdir())) == 2
    replaced = (out / "pararnn.json").read_bytes() != before
    assert replaced == (moment[0] == "shutil.rmtree")
    assert convert(*arguments[1:], "--force").exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("hidden", [".DS_Store", "._config.json"])
def test_what_macos_puts_into_folders_counts_neither_as_a_model_nor_as_a_users_file(
    hidden, model, accepted, tmp_path
):
    folder = accepted(model)
    (folder / hidden).write_text("x")
    assert convert(model, "-o", folder, "--tokenizer", "none", "--force").exit_code == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / hidden).write_text("x")
    assert convert(model, "-o", empty, "--tokenizer", "none").exit_code == 0
    assert (empty / "config.json").exists()


@FORMS
def test_a_folder_is_not_named_as_a_package(form, model, refused, tmp_path):
    message = refused(model, "--tokenizer", "none", *form, out=tmp_path / "final.mlpackage")
    assert message.endswith(f"give it a name without .mlpackage, such as {tmp_path}/final")


def test_of_a_folder_the_file_that_was_read_is_named(model, tmp_path):
    result = convert(tmp_path, "-o", tmp_path.parent / f"{tmp_path.name}-out", "--tokenizer", "none")
    assert result.exit_code == 0
    assert f"Read: {model}\n" in result.stderr
    assert "Read: " not in convert(model, "-o", tmp_path / "out", "--tokenizer", "none").stderr


def test_a_name_that_is_not_utf8(refused, tmp_path):
    source = write_pt(tmp_path / "m.pt", apple_gru())
    assert "a name that is not UTF-8" in refused(source, out=Path(f"{tmp_path}/name-\udcff"))
