"""The one further prefix (`model.`, say) that a wrapper around the language model may leave on its names."""

from collections.abc import Sequence

from ..readers.checkpoint import Checkpoint


def outer_prefix(checkpoint: Checkpoint, hallmarks: Sequence[str]) -> str:
    """ "" where names start at the root, else the single component and its dot before a hallmark name."""
    names = checkpoint.tensors
    if any(name in names for name in hallmarks):
        return ""
    for name in names:
        first, dot, rest = name.partition(".")
        if rest in hallmarks:
            return first + dot
    return ""
