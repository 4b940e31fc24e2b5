"""The three trainings, each a model, batches and losses for the project's trainer, and what it leaves.

OUT holds words/ (the tokenizer of texts), a folder of checkpoints for each training, tokenizer.safetensors
after the first, and model/, which sees after the second and draws after the third.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_pararnn import load_image_model
from mlx_pararnn.compute.layer_ops import cross_entropy
from mlx_pararnn.convert.writers.image_folder import save_image_model
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.whole_file import whole_file
from mlx_pararnn.images.config import ImageArgs
from mlx_pararnn.images.decoder import ImageDecoder, flow_losses
from mlx_pararnn.images.image_model import ImageModel
from mlx_pararnn.images.image_tokenizer import HybridTokenizer
from mlx_pararnn.model import Model
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Losses, Trainer

from .ablation import VARIANTS, DiscreteReader, Sizes, backbone, check_variant
from .batches import Scenes, Words, captioned, flows, mixture, understanding
from .pictures import Sprites

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths; the defaults are the recipe's, tests take smaller ones.

    Attributes:
        images: fields of `ImageArgs` that are not the preset's.
        language: hidden_size, num_hidden_layers, num_heads and intermediate_size of the language model.
        small: the same of the models of the first training, which are not kept.
        cell: of the language model.
        variant: of the language part, one of `ablation.VARIANTS`.
        rows: pictures in a batch.
        steps: of each training, by name.
    """

    images: dict[str, Any]
    language: tuple[int, int, int, int]
    small: tuple[int, int, int, int]
    cell: str
    rows: int
    steps: dict[str, int]
    variant: str = "hybrid"


RECIPE = Recipe(
    images={},
    language=(256, 4, 4, 704),
    small=(128, 2, 4, 256),
    cell="gru",
    rows=48,
    steps={"contrastive": 2500, "alignment": 4500, "language": 2000, "decoder": 1500, "judge": 6000},
)


class Project:
    """What the trainings share.

    Args:
        out: where everything is written.
        icons: the folder where `npm install` ran.
        seed: of weights and scenes.
        report: given each line of the log.
    """

    def __init__(
        self, out: Path, icons: Path, recipe: Recipe = RECIPE, seed: int = 0, report: Report | None = None
    ) -> None:
        check_variant(recipe.variant)
        self.out, self.recipe, self.seed = out, recipe, seed
        self.report = report or (lambda line: print(json.dumps(line), flush=True))
        self.words, self.sprites = Words(out / "words"), Sprites(icons)
        args = self.words.image_args().to_dict()
        self.args = ImageArgs.from_dict({**args, **recipe.images})
        self._trainer: Trainer | None = None

    def stop(self) -> None:
        """End the training that runs after its step, with a checkpoint."""
        if self._trainer is not None:
            self._trainer.stop()

    @property
    def tokenizer_file(self) -> Path:
        return self.out / "tokenizer.safetensors"

    @property
    def reader_file(self) -> Path:
        """The tokenizer that images are read with, where that is another one than gives their tokens."""
        return self.out / "reader.safetensors"

    @property
    def model_folder(self) -> Path:
        return self.out / "model"

    @property
    def variant_file(self) -> Path:
        """The language part of a variant: language model and continuous adapter."""
        return self.out / f"language-{self.recipe.variant}.safetensors"

    def language_model(self, sizes: Sizes, vocabulary: int) -> Model:
        """A new one, of the recipe's cell."""
        return backbone(self.recipe.cell, sizes, vocabulary)

    def unified_model(self) -> ImageModel:
        """The variant's model without a decoder: a new language model and the trained tokenizer."""
        args = ImageArgs.from_dict({**self.args.to_dict(), "decoder": None})
        cell, vocabulary = self.recipe.cell, args.first_token + args.codes
        own = VARIANTS[self.recipe.variant] or cell
        model = ImageModel(args, backbone(own, self.recipe.language, vocabulary, size_of=cell))
        tokenizer = self.tokenizer()
        if self.recipe.variant == "separate":
            reader = self.tokenizer(self.reader_file)
            tokenizer.encoder, tokenizer.continuous = reader.encoder, reader.continuous
        elif self.recipe.variant == "discrete":
            discrete = DiscreteReader(self.args, self.recipe.language[0])
            discrete.update(tokenizer.parameters())
            tokenizer = discrete
        model.image_tokenizer = tokenizer
        return model

    def trained_model(self) -> tuple[ImageModel, TokenizerWrapper]:
        """What the trainings have left: model/, or a variant's language part with the decoder in model/."""
        whole, words = load_image_model(self.model_folder)
        if self.recipe.variant == "hybrid":
            return whole, words
        if not self.variant_file.is_file():
            raise PararnnError(f"{self.variant_file}: is not there; train it first")
        model = self.unified_model()
        model.load_weights(str(self.variant_file))
        model.args, model.image_decoder = whole.args, whole.image_decoder
        return model, words

    def tokenizer(self, file: Path | None = None) -> HybridTokenizer:
        """The image tokenizer as the first training left it, or the one in a file."""
        file = file or self.tokenizer_file
        if not file.is_file():
            raise PararnnError(f"{file}: is not there; train it first")
        tokenizer = HybridTokenizer(self.args, self.recipe.language[0])
        tokenizer.load_weights(str(file))
        return tokenizer

    def train(
        self,
        name: str,
        model: nn.Module,
        batches: Scenes,
        losses: Losses,
        learning_rate: float,
        suffix: str = "",
    ) -> bool:
        """Train, or go on with training, in the folder `name` and `suffix`; True if that is done."""
        settings = Settings(
            steps=self.recipe.steps[name],
            batch_size=self.recipe.rows,
            learning_rate=learning_rate,
            final_rate=0.02,
            warmup=100,
            beta2=0.98,
            weight_decay=0.05,
            report_every=20,
            eval_every=0,
            save_every=100,
            seed=self.seed,
        )
        folder = self.out / (name + suffix)
        report = lambda line: self.report({"training": name, **line})  # noqa: E731
        self._trainer = Trainer(model, batches, settings, folder=folder, report=report, losses=losses)
        self._trainer.resume()
        return not self._trainer.run().stopped

    def seeded(self, name: str, apart: bool = False) -> int:
        """A seed for each training, and one for it done a second time; it seeds MLX too."""
        seed = self.seed * 100 + 50 * apart + list(RECIPE.steps).index(name)
        mx.random.seed(seed)
        return seed


