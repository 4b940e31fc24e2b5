"""Prompts in which images stand between texts: their token ids, and the embeddings that the model reads.

Letters in shapes: S pixels on a side, N tokens of an image, T tokens, D the language model's width.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import PararnnError
from .config import ImageArgs
from .modules import ImageModules
from .picture import to_pixels

# Stands for an image in a text, such as a chat template's; nobody can guess it.
MARK = f"\ue002{secrets.token_hex(8)}\ue003"


@dataclass(frozen=True)
class ImagePrompt:
    """Token ids, and where the images stand among them.

    Attributes:
        tokens: (T) ids; those of an image are all begin_token, for what is there is in the embeddings alone.
        pictures: of each image where its first token stands, and its pixels (S, S, 3), uint8.
    """

    tokens: list[int]
    pictures: list[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Seen:
    """An image in a prompt: where its first token stands, and its embeddings (N, D)."""

    place: int
    embeddings: mx.array

    @property
    def end(self) -> int:
        """Where the token after its last one stands."""
        return self.place + len(self.embeddings)


def lay_out(
    args: ImageArgs, tokenizer: TokenizerWrapper, text: str, pictures: Sequence[np.ndarray]
) -> ImagePrompt:
    """The prompt of a text that holds MARK where each picture (S, S, 3) stands.

    Raises:
        PararnnError: there are more pictures than marks, or fewer.
    """
    first, *others = text.split(MARK)
    if len(others) != len(pictures):
        raise PararnnError(
            f"this model's chat template shows {len(others)} of {len(pictures)} images; send none"
        )
    tokens: list[int] = list(tokenizer.encode(first, add_special_tokens=False))
    places = []
    for other in others:
        places.append(len(tokens) + 1)
        tokens += [args.begin_token] * (1 + args.tokens) + [args.end_token]
        tokens += tokenizer.encode(other, add_special_tokens=False)
    return ImagePrompt(tokens, list(zip(places, pictures, strict=True)))


def question_text(question: str) -> str:
    """How a question stands before its answer."""
    return f"{question.strip()}\n"


def without_template(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation about images as a model without a chat template reads it: a line for each message."""
    return "".join(question_text(message["content"]) for message in messages)


def look(model: ImageModules, prompt: ImagePrompt) -> list[Seen]:
    """What the language model reads of the prompt's images."""
    seen = []
    for place, picture in prompt.pictures:
        features = model.image_tokenizer.features(mx.array(to_pixels(picture[None])))
        seen.append(Seen(place, model.image_tokenizer.read(features)[0]))
    return seen


def embeddings(
    model: ImageModules, tokens: Sequence[int], seen: Sequence[Seen], begin: int = 0, end: int | None = None
) -> mx.array:
    """Of a prompt's tokens from `begin` to `end`: their own, and an image's where it stands (T, D)."""
    end = len(tokens) if end is None else end
    rows = model.language_model.model.embed_tokens(mx.array(list(tokens[begin:end])))
    for image in seen:
        first, last = max(image.place, begin), min(image.end, end)
        if first < last:
            inside = image.embeddings[first - image.place : last - image.place]
            rows[first - begin : last - begin] = inside.astype(rows.dtype)
    return rows


def identity(tokens: Sequence[int], seen: Sequence[Seen]) -> list[int]:
    """Numbers that are the same for two prompts only as far as the model reads the same.

    Where an image stands they are negative, made of what is read there; elsewhere they are the tokens.
    """
    numbers = list(tokens)
    for image in seen:
        content = hashlib.shake_128(np.array(image.embeddings.astype(mx.float32)).tobytes())
        count = 1 + image.end - image.place  # with begin_token, so that few tokens tell images apart too
        words = np.frombuffer(content.digest(4 * count), "<u4") | 1 << 31
        numbers[image.place - 1 : image.end] = words.view("<i4").tolist()
    return numbers
