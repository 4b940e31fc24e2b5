"""A disk that is full or read-only, for what is written beside conversions: runs, conversations, states.

What was there before stays whole, nothing half-written is left, and what is said is one sentence.
"""

import json
import logging
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_pararnn import PararnnError
from mlx_pararnn.chat.saved_prompts import SavedPromptCache
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.loading import load_model, load_tokenizer
from mlx_pararnn.training import run
from mlx_pararnn.training.reporting import read_log
from mlx_pararnn.training.settings import Plan, Settings
from tests.support.demo import DEMO
from tests.support.disks import small_disk
from tests.support.training_runs import SMALL, TEXT, losses, small_model

FAULTS = ["full", "read-only"]


def broken(disk, fault, left=0):
    if fault.startswith("full"):
        disk.fill(left)
    else:
        disk.allow_writing(False)


def mended(disk, fault):
    if fault.startswith("full"):
        disk.make_room()
    else:
        disk.allow_writing(True)


def hidden(folder):
    return [path.name for path in folder.rglob("*") if path.name.startswith(".") or "partial" in path.name]


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = Settings(
        steps=6, batch_size=2, length=16, warmup=2, report_every=1, save_every=1, eval_every=0, keep=9
    )
    return Plan(tmp_path / "text.txt", model=SMALL, settings=settings)


@pytest.fixture
def whole(plan, tmp_path):
    """What the run gives where nothing is in its way."""
    run.start(tmp_path / "whole", plan).run()
    return result(tmp_path / "whole")


def result(out):
    return losses(read_log(out)), (out / "model.safetensors").read_bytes()


@pytest.mark.large
@pytest.mark.parametrize("fault", [*FAULTS, "full after a checkpoint"])
def test_a_run_is_resumed_when_there_is_room_again(fault, plan, whole, tmp_path):
    with small_disk(tmp_path / "disk", "4m") as disk:
        out = disk.path / "out"

        def at_step_3(line):
            if line.get("checkpoint") == "00000003":
                checkpoint = sum(path.stat().st_size for path in (out / "checkpoints/00000003").iterdir())
                broken(disk, fault, left=checkpoint + 20_000 if "after" in fault else 0)

        made = run.start(out, plan, at_step_3)
        with pytest.raises(PararnnError, match=r"written.*make room, and continue with --resume") as error:
            made.run()
        assert "\n" not in str(error.value)
        assert hidden(out) == []
        assert (out / "checkpoints/00000004").exists() == ("after" in fault)  # and no room for its model
        load_model(out)
        load_tokenizer(out, {})
        mended(disk, fault)
        run.resume(out).run()
        assert result(out) == whole


@pytest.mark.large
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_cannot_begin_leaves_nothing(fault, plan, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        broken(disk, fault)
        with pytest.raises(PararnnError, match=r"written|cannot write there"):
            run.start(disk.path / "out", plan)
        mended(disk, fault)
        assert [*disk.path.iterdir()] == []


LIMITED = """
import resource, sys
from mlx_pararnn.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))  # Python ignores SIGXFSZ
main()
"""


@pytest.mark.large
def test_a_limit_of_a_files_size_ends_a_run_in_a_sentence(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(json.dumps({"steps": 4, "batch_size": 2, "length": 16, "model": SMALL}))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", "text.txt", "-o", "out", "--config", "c.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "make room, and continue with --resume" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_conversation_that_was_saved_stays(fault, tmp_path):
    tokenizer = load_tokenizer(DEMO, {})
    with small_disk(tmp_path / "disk", "1m") as disk:
        file = disk.path / "talk.safetensors"
        conversation = Chat(small_model(), tokenizer)
        list(conversation.respond("x", max_tokens=1))
        conversation.save(file)
        before = file.read_bytes()
        list(conversation.respond("y", max_tokens=1))
        broken(disk, fault)
        with pytest.raises(PararnnError, match=f"^cannot write {file}: "):
            conversation.save(file)
        assert file.read_bytes() == before
        assert hidden(disk.path) == []
        assert len(conversation.messages) == 4  # it goes on
        mended(disk, fault)
        conversation.save(file)
        again = Chat(small_model(), tokenizer)
        again.load(file)
        assert again.messages == conversation.messages


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_goes_on_without_saving_its_states(fault, tmp_path, caplog):
    model = small_model()

    def insert(prompts, text):
        cache = model.make_cache()
        model(mx.array([text]), cache=cache)
        prompts.insert_cache("", text, cache)
        assert prompts.save_some()
        assert prompts.fetch_nearest_cache("", [*text, 9])[1] == [9]

    with small_disk(tmp_path / "disk", "1m") as disk:
        folder = disk.path / "states"
        prompts = SavedPromptCache(folder, 100, 10**9)
        prompts.open(model)
        insert(prompts, [1] * 30)
        broken(disk, fault)
        with caplog.at_level(logging.WARNING):
            insert(prompts, [2] * 30)
        (message,) = caplog.messages
        assert message.startswith(f"a state cannot be saved in {folder} (")
        assert len([*folder.iterdir()]) == 1
        assert hidden(folder) == []
        if fault == "read-only":
            with pytest.raises(PararnnError, match="cannot be written to"):
                SavedPromptCache(folder, 100, 10**9)
        mended(disk, fault)
        insert(prompts, [3] * 30)
        again = SavedPromptCache(folder, 100, 10**9)
        again.open(model)
        assert len(again) == 2
