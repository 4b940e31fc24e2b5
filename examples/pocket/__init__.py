"""How the pocket model is made: messages and traces, training, evaluation."""

import mlx_pararnn  # noqa: F401 - before MLX, so that OpenBLAS does its matrix products on Linux
