"""Language models of Apple's ml-pararnn training code (`RNNLanguageModel`; arXiv 2510.21450, Fig. 9).

Blocks come in pairs: `blocks.{2i}` is recurrent, `blocks.{2i+1}` is RMSNorm and SwiGLU without a residual.
"""

from ..readers.checkpoint import Checkpoint
from .base import Canonical, Output, Source, copied, head_outputs, permuted
from .cell_layouts import CellSizes, apple_cell
from .prefixes import outer_prefix

_EPS = 1e-6  # the source's RMSNorm


class MlPararnn:
    """Language models of ml-pararnn's training code."""

    name = "ml-pararnn"
    title = "Apple's ml-pararnn language model"

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is of this family."""
        prefix = outer_prefix(checkpoint, ("embedding.weight", "blocks.0.rnn_cell.B", "final_norm.weight"))
        return any(
            name.removeprefix(prefix).startswith("blocks.") and ".rnn_cell." in name
            for name in checkpoint.tensors
        )

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        """The model in canonical names and its config.json; see `Family.map`."""
        prefix = outer_prefix(checkpoint, ("embedding.weight", "blocks.0.rnn_cell.B", "final_norm.weight"))
        source = Source(checkpoint, self.name, prefix)
        vocab, d = source.shape("embedding.weight", 2)
        taps = source.shape("blocks.0.conv.conv.weight", 3)[2]
        width = source.shape("blocks.1.1.w1.weight", 2)[0]
        layers = (source.block_count() + 1) // 2
        outputs = [copied("model.embed_tokens.weight", source.take("embedding.weight", (vocab, d)))]
        sizes: CellSizes | None = None
        for layer in range(layers):
            cell_sizes, cell_outputs = _recurrent_block(source, layer, d, taps)
            # One cell and one number of heads: a layer that differs is told as misshapen below.
            sizes = sizes or cell_sizes
            if cell_sizes != sizes:
                source.misfit(f"blocks.{2 * layer}.rnn_cell", str(cell_sizes), str(sizes))
            outputs += cell_outputs + _mlp_block(source, layer, d, width)
        outputs.append(copied("model.norm.weight", source.take("final_norm.weight", (d,))))
        head, is_tied = head_outputs(source, "embedding.weight", "lm_head.weight", tied, True, (vocab, d))
        source.finish()
        assert sizes is not None
        args = {
            "cell": sizes.cell,
            "hidden_size": d,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
            "num_heads": sizes.num_heads,
            "intermediate_size": width,
            "mixer": "gated_conv",
            "conv_kernel": taps,
            "norm": "rms",
            "norm_eps": _EPS,
            "mlp": "swiglu",
            "mlp_bias": False,
            "mlp_residual": False,
            "residual_scale": True,
            "max_position_embeddings": None,
            "tie_word_embeddings": is_tied,
            "activations": None,
        }
        return Canonical(args, outputs + head)


def _recurrent_block(source: Source, layer: int, d: int, taps: int) -> tuple[CellSizes, list[Output]]:
    old, new = f"blocks.{2 * layer}.", f"model.layers.{layer}."
    outputs = [
        copied(f"{new}norm.weight", source.take(f"{old}norm.weight", (d,))),
        copied(f"{new}residual_scale", source.take(f"{old}residual_scale", (1,))),
        copied(f"{new}mixer.in_proj.weight", source.take(f"{old}in_proj.weight", (2 * d, d))),
        permuted(
            f"{new}mixer.conv1d.weight",
            source.take(f"{old}conv.conv.weight", (d, 1, taps)),
            (0, 2, 1),  # MLX keeps (d, taps, 1); the last tap is the current token's in both
            (d, taps, 1),
        ),
        copied(f"{new}mixer.conv1d.bias", source.take(f"{old}conv.conv.bias", (d,))),
        copied(f"{new}mixer.norm.weight", source.take(f"{old}gate_norm.weight", (d,))),
        copied(f"{new}mixer.out_proj.weight", source.take(f"{old}out_proj.weight", (d, d))),
    ]
    sizes, cell = apple_cell(source, f"{old}rnn_cell.", f"{new}mixer.cell.")
    if (sizes.input_size, sizes.hidden_size) != (d, d):
        source.misfit(
            f"{old}rnn_cell.B", f"{sizes.input_size} inputs, {sizes.hidden_size} channels", f"{d} of each"
        )
    return sizes, outputs + cell


def _mlp_block(source: Source, layer: int, d: int, width: int) -> list[Output]:
    old, new = f"blocks.{2 * layer + 1}.", f"model.layers.{layer}."
    return [
        copied(f"{new}mlp_norm.weight", source.take(f"{old}0.weight", (d,))),
        copied(f"{new}mlp.gate_proj.weight", source.take(f"{old}1.w1.weight", (width, d))),
        copied(f"{new}mlp.up_proj.weight", source.take(f"{old}1.w3.weight", (width, d))),
        copied(f"{new}mlp.down_proj.weight", source.take(f"{old}1.w2.weight", (d, width))),
    ]
