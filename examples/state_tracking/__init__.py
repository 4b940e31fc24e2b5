"""State tracking without tools by recurrent models, nonlinear and linear."""

import mlx_pararnn  # noqa: F401 - before MLX, so that OpenBLAS does its matrix products on Linux
