"""One ml-pararnn cell on its own: a state dict of A, B, b and, for the LSTM, C, behind any prefix."""

from ..readers.checkpoint import Checkpoint
from .base import Canonical, Source
from .cell_layouts import apple_cell


class BareCell:
    name = "bare-cell"
    title = "single ParaRNN cell"

    def detect(self, checkpoint: Checkpoint) -> bool:
        return all(_prefix(checkpoint) + part in checkpoint.tensors for part in "ABb")

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        source = Source(checkpoint, self.name, _prefix(checkpoint))
        sizes, outputs = apple_cell(source, "", "")
        source.finish()
        args = {
            "cell": sizes.cell,
            "input_size": sizes.input_size,
            "hidden_size": sizes.hidden_size,
            "num_heads": sizes.num_heads,
            "activations": None,
        }
        note = (
            "A state dict does not say which activations the cell had: unless `activations` in config.json "
            "says otherwise, they are taken to be the cell's defaults."
        )
        return Canonical(args, outputs, [note], model_type="pararnn_cell")


def _prefix(checkpoint: Checkpoint) -> str:
    name = next((name for name in checkpoint.tensors if name == "B" or name.endswith(".B")), "B")
    return name.removesuffix("B")
