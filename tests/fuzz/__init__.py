"""Fuzzing: whatever bytes a stranger gives, what reads them says no in one sentence or does its work.

    python -m tests.fuzz pickle --runs 100000
    python -m tests.fuzz --list

targets.py, outputs.py and pictures.py have what is tried, __main__.py tries it. With atheris installed the
changes are guided by coverage.
"""

import mlx_pararnn  # noqa: F401 - before MLX, as it wishes
