"""Folders that pararnn-torch's `save_pretrained` writes (0.17.4: ParaSLSTMForCausalLM).

Pre-norm with RMSNorm, no positions, MLPs with bias; the head tied or not, as config.json says.
"""

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from .base import Canonical, Source, copied, head_outputs
from .cell_layouts import torch_cell_name
from .prefixes import outer_prefix
from .torch_blocks import CELL, blocks, is_torch_lm, norm, plain_args, recurrent_cap, refuse_mixing

_HALLMARKS = ("embed.weight", "norm.weight", "blocks.0.norm_rnn.weight")
_DEFAULT_EPS = 1e-6


class PararnnTorch:
    """pararnn-torch's language models, as save_pretrained writes them."""

    name = "pararnn-torch"
    title = "pararnn-torch language model"

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is of this family."""
        return is_torch_lm(checkpoint)

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        """The model in canonical names and its config.json; see `Family.map`."""
        refuse_mixing(checkpoint)
        source = Source(checkpoint, self.name, outer_prefix(checkpoint, _HALLMARKS))
        # Sizes in config.json are partly placeholders for other tools (state_size, conv_kernel).
        config = checkpoint.config or {}
        vocab, d = source.shape("embed.weight", 2)
        layers = source.block_count()
        cell = torch_cell_name(source, f"blocks.0.{CELL}")
        cap, notes = recurrent_cap(checkpoint)
        outputs = [copied("model.embed_tokens.weight", source.take("embed.weight", (vocab, d)))]
        outputs += blocks(source, layers, cell, d, norm_bias=False, cap=cap)
        outputs += norm(source, "norm", "model.norm", d, bias=False)
        says = config.get("tie_word_embeddings")
        says = says if isinstance(says, bool) else None
        head, is_tied = head_outputs(source, "embed.weight", "lm_head.weight", tied, says, (vocab, d))
        source.finish()
        args = plain_args(source, cell, d, layers, vocab) | {
            "norm": "rms",
            "norm_eps": _eps(checkpoint),
            "max_position_embeddings": None,
            "tie_word_embeddings": is_tied,
        }
        return Canonical(args, outputs + head, notes)


def _eps(checkpoint: Checkpoint) -> float:
    eps = (checkpoint.config or {}).get("rms_norm_eps", _DEFAULT_EPS)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise PararnnError(f"{checkpoint.folder / 'config.json'}: rms_norm_eps must be a number of 0 or more")
    return float(eps)
