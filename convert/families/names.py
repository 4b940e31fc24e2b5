"""The names of the checkpoint families, for `--family` and for messages that list what was considered."""

from importlib import metadata
from typing import Any

# Other packages name their families by entry points of this group.
ENTRY_POINT_GROUP = "mlx_pararnn.families"
BUILT_IN = ("ml-pararnn", "babylm", "pararnn-torch", "bare-cell")


# Families that a program has registered, by name.
REGISTERED: dict[str, Any] = {}


def family_names() -> list[str]:
    """The built-in families, then those that were registered, then those of other packages."""
    return [*BUILT_IN, *REGISTERED, *installed_names()]


def installed_names() -> list[str]:
    """The families of other packages."""
    return sorted(
        {entry.name for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)} - {*BUILT_IN, *REGISTERED}
    )
