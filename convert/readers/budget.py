"""What reading one checkpoint's headers may cost: a small file can describe a great deal.

The limits stand far above what checkpoints of a million small objects need, and below a second or two of
work and a few hundred megabytes.
"""

from pathlib import Path

from mlx_pararnn.errors import PararnnError

MAX_PICKLE_BYTES = 64 << 20
# Of a pickle: instructions, and what a call looks through. Real ones have two bytes or more an instruction
# (.metadata of torch.distributed.checkpoint; other files three), and that of a run on many devices is large.
MAX_OPERATIONS = 1_500_000
_BYTES_AN_OPERATION = 2
_MOST_OPERATIONS = 6_000_000
# Of a pickle: an estimate of what its values take in memory, and of what one does.
MAX_VALUE_BYTES = 384 << 20
VALUE_BYTES = 100
# Of a zip file's list of records: some 200,000 of them.
MAX_DIRECTORY_BYTES = 16 << 20
# Of a checkpoint: names of tensors. A file of 5 MB can give one tensor 400,000 of them.
MAX_TENSORS = 200_000


class OverBudget(Exception):
    """The limit is reached; the message says of what."""


def check_count(path: Path, tensors: int) -> None:
    """Raises PararnnError if a checkpoint names more tensors than any has."""
    if tensors > MAX_TENSORS:
        raise PararnnError(
            f"{path}: it names {tensors:,} tensors, more than any checkpoint ({MAX_TENSORS:,} at most); "
            "pass a file of a model's weights"
        )


class Budget:
    """Counts the operations and bytes that one pickle costs."""

    def __init__(self, pickle_bytes: int) -> None:
        self.operations = min(max(MAX_OPERATIONS, pickle_bytes // _BYTES_AN_OPERATION), _MOST_OPERATIONS)
        self.size = max(MAX_VALUE_BYTES, self.operations * VALUE_BYTES)

    def spend(self, operations: int, size: int) -> None:
        """Raises OverBudget once more was spent than there is."""
        self.operations -= operations
        self.size -= size
        if self.operations < 0 or self.size < 0:
            raise OverBudget("it describes more objects than a checkpoint has")
