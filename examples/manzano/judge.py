"""A classifier that tells what is in a picture, trained apart from the model whose drawings it judges."""

import random
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_pararnn.compute.layer_ops import cross_entropy
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.whole_file import whole_file
from mlx_pararnn.images.config import TransformerArgs
from mlx_pararnn.images.image_tokenizer import VisionEncoder
from mlx_pararnn.images.picture import to_pixels
from mlx_pararnn.training.batches import Batch

from .batches import Scenes, pictures
from .pictures import SIZE, Sprites
from .scenes import GROUNDS, ICONS, Group, Scene
from .stages import Project

NOTHING = ("", "")
THINGS = [NOTHING, *((noun, colour) for noun, colours in ICONS.items() for colour in colours)]
RELATIONS = ["", "left of", "above"]
# what is asked of a picture, and how many answers there are: of the canonical scene's groups, and of all
HEADS = {
    "first": len(THINGS),
    "first_count": 4,
    "second": len(THINGS),
    "second_count": 4,
    "relation": len(RELATIONS),
    "ground": len(GROUNDS),
}
ENCODER = TransformerArgs(patch=4, hidden_size=128, layers=4, heads=4, intermediate_size=256)


class Judge(nn.Module):
    """Pixels (B, S, S, 3) from -1 to 1 to logits of each of HEADS."""

    def __init__(self, args: TransformerArgs = ENCODER) -> None:
        super().__init__()
        self.encoder = VisionEncoder(args, SIZE)
        self.heads = {name: nn.Linear(args.hidden_size, count) for name, count in HEADS.items()}

    def __call__(self, pixels: mx.array) -> dict[str, mx.array]:
        pooled = self.encoder(pixels).mean(axis=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    def scenes(self, images: np.ndarray) -> list[Scene]:
        """What pictures (B, S, S, 3), uint8, most likely show."""
        found = self(mx.array(to_pixels(images)))
        likeliest = {name: logits.argmax(axis=-1).tolist() for name, logits in found.items()}
        return [
            scene_of({name: places[row] for name, places in likeliest.items()}) for row in range(len(images))
        ]


def labels(shown: Scene) -> dict[str, int]:
    """The right answers of HEADS."""
    canonical = shown.canonical()
    first, second = (*canonical.groups, Group("", "", 0))[:2]
    return {
        "first": THINGS.index((first.noun, first.colour)),
        "first_count": first.count,
        "second": THINGS.index((second.noun, second.colour)),
        "second_count": second.count,
        "relation": RELATIONS.index(canonical.relation),
        "ground": list(GROUNDS).index(shown.ground),
    }


def scene_of(answers: dict[str, int]) -> Scene:
    """`labels` undone; of answers that contradict each other, what is there."""
    groups = tuple(
        Group(*THINGS[answers[name]], answers[f"{name}_count"])
        for name in ("first", "second")
        if answers[name]
    )
    return Scene(groups, RELATIONS[answers["relation"]], list(GROUNDS)[answers["ground"]])


def right(wanted: Scene, found: Scene) -> dict[str, bool]:
    """On which axes a drawing is what was asked for."""
    wanted, found = wanted.canonical(), found.canonical()

    def compare(what: Any) -> bool:
        return sorted(map(what, wanted.groups)) == sorted(map(what, found.groups))

    return {
        "object": compare(lambda group: group.noun),
        "count": compare(lambda group: (group.noun, group.count)),
        "colour": compare(lambda group: (group.noun, group.colour)) and wanted.ground == found.ground,
        "position": wanted.relation == found.relation
        and [group.noun for group in wanted.groups] == [group.noun for group in found.groups],
    }


def judged(rows: int, sprites: Sprites, rng: random.Random) -> Batch:
    """Pictures and the answers about them; the judge sees scenes of the held-out kind too."""
    half = rows // 2
    parts = [pictures(half, sprites, rng, held_out=True), pictures(rows - half, sprites, rng)]
    answers = [labels(shown) for scenes, _ in parts for shown in scenes]
    others = {name: np.array([answer[name] for answer in answers], np.int32) for name in HEADS}
    pixels = to_pixels(np.concatenate([images for _, images in parts]))
    return Batch(np.zeros((rows, 2), int), others={**others, "pixels": pixels})


def judge_losses(model: Any, arrays: dict[str, mx.array], _: Any) -> tuple[mx.array, list[Any]]:
    """Of all heads together."""
    found = model(arrays["pixels"])
    return sum((cross_entropy(found[n], arrays[n]).sum() for n in HEADS), mx.array(0.0)), []


def train_judge(project: Project) -> None:
    """Leaves judge.safetensors."""
    seed = project.seeded("judge")
    judge = Judge()
    made = partial(judged, project.recipe.rows, project.sprites)
    if project.train("judge", judge, Scenes(seed, made), judge_losses, 1e-3):
        with whole_file(project.out / "judge.safetensors") as partial_file:
            judge.save_weights(str(partial_file))


def load_judge(project: Project) -> Judge:
    """As `train_judge` left it."""
    file = project.out / "judge.safetensors"
    if not file.is_file():
        raise PararnnError(f"{file}: is not there; train it first")
    judge = Judge()
    judge.load_weights(str(file))
    return judge
