"""The server with a model that sees and draws: images in all protocols, drawings, and what is refused."""

import base64
import io
import threading
import zlib

import mlx.core as mx
import numpy as np
import openai
import pytest
from mlx.utils import tree_map
from PIL import Image

import mlx_pararnn
from mlx_pararnn.chat.prompt_cache import PromptCache
from mlx_pararnn.chat.server.batch import Batch
from mlx_pararnn.chat.server.jobs import Job
from mlx_pararnn.chat.server.reading import read
from mlx_pararnn.chat.server.sent_images import MOST_IMAGES
from mlx_pararnn.images.image_prompts import MARK, ImagePrompt, embeddings, lay_out, look
from tests.support.image_models import image_model, write_image_model
from tests.support.serving import client_of, running

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 8, 3)).astype(np.uint8)) for n in range(2)
]


def file_of(picture, kind="PNG"):
    data = io.BytesIO()
    picture.save(data, kind)
    return data.getvalue()


def url_of(picture):
    return f"data:image/png;base64,{base64.b64encode(file_of(picture)).decode()}"


def about(picture, text):
    return [{"type": "image_url", "image_url": {"url": url_of(picture)}}, {"type": "text", "text": text}]


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    """Its language model's weights are large: with small ones the state forgets what it saw."""
    model = image_model()
    language = model.language_model
    language.update(tree_map(lambda weight: 3 * weight, language.parameters()))
    return write_image_model(model, tmp_path_factory.mktemp("images") / "model")


@pytest.fixture(scope="module")
def pair(seeing_folder):
    return mlx_pararnn.load_image_model(seeing_folder)


@pytest.fixture(scope="module")
def seeing(seeing_folder):
    with running(seeing_folder, "--temp", 0, "--max-tokens", 300) as server:
        yield server


@pytest.fixture(scope="module")
def sees(seeing):
    return client_of(seeing)


