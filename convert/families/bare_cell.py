"""One cell on its own, with any prefix: a state dict of ml-pararnn's or pararnn-torch's.

ml-pararnn's has A, B, b and, for the LSTM, C; pararnn-torch's has W_x and one recurrent weight a row.
"""

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from ..readers.wording import listed
from .base import Canonical, Source
from .cell_layouts import CellSizes, apple_cell, torch_cell, torch_cell_sizes
from .torch_blocks import recurrent_cap, refuse_mixing

_TORCH = "W_x.weight"


class BareCell:
    """A single cell, ml-pararnn's or pararnn-torch's."""

    name = "bare-cell"
    title = "single ParaRNN cell"

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is of this family."""
        prefixes = _apple_prefixes(checkpoint) + _torch_prefixes(checkpoint)
        # Several, and nothing else: `map` then says what to do.
        return len(prefixes) == 1 or (
            bool(prefixes) and all(name.startswith(tuple(prefixes)) for name in checkpoint.tensors)
        )

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        """The model in canonical names and its config.json; see `Family.map`."""
        apple, torch = _apple_prefixes(checkpoint), _torch_prefixes(checkpoint)
        if len(apple + torch) > 1:
            raise PararnnError(
                f"{checkpoint.path}: it holds {len(apple + torch)} cells ({listed(apple + torch)}) and no "
                "model around them; cells are converted one at a time: save each in PyTorch with "
                'torch.save(cell.state_dict(), "cell.pt")'
            )
        if not torch:
            source = Source(checkpoint, self.name, apple[0] if apple else _likely_prefix(checkpoint))
            sizes, outputs = apple_cell(source, "", "")
            source.finish()
            note = (
                "A state dict does not say which activations the cell had: unless `activations` in "
                "config.json says otherwise, they are taken to be the cell's defaults."
            )
            return Canonical(_args(sizes), outputs, [note], model_type="pararnn_cell")
        refuse_mixing(checkpoint)
        source = Source(checkpoint, self.name, torch[0])
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


def _apple_prefixes(checkpoint: Checkpoint) -> list[str]:
    prefixes = [name.removesuffix("B") for name in checkpoint.tensors if name == "B" or name.endswith(".B")]
    return [prefix for prefix in prefixes if all(prefix + part in checkpoint.tensors for part in "Ab")]


def _torch_prefixes(checkpoint: Checkpoint) -> list[str]:
    names = [name for name in checkpoint.tensors if name == _TORCH or name.endswith(f".{_TORCH}")]
    return [name.removesuffix(_TORCH) for name in names]


def _likely_prefix(checkpoint: Checkpoint) -> str:
    """Where the user says that it is a cell and parts of it are missing."""
    name = next((name for name in checkpoint.tensors if name.endswith(".B")), "B")
    return name.removesuffix("B")
