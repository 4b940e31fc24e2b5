"""`python -m tests.support.killed_writing WHAT FOLDER`: writing that is killed at random moments.

Each run is a process of its own, forked from this one, where MLX is imported and never used. After each kill
the folder holds nothing, or something whole that loads; prints what was seen.
"""

import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from mlx_pararnn import Model
from mlx_pararnn.chat.saved_prompts import SavedPromptCache
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.convert.package.reference import relative_difference
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.generation import stream_generate
from mlx_pararnn.loading import load, load_model, load_tokenizer
from mlx_pararnn.training import checkpoints, run
from mlx_pararnn.training.reporting import read_log
from mlx_pararnn.training.settings import Plan, Settings
from tests.support.golden import golden_file
from tests.support.killing import finished, killed
from tests.support.training_runs import SMALL, TEXT, losses, small_model

Contents = dict[str, bytes]
CHECKPOINT = "lm/paragru_s64/state_dict.pt"


def contents(folder: Path) -> Contents:
    """Every file below a folder, by its path inside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writing(write: Callable[[], object], out: Path, look: Callable[[], object], times: int = 50) -> None:
    """A folder that appears whole, or not at all; `look` raises where one that is there is not whole."""
    finished(write)  # the first takes longer than those whose moments are drawn
    look()
    seen, chance = set(), random.Random(0)

    def check(ended: bool) -> None:
        seen.add(out.exists())
        if out.exists():
            look()
            if chance.random() < 0.5:
                shutil.rmtree(out)

    print(killed(write, check, times)["killed"], sorted(seen))
    finished(write)
    look()
    print([path.name for path in out.parent.iterdir()])


def conversion(out: Path, **options: Any) -> None:
    """`convert`, and with options `convert -q`: the same bytes each time, which load."""
    source = golden_file(CHECKPOINT)

    def write() -> None:
        convert_to_mlx(source, out, tokenizer="bytes", force=True, **options)

    def use() -> None:
        assert len(list(stream_generate(*load(out), "x", max_tokens=2))) == 2

    finished(write)
    finished(use)
    whole = contents(out)

    def look() -> None:
        assert contents(out) == whole

    writing(write, out, look)


def export(out: Path) -> None:
    """`convert --to coreml`, but for what coremltools computes, in which nothing of OUT is written.

    It makes a package among the temporary files and copies it; that package is made once, and copied.
    """
    from mlx_pararnn.convert.coreml import mlpackage
    from mlx_pararnn.convert.to_coreml import convert_to_coreml

    first = out.parent.parent / "first"

    def write(to: Path = out) -> None:
        convert_to_coreml(golden_file(CHECKPOINT), to, chunk=2, tokenizer="bytes", force=True)

    finished(lambda: write(first))
    finished(lambda: run_coreml(first))
    (package,) = first.glob("*.mlpackage")
    mlpackage.build_function = lambda *_: None
    mlpackage.write_package = lambda path, *_: shutil.copytree(package, path)
    whole = contents(first)

    def look() -> None:
        assert contents(out) == whole

    writing(write, out, look)


def whole_export(out: Path) -> None:
    """`convert --to coreml` with all that coremltools does, which writes another manifest each time."""
    from mlx_pararnn.convert.coreml import mlpackage  # noqa: F401 - coremltools takes seconds to import
    from mlx_pararnn.convert.to_coreml import convert_to_coreml

    temporary = out.parent.parent / "temporary"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)  # where coremltools leaves what it was making

    def write() -> None:
        convert_to_coreml(golden_file(CHECKPOINT), out, chunk=2, tokenizer="bytes", force=True)

    writing(write, out, lambda: finished(lambda: run_coreml(out)), times=8)


def run_coreml(out: Path) -> None:
    """The reference text read by a Core ML package, in an interpreter of its program."""
    from tests.support.coreml.runner import Runner

    load_tokenizer(out, {})
    reference = load_file(out / "reference.safetensors")
    logits = Runner(out).read(reference["tokens"])
    assert relative_difference(logits, reference["logits"][-1]) < 1e-2


def export_to_coreai(out: Path) -> None:
    """`convert --to coreai`; what coreai-core writes differs each time."""
    from mlx_pararnn.convert.coreai.aimodel_check import verify_package
    from mlx_pararnn.convert.to_coreai import convert_to_coreai

    def write() -> None:
        convert_to_coreai(golden_file(CHECKPOINT), out, chunk=2, tokenizer="bytes", force=True)

    def use() -> None:
        load_tokenizer(out, {})
        assert all(check.passed for check in verify_package(out))

    writing(write, out, lambda: finished(use))


def training(out: Path) -> None:
    """`train` and `train --resume`, with a checkpoint and a model after each step."""
    text = out.parent.parent / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    settings = Settings(steps=10, batch_size=2, length=16, warmup=2, report_every=1, save_every=1, keep=2)
    plan = Plan(text, model=SMALL, settings=settings)

    def train(to: Path = out) -> None:
        (run.resume(to) if to.exists() else run.start(to, plan)).run()

    def result(of: Path) -> tuple[object, bytes]:
        return losses(read_log(of)), (of / "model.safetensors").read_bytes()

    def look() -> None:
        load_tokenizer(out, {})
        if (out / "model.safetensors").exists():
            load_model(out)
        found = checkpoints.load(out / "checkpoints")
        assert found is None or found[1]["step"] in range(1, 11)

    first = out.parent.parent / "first"
    finished(lambda: train(first))
    seen = set()

    def check(ended: bool) -> None:
        seen.add((out.exists(), ended))
        if out.exists():
            finished(look)
        if ended:
            assert result(out) == result(first)
            shutil.rmtree(out)

    print(killed(train, check)["killed"], sorted(seen))
    finished(train)
    assert result(out) == result(first)
    print([path.name for path in out.parent.iterdir()])


def conversations(out: Path) -> None:
    """`/save` of chat: a conversation that grows and is saved over itself."""
    model_folder = out.parent.parent / "model"
    convert_to_mlx(golden_file(CHECKPOINT), model_folder, tokenizer="bytes")
    tokenizer, file, turns = load_tokenizer(model_folder, {}), out / "talk.safetensors", 20
    out.mkdir()

    def converse() -> None:
        conversation = Chat(small_model(), tokenizer)
        if file.exists():
            conversation.load(file)
        for _ in range(turns):
            list(conversation.respond("x", max_tokens=1))
            conversation.save(file)

    def look() -> None:
        conversation = Chat(small_model(), tokenizer)
        conversation.load(file)
        said = len(conversation.messages)
        assert said > 0
        list(conversation.respond("x", max_tokens=1))
        assert len(conversation.messages) == said + 2

    seen, chance = set(), random.Random(0)

    def check(ended: bool) -> None:
        seen.add(file.exists())
        if file.exists():
            finished(look)
        if ended or chance.random() < 0.3:
            file.unlink(missing_ok=True)

    print(killed(converse, check)["killed"], sorted(seen))
    finished(converse)
    print([path.name for path in out.iterdir()])


def states(out: Path) -> None:
    """What `serve --prompt-cache-dir` writes: states that the next server finds."""
    import mlx.core as mx  # before mlx_pararnn it would do without OpenBLAS, and say so

    texts = [[letter] * 40 for letter in range(1, 13)]

    def opened(model: Model) -> SavedPromptCache:
        prompts = SavedPromptCache(out, 100, 10**9)
        prompts.open(model)
        return prompts

    def save() -> None:
        model = small_model()
        prompts = opened(model)
        for text in texts:
            cache = model.make_cache()
            model(mx.array([text]), cache=cache)
            prompts.insert_cache("", text, cache)
            while prompts.save_some():
                pass

    def look() -> None:
        logging.getLogger("mlx_pararnn").addHandler(Raising())
        prompts = opened(small_model())
        assert len(prompts) == len([*out.iterdir()])  # no part of a file is left, and each is found

    seen = set()

    def check(ended: bool) -> None:
        if out.exists():
            finished(look)
        seen.add(out.exists() and 0 < len([*out.iterdir()]) < len(texts))
        if ended:
            shutil.rmtree(out)

    print(killed(save, check)["killed"], sorted(seen))
    finished(save)
    print(len([*out.iterdir()]))


class Raising(logging.Handler):
    """A warning is an error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise it."""
        raise AssertionError(record.getMessage())


def main(what: str, folder: Path) -> None:
    """Carry it out."""
    out = folder / "work/out"
    out.parent.mkdir()
    if what == "quantized":
        conversion(out, quantize=True, q_group_size=32)
    else:
        {
            "as it is": conversion,
            "coreml": export,
            "whole coreml": whole_export,
            "coreai": export_to_coreai,
            "training": training,
            "conversations": conversations,
            "states": states,
        }[what](out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
