"""The models that are compared: ours, and MLX-LM's llama and mamba2 with as many parameters."""

from typing import NamedTuple

import mlx_pararnn  # before mlx.core: it loads OpenBLAS

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama as mlx_llama
from mlx_lm.models import mamba2 as mlx_mamba2


class Sizes(NamedTuple):
    d: int
    layers: int
    vocabulary: int
    intermediate: int
    heads: int


LARGE = Sizes(1024, 4, 32000, 2816, 4)  # the 400m preset's blocks, of which there are 24, four times
SMALL = Sizes(192, 3, 300, 512, 4)
D, LAYERS, VOCABULARY, INTERMEDIATE, HEADS = LARGE


def pararnn(cell="gru", layers=None, sizes=LARGE):
    mx.random.seed(0)
    model = mlx_pararnn.Model(
        mlx_pararnn.ModelArgs(
            cell=cell,
            hidden_size=sizes.d,
            num_hidden_layers=layers or sizes.layers,
            num_heads=sizes.heads,
            intermediate_size=sizes.intermediate,
            vocab_size=sizes.vocabulary,
        )
    )
    return _ready(model)


def llama(sizes=LARGE):
    """Multi-head attention, heads of 64, no grouping; the MLP makes up the number of parameters."""
    args = mlx_llama.ModelArgs(
        model_type="llama",
        hidden_size=sizes.d,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.intermediate - sizes.d * 7 // 64,
        num_attention_heads=sizes.d // 64,
        num_key_value_heads=sizes.d // 64,
        rms_norm_eps=1e-6,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
    )
    return _ready(mlx_llama.Model(args))


def mamba2(sizes=LARGE, heads=30, head_dim=64):
    """Mamba2 has no MLP: eight of its layers (state 128, heads of 64) have the size of our four.

    Of models.SMALL it has the size with 9 heads of 32.
    """
    args = mlx_mamba2.ModelArgs(
        model_type="mamba2",
        num_heads=heads,
        head_dim=head_dim,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.d,
        intermediate_size=heads * head_dim,
        state_size=128,
        num_hidden_layers=2 * sizes.layers,
        layer_norm_epsilon=1e-6,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=False,
        time_step_limit=(0.0, float("inf")),
        time_step_rank="auto",
    )
    return _ready(mlx_mamba2.Model(args))


def _ready(model):
    mx.eval(model.parameters())
    return model.eval()


def parameters(model):
    return sum(array.size for _, array in tree_flatten(model.parameters()))
