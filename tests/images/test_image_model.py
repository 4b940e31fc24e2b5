"""Models that see and draw, as folders and as a user has them, with random weights."""

import json
import os

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.cli.app import app
from mlx_pararnn.files.hub import BUNDLED
from mlx_pararnn.images.config import ImageArgs
from mlx_pararnn.images.image_model import WEIGHTS
from mlx_pararnn.images.image_prompts import question_text
from mlx_pararnn.images.use import image_prompt
from tests.support import image_oracle as oracle
from tests.support.image_models import TRANSFORMER, VOCABULARY, image_model, weights_of, write_image_model

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
CODES = 24


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def changed(folder, tmp_path, **fields):
    """The folder with other fields of `images` in its config.json; None takes one away."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["images"] = {k: v for k, v in {**config["images"], **fields}.items() if v is not ...}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_holds_what_was_saved(image_folder, image_pair):
    model, tokenizer = image_pair
    ours, saved = (dict(tree_flatten(m.parameters())) for m in (model, image_model()))
    assert ours.keys() == saved.keys()
    assert all(mx.array_equal(ours[name], saved[name]) for name in ours)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    assert model.args == image_model().args


def test_its_language_model_is_one_for_everything_else(image_folder):
    for load in (mlx_pararnn.load, mlx_lm.load):
        model, _ = load(str(image_folder))
        assert model(mx.array([[1, 2]])).shape == (1, 2, VOCABULARY + CODES)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_seeing_is_reading_the_images_embeddings(cell):
    """The logits are those of the embeddings that the oracle computes, token after token."""
    model = image_model(cell)
    tokenizer = mlx_pararnn.load(BUNDLED)[1]
    tokens, embeddings = image_prompt(model, tokenizer, PICTURE, " how many? ")
    words = tokenizer.encode(question_text("how many?"))
    assert tokens == [256, 256, 256, 256, 256, 257, *words]
    weights = weights_of(model.image_tokenizer)
    pixels = np.array(PICTURE) / 127.5 - 1
    encoded = oracle.encoder(oracle.part(weights, "encoder."), pixels, patch=2, heads=2, layers=2)
    features = oracle.space_to_channel(encoded, 2)
    expected = weights_of(model.language_model)["model.embed_tokens.weight"][tokens]
    expected[1:5] = oracle.adapter(oracle.part(weights, "continuous."), features)
    np.testing.assert_allclose(np.array(embeddings), expected, rtol=2e-4, atol=5e-5)
    language = model.language_model
    whole = language(mx.array([tokens]), input_embeddings=embeddings[None])
    cache = language.make_cache()
    steps = [
        language(mx.array([[token]]), cache=cache, input_embeddings=embeddings[None, k, None])
        for k, token in enumerate(tokens)
    ]
    np.testing.assert_allclose(np.array(whole), np.array(mx.concatenate(steps, axis=1)), atol=5e-5)


def test_the_answer_is_the_likeliest_after_image_and_question(image_pair):
    model, tokenizer = image_pair
    answer = mlx_pararnn.see(model, tokenizer, PICTURE, "what is it?", max_tokens=5)
    tokens, embeddings = image_prompt(model, tokenizer, PICTURE, "what is it?")
    found = []
    for _ in range(5):
        logits = model.language_model(mx.array([tokens]), input_embeddings=embeddings[None])
        found.append(int(logits[0, -1].argmax()))
        tokens.append(found[-1])
        own = model.language_model.model.embed_tokens(mx.array(found[-1:]))
        embeddings = mx.concatenate([embeddings, own])
    assert answer == tokenizer.decode(found)
    assert model.see(tokenizer, PICTURE, "what is it?", max_tokens=5) == answer


@pytest.mark.large
def test_gradients_reach_both_adapters_and_the_language_model(image_pair):
    model = image_model()
    pixels = mx.array(np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32))
    places = mx.broadcast_to(mx.arange(1, 5), (2, 4))

    def loss(model):
        features = model.image_tokenizer.features(pixels)
        x = model.embeddings(mx.zeros((2, 7), mx.int32), features, places)
        codes = model.image_tokenizer.embed_codes(model.image_tokenizer.encode(features))
        logits = model.language_model(mx.zeros((2, 7), mx.int32), input_embeddings=x)
        return logits.square().mean() + codes.square().mean()

    _, gradient = nn.value_and_grad(model, loss)(model)
    lengths = {name: float(mx.abs(g).max()) for name, g in tree_flatten(gradient)}
    zero = {name for name, length in lengths.items() if not length}
    assert {name.partition(".")[0] for name in zero} == {"image_decoder"}


def test_a_picture_is_of_its_seed(image_pair):
    model, tokenizer = image_pair
    said = []
    made = [
        mlx_pararnn.draw(
            model, tokenizer, "a dog", seed=seed, steps=3, progress=lambda *now: said.append(now)
        )
        for seed in (1, 1, 2)
    ]
    first, again, other = map(np.array, made)
    assert first.shape == (8, 8, 3)
    assert (first == again).all()
    assert (first != other).any()
    assert (np.array(model.draw(tokenizer, "a dog", seed=1, steps=3)) == first).all()
    assert said[:7] == [(k, 7) for k in range(1, 8)]


def test_steps_are_previewed_and_the_last_is_the_picture(image_pair):
    shown = []
    mx.random.seed(5)
    before = mx.array(mx.random.normal((3,)))
    mx.random.seed(5)
    made = mlx_pararnn.draw(*image_pair, "a dog", seed=1, steps=3, preview=shown.append)
    assert len(shown) == 3
    assert (np.array(shown[0]) != np.array(shown[1])).any()
    assert (np.array(shown[-1]) == np.array(made)).all()
    assert (np.array(before) == np.array(mx.random.normal((3,)))).all()  # a seed is the picture's alone


def test_drawing_decodes_the_tokens_that_the_language_model_writes(image_pair):
    """With the likeliest tokens, step by step."""
    model, tokenizer = image_pair
    args, language = model.args, model.language_model
    tokens = [*tokenizer.encode("a dog"), args.begin_token]
    for _ in range(args.tokens):
        logits = language(mx.array([tokens]))[0, -1, args.first_token :]
        tokens.append(args.first_token + int(logits.argmax()))
    codes = mx.array(tokens[-args.tokens :]) - args.first_token
    mx.random.seed(3)
    noise = mx.random.normal((1, 8, 8, 3))
    pixels = model.image_decoder.sample(model.image_tokenizer.embed(codes[None]), noise, 2, 2.0)[0]
    expected = np.clip(np.round((np.array(pixels) + 1) * 127.5), 0, 255)
    found = mlx_pararnn.draw(model, tokenizer, "a dog", seed=3, steps=2, temp=0)
    assert np.abs(np.array(found) - expected).max() <= 1


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (" ", {}, "there is nothing to draw"),
        ("a \udc80", {}, "is not UTF-8 text"),
        ("a dog", {"steps": 0}, "steps is 0"),
        ("a dog", {"guidance": float("nan")}, "guidance is nan"),
        ("a dog", {"temp": -1}, "temp is -1"),
    ],
)
def test_what_cannot_be_drawn(image_pair, text, options, said):
    with pytest.raises(PararnnError, match=said):
        mlx_pararnn.draw(*image_pair, text, **options)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(tmp_path, bits):
    """Its matrices are packed, and its answers are near; widths that no group divides stay as they are."""
    part = {"patch": 2, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}
    model = image_model(width=32, encoder=part, decoder=part)
    pixels = mx.array(np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32))
    exact = model.image_tokenizer.features(pixels)
    folder = write_image_model(model, tmp_path / "model", bits=bits, group_size=32)
    loaded, tokenizer = mlx_pararnn.load_image_model(folder)
    for array in ("scales", "biases"):
        assert f"image_decoder.layers.0.mlp.up_proj.{array}" in dict(tree_flatten(loaded.parameters()))
    assert "scales" in loaded.language_model.model.embed_tokens
    assert "scales" not in loaded.image_tokenizer.discrete.layers[0]  # three numbers wide
    near = mx.abs(loaded.image_tokenizer.features(pixels) - exact).mean() / mx.abs(exact).mean()
    assert 0 < near.item() < (0.05 if bits == 8 else 0.6)
    mlx_pararnn.draw(loaded, tokenizer, "a dog", seed=0, steps=1)
    assert mlx_pararnn.see(loaded, tokenizer, PICTURE, "what?", max_tokens=2) is not None


def test_bits_that_mlx_does_not_have():
    with pytest.raises(PararnnError, match="7 bits in groups of 64: MLX has 2, 3, 4, 5, 6, 8 bits"):
        image_model().quantize(7)


def test_a_folder_that_is_there_is_replaced_only_when_asked(image_folder, tmp_path):
    out = write_image_model(image_model(), tmp_path / "model")
    with pytest.raises(PararnnError, match="already exists"):
        write_image_model(image_model(), out)
    write_image_model(image_model(), out, force=True)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in image_folder.iterdir())


def test_a_folder_that_cannot_be_written_is_not_there(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(PararnnError, match="could not be written"):
        write_image_model(image_model(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model-tokenizer"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "32"}, "images.size is '32'; it must be a whole number"),
        ({"size": 9}, "images.size is 9; it must be a multiple of encoder.patch 2"),
        ({"stride": 3}, "images.stride is 3; it must be a divisor of 4 patches"),
        ({"stride": ...}, "images lacks the field 'stride'"),
        ({"levels": []}, "images.levels must hold 1 to 16 numbers"),
        ({"levels": [2] * 100_000}, "images.levels must hold 1 to 16 numbers"),
        ({"size": 2**30}, "images.size is 1073741824; it must be a whole number from 1 to 4096"),
        ({"size": True}, "images.size is True"),
        ({"encoder": {**TRANSFORMER, "layers": 60_000}}, "images.encoder.layers is 60000, and .* has 2"),
        ({"decoder": {**TRANSFORMER, "layers": 1}}, "images.decoder.layers is 1, and .* has 2"),
        ({"encoder": {**TRANSFORMER, "hidden_size": 2**20}}, "must be a whole number from 1 to 65536"),
        ({"encoder": {**TRANSFORMER, "hidden_size": 64}}, "does not fit config.json: image_tokenizer"),
        ({"decoder": {**TRANSFORMER, "heads": 3}}, "must be a multiple of heads 3"),
        ({"decoder": {**TRANSFORMER, "share_attention": 1}}, "must be true or false"),
        ({"size": 4096, "stride": 2048}, "small enough for 16,777,216 features"),
        ({"levels": 7}, "images.levels is 7"),
        ({"levels": [2**16, 2**16]}, "whose product is at most"),
        ({"levels": [4, 3, 3]}, "go beyond the vocabulary of 282"),
        ({"encoder": None}, "images.encoder is None; it must be an object"),
        ({"encoder": {"patch": 2}}, "images.encoder lacks the field 'hidden_size'"),
        ({"code": "x"}, "images has a field 'code', which is unknown"),
        ({"begin_token": 300}, "must be below first_token"),
        ({"quantization": 8}, "images.quantization is 8; it must say bits and group_size"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits in groups of 64"),
        ({"decoder": None}, "image_decoder.* should be absent"),
    ],
)
def test_a_config_that_is_wrong(image_folder, tmp_path, fields, said):
    with pytest.raises(PararnnError, match=said) as error:
        mlx_pararnn.load_image_model(changed(image_folder, tmp_path, **fields))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_all_of_a_config_comes_back(image_pair):
    args = image_pair[0].args
    assert ImageArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


def rewrite(path, **changes):
    mx.save_safetensors(str(path), {**mx.load(str(path)), **changes})


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda path: path.unlink(), "no images.safetensors in"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "cannot be read"),
        (lambda path: path.write_bytes(b"no safetensors"), "cannot be read"),
        (lambda path: rewrite(path, a=mx.zeros(2)), "a is .2,. and should be absent"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    ],
)
def test_weights_that_are_broken(tmp_path, break_it, said):
    folder = write_image_model(image_model(), tmp_path / "model")
    break_it(folder / WEIGHTS)
    with pytest.raises(PararnnError, match=said) as error:
        mlx_pararnn.load_image_model(folder)
    assert "\n" not in str(error.value)


def test_weights_of_no_floating_point_kind(tmp_path):
    folder = write_image_model(image_model(), tmp_path / "model")
    name = "image_tokenizer.code_proj.weight"
    rewrite(folder / WEIGHTS, **{name: mx.zeros((3, 64), mx.int32)})
    with pytest.raises(PararnnError, match=f"{name} holds int32 numbers"):
        mlx_pararnn.load_image_model(folder)


def test_models_that_neither_see_nor_draw():
    with pytest.raises(PararnnError, match="neither sees nor draws images; examples/manzano"):
        mlx_pararnn.load_image_model(BUNDLED)


def test_the_draw_command(image_folder, tmp_path):
    out = tmp_path / "dog.png"
    options = "-o", out, "--model", image_folder, "--seed", 1, "--steps", 2, "--guidance", 1.5, "--temp", 0.5
    result = run("draw", "a dog", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    drawn = mlx_pararnn.draw(
        *mlx_pararnn.load_image_model(image_folder), "a dog", seed=1, steps=2, guidance=1.5, temp=0.5
    )
    assert (np.array(Image.open(out)) == np.array(drawn)).all()
    result = run("draw", "a dog", *options)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "already exists" in result.stderr
    assert run("draw", "a dog", *options, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "a.png"], "no model that sees or draws comes with the package; give one: examples/manzano"),
        (["-o", "a.txt"], "ends in .png"),
        (["-o", "a.png", "--model", BUNDLED], "neither sees nor draws images"),
        (["-o", "a.png", "--model", "no-such-model"], "no such model folder"),
    ],
)
def test_what_the_draw_command_refuses(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    result = run("draw", "a dog", *options)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_only_sees(tmp_path):
    folder = write_image_model(image_model(decoder=None), tmp_path / "model")
    result = run("draw", "a dog", "-o", tmp_path / "a.png", "--model", folder)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "this model sees images and has no image decoder to draw them" in result.stderr
    PICTURE.save(tmp_path / "a.png")
    assert run("generate", folder, "--image", tmp_path / "a.png", "-p", "what?", "-m", 2).exit_code == 0


def test_generate_with_an_image(image_folder, image_pair, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    result = run(
        "generate", image_folder, "--image", tmp_path / "a.png", "-p", "what is it?", "-m", 5, "--json"
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["text"] == mlx_pararnn.see(*image_pair, PICTURE, "what is it?", max_tokens=5)
    assert answer["image"] == str(tmp_path / "a.png")
    assert answer["prompt_tokens"] == 1 + 4 + 1 + len("what is it?\n")


@pytest.mark.parametrize(
    ("model", "image", "said"),
    [
        (None, "a.png", "no model that sees or draws comes with the package"),
        (BUNDLED, "a.png", "neither sees nor draws images"),
        ("folder", "none.png", "no such file"),
        ("folder", "a.txt", "is not an image of a known kind"),
    ],
)
def test_images_that_generate_refuses(image_folder, tmp_path, monkeypatch, model, image, said):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    (tmp_path / "a.txt").write_text("text")
    models = [] if model is None else [image_folder if model == "folder" else model]
    result = run("generate", *models, "--image", image, "-p", "what?")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert said in result.stderr


def test_without_pillow(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PararnnError, match="images need Pillow, which is missing: pip install 'mlx-pararnn"):
        mlx_pararnn.images.picture.pillow()
