"""What each training learns from: batches of scenes. A batch is made from its number: runs can be resumed."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from mlx_pararnn.images.config import ImageArgs
from mlx_pararnn.images.image_prompts import question_text
from mlx_pararnn.images.image_tokenizer import HybridTokenizer
from mlx_pararnn.images.picture import to_pixels
from mlx_pararnn.loading import load_tokenizer
from mlx_pararnn.training.batches import Batch
from mlx_pararnn.training.tokenizers import END, write_tokenizer

from .pictures import Sprites, draw
from .scenes import Scene, questions, scene

VOCABULARY = 640
BEGIN_IMAGE, END_IMAGE = "<|image|>", "<|/image|>"
DESCRIBE = "describe the picture."
LENGTH = 88  # most tokens of a row: an image's, and those of all that is asked of it and answered
IMAGE_WEIGHT = 0.5  # of an image token's loss; a text token's is 1
# understanding, generation and text in every batch, as the paper has them
SHARES = (0.4, 0.4, 0.2)


class Words:
    """The tokenizer of captions, questions and answers: a BPE trained on them, and tokens around an image."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            _train_tokenizer(folder)
        self.folder = folder
        self.tokenizer = load_tokenizer(folder, {})
        self.end, self.begin_image, self.end_image = (
            self.tokenizer.convert_tokens_to_ids(token) for token in (END, BEGIN_IMAGE, END_IMAGE)
        )
        self.count = max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)  # type: ignore[no-any-return]

    def image_args(self, preset: str = "32px") -> ImageArgs:
        """The image tokens follow those of the text."""
        return ImageArgs.preset(preset, self.begin_image, self.end_image, self.count)


def _train_tokenizer(folder: Path) -> None:
    rng = random.Random(0)
    texts = [DESCRIBE]
    for _ in range(3000):
        shown = scene(rng)
        asked = questions(shown, rng)
        texts += [shown.caption(), *(f"{question}\n{answer}" for _, question, answer in asked)]
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(f"bpe:{VOCABULARY}", texts, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([BEGIN_IMAGE, END_IMAGE])
    tokenizer.save(str(folder / "tokenizer.json"))


class Scenes:
    """Endless batches, each from the number that it has: `make` is given its random numbers."""

    def __init__(self, seed: int, make: Callable[[random.Random], Batch]) -> None:
        self.seed, self.make = seed, make

    def starting_at(self, batch: int) -> Iterator[Batch]:
        while True:
            yield self.make(random.Random(f"{self.seed}/{batch}"))
            batch += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)


def pictures(
    rows: int, sprites: Sprites, rng: random.Random, held_out: bool = False
) -> tuple[list[Scene], np.ndarray]:
    """Scenes and their pictures (rows, S, S, 3), uint8."""
    shown = [scene(rng, held_out) for _ in range(rows)]
    return shown, np.array([draw(one, sprites, rng) for one in shown])


def captioned(rows: int, words: Words, sprites: Sprites, rng: random.Random) -> Batch:
    """Pictures and captions: `pixels`, and in `last` where in its row each caption ends. One target a row."""
    shown, images = pictures(rows, sprites, rng)
    texts = [words.encode(_worded(one, rng).caption()) for one in shown]
    longest = max(map(len, texts))
    tokens = np.full((rows, longest + 1), words.end)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    mask = np.zeros((rows, longest), np.float32)
    mask[:, 0] = 1
    last = np.array([len(text) for text in texts], np.int32)
    return Batch(tokens, mask, others={"pixels": to_pixels(images), "last": last})


def understanding(
    rows: int,
    words: Words,
    args: ImageArgs,
    sprites: Sprites,
    rng: random.Random,
    discrete_share: float = 0.5,
) -> Batch:
    """Questions about pictures: `pixels`, `places`, and in `discrete` which adapter each row goes through."""
    shown, images = pictures(rows, sprites, rng)
    made = [_seen_row(one, words, args, rng) for one in shown]
    tokens, mask = _padded(made, words)
    discrete = np.array([rng.random() < discrete_share for _ in shown])
    others = {"pixels": to_pixels(images), "discrete": discrete, "places": _places(rows, args)}
    return Batch(tokens, mask, others=others)