# 1. The image tokenizer


class Contrast(nn.Module):
    """The encoder and a reader of captions, both to one space."""

    def __init__(self, tokenizer: HybridTokenizer, reader: Model, features: int) -> None:
        super().__init__()
        self.encoder, self.reader = tokenizer, reader
        tokenizer.freeze()
        tokenizer.encoder.unfreeze()
        width = reader.args.hidden_size
        self.image_proj = nn.Linear(features, width, bias=False)
        self.text_proj = nn.Linear(width, width, bias=False)
        self.log_scale = mx.array(2.0)

    def similarities(self, pixels: mx.array, tokens: mx.array, last: mx.array) -> mx.array:
        """Of each image to each caption (B, B): cosines times a learned scale."""
        image = self.image_proj(self.encoder.features(pixels).mean(axis=1))
        cache = self.reader.make_cache(tokens.shape[0])
        hidden = self.reader.model(tokens, cache, output_wanted=True)
        text = self.text_proj(mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
        image, text = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        return mx.exp(mx.minimum(self.log_scale, 4.6)) * image @ text.T


def contrastive_losses(model: Any, arrays: dict[str, mx.array], _: Any) -> tuple[mx.array, list[Any]]:
    """CLIP's (arXiv 2103.00020): the caption of each image, and the image of each caption."""
    table = model.similarities(arrays["pixels"], arrays["tokens"], arrays["last"])
    own = mx.arange(len(table))
    return (cross_entropy(table, own) + cross_entropy(table.T, own)).sum() / 2, []


class Alignment(nn.Module):
    """The tokenizer and a small language model that reads it, by one adapter or the other."""

    def __init__(self, tokenizer: HybridTokenizer, reader: Model) -> None:
        super().__init__()
        self.image_tokenizer, self.reader = tokenizer, reader
        ours, theirs = tokenizer.continuous.layers[2].weight.shape[0], reader.args.hidden_size
        self.proj = nn.Linear(ours, theirs, bias=False)

    def read(self, pixels: mx.array, discrete: mx.array) -> mx.array:
        """Embeddings (B, N, D) by the discrete adapter where `discrete` (B,), else by the continuous one."""
        tokenizer = self.image_tokenizer
        features = tokenizer.features(pixels)
        codes = tokenizer.embed_codes(tokenizer.encode(features))
        return self.proj(mx.where(discrete[:, None, None], codes, tokenizer.read(features)))


def alignment_losses(model: Any, arrays: dict[str, mx.array], _: Any) -> tuple[mx.array, list[Any]]:
    """Of the answers, after an image that came through one adapter or the other."""
    image = model.read(arrays["pixels"], arrays["discrete"])
    own = model.reader.model.embed_tokens(arrays["tokens"][:, :-1])
    embeddings = mx.put_along_axis(own, arrays["places"][..., None], image, axis=1)
    return _language_losses(model.reader, arrays, embeddings), []


def train_tokenizer(project: Project) -> None:
    """Contrast images with captions, then answer questions through a small language model.

    For the variant "separate" this trains the tokenizer that reads, whose images never go through the
    discrete adapter.
    """
    reads_only = project.recipe.variant == "separate"
    file = project.reader_file if reads_only else project.tokenizer_file
    suffix, share = ("-reader", 0.0) if reads_only else ("", 0.5)
    words, args, recipe = project.words, project.args, project.recipe
    seed = project.seeded("contrastive", apart=reads_only)
    tokenizer = HybridTokenizer(args, recipe.language[0])
    features = args.encoder.hidden_size * args.stride**2
    contrast = Contrast(tokenizer, project.language_model(recipe.small, words.count), features)
    made = partial(captioned, recipe.rows, words, project.sprites)
    if not project.train("contrastive", contrast, Scenes(seed, made), contrastive_losses, 1e-3, suffix):
        return
    tokenizer.unfreeze()
    # The few words of answers would make it forget things: docs/images.md, runs so far.
    tokenizer.encoder.freeze()
    seed = project.seeded("alignment")
    alignment = Alignment(tokenizer, project.language_model(recipe.small, words.count))
    made = partial(understanding, recipe.rows, words, args, project.sprites, discrete_share=share)
    if project.train("alignment", alignment, Scenes(seed, made), alignment_losses, 1e-3, suffix):
        _save(tokenizer, file)


def _save(module: nn.Module, file: Path) -> None:
    """Its weights, whole or not at all."""
    with whole_file(file) as partial_file:
        module.save_weights(str(partial_file))


# 2. The language model


def unified_losses(model: Any, arrays: dict[str, mx.array], _: Any) -> tuple[mx.array, list[Any]]:
    """Of answers, image tokens and text, each with its weight."""
    language, tokens = model.language_model, arrays["tokens"][:, :-1]
    own = language.model.embed_tokens(tokens)
    seen = model.embeddings(tokens, arrays["features"], arrays["places"])
    embeddings = mx.where(arrays["sees"][:, None, None], seen, own)
    return _language_losses(language, arrays, embeddings), []


def _language_losses(model: Model, arrays: dict[str, mx.array], embeddings: mx.array) -> mx.array:
    tokens = arrays["tokens"]
    logits = model(tokens[:, :-1], input_embeddings=embeddings)
    return (cross_entropy(logits, tokens[:, 1:]) * arrays["mask"]).sum()


def train_language_model(project: Project) -> None:
    """Understanding, generation and text together; encoder and discrete adapter stay as they are."""
    words, recipe, variant = project.words, project.recipe, project.recipe.variant
    seed = project.seeded("language")
    model = project.unified_model()
    model.image_tokenizer.freeze()
    if variant != "discrete":
        model.image_tokenizer.continuous.unfreeze()
    writer, reader = model.image_tokenizer, None
    if variant == "separate":
        writer, reader = project.tokenizer(), writer
    made = partial(mixture, recipe.rows, words, model.args, writer, project.sprites, reader=reader)
    suffix = "" if variant == "hybrid" else f"-{variant}"
    if not project.train("language", model, Scenes(seed, made), unified_losses, 2e-3, suffix):
        return
    if variant == "hybrid":
        save_image_model(model, words.folder, project.model_folder, force=True)
    else:
        _save(model, project.variant_file)


# 3. The image decoder


def decoder_losses(model: Any, arrays: dict[str, mx.array], _: Any) -> tuple[mx.array, list[Any]]:
    """The flow's."""
    return flow_losses(
        model, *(arrays[n] for n in ("pixels", "condition", "noise", "time", "kept"))
    ).sum(), []


def train_decoder(project: Project) -> None:
    """From the discrete tokens of pictures to their pixels; then model/ draws too."""
    words, args, recipe = project.words, project.args, project.recipe
    seed = project.seeded("decoder")
    decoder = ImageDecoder(args, recipe.language[0])
    tokenizer = project.tokenizer()
    made = partial(flows, recipe.rows, args, tokenizer, project.sprites)
    if not project.train("decoder", decoder, Scenes(seed, made), decoder_losses, 1e-3):
        return
    sees, _ = load_image_model(project.model_folder)
    model = ImageModel(args, sees.language_model)
    model.image_tokenizer, model.image_decoder = sees.image_tokenizer, decoder
    save_image_model(model, words.folder, project.model_folder, force=True)
