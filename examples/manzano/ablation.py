"""What the language part is compared with: another way of reading images, or another backbone of equal size.

A variant has the tokenizer and the decoder of the whole recipe; only its language part is trained anew.
"""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.images.image_tokenizer import HybridTokenizer
from mlx_pararnn.model import Model, ModelArgs
from mlx_pararnn.training.run import initialize, remember_long

# name -> the cell of the backbone, or None for the recipe's
VARIANTS: dict[str, str | None] = {
    "hybrid": None,  # the recipe itself
    "discrete": None,  # images are read by the discrete adapter too
    "separate": None,  # images are read by an encoder of their own, which never learned to give tokens
    "lstm": "lstm",
    "nlru": "nlru",  # a linear recurrence
    "transformer": "transformer",  # MLX-LM's llama
}
LONGEST_MEMORY = 100  # tokens: an image and all that is asked of it
Sizes = tuple[int, int, int, int]


def check_variant(name: str) -> None:
    """Raise PararnnError for a name that is none of VARIANTS."""
    if name not in VARIANTS:
        raise PararnnError(f"no variant {name!r}; choose one of {', '.join(VARIANTS)}")


class Transformer(llama.Model):  # type: ignore[misc]
    """MLX-LM's llama with caches of its own, so that it is read and generated with as any model here."""

    group = None  # it is not divided among processes

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.model.layers]


class DiscreteReader(HybridTokenizer):
    """A tokenizer whose images are read as the embeddings of their discrete tokens."""

    def read(self, features: mx.array) -> mx.array:
        """Features (B, N, F) to embeddings (B, N, D)."""
        return self.embed_codes(self.encode(features))


def backbone(cell: str, sizes: Sizes, vocabulary: int, size_of: str | None = None) -> Model:
    """A new language model: of a cell, or for "transformer" a llama.

    Args:
        sizes: width, layers, heads, and the inner width of the MLP.
        vocabulary: how many tokens.
        size_of: a cell; the MLP's width is then the one with which the model is nearest in parameters to
            that cell's.
    """
    if size_of not in (None, cell):
        assert size_of is not None
        sizes = (*sizes[:3], _equal_inner(cell, sizes, vocabulary, size_of))
    model = _new(cell, sizes, vocabulary)
    model.model.embed_tokens.weight = 0.02 * mx.random.normal((vocabulary, sizes[0]))
    if cell != "transformer":
        initialize(model)
        # Else a unit forgets half at each token, and what an image shows is lost before it is asked for.
        remember_long(model, LONGEST_MEMORY)
    return model


def parameters(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


def _new(cell: str, sizes: Sizes, vocabulary: int) -> Model:
    width, layers, heads, inner = sizes
    if cell == "transformer":
        made: Any = Transformer(llama.ModelArgs("llama", width, layers, inner, heads, 1e-5, vocabulary))
        return cast(Model, made)
    args = ModelArgs(width, layers, vocabulary, inner, cell=cell, num_heads=heads, tie_word_embeddings=True)
    return Model(args)


def _equal_inner(cell: str, sizes: Sizes, vocabulary: int, size_of: str) -> int:
    """Parameters grow linearly with the MLP's width. No weight is computed: MLX makes one when it is read."""
    wanted = parameters(_new(size_of, sizes, vocabulary))
    one, two = (parameters(_new(cell, (*sizes[:3], inner), vocabulary)) for inner in (1, 2))
    return max(1, round((wanted - one) / (two - one)) + 1)
