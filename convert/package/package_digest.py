"""A package's weights as one number: of its files, and of what they hold.

By the first `verify` sees that they are those of the export; by the second a runner knows the same weights
again in a package that was exported anew.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from .constants import Stored

# Where it stands: the metadata of the reference beside the package.
DIGEST = "weights_sha256"


def weights_digest(package: Path) -> str:
    """SHA-256 over the files that hold a package's weights, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("weights/*"), *package.glob("*.mlirb")]):
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def stored_digest(weights: Mapping[str, Stored]) -> str:
    """SHA-256 over the numbers that a package stores, by name, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + b"\0")
        digest.update(weights[name].values().tobytes())
    return digest.hexdigest()
