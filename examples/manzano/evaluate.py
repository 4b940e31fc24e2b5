"""What a model understands and draws of scenes that are held out, or of new ones of the kind it learned from.

`python -m examples.manzano.evaluate ICONS -o OUT` asks OUT/model and lets OUT's judge look at what it draws:
shares of right answers by kind, of right drawings by kind, and the same of pictures that only went through
the image tokenizer and the decoder. It writes OUT/sheet.png: an original, its reconstruction and a drawing
from its caption in each row.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_pararnn.images.image_model import ImageModel
from mlx_pararnn.images.image_tokenizer import HybridTokenizer
from mlx_pararnn.images.picture import to_picture, to_pixels
from mlx_pararnn.images.use import GUIDANCE, STEPS, draw, see

from .ablation import VARIANTS, parameters
from .batches import pictures
from .judge import Judge, load_judge, right
from .pictures import enlarged_rows
from .scenes import KINDS, Scene, questions
from .stages import RECIPE, Project


def answers(
    model: ImageModel, tokenizer: Any, project: Project, scenes: int, seed: int, held_out: bool = True
) -> dict[str, Any]:
    """Of questions of each kind the share that is answered right, word by word, and their number."""
    rng = random.Random(seed)
    counts = {kind: [0, 0] for kind in KINDS}
    shown, images = pictures(scenes, project.sprites, rng, held_out)
    for one, image in zip(shown, images, strict=True):
        for kind, question, answer in questions(one, rng):
            said = see(model, tokenizer, Image.fromarray(image), question, 24)
            counts[kind][0] += said.strip() == answer
            counts[kind][1] += 1
    return {kind: {"right": good / max(total, 1), "asked": total} for kind, (good, total) in counts.items()}


def drawings(
    model: ImageModel,
    tokenizer: Any,
    judge: Judge,
    project: Project,
    scenes: int,
    seed: int,
    steps: int = STEPS,
    held_out: bool = True,
) -> tuple[dict[str, Any], np.ndarray]:
    """Shares of right drawings and reconstructions by kind, and (scenes, 3, S, S, 3): what was judged.

    Also the share of the pictures themselves that the judge tells right, which bounds what it can say.
    """
    rng = random.Random(seed)
    shown, images = pictures(scenes, project.sprites, rng, held_out)
    drawn = np.array(
        [
            np.array(draw(model, tokenizer, one.caption(), seed=seed + number, steps=steps))
            for number, one in enumerate(shown)
        ]
    )
    writer = project.tokenizer() if project.recipe.variant == "separate" else model.image_tokenizer
    again = reconstructions(model, writer, images, seed, steps)
    found = {
        name: shares(shown, judge.scenes(some))
        for name, some in (("pictures", images), ("reconstructed", again), ("drawn", drawn))
    }
    found["mean_square_error"] = float(((again.astype(float) - images) ** 2).mean() / 255**2)
    return found, np.stack([images, again, drawn], axis=1)


def reconstructions(
    model: ImageModel, tokenizer: HybridTokenizer, images: np.ndarray, seed: int, steps: int
) -> np.ndarray:
    """Pictures (B, S, S, 3), uint8, by way of the discrete tokens that `tokenizer` gives them."""
    mx.random.seed(seed)
    decoder = model.image_decoder
    assert decoder is not None
    pixels = mx.array(to_pixels(images))
    condition = tokenizer.embed(tokenizer.tokens(pixels))
    made = decoder.sample(condition, mx.random.normal(pixels.shape), steps, GUIDANCE)
    return np.array([np.array(to_picture(one)) for one in np.array(made)])


def shares(wanted: list[Scene], found: list[Scene]) -> dict[str, float]:
    """Of each kind, in which share of the pictures it is right."""
    verdicts = [right(*pair) for pair in zip(wanted, found, strict=True)]
    return {kind: sum(verdict[kind] for verdict in verdicts) / len(verdicts) for kind in KINDS}


def contact_sheet(judged: np.ndarray, across: int = 8, enlarged: int = 3) -> Image.Image:
    """Triples (scenes, 3, S, S, 3) as rows of `across` triples one under the other."""
    columns = [np.vstack(list(triple)) for triple in judged]
    rows = [np.hstack(columns[k : k + across]) for k in range(0, len(columns) - across + 1, across)]
    return enlarged_rows(rows, enlarged)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("icons", type=Path, help="the folder where npm install ran")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--variant", choices=VARIANTS, default="hybrid", help="of the language part")
    parser.add_argument("--learned-kind", action="store_true", help="new scenes that are not held out")
    given = parser.parse_args()
    project = Project(given.out, given.icons, replace(RECIPE, variant=given.variant))
    model, tokenizer = project.trained_model()
    print(json.dumps({"variant": given.variant, "parameters": parameters(model.language_model)}))
    how: dict[str, Any] = {"scenes": given.scenes, "seed": given.seed, "held_out": not given.learned_kind}
    print(json.dumps({"answers": answers(model, tokenizer, project, **how)}), flush=True)
    made, judged = drawings(model, tokenizer, load_judge(project), project, **how)
    print(json.dumps(made))
    name = "sheet" if given.variant == "hybrid" else f"sheet-{given.variant}"
    name += "-learned" if given.learned_kind else ""
    contact_sheet(judged[:32]).save(given.out / f"{name}.png")
