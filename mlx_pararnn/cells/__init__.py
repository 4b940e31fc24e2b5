"""The recurrent cells: one small file each, a protocol (`cell.py`), and the registry below.

A cell of your own is a dozen lines (docs/python.md has a worked example):

    @register_cell
    class MinimalGRU(Cell):
        name = "minimal_gru"
        gates = ("z", "n")
        slots = ("h",)
        output = "h"
        params = ("a_z",)

        def step(self, state, u, params, F):
            (h,) = state
            z = F.sigmoid(params["a_z"] * h + u["z"])
            return (z * F.tanh(u["n"]) + (1 - z) * h,)

It decodes and prefills (Newton included) at once. A model that names it is loaded again when the module
that registers it has been imported: by an entry point of the group `mlx_pararnn.cells`, or by `--import`.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points

from ..errors import PararnnError
from .cell import Cell, CellType
from .gru import GRU
from .lstm import LSTM
from .nlru import NLRU
from .slstm import SLSTM

__all__ = ["GRU", "LSTM", "NLRU", "SLSTM", "Cell", "get_cell", "register_cell"]

_REGISTRY: dict[str, type[Cell]] = {}


def register_cell(cls: CellType) -> CellType:
    """Make a `Cell` subclass known under its `name`; use it as a class decorator.

    Raises:
        PararnnError: if the class lacks a field, its step fails, or another class has the name already.
    """
    cls.check()
    known = _REGISTRY.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PararnnError(f"a cell named {cls.name!r} is registered already, by {known.__module__}")
    cls.check_step()
    _REGISTRY[cls.name] = cls
    return cls


def get_cell(name: str, activations: Mapping[str, str] | None = None) -> Cell:
    """The cell called `name`, with `activations` in place of its defaults.

    Args:
        name: a name in the registry: `gru`, `lstm`, `slstm`, `nlru`, or one registered by a user.
        activations: place -> one of the twelve names of `activations.py`; see the cell's own `activations`.

    Raises:
        PararnnError: no such cell, or a place or activation that the cell does not know.
    """
    if name not in _REGISTRY:
        for entry in entry_points(group="mlx_pararnn.cells", name=name):
            entry.load()
    if name not in _REGISTRY:
        raise PararnnError(
            f"unknown cell {name!r} (known: {', '.join(sorted(_REGISTRY))}); a cell of your own is found "
            "through an entry point of the group 'mlx_pararnn.cells', or with --import MODULE"
        )
    return _REGISTRY[name](activations)


for _cell in (GRU, LSTM, SLSTM, NLRU):
    register_cell(_cell)
