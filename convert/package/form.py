"""What a package's functions look like from outside."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_pararnn.cells import get_cell
from mlx_pararnn.model_config import ModelArgs

GROWING = ("slstm",)  # cells whose state grows with the text: float16 keeps ever fewer digits of it
LANES = 32  # the Neural Engine refuses states whose innermost axis is not a multiple of this


@dataclass(frozen=True)
class Form:
    """How the functions are to be, whatever the model.

    Attributes:
        graph_state: states inside the program; else inputs and outputs.
        argmax: give the likeliest token instead of the logits.
        activations: np.float16 or np.float32.
        recurrence: what the recurrence is computed in and its state is in.
        layers_per_function: how many layers a function that reads several tokens has at most; None for all.
        layout: where channels and time stand, by its name in `layouts.LAYOUTS`. In "ane" the state is of the
            activations' type, whatever the recurrence is computed in.
    """

    graph_state: bool = True
    argmax: bool = False
    activations: Any = np.float16
    recurrence: Any = np.float16
    layers_per_function: int | None = None
    layout: str = "plain"


def parts(form: Form, layers: int, name: str) -> dict[str, range]:
    """The functions that `name` is divided into, in the order of their calls, and which `layers` each has."""
    whole, most = range(layers), form.layers_per_function or layers
    if name == "decode" or most >= layers:
        return {name: whole}
    return {part_name(name, n): whole[i : i + most] for n, i in enumerate(whole[::most], 1)}


def part_name(name: str, number: int) -> str:
    """The name of a part of the function `name`, counted from 1."""
    return f"{name}_part_{number}"


def state_shapes(args: ModelArgs) -> dict[str, tuple[int, int, int]]:
    """Name -> shape of the states, one row a layer; `state` alone is a word of MIL and can be no name."""
    padded = -(-args.hidden_size // LANES) * LANES
    slots = len(get_cell(args.cell, args.activations).slots)
    shapes = {"cell_state": (args.num_hidden_layers, slots, padded)}
    if args.mixer == "gated_conv" and args.conv_kernel > 1:
        shapes["conv"] = (args.num_hidden_layers, args.conv_kernel - 1, padded)
    return shapes


def state_dtypes(form: Form) -> dict[str, Any]:
    """Name -> NumPy type of the states."""
    cell_state = form.activations if form.layout == "ane" else form.recurrence
    return {"cell_state": cell_state, "conv": form.activations}
