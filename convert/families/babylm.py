"""The published BabyLM ParaRNN models (Hugging Face bugkira-ai/babylm-*).

Pre-norm with LayerNorm, learned positions, MLPs with bias, tied head.
"""

from ..readers.checkpoint import Checkpoint
from .base import Canonical, Source, copied, head_outputs
from .cell_layouts import torch_cell_name
from .prefixes import outer_prefix
from .torch_blocks import CELL, blocks, is_torch_lm, norm, plain_args, recurrent_cap, refuse_mixing

_HALLMARKS = ("pos.weight", "norm_f.weight", "norm_f.bias", "embed.weight", "blocks.0.norm_rnn.bias")
_OWN = ("pos.weight", "norm_f.weight", "norm_f.bias", "blocks.0.norm_rnn.bias")
_EPS = 1e-5  # torch.nn.LayerNorm's default


class BabyLM:
    """The published BabyLM models, and checkpoints of their layout."""

    name = "babylm"
    title = "BabyLM ParaRNN model"

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is of this family."""
        prefix = outer_prefix(checkpoint, _HALLMARKS)
        names = {name.removeprefix(prefix) for name in checkpoint.tensors}
        return is_torch_lm(checkpoint) and any(name in names for name in _OWN)

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        """The model in canonical names and its config.json; see `Family.map`."""
        refuse_mixing(checkpoint)
        source = Source(checkpoint, self.name, outer_prefix(checkpoint, _HALLMARKS))
        vocab, d = source.shape("embed.weight", 2)
        positions = source.shape("pos.weight", 2)[0]
        layers = source.block_count()
        cell = torch_cell_name(source, f"blocks.0.{CELL}")
        cap, notes = recurrent_cap(checkpoint)
        outputs = [
            copied("model.embed_tokens.weight", source.take("embed.weight", (vocab, d))),
            copied("model.embed_positions.weight", source.take("pos.weight", (positions, d))),
            *blocks(source, layers, cell, d, norm_bias=True, cap=cap),
            *norm(source, "norm_f", "model.norm", d, bias=True),
        ]
        head, is_tied = head_outputs(source, "embed.weight", "lm_head.weight", tied, True, (vocab, d))
        source.finish()
        args = plain_args(source, cell, d, layers, vocab) | {
            "norm": "layer",
            "norm_eps": _EPS,
            "max_position_embeddings": positions,
            "tie_word_embeddings": is_tied,
        }
        return Canonical(args, outputs + head, notes)
