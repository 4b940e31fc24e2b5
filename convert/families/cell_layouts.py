"""Recurrent cells of the two code bases, as the one layout of `mlx_pararnn.cells`.

Out: input_proj.weight (heads, gates*do, di), bias (heads, gates*do), recurrent_weight (rows, D), with
D = heads*do channels. Gates: GRU z, r, h; LSTM f, o, c; NLRU a, n; sLSTM i, f, z, o.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..readers.dtypes import Array
from ..readers.tensors import Tensor
from .base import Output, Source, computed, copied, permuted


@dataclass(frozen=True)
class CellSizes:
    """A cell's name and sizes, as its tensors' shapes have them."""

    cell: str
    input_size: int
    hidden_size: int
    num_heads: int


def apple_cell(source: Source, prefix: str, target: str) -> tuple[CellSizes, list[Output]]:
    """ml-pararnn's GRU or LSTM: B (heads, di, 3, do), A (3, D), b (3, D) and, for the LSTM, C (2, D).

    LSTM rows of A and b are f, o, c as its code has them (its docstring says otherwise), of C f and o.
    """
    lstm = f"{prefix}C" in source
    heads, head_in, gates, head_out = source.shape(f"{prefix}B", 4)
    width = heads * head_out
    projection = source.take(f"{prefix}B", (heads, head_in, 3, head_out))
    bias = source.take(f"{prefix}b", (3, width))
    diagonal = [source.take(f"{prefix}A", (3, width))]
    if lstm:
        diagonal.append(source.take(f"{prefix}C", (2, width)))
    outputs = [
        permuted(f"{target}input_proj.weight", projection, (0, 2, 3, 1), (heads, gates * head_out, head_in)),
        computed(
            f"{target}bias",
            (heads, gates * head_out),
            [bias],
            lambda b: np.transpose(b.reshape(3, heads, head_out), (1, 0, 2)),
        ),
        _rows(f"{target}recurrent_weight", [*diagonal], width, None),
    ]
    return CellSizes("lstm" if lstm else "gru", heads * head_in, width, heads), outputs


@dataclass(frozen=True)
class TorchLayout:
    """A cell of pararnn-torch.

    Attributes:
        rows: its names for the rows of our recurrent weight.
        row_count: how many those are.
        gate_order: our gate number k is block gate_order[k] of W_x.
    """

    rows: tuple[str, ...]
    row_count: int
    gate_order: tuple[int, ...]


# Their GRU's a_n is our row h; their LSTM's blocks are f, candidate, o, and a_z is the candidate's row.
TORCH_LAYOUTS = {
    "gru": TorchLayout(("a_z", "a_r", "a_n"), 3, (0, 1, 2)),
    "lstm": TorchLayout(("a_f", "a_o", "a_z", "c_f", "c_o"), 5, (0, 2, 1)),
    "nlru": TorchLayout(("u",), 1, (0, 1)),
    "slstm": TorchLayout(("R",), 4, (0, 1, 2, 3)),
}


def torch_cell_name(source: Source, prefix: str) -> str:
    """Which cell of pararnn-torch stands under `prefix`, told by the names of its recurrent weights.

    A name may be missing: the cell with the most of its own names present is meant, and the rest is reported.
    """

    def present(cell: str) -> float:
        rows = TORCH_LAYOUTS[cell].rows
        return sum(f"{prefix}{row}" in source for row in rows) / len(rows)

    return max(TORCH_LAYOUTS, key=present)


def torch_cell_sizes(source: Source, prefix: str) -> CellSizes:
    """The kind and sizes of the pararnn-torch cell under `prefix`, by its names and the shape of W_x."""
    cell = torch_cell_name(source, prefix)
    rows, inputs = source.shape(f"{prefix}W_x.weight", 2)
    return CellSizes(cell, inputs, rows // len(TORCH_LAYOUTS[cell].gate_order), 1)


def torch_cell(
    source: Source,
    prefix: str,
    target: str,
    cell: str,
    width: int,
    cap: float | None,
    inputs: int | None = None,
) -> list[Output]:
    """A pararnn-torch cell with `width` channels and `inputs` inputs (None: as many): one head.

    W_x is (gates*width, inputs).

    The library clamps the recurrent weights to [-cap, cap] each time it uses them: here it is done once.
    """
    layout = TORCH_LAYOUTS[cell]
    gates = len(layout.gate_order)
    inputs = inputs or width
    weight = source.take(f"{prefix}W_x.weight", (gates * width, inputs))
    bias = source.take(f"{prefix}W_x.bias", (gates * width,))
    row_shape = (layout.row_count, width) if layout.rows == ("R",) else (width,)
    rows = [source.take(f"{prefix}{row}", row_shape) for row in layout.rows]

    def ordered(array: Array) -> Array:
        return array.reshape(gates, width)[list(layout.gate_order)]

    in_our_order = [weight.rows(gate * width, (gate + 1) * width) for gate in layout.gate_order]
    return [
        Output(
            f"{target}input_proj.weight",
            (1, gates * width, inputs),
            weight.dtype,
            lambda: chain.from_iterable(block.pieces() for block in in_our_order),
        ),
        computed(f"{target}bias", (1, gates * width), [bias], ordered),
        _rows(f"{target}recurrent_weight", rows, width, cap),
    ]


def _rows(name: str, tensors: list[Tensor], width: int, cap: float | None) -> Output:
    count = sum(tensor.shape[0] if len(tensor.shape) == 2 else 1 for tensor in tensors)
    if len(tensors) == 1 and cap is None and len(tensors[0].shape) == 2:
        return copied(name, tensors[0])

    def stacked(*arrays: Array) -> Array:
        rows = np.concatenate([array.reshape(-1, width) for array in arrays])
        return rows if cap is None else np.clip(rows, -cap, cap)

    return computed(name, (count, width), tensors, stacked, widen=cap is not None)
