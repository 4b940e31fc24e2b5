"""One cell on its own, behind any prefix: a state dict of ml-pararnn's or pararnn-torch's.

ml-pararnn's has A, B, b and, for the LSTM, C; pararnn-torch's has W_x and one recurrent weight a row.
"""

from ..readers.checkpoint import Checkpoint
from .base import Canonical, Source
from .cell_layouts import CellSizes, apple_cell, torch_cell, torch_cell_sizes
from .torch_blocks import recurrent_cap, refuse_mixing

_TORCH = "W_x.weight"


class BareCell:
    name = "bare-cell"
    title = "single ParaRNN cell"

    def detect(self, checkpoint: Checkpoint) -> bool:
        return _is_apple(checkpoint) or len(_torch_names(checkpoint)) == 1

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        if _is_apple(checkpoint) or not _torch_names(checkpoint):
            source = Source(checkpoint, self.name, _prefix(checkpoint))
            sizes, outputs = apple_cell(source, "", "")
            source.finish()
            note = (
                "A state dict does not say which activations the cell had: unless `activations` in "
                "config.json says otherwise, they are taken to be the cell's defaults."
            )
            return Canonical(_args(sizes), outputs, [note], model_type="pararnn_cell")
        refuse_mixing(checkpoint)
        source = Source(checkpoint, self.name, _torch_names(checkpoint)[0].removesuffix(_TORCH))
        sizes = torch_cell_sizes(source, "")
        cap, notes = recurrent_cap(checkpoint)
        outputs = torch_cell(source, "", "", sizes.cell, sizes.hidden_size, cap, sizes.input_size)
        source.finish()
        return Canonical(_args(sizes), outputs, notes, model_type="pararnn_cell")


def _args(sizes: CellSizes) -> dict[str, object]:
    return {
        "cell": sizes.cell,
        "input_size": sizes.input_size,
        "hidden_size": sizes.hidden_size,
        "num_heads": sizes.num_heads,
        "activations": None,
    }


def _is_apple(checkpoint: Checkpoint) -> bool:
    return all(_prefix(checkpoint) + part in checkpoint.tensors for part in "ABb")


def _prefix(checkpoint: Checkpoint) -> str:
    name = next((name for name in checkpoint.tensors if name == "B" or name.endswith(".B")), "B")
    return name.removesuffix("B")


def _torch_names(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if name == _TORCH or name.endswith(f".{_TORCH}")]
