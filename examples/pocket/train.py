"""Train the pocket model: `python -m examples.pocket.train STAGE -o FOLDER`.

Stage "numbers" learns the tasks of the pointer memory; stage "pocket" starts from its model (--start), and
learns to decline what is none of them. A run that was stopped goes on from its last checkpoint when the same
command is given again. The model folder is FOLDER/model.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.utils import save_config, save_model

from mlx_pararnn.model import Model, ModelArgs
from mlx_pararnn.pocket.protocol import tokenizer_files
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Trainer

from .batches import Turn, batches, mixed, number_turns, other_turns, protocol

ARGS = ModelArgs(
    cell="gru",
    mixer="gated_conv",
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=256,
    vocab_size=278,
)
LONGEST = 6  # digits of a number in the training data

COMMON = Settings(
    batch_size=32,
    length=128,
    learning_rate=4e-3,
    final_rate=0.05,
    warmup=50,
    beta2=0.98,
    weight_decay=0.01,
    report_every=20,
    eval_every=0,
    save_every=50,
)
NUMBERS = partial(number_turns, longest=LONGEST)
# name -> settings, and from a seed to turns
STAGES: dict[str, tuple[Settings, Callable[[int], Iterator[Turn]]]] = {
    "numbers": (replace(COMMON, steps=1000), NUMBERS),
    "pocket": (
        replace(COMMON, steps=110, learning_rate=2e-3, warmup=5, seed=1),
        partial(mixed, (NUMBERS, other_turns), (6, 1)),
    ),
}


def train(
    stage: str,
    out: Path,
    start: Path | None = None,
    steps: int | None = None,
    report: Callable[[dict[str, Any]], None] = lambda line: print(json.dumps(line), flush=True),
) -> Path:
    """Train, or go on with training, and write the model folder.

    Args:
        stage: one of STAGES.
        out: where checkpoints and the model are written.
        start: a model folder to start from instead of random weights.
        steps: instead of the stage's own.
        report: given each line of the log.

    Returns:
        The model folder.
    """
    settings, turns = STAGES[stage]
    settings = replace(settings, steps=steps or settings.steps)
    mx.random.seed(settings.seed)
    model = Model(ARGS)
    if start is not None:
        model.load_weights(str(start / "model.safetensors"))
        model.set_dtype(mx.float32)
    data = batches(turns, settings.batch_size, settings.length, settings.seed + 1)
    trainer = Trainer(model, data, settings, folder=out / "checkpoints", report=report)
    trainer.resume()
    trainer.run()
    return write_model(model, out / "model")


def write_model(model: Model, folder: Path) -> Path:
    """A model folder with float16 matrices; what `cast_predicate` names stays float32."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    exact = model.cast_predicate
    small = Model(model.args)
    small.update(
        tree_map_with_path(lambda path, w: w.astype(mx.float16) if exact(path) else w, model.parameters())
    )
    save_model(folder, small)
    ids = protocol()
    save_config({**asdict(model.args), "eos_token_id": ids.end}, folder / "config.json")
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    settings = {"do_sample": False, "eos_token_id": ids.end}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a model folder to start from")
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    print(train(given.stage, given.out, given.start, given.steps))
