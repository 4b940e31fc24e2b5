"""A picture from words, and words about a picture."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import PararnnError
from ..generation import COLDEST, check_text, check_tokens, encode, find_room, stream_generate
from .config import RECIPE
from .image_prompts import MARK, embeddings, lay_out, look, question_text
from .modules import ImageModules
from .picture import pillow, read_picture, to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 25
GUIDANCE = 2.0
_READ_STEP = 512  # tokens of a text that are read at a time


def draw(
    model: ImageModules,
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    seed: int | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    temp: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    preview: Callable[["Image"], None] | None = None,
) -> "Image":
    """A picture of what `text` says: image tokens from the language model, then pixels from the decoder.

    Args:
        seed: of both; None goes on with MLX's random numbers.
        steps: of the decoder.
        guidance: how much the decoder follows the tokens; 1 is as it was trained.
        temp: of sampling the tokens; 0 takes the likeliest.
        progress: called with what is done and how much there is: each token and each step counts one.
        preview: called with the picture as it is after each step of the decoder.

    Raises:
        PararnnError: the model has no image decoder, the text is empty or too long, or a number is no use.
    """
    pixels = None
    drawn = drawing(model, tokenizer, text, seed=seed, steps=steps, guidance=guidance, temp=temp)
    for done, pixels in enumerate(drawn, 1):
        progress(done, model.args.tokens + steps)
        if pixels is not None and preview is not None:
            preview(to_picture(pixels))
    assert pixels is not None
    return to_picture(pixels)


def drawing(
    model: ImageModules,
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    seed: int | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    temp: float = 1.0,
) -> Iterator[np.ndarray | None]:
    """`draw`, step by step: None for each image token, then for each step of the decoder its pixels.

    Between two steps others may compute: the random numbers of a seed are this drawing's own.

    Yields:
        None, or (S, S, 3) from -1 to 1, still noisy but for the last.
    """
    check_can_draw(model)
    check_drawing(text, steps, guidance, temp)
    keys = _Keys(seed)
    tokens: list[int] = []
    for token in _image_tokens(model, tokenizer, text, temp, keys):
        tokens.append(token)
        yield None
    condition = model.image_tokenizer.embed(mx.array(tokens)[None])
    noise = mx.random.normal((1, model.args.size, model.args.size, 3), key=keys.next())
    decoder = model.image_decoder
    assert decoder is not None
    for pixels in decoder.sampled(condition, noise, steps, guidance):
        yield np.array(pixels[0].astype(mx.float32))


def see(
    model: ImageModules,
    tokenizer: TokenizerWrapper,
    image: "Path | str | bytes | Image",
    question: str,
    max_tokens: int = 256,
    **kwargs: Any,
) -> str:
    """What the model answers to a question about an image.

    Args:
        image: a file, its bytes, or an image of Pillow's; see `picture.read_picture`.
        max_tokens, kwargs: `mlx_pararnn.stream_generate`'s.

    Raises:
        PararnnError: the image cannot be read, or what `stream_generate` raises.
    """
    answer = stream_see(model, tokenizer, image, question, max_tokens, **kwargs)
    return "".join(response.text for response in answer)


def stream_see(
    model: ImageModules,
    tokenizer: TokenizerWrapper,
    image: "Path | str | bytes | Image",
    question: str,
    max_tokens: int = 256,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """`see`, piece by piece, as `mlx_pararnn.stream_generate` yields."""
    tokens, embeddings = image_prompt(model, tokenizer, image, question)
    language = model.language_model
    yield from stream_generate(language, tokenizer, tokens, max_tokens, input_embeddings=embeddings, **kwargs)


def image_prompt(
    model: ImageModules, tokenizer: TokenizerWrapper, image: "Path | str | bytes | Image", question: str
) -> tuple[list[int], mx.array]:
    """Token ids (T) and embeddings (T, D) of an image and a question about it.

    Where the image stands the ids are begin_token: what is there is in the embeddings alone.
    """
    check_text(question)
    picture = read_picture(image, model.args.size)
    prompt = lay_out(model.args, tokenizer, MARK + question_text(question), [picture])
    return prompt.tokens, embeddings(model, prompt.tokens, look(model, prompt))


def drawing_prompt(model: ImageModules, tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """The tokens that an image's follow; raises PararnnError where a text leaves no room for them."""
    args, language = model.args, model.language_model
    prompt = [*encode(tokenizer, text.strip()), args.begin_token]
    check_tokens(prompt, language.args.vocab_size)
    room = find_room(language, len(prompt))
    if room is not None and room < args.tokens:
        raise PararnnError(f"the text leaves {room} of {args.tokens} positions for the image; shorten it")
    return prompt


def check_can_draw(model: ImageModules) -> None:
    """Raise PararnnError for a model without an image decoder."""
    if model.image_decoder is None:
        raise PararnnError(f"this model sees images and has no image decoder to draw them; {RECIPE}")


def check_drawing(text: str, steps: int, guidance: float, temp: float) -> None:
    """Raise PararnnError for what cannot be drawn, before anything is loaded."""
    pillow()
    check_text(text)
    if not text.strip():
        raise PararnnError("there is nothing to draw; say what, as in: a red apple on blue")
    if not (type(steps) is int and 1 <= steps <= 1000):
        raise PararnnError(f"steps is {steps!r}; it must be a whole number from 1 to 1000")
    for name, value in (("guidance", guidance), ("temp", temp)):
        if not 0 <= value <= 100:
            raise PararnnError(f"{name} is {value!r}; it must be a number from 0 to 100")


class _Keys:
    """Keys of random numbers, those that MLX itself takes one after the other from a seed; None without."""

    def __init__(self, seed: int | None) -> None:
        self._key = None if seed is None else mx.random.key(seed)

    def next(self) -> mx.array | None:
        if self._key is None:
            return None
        self._key, key = mx.random.split(self._key)
        return key


def _image_tokens(
    model: ImageModules, tokenizer: TokenizerWrapper, text: str, temp: float, keys: _Keys
) -> Iterator[int]:
    """Discrete tokens (N), from 0 on, that the language model writes after a text."""
    args, language = model.args, model.language_model
    cache, unread = language.make_cache(), drawing_prompt(model, tokenizer, text)
    while len(unread) > _READ_STEP:
        language(mx.array([unread[:_READ_STEP]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        unread = unread[_READ_STEP:]
    for _ in range(args.tokens):
        logits = language(mx.array([unread]), cache=cache)[0, -1]
        choices = logits[args.first_token : args.first_token + args.codes].astype(mx.float32)
        cold = temp < COLDEST
        chosen = mx.argmax(choices) if cold else mx.random.categorical(choices / temp, key=keys.next())
        token = cast(int, chosen.item())
        yield token
        unread = [args.first_token + token]
