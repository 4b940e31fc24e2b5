"""A language model with an image encoder and, where it draws, an image decoder; its folder.

The folder is a language model's, which every command reads, with the field `images` in config.json and the
weights of tokenizer and decoder in images.safetensors. The language model's last tokens are image tokens.

Letters in shapes: B images, S pixels on a side, N tokens of an image, T tokens, D the language model's width.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors import SafetensorError, safe_open

from ..errors import PararnnError, one_line
from ..hub import find_model
from ..loading import check_dtypes, load_model, load_tokenizer
from ..model import Model
from ..model_config import BITS
from ..model_files import open_regular
from ..module_arrays import named_arrays
from .config import RECIPE, ImageArgs
from .decoder import ImageDecoder
from .tokenizer import HybridTokenizer

WEIGHTS = "images.safetensors"
_GROUP_SIZES = (32, 64, 128)  # of MLX's affine mode


class ImageModel(nn.Module):
    """The language model, the image tokenizer, and the image decoder where there is one."""

    def __init__(self, args: ImageArgs, language_model: Model) -> None:
        super().__init__()
        width, vocabulary = language_model.args.hidden_size, language_model.args.vocab_size
        if args.first_token + args.codes > vocabulary:
            raise PararnnError(
                f"config.json: images.first_token {args.first_token} and {args.codes:,} image tokens go "
                f"beyond the vocabulary of {vocabulary:,}; both must be those that the model was trained with"
            )
        if max(args.begin_token, args.end_token) >= args.first_token:
            raise PararnnError(
                "config.json: images.begin_token and end_token must be below first_token, an image's"
            )
        self.args = args
        self.language_model = language_model
        self.image_tokenizer = HybridTokenizer(args, width)
        self.image_decoder = None if args.decoder is None else ImageDecoder(args, width)

    def embeddings(self, tokens: mx.array, features: mx.array, places: mx.array) -> mx.array:
        """What the language model reads: tokens' own embeddings, and an image's where it stands.

        Args:
            tokens: (B, T).
            features: (B, N, F), `HybridTokenizer.features`.
            places: (B, N), where in its row each token of the image stands; the ids there do not matter.

        Returns:
            (B, T, D).
        """
        own = self.language_model.model.embed_tokens(tokens)
        image = self.image_tokenizer.read(features).astype(own.dtype)
        return mx.put_along_axis(own, places[..., None], image, axis=1)

    def image_parts(self) -> dict[str, nn.Module]:
        """All but the language model: what images.safetensors holds."""
        parts: dict[str, nn.Module] = {"image_tokenizer": self.image_tokenizer}
        return parts if self.image_decoder is None else {**parts, "image_decoder": self.image_decoder}

    def image_weights(self) -> dict[str, mx.array]:
        """By the names that images.safetensors has for them."""
        return {
            f"{name}.{path}": weight
            for name, part in self.image_parts().items()
            for path, weight in named_arrays(part.parameters())
        }

    def quantize(self, bits: int, group_size: int = 64) -> None:
        """Pack the matrices of tokenizer and decoder, but for those whose rows no group divides.

        The language model is quantized as any other (`mlx_lm.utils.quantize_model`).

        Raises:
            PararnnError: MLX has no such bits or groups.
        """
        if bits not in BITS or group_size not in _GROUP_SIZES:
            raise PararnnError(
                f"{bits} bits in groups of {group_size}: MLX has {', '.join(map(str, BITS))} bits and groups "
                f"of {', '.join(map(str, _GROUP_SIZES))}"
            )
        for part in self.image_parts().values():
            nn.quantize(part, group_size, bits, class_predicate=_quantizable(group_size))
        self.args = replace(self.args, quantization={"group_size": group_size, "bits": bits})


def load_image_model(
    path_or_hf_repo: str | Path, *, adapter_path: str | Path | None = None, state: str | Path | None = None
) -> tuple[ImageModel, TokenizerWrapper]:
    """A model that sees, and its tokenizer; arguments as `mlx_pararnn.load` has them.

    Raises:
        PararnnError: there is no such model, it is not whole, or it is a language model alone.
    """
    path = find_model(path_or_hf_repo)
    language_model, config = load_model(path, adapter_path=adapter_path, state=state)
    if "images" not in config:
        raise PararnnError(f"{path}: this model neither sees nor draws images; {RECIPE}")
    file = path / WEIGHTS
    shapes = _shapes(file)
    try:
        args = ImageArgs.from_dict(config["images"])
        _check_layers(args, shapes)
        model = ImageModel(args, language_model)
        if args.quantization is not None:
            model.quantize(**_quantization(args.quantization))
    except PararnnError as error:
        raise PararnnError(f"{path}: {error}") from None
    _check_weights(model, shapes, file)
    try:
        model.load_weights(str(file), strict=False)
        check_dtypes(path, model)
        mx.eval(model.parameters())
    except (RuntimeError, OSError) as error:
        raise _unreadable(file, error) from error
    return model, load_tokenizer(path, config)


def _quantization(values: dict[str, int]) -> dict[str, int]:
    if not isinstance(values, dict) or values.keys() != {"bits", "group_size"}:
        raise PararnnError(f"config.json: images.quantization is {values!r}; it must say bits and group_size")
    return values


def _quantizable(group_size: int) -> Any:
    return lambda _, module: isinstance(module, nn.Linear) and module.weight.shape[-1] % group_size == 0


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """What the header of a file of weights says."""
    try:
        with open_regular(file):  # not a pipe, which safetensors would wait for
            pass
        with safe_open(file, "numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PararnnError(f"no {WEIGHTS} in {file.parent}; copy or train the model again") from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _check_layers(args: ImageArgs, shapes: dict[str, tuple[int, ...]]) -> None:
    """Before any is made: a config may name millions."""
    for name, prefix in (
        ("encoder", "image_tokenizer.encoder.layers."),
        ("decoder", "image_decoder.layers."),
    ):
        part = getattr(args, name)
        count = len({key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)})
        if part is not None and part.layers != count:
            raise PararnnError(
                f"config.json: images.{name}.layers is {part.layers}, and {WEIGHTS} has {count}; copy or "
                "train the model again"
            )


def _check_weights(model: ImageModel, shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """Names and shapes, before anything is read."""
    wanted = model.image_weights()
    for name in sorted(wanted.keys() | shapes.keys()):
        there, needed = shapes.get(name), wanted[name].shape if name in wanted else None
        if there != needed:
            raise PararnnError(
                f"{file}: does not fit config.json: {name} is {there or 'missing'} and should be "
                f"{needed or 'absent'}; copy or train the model again"
            )


def _unreadable(file: Path, error: Exception) -> PararnnError:
    return PararnnError(f"{file} cannot be read ({one_line(error)}); copy or train the model again")
