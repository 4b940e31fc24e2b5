"""The modules of a model that sees and draws: language model, image tokenizer, image decoder.

Letters in shapes: B images, S pixels on a side, N tokens of an image, T tokens, D the language model's width.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..compute.module_arrays import named_arrays
from ..errors import PararnnError
from ..files.quantization_formats import BITS, GROUP_SIZES
from ..model import Model
from .config import ImageArgs
from .decoder import ImageDecoder
from .image_tokenizer import HybridTokenizer


class ImageModules(nn.Module):
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
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise PararnnError(
                f"{bits} bits in groups of {group_size}: MLX has {', '.join(map(str, BITS))} bits and groups "
                f"of {', '.join(map(str, GROUP_SIZES))}"
            )
        for part in self.image_parts().values():
            nn.quantize(part, group_size, bits, class_predicate=_quantizable(group_size))
        self.args = replace(self.args, quantization={"group_size": group_size, "bits": bits})


def _quantizable(group_size: int) -> Any:
    return lambda _, module: isinstance(module, nn.Linear) and module.weight.shape[-1] % group_size == 0
