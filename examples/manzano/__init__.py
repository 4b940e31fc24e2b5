"""How a model that sees and draws is made: scenes, three trainings, a judge, evaluation."""

import mlx_pararnn  # noqa: F401 - before MLX, so that OpenBLAS does its matrix products on Linux
