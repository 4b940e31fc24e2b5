"""The SHA-256 of a file's weights, which `convert` notes in the file and `verify` computes again.

It stands in the metadata of the safetensors header: a program that changes the weights and writes the file
anew leaves it out.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

from .model_files import open_regular

KEY = "sha256"


def combined(digests: Mapping[str, bytes]) -> str:
    """One SHA-256 in hexadecimal digits of those of all tensors, by name."""
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()


def is_as_written(file: Path) -> bool | None:
    """Whether a safetensors file holds the weights that were written; None where it does not say.

    The file's header has been found to be sound: the model was loaded from it.
    """
    with open_regular(file) as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
        noted = (header.pop("__metadata__", None) or {}).get(KEY)
        if noted is None:
            return None
        digests = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            opened.seek(8 + length + begin)
            digest, left = hashlib.sha256(), end - begin
            while left and (piece := opened.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
            digests[name] = digest.digest()
    return combined(digests) == noted