def ask(client, *contents, **more):
    messages = [
        {"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)
    ]
    return client.chat.completions.create(model="any", messages=messages, max_tokens=6, **more)


@pytest.mark.large
def test_an_image_part_is_answered_as_see_answers_and_images_are_not_mixed_up(sees, pair):
    """Their prompts have the same token ids; the same image again is found in the prompt cache."""
    model, tokenizer = pair
    expected = [model.see(tokenizer, picture, "a", max_tokens=6) for picture in PICTURES]
    assert expected[0] != expected[1]
    length = len(tokenizer.encode("a\n")) + 2 + model.args.tokens
    for n, cached in ((0, False), (1, False), (0, True), (1, True)):
        answer = ask(sees, about(PICTURES[n], "a"))
        assert answer.choices[0].message.content == expected[n]
        assert answer.usage.prompt_tokens == length
        assert (answer.usage.prompt_tokens_details.cached_tokens > 0) == cached
    more = ask(sees, about(PICTURES[0], "a"), expected[0], "and now?")
    assert more.usage.prompt_tokens_details.cached_tokens >= 1 + model.args.tokens


@pytest.mark.large
def test_the_other_protocols_take_images_too(sees, seeing, pair):
    model, tokenizer = pair
    expected = model.see(tokenizer, PICTURES[0], "a", max_tokens=6)
    content = [
        {"type": "input_image", "image_url": url_of(PICTURES[0]), "detail": "auto"},
        {"type": "input_text", "text": "a"},
    ]
    answer = sees.responses.create(
        model="any", input=[{"role": "user", "content": content}], max_output_tokens=6
    )
    assert answer.output_text == expected
    source = {"type": "base64", "media_type": "image/png", "data": url_of(PICTURES[0]).partition(",")[2]}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": "a"}]
    body = {"model": "any", "max_tokens": 6, "messages": [{"role": "user", "content": parts}]}
    assert sees.post("/messages", cast_to=object, body=body)["content"][0]["text"] == expected


@pytest.mark.large
def test_drawings_are_those_of_the_seed(sees, pair):
    model, tokenizer = pair
    answer = sees.images.generate(
        model="any", prompt="a dog", n=2, size="8x8", response_format="b64_json", extra_body={"seed": 3}
    )
    assert answer.created > 0
    for seed, made in zip((3, 4), answer.data, strict=True):
        found = Image.open(io.BytesIO(base64.b64decode(made.b64_json)))
        assert found.format == "PNG"
        expected = np.array(model.draw(tokenizer, "a dog", seed=seed)).astype(int)
        assert np.abs(np.array(found) - expected).max() <= 1
    assert len(sees.images.generate(prompt="a dog", size="auto").data) == 1


@pytest.mark.large
def test_answers_go_on_while_others_draw(sees, pair):
    """And a picture is its seed's alone, whoever samples beside it."""
    model, tokenizer = pair
    drawn = []
    thread = threading.Thread(
        target=lambda: drawn.append(sees.images.generate(prompt="a dog", n=4, extra_body={"seed": 1}))
    )
    thread.start()
    answers = [ask(sees, about(PICTURES[0], "a"), temperature=1.0) for _ in range(3)]
    thread.join()
    assert all(answer.choices[0].finish_reason for answer in answers)
    found = np.array(Image.open(io.BytesIO(base64.b64decode(drawn[0].data[0].b64_json))))
    expected = np.array(model.draw(tokenizer, "a dog", seed=1)).astype(int)
    assert np.abs(found - expected).max() <= 1


def bomb():
    """25 million pixels in a few bytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (5_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sent(data, kind="png"):
    return [{"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}]


@pytest.mark.large
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}], "opens no addresses"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "opens no addresses"),
        ([{"type": "image_url", "image_url": {"url": "data:text/html;base64,AAAA"}}], "opens no addresses"),
        ([{"type": "input_image", "file_id": "file-1"}], "opens no addresses"),
        (sent("&&&&"), "not base64"),
        (sent(base64.b64encode(b"no image").decode()), "not an image of a known kind"),
        (sent(base64.b64encode(bomb()).decode()), "5000 x 5000 pixels, more than 16 million"),
        (sent(base64.b64encode(file_of(PICTURES[0])[:60]).decode()), "cannot be read as an image"),
        (about(PICTURES[0], "x") * (MOST_IMAGES + 1), f"messages have {MOST_IMAGES + 1} images"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(sees, content, said):
    with pytest.raises(openai.BadRequestError, match=said):
        ask(sees, content)


@pytest.mark.large
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": " "}, "there is nothing to draw"),
        ({"prompt": "x" * 5000}, "prompt: .*at most 4000 characters"),
        ({"prompt": "a", "n": 11}, "n must be at most 10"),
        ({"prompt": "a", "size": "1024x1024"}, "size can only be auto or 8x8"),
        ({"prompt": "a", "response_format": "url"}, "response_format"),
        ({"prompt": "a", "output_format": "webp"}, "output_format"),
        ({"prompt": "a", "quality": "hd"}, "quality"),
        ({"prompt": "a", "stream": True}, "stream is not taken"),
    ],
)
def test_drawings_that_cannot_be_made_name_the_field(sees, fields, said):
    with pytest.raises(openai.BadRequestError, match=said):
        sees.post("/images/generations", cast_to=object, body=fields)


def test_a_model_without_images_says_so(client):
    with pytest.raises(openai.BadRequestError, match="this model sees none"):
        ask(client, about(PICTURES[0], "a"))
    with pytest.raises(openai.NotFoundError, match="this model draws no images"):
        client.images.generate(prompt="a dog")


def test_a_row_that_is_suspended_reads_its_image_again(pair):
    """From the beginning, or from a state inside of the image."""
    model, tokenizer = pair
    language = model.language_model
    pictures = [np.array(PICTURES[0])]
    prompt = lay_out(model.args, tokenizer, MARK + "a\n", pictures)
    whole = language(mx.array([prompt.tokens]), input_embeddings=whole_embeddings(model, prompt))
    for read_before in (0, 3):
        job = Job(prompt.tokens, 4, None, None, pictures=prompt.pictures)
        job.look(look(model, prompt))
        if read_before:
            job.cache = language.make_cache()
            language(
                mx.array([prompt.tokens[:read_before]]),
                cache=job.cache,
                input_embeddings=whole_embeddings(model, prompt)[:, :read_before],
            )
        for _ in read(job, Batch(language, set(), 1, PromptCache()), model):
            pass
        assert job.cache[0].offset == job.images_end == 1 + model.args.tokens
        logits = language(mx.array([prompt.tokens[job.images_end :]]), cache=job.cache)
        np.testing.assert_allclose(np.array(logits[0, -1]), np.array(whole[0, -1]), atol=5e-5)


def whole_embeddings(model, prompt: ImagePrompt):
    return embeddings(model, prompt.tokens, look(model, prompt))[None]
