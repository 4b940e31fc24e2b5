"""Where the model goes: whole or not at all, and never over something else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from pt_writer import write_pt
from running import convert
from safetensors.numpy import save_file
from small_models import apple_gru, torch_lm

from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.convert.writers import output_folder

pytest_plugins = ("conversion_fixtures",)


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB; only root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("needs to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_file_system_that_is_really_full(small_disk, data, monkeypatch):
    # Room is promised and not there, as when another program fills the disk meanwhile.
    monkeypatch.setattr(output_folder, "_check_room", lambda *_: None)
    result = convert(data / "lm/paragru_s64/state_dict.pt", "-o", small_disk / "out", "--tokenizer", "none")
    assert result.exit_code == 1
    assert "it could not be written (No space left on device); make room" in result.stderr
    assert list(small_disk.iterdir()) == []
    monkeypatch.undo()
    result = convert(data / "lm/paragru_s64/state_dict.pt", "-o", small_disk / "out", "--tokenizer", "none")
    assert "the model takes 1 MB and the disk has 0 MB left" in result.stderr