def mixture(
    rows: int,
    words: Words,
    args: ImageArgs,
    tokenizer: HybridTokenizer,
    sprites: Sprites,
    rng: random.Random,
    reader: HybridTokenizer | None = None,
) -> Batch:
    """Understanding, generation and text in SHARES; `features` of the pictures that are read, and `sees`.

    A row of generation has two scenes, so that rows are more alike in length. The encoder and the discrete
    adapter do not learn, so what they give is computed here. With a `reader` the features are its own, and
    only the tokens are the `tokenizer`'s.
    """
    first, second = round(SHARES[0] * rows), round((SHARES[0] + SHARES[1]) * rows)
    seen, images = pictures(first, sprites, rng)
    shown, to_draw = pictures(2 * (second - first), sprites, rng)
    features = (reader or tokenizer).features(mx.array(to_pixels(images)))
    drawn = (np.array(tokenizer.tokens(mx.array(to_pixels(to_draw)))) + args.first_token).tolist()
    made = [_seen_row(one, words, args, rng) for one in seen]
    drawings = [_drawing_row(one, ids, words, rng) for one, ids in zip(shown, drawn, strict=True)]
    made += [_joined(*pair) for pair in zip(drawings[::2], drawings[1::2], strict=True)]
    made += [_text_row(scene(rng), words, rng) for _ in range(rows - second)]
    tokens, mask = _padded(made, words)
    others = {
        "features": np.pad(np.array(features), ((0, rows - first), (0, 0), (0, 0))),
        "sees": np.arange(rows) < first,
        "places": _places(rows, args),
    }
    return Batch(tokens, mask, others=others)


def flows(
    rows: int, args: ImageArgs, tokenizer: HybridTokenizer, sprites: Sprites, rng: random.Random
) -> Batch:
    """Pictures, the embeddings of their discrete tokens, noise and times: what the decoder learns from."""
    _, images = pictures(rows, sprites, rng)
    pixels = to_pixels(images)
    condition = np.array(tokenizer.embed(tokenizer.tokens(mx.array(pixels))))
    numbers = np.random.default_rng(rng.getrandbits(64))
    others = {
        "pixels": pixels,
        "condition": condition,
        "noise": numbers.standard_normal(pixels.shape).astype(np.float32),
        "time": numbers.random(rows).astype(np.float32),
        "kept": numbers.random(rows) >= 0.1,  # of the others the decoder learns to do without a condition
    }
    return Batch(np.zeros((rows, 2), int), others=others)


Row = tuple[list[int], list[float]]  # tokens, and the weight of each one's loss


def _seen_row(shown: Scene, words: Words, args: ImageArgs, rng: random.Random) -> Row:
    """The picture, then in any order the wish for a caption and a question of each kind, with their answers.

    A caption tells everything: the state must hold the whole picture, not what one question asks.
    """
    image = [words.begin_image] * (1 + args.tokens) + [words.end_image]
    asked = [(DESCRIBE, _worded(shown, rng).caption())]
    asked += [(question, answer) for _, question, answer in questions(shown, rng)]
    rng.shuffle(asked)
    return _joined((image, [0.0] * len(image)), *_turns(asked, words))


def _drawing_row(shown: Scene, ids: list[int], words: Words, rng: random.Random) -> Row:
    """A caption and the picture's tokens."""
    asked = [*words.encode(_worded(shown, rng).caption()), words.begin_image]
    drawn = [*ids, words.end_image]
    return asked + drawn, [0.0] * len(asked) + [IMAGE_WEIGHT] * len(drawn)


def _text_row(shown: Scene, words: Words, rng: random.Random) -> Row:
    """A caption, and the questions about it with their answers; all of it is learned."""
    asked = [(question, answer) for _, question, answer in questions(shown, rng)]
    rng.shuffle(asked)
    tokens, _ = _joined((words.encode(f"{_worded(shown, rng).caption()}\n"), []), *_turns(asked, words))
    return tokens, [1.0] * len(tokens)


def _turns(asked: list[tuple[str, str]], words: Words) -> list[Row]:
    """Questions and answers, as a conversation without a chat template has them: answers are learned."""
    rows = []
    for number, (question, answer) in enumerate(asked):
        read = words.encode(("\n" if number else "") + question_text(question))
        said = [*words.encode(answer), words.end]
        rows.append((read + said, [0.0] * len(read) + [1.0] * len(said)))
    return rows


def _joined(*rows: Row) -> Row:
    """One after the other."""
    return [token for tokens, _ in rows for token in tokens], [w for _, weights in rows for w in weights]


def _worded(shown: Scene, rng: random.Random) -> Scene:
    return shown.turned() if rng.random() < 0.5 else shown


def _padded(rows: list[Row], words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, a multiple of 8: MLX compiles a step for each."""
    length = -8 * (-max(len(ids) - 1 for ids, _ in rows) // 8)
    assert length <= LENGTH, length
    tokens = np.full((len(rows), length + 1), words.end)
    mask = np.zeros((len(rows), length), np.float32)
    for number, (ids, weights) in enumerate(rows):
        tokens[number, : len(ids)] = ids
        mask[number, : len(ids) - 1] = weights[1:]
    return tokens, mask


def _places(rows: int, args: ImageArgs) -> np.ndarray:
    return np.tile(np.arange(1, args.tokens + 1, dtype=np.int32), (rows, 1))
