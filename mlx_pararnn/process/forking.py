"""A process that was forked after MLX was used has none of MLX's threads, and would wait for them."""

import os

from ..errors import PararnnError

_used_in: int | None = None


def note_use_of_mlx() -> None:
    """Called before MLX computes something.

    Raises:
        PararnnError: this process was forked from one in which it had computed.
    """
    global _used_in
    if _used_in is None:
        _used_in = os.getpid()
    elif _used_in != os.getpid():
        raise PararnnError(
            "this process was forked after MLX was used, and has none of its threads; start it with "
            'multiprocessing.get_context("spawn"), or fork before a model is loaded'
        )
