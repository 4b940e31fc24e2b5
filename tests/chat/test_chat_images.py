"""Conversations about images: what the model reads, undone, saved and loaded; the commands of `chat`."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.app import app
from mlx_pararnn.cli.chat_commands import dropped_path, free_path
from mlx_pararnn.images.image_prompts import Seen, identity
from tests.support.demo import DEMO

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 8, 3)).astype(np.uint8)) for n in range(2)
]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def templated(image_pair):
    model, tokenizer = image_pair
    tokenizer.chat_template = TEMPLATE
    tokenizer.has_chat_template = True
    yield model, tokenizer
    tokenizer.chat_template, tokenizer.has_chat_template = None, False


def chat_of(model, tokenizer, **more):
    return Chat(model.language_model, tokenizer, images=model, **more)


def said(conversation, text, **more):
    return "".join(r.text for r in conversation.respond(text, max_tokens=4, **more))


def states(conversation):
    return [np.array(layer.cache[0]) for layer in conversation.cache]


def same(ours, theirs):
    return all(np.abs(a - b).max() < 1e-5 for a, b in zip(states(ours), states(theirs), strict=True))


def test_a_message_about_an_image_is_answered_as_see_answers(image_pair):
    model, tokenizer = image_pair
    conversation = chat_of(*image_pair)
    answer = said(conversation, "what is it?", image=PICTURES[0])
    assert answer == model.see(tokenizer, PICTURES[0], "what is it?", max_tokens=4)
    assert [sorted(m) for m in conversation.messages] == [["content", "image", "role"], ["content", "role"]]
    read = conversation.tokens
    said(conversation, "and now?")
    assert conversation.tokens == read + 4 + len(tokenizer.encode("\nand now?\n"))  # nothing is read again
    other = chat_of(*image_pair)
    said(other, "what is it?", image=PICTURES[1])
    assert not same(other, conversation)


@pytest.mark.parametrize("form", ["plain", "template"])
def test_undo_and_a_saved_conversation_remember_the_image(form, request, tmp_path):
    pair = request.getfixturevalue("image_pair" if form == "plain" else "templated")
    conversation = chat_of(*pair)
    first = said(conversation, "one?", image=PICTURES[0])
    path = conversation.save(tmp_path / "talk")
    here = conversation.branch()
    said(conversation, "two?", image=PICTURES[1])
    assert conversation.undo() == "two?"
    assert same(conversation, here)
    again = chat_of(*pair)
    again.load(path)
    assert same(again, here)
    assert again.messages == here.messages
    assert "".join(r.text for r in again.regenerate(max_tokens=4)) == first  # from the saved image
    assert same(again, here)
    without = Chat(pair[0].language_model, pair[1])
    without.load(path)
    with pytest.raises(PararnnError, match="loaded without its images"):
        list(without.regenerate(max_tokens=4))


def test_an_image_stands_in_its_message_of_a_template(templated):
    model, tokenizer = templated
    conversation = chat_of(model, tokenizer)
    said(conversation, "one?", image=PICTURES[0])
    whole = len(tokenizer.encode("[u]one?~[a]")) + 2 + model.args.tokens
    assert conversation.tokens == whole + 4
    said(conversation, "two?", image=PICTURES[1])
    rest = len(tokenizer.encode("~[u]two?~[a]")) + 2 + model.args.tokens
    assert conversation.tokens == whole + 4 + rest + 4
    conversation.set_system("be brief")
    assert conversation.tokens == 0
    said(conversation, "three?")  # all is read again, images too
    assert conversation.tokens > whole + rest + 2 * (2 + model.args.tokens)


def test_who_sees_nothing_says_so():
    conversation = Chat(*mlx_pararnn.load(DEMO))
    with pytest.raises(PararnnError, match="this model sees no images"):
        list(conversation.respond("what?", image=PICTURES[0]))


def test_two_images_are_never_the_same_text():
    seen = [Seen(2, mx.array(np.random.default_rng(n).standard_normal((3, 4)))) for n in (0, 1)]
    a, b = (identity([7, 9, 9, 9, 9, 8], [image]) for image in seen)
    assert (a[0], a[5]) == (b[0], b[5]) == (7, 8)
    assert all(n < 0 for n in a[1:5])
    assert not set(a[1:5]) & set(b[1:5])
    assert identity([7, 9, 9, 9, 9, 8], [seen[0]]) == a


def run(*args, lines):
    return CliRunner().invoke(app, ["chat", *map(str, args)], input="\n".join([*lines, ""]))


def test_the_commands(image_folder, image_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURES[0].save("a cat.png")
    (tmp_path / "text.png").write_text("no image")
    model, tokenizer = image_pair
    options = image_folder, "--max-tokens", 4, "--temp", 0, "--seed", 1, "--no-history"
    result = run(
        *options,
        lines=[
            "/image",
            "/image none.png",
            "/image text.png",
            "/image a cat.png",
            "what is it?",
            "/draw a dog",
            "/draw",
            "/undo",
            "a\\ cat.png",
            "what is it?",
            "/help",
        ],
    )
    assert result.exit_code == 0, result.output
    answer = model.see(tokenizer, PICTURES[0], "what is it?", max_tokens=4)
    assert result.stdout.count(answer) == 2
    for line in (
        "/image needs a file name.",
        "error: none.png: no such file; give an image file",
        "error: text.png: is not an image of a known kind",
        "The next message asks about a cat.png.",
        "Drawn: drawing.png",
        "error: there is nothing to draw",
        "Taken back: what is it?",
        "/draw TEXT ",
    ):
        assert line in result.stderr
    drawn = model.draw(tokenizer, "a dog", seed=1)
    assert (np.array(Image.open("drawing.png")) == np.array(drawn)).all()
    assert free_path(tmp_path / "drawing.png") == tmp_path / "drawing-2.png"


def test_models_without_images_say_so_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURES[0].save("cat.png")
    result = run(DEMO, "--no-history", lines=["/image cat.png", "/image", "/draw a dog", "/help"])
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: this model sees no images"] * 2 + ["error: this model draws no images"]
    assert "/image" not in result.stderr.partition("/help  ")[2]


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "file://{}", "escaped", " {} "])
def test_a_path_as_terminals_drop_it(tmp_path, form):
    path = tmp_path / "a cat.png"
    path.touch()
    text = str(path).replace(" ", "\\ ") if form == "escaped" else form.format(path)
    assert dropped_path(text.replace(" cat", "%20cat") if "file:" in form else text) == path
