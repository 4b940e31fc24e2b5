"""The recipe in examples/manzano: scenes, pictures, and a small run of every training, in two parts."""

import copy
import itertools
import json
import random
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from examples.manzano import ablation, batches, evaluate, judge, pictures, stages
from examples.manzano.scenes import GROUNDS, ICONS, KINDS, Group, Scene, questions, scene
from examples.manzano.stages import Project, Recipe
from mlx_pararnn import PararnnError, draw, load_image_model, see
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.tokenizers import END
from mlx_pararnn.training.trainer import Trainer

PART = {"patch": 8, "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16}
SMALL = Recipe(
    images={"levels": [3, 2], "encoder": PART, "decoder": PART},
    language=(16, 1, 2, 16),
    small=(16, 1, 2, 16),
    cell="gru",
    rows=5,
    steps=dict.fromkeys(stages.RECIPE.steps, 2),
)
ALL = [
    Scene((Group("apple", "red", 1),), "", "blue"),
    Scene((Group("fox", "", 3),), "", "white"),
    Scene((Group("apple", "red", 2), Group("dog", "", 1)), "left of", "green"),
    Scene((Group("key", "", 1), Group("heart", "orange", 1)), "below", "black"),
]


@pytest.fixture(scope="session")
def icons(tmp_path_factory):
    """Two small sets: discs and squares, of a hue for each name."""
    folder = tmp_path_factory.mktemp("icons")
    names = [name for colours in ICONS.values() for name in colours.values()]
    shapes = '<circle cx="8" cy="8" r="7" fill="{}"/>', '<rect x="1" y="1" width="14" height="14" fill="{}"/>'
    for name, shape in zip(pictures.SETS, shapes, strict=True):
        bodies = {n: {"body": shape.format(f"hsl({9 * k},80%,50%)")} for k, n in enumerate(names)}
        (folder / "node_modules" / name).mkdir(parents=True)
        (folder / "node_modules" / name / "icons.json").write_text(json.dumps({"icons": bodies}))
    return folder


@pytest.fixture(scope="session")
def first_project(icons, tmp_path_factory):
    pytest.importorskip("resvg_py")
    return Project(tmp_path_factory.mktemp("first"), icons, SMALL)


@pytest.fixture
def project(first_project, tmp_path):
    """A folder of its own; the icons and the tokenizer of words are there already."""
    mine = copy.copy(first_project)
    mine.out, mine.report = tmp_path, lambda line: None
    return mine


def test_captions():
    assert [shown.caption() for shown in ALL] == [
        "a red apple on blue",
        "three foxes on white",
        "two red apples left of a dog on green",
        "a key below an orange heart on black",
    ]
    assert ALL[2].turned().caption() == "a dog right of two red apples on green"
    assert ALL[3].canonical() == ALL[3].turned()


def test_questions_and_answers():
    asked = {q: (kind, a) for _ in range(50) for kind, q, a in questions(ALL[2], random.Random(_))}
    assert asked == {
        "how many apples are there?": ("count", "two"),
        "how many dogs are there?": ("count", "one"),
        "what is left of the dog?": ("object", "apple"),
        "what is right of the apples?": ("object", "dog"),
        "where are the apples?": ("position", "left of the dog"),
        "where is the dog?": ("position", "right of the apples"),
        "what colour are the apples?": ("colour", "red"),
        "what colour is the ground?": ("colour", "green"),
    }
    assert {kind for shown in ALL for kind, _, _ in questions(shown, random.Random(0))} == set(KINDS)


def test_what_is_held_out_is_never_trained_on():
    rng = random.Random(0)
    pairs = [
        {(g.noun, g.colour, s.ground) for s in (scene(rng, held_out) for _ in range(3000)) for g in s.groups}
        for held_out in (False, True)
    ]
    kept = {pair for pair in pairs[1] if Scene((Group(*pair[:2], 1),), "", pair[2]).is_held_out()}
    assert len(kept) >= 30
    assert not kept & pairs[0]
    assert {ground for *_, ground in kept} == set(GROUNDS)


def test_pictures_are_of_their_seed_and_ground(project):
    shown, images = batches.pictures(20, project.sprites, random.Random(1))
    again = batches.pictures(20, project.sprites, random.Random(1))
    assert (shown, images.tolist()) == (again[0], again[1].tolist())
    assert images.shape == (20, 32, 32, 3)
    for one, image in zip(shown, images, strict=True):
        ground = (image == GROUNDS[one.ground]).all(axis=-1)
        assert 0.3 < ground.mean() < 0.95


@pytest.mark.parametrize(("relation", "axis"), [("left of", 1), ("right of", 1), ("above", 0), ("below", 0)])
def test_groups_stand_as_the_scene_says(project, relation, axis):
    shown = Scene((Group("dog", "", 1), Group("key", "", 2)), relation, "white")
    image = pictures.draw(shown, project.sprites, random.Random(0)).astype(int)
    alone = pictures.draw(Scene((Group("dog", "", 1),), "", "white"), project.sprites, random.Random(0))
    colour = alone[16, 16] if (alone[16, 16] != 245).any() else alone[alone.sum(axis=-1) != 735][0]
    rows = np.argwhere(np.abs(image - colour).sum(axis=-1) < 60)[:, axis]
    others = np.argwhere((image != 245).any(axis=-1))[:, axis]
    assert (rows.mean() < others.mean()) == (relation in ("left of", "above"))


def test_a_row_is_an_image_and_all_that_is_asked_of_it(project):
    words, args = project.words, project.args
    batch = batches.understanding(6, words, args, project.sprites, random.Random(0))
    shown, _ = batches.pictures(6, project.sprites, random.Random(0))
    for one, tokens, mask in zip(shown, batch.tokens, batch.mask, strict=True):
        head = [words.begin_image] * (1 + args.tokens) + [words.end_image]
        assert tokens[: len(head)].tolist() == head
        learned = [token for token, weight in zip(tokens[1:], mask, strict=True) if weight]
        answers = words.tokenizer.decode(learned).split(END)[:-1]
        texts = words.tokenizer.decode(tokens[len(head) :].tolist()).split(END + "\n")
        pairs = dict(text.split(END)[0].split("\n") for text in texts)
        assert list(pairs.values()) == answers
        assert pairs.pop(batches.DESCRIBE) in (one.caption(), one.turned().caption())
        possible = {(q, a) for seed in range(50) for _, q, a in questions(one, random.Random(seed))}
        assert pairs.items() <= possible
        assert len(pairs) == len(questions(one, random.Random(0)))


def test_a_batch_is_mixed_by_the_papers_shares(project):
    words, args = project.words, project.args
    mx.random.seed(0)
    tokenizer = stages.HybridTokenizer(args, 16)
    rng = random.Random(0)
    batch = batches.mixture(20, words, args, tokenizer, project.sprites, random.Random(0))
    assert batch.others["sees"].tolist() == [True] * 8 + [False] * 12
    _, seen = batches.pictures(8, project.sprites, rng)
    features = np.array(tokenizer.features(mx.array(batches.to_pixels(seen))))
    assert np.array_equal(batch.others["features"][:8], features)
    _, images = batches.pictures(16, project.sprites, rng)
    wanted = np.array(tokenizer.tokens(mx.array(batches.to_pixels(images)))) + args.first_token
    pairs = wanted.reshape(8, 2, -1).tolist()
    for tokens, mask, (ids, more) in zip(batch.tokens[8:16], batch.mask[8:16], pairs, strict=True):
        learned = tokens[1:][mask > 0].tolist()
        assert learned == [*ids, words.end_image, *more, words.end_image]
        assert set(mask) == {0, batches.IMAGE_WEIGHT}
    assert set(batch.mask[:8].ravel()) == set(batch.mask[16:].ravel()) == {0, 1}
    assert (batch.tokens[16:] < args.begin_token).all()


def test_the_judge_reads_its_own_labels():
    for shown in ALL:
        assert judge.scene_of(judge.labels(shown)) == shown.canonical()
        assert judge.right(shown, shown.turned() if len(shown.groups) == 2 else shown) == dict.fromkeys(
            KINDS, True
        )
    other = Scene((Group("apple", "green", 2), Group("dog", "", 2)), "right of", "green")
    found = judge.right(ALL[2], other)
    assert found == {"object": True, "count": False, "colour": False, "position": False}


def run(project, parts=("tokenizer", "language", "decoder", "judge")):
    trainings = {
        "tokenizer": stages.train_tokenizer,
        "language": stages.train_language_model,
        "decoder": stages.train_decoder,
        "judge": judge.train_judge,
    }
    for part in parts:
        trainings[part](project)


def test_every_training_ends_in_a_model_that_sees_and_draws(project):
    lines = []
    project.report = lines.append
    run(project)
    assert {line["training"] for line in lines} == set(SMALL.steps)
    model, tokenizer = load_image_model(project.model_folder)
    assert model.args == project.args
    first = stages.HybridTokenizer(project.args, 16)
    first.load_weights(str(project.tokenizer_file))
    for name in ("encoder", "discrete", "code_proj"):  # frozen after the first training
        for a, b in zip(leaves(first[name]), leaves(model.image_tokenizer[name]), strict=True):
            assert mx.array_equal(a, b)
    asked = evaluate.answers(model, tokenizer, project, 2, 0)
    assert set(asked) == set(KINDS)
    found, judged = evaluate.drawings(model, tokenizer, judge.load_judge(project), project, 2, 0, steps=1)
    assert {name: set(kinds) for name, kinds in found.items() if isinstance(kinds, dict)} == {
        name: set(KINDS) for name in ("pictures", "reconstructed", "drawn")
    }
    assert evaluate.contact_sheet(judged, across=2).size == (2 * 96, 3 * 96)
    assert draw(model, tokenizer, "a dog", steps=1).size == (32, 32)
    assert isinstance(see(model, tokenizer, Image.fromarray(judged[0, 0]), "what?", max_tokens=2), str)


@pytest.fixture(scope="session")
def trained(icons, tmp_path_factory):
    """A project whose hybrid is trained, for variants of its language part."""
    pytest.importorskip("resvg_py")
    project = Project(tmp_path_factory.mktemp("trained"), icons, SMALL, report=lambda line: None)
    run(project)
    return project


@pytest.mark.large
@pytest.mark.parametrize("variant", [name for name in ablation.VARIANTS if name != "hybrid"])
def test_every_variant_of_the_language_part_trains_sees_and_draws(trained, icons, variant):
    project = Project(trained.out, icons, replace(SMALL, variant=variant), report=lambda line: None)
    with pytest.raises(PararnnError, match=f"language-{variant}.safetensors: is not there; train it first"):
        project.trained_model()
    run(project, ["tokenizer", "language"] if variant == "separate" else ["language"])
    model, tokenizer = project.trained_model()
    hybrid, _ = trained.trained_model()
    ours, theirs = (ablation.parameters(m.language_model) for m in (model, hybrid))
    assert abs(ours - theirs) <= 3 * 16 * 2  # of one layer: a row and a column of each matrix of the MLP
    assert set(evaluate.answers(model, tokenizer, project, 2, 0)) == set(KINDS)
    found, _ = evaluate.drawings(model, tokenizer, judge.load_judge(project), project, 2, 0, steps=1)
    assert {"reconstructed", "drawn"} < set(found)
    pixels = mx.array(batches.to_pixels(batches.pictures(1, project.sprites, random.Random(0))[1]))
    own, first = model.image_tokenizer, trained.tokenizer()
    features = own.features(pixels)
    assert mx.array_equal(features, first.features(pixels)).item() == (variant != "separate")
    read = first.embed(first.tokens(pixels)) if variant == "discrete" else None
    assert read is None or np.allclose(np.array(own.read(features)), np.array(read), atol=1e-5)


def test_backbones_of_equal_size():
    """At the recipe's own sizes, without computing anything."""
    vocabulary = 1642
    sizes = {
        cell: ablation.parameters(ablation.backbone(cell, (64, 4, 4, 176), vocabulary, size_of="gru"))
        for cell in ("gru", "lstm", "nlru", "transformer")
    }
    assert max(sizes.values()) - min(sizes.values()) < 0.01 * sizes["gru"]
    with pytest.raises(PararnnError, match="no variant 'mamba'; choose one of hybrid, discrete"):
        ablation.check_variant("mamba")


def leaves(module):
    return [array for _, array in tree_flatten(module.parameters())]


def test_a_training_needs_those_before_it(project):
    for part in ("language", "decoder"):
        with pytest.raises(PararnnError, match=r"tokenizer\.safetensors: is not there; train it first"):
            run(project, [part])
    with pytest.raises(PararnnError, match=r"judge\.safetensors: is not there; train it first"):
        judge.load_judge(project)


@pytest.mark.large
@pytest.mark.parametrize("part", ["contrastive", "alignment", "decoder"])
def test_a_training_that_was_stopped_goes_on_to_the_bit(project, part):
    """With batches and losses of each kind."""
    args, words = project.args, project.words

    def made(folder, steps):
        mx.random.seed(0)
        tokenizer = stages.HybridTokenizer(args, 16)
        if part == "contrastive":
            model = stages.Contrast(tokenizer, project.language_model(SMALL.small, words.count), 16 * 4)
            make, losses = partial(batches.captioned, 4, words, project.sprites), stages.contrastive_losses
        elif part == "alignment":
            model = stages.Alignment(tokenizer, project.language_model(SMALL.small, words.count))
            make = partial(batches.understanding, 4, words, args, project.sprites)
            losses = stages.alignment_losses
        else:
            model, losses = stages.ImageDecoder(args, 16), stages.decoder_losses
            make = partial(batches.flows, 4, args, tokenizer, project.sprites)
        settings = Settings(steps=steps, warmup=1, schedule="constant", eval_every=0, save_every=2)
        trainer = Trainer(model, batches.Scenes(0, make), settings, folder=folder, losses=losses)
        trainer.resume()
        trainer.run()
        return trainer.weights

    whole = made(project.out / "whole", 4)
    made(project.out / "parts", 2)
    parts = made(project.out / "parts", 4)
    assert all(mx.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.large
def test_the_losses_fall(project):
    """Over a few steps on one batch, of every kind."""
    args, words = project.args, project.words
    mx.random.seed(0)
    tokenizer = stages.HybridTokenizer(args, 16)
    contrast = stages.Contrast(tokenizer, project.language_model(SMALL.small, words.count), 16 * 4)
    kinds = [
        (contrast, partial(batches.captioned, 8, words, project.sprites), stages.contrastive_losses),
        (
            stages.ImageDecoder(args, 16),
            partial(batches.flows, 8, args, tokenizer, project.sprites),
            stages.decoder_losses,
        ),
        (
            judge.Judge(replace(judge.ENCODER, layers=1)),
            partial(judge.judged, 8, project.sprites),
            judge.judge_losses,
        ),
    ]
    for model, make, losses in kinds:
        lines = []
        settings = Settings(
            steps=15, warmup=3, learning_rate=3e-3, report_every=1, eval_every=0, save_every=0
        )
        batch = make(random.Random(0))
        Trainer(model, itertools.repeat(batch), settings, report=lines.append, losses=losses).run()
        assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
