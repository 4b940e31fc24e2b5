"""The checkpoint families: one file each, and the list that `convert` goes through.

A family of your own: a table of names (`NamedTensors`), or an object with `name`, `title`,
`detect(checkpoint)` and `map(checkpoint, tied)` (see base.Family). `register_family` makes it known, in a
module that `--import` names; so does an entry point of the group `mlx_pararnn.families`.
"""

from importlib import metadata

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from ..readers.wording import listed, shown
from .babylm import BabyLM
from .bare_cell import BareCell
from .base import Canonical, Family
from .ml_pararnn import MlPararnn
from .named_tensors import NamedTensors
from .names import BUILT_IN, ENTRY_POINT_GROUP, REGISTERED, family_names, installed_names
from .pararnn_torch import PararnnTorch

_BUILT_IN: tuple[Family, ...] = (MlPararnn(), BabyLM(), PararnnTorch(), BareCell())

__all__ = ["Canonical", "Family", "NamedTensors", "family_names", "find_family", "register_family"]


def register_family(family: Family) -> None:
    """Make a family known under its name; it is asked before the built-in ones.

    Raises:
        PararnnError: a built-in family has the name.
    """
    if family.name in BUILT_IN:
        raise PararnnError(f"the family {family.name} is built in; choose another name")
    REGISTERED[family.name] = family


def find_family(checkpoint: Checkpoint, name: str | None = None) -> Family:
    """The family called `name`, or the first that recognises the checkpoint: registered, built in, installed.

    Raises:
        PararnnError: there is none; the message lists tensors and families.
    """
    if name is not None:
        for family in (*REGISTERED.values(), *_BUILT_IN):
            if family.name == name:
                return family
        if name not in family_names():
            raise PararnnError(f"unknown family {shown(name)}; known: {', '.join(family_names())}")
        return _installed(name)
    for family in (*REGISTERED.values(), *_BUILT_IN):
        if family.detect(checkpoint):
            return family
    for other in installed_names():
        if (family := _installed(other)).detect(checkpoint):
            return family
    names = list(checkpoint.tensors)
    raise PararnnError(
        f"{checkpoint.path}: not a ParaRNN checkpoint of a known family (considered: "
        f"{', '.join(family_names())}); it holds {len(names)} tensors: {listed(names)}"
    )


def _installed(name: str) -> Family:
    (entry, *_) = metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
    try:
        loaded = entry.load()
        return loaded() if isinstance(loaded, type) else loaded
    except Exception as error:
        raise PararnnError(
            f"the family {name} ({entry.value}) cannot be loaded: {type(error).__name__}: {shown(str(error))}"
        ) from error
