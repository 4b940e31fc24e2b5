"""A package's weights as one number, by which `verify` sees that they are those of the export."""

import hashlib
from pathlib import Path

# Where it stands: the metadata of the reference beside the package.
DIGEST = "weights_sha256"


def weights_digest(package: Path) -> str:
    """SHA-256 over the package's weight files, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("weights/*")):
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
