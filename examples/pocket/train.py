"""Train the pocket model: `python -m examples.pocket.train -o FOLDER`.

A run that was stopped goes on from its last checkpoint when the same command is given again; with more
--steps as long as the learning rate has not begun to fall. The model folder is FOLDER/model.

`--from MODEL` goes on from a model's weights; `--functions` and `--phrasings` add functions of your own
(docs/tools.md has an example).
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.utils import save_config, save_model

from mlx_pararnn.loading import load_model
from mlx_pararnn.model import Model, ModelArgs
from mlx_pararnn.pocket.protocol import tokenizer_files
from mlx_pararnn.training.run import remember_long
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Trainer

from .batches import batches, protocol, turns
from .calls import teach

ARGS = ModelArgs(
    cell="gru",
    mixer="gated_conv",
    hidden_size=192,
    num_hidden_layers=3,
    intermediate_size=384,
    vocab_size=278,
)
LONGEST_MEMORY = 400  # tokens: a message of 60 characters, until its arguments have been copied
EARLY = 3100  # batches with shorter traces of calls, to begin with

SETTINGS = Settings(
    steps=8000,
    batch_size=16,
    length=256,
    learning_rate=3e-3,
    final_rate=0.02,
    schedule="wsd",
    decay=0.4,
    warmup=100,
    beta2=0.98,
    weight_decay=0.01,
    report_every=50,
    eval_every=0,
    save_every=100,
)

# For a model that has learned already.
FURTHER = replace(SETTINGS, steps=500, learning_rate=1e-3, warmup=20)


def train(
    out: Path,
    settings: Settings = SETTINGS,
    start: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda line: print(json.dumps(line), flush=True),
) -> Path:
    """Train, or go on with training, and write the model folder.

    Args:
        out: where checkpoints and the model are written.
        settings: how.
        start: a model folder to go on from; None for new weights.
        report: given each line of the log.

    Returns:
        The model folder.
    """
    mx.random.seed(settings.seed)
    rows, length = settings.batch_size, settings.length
    data = batches(turns, rows, length, settings.seed + 2)
    if start is None:
        model = Model(ARGS)
        remember_long(model, LONGEST_MEMORY)
        early = batches(partial(turns, looking=False), rows, length, settings.seed + 1)
        data = chain(islice(early, EARLY), data)
    else:
        model, _ = load_model(start)
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
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--from", type=Path, dest="start", metavar="MODEL", help="go on from its weights")
    parser.add_argument("--functions", type=Path, help="JSON schemas of functions of your own")
    parser.add_argument("--phrasings", type=Path, help="what people say when they want them called")
    given = parser.parse_args()
    if (given.functions is None) != (given.phrasings is None):
        parser.error("--functions and --phrasings go together")
    if given.functions is not None:
        try:
            teach(given.functions, given.phrasings)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    settings = SETTINGS if given.start is None else FURTHER
    print(train(given.out, replace(settings, steps=given.steps or settings.steps), given.start))
