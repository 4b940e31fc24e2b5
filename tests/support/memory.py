"""What MLX's arrays take, without the garbage of the tests that ran before."""

import gc

import mlx.core as mx


def active_memory() -> int:
    """Bytes. Arrays in reference cycles would else be freed at any time, between two measurements too."""
    mx.synchronize()
    gc.collect()
    return int(mx.get_active_memory())
