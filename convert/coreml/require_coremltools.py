"""coremltools, where it is to be had."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_pararnn.errors import PararnnError


def require_coremltools() -> None:
    """Import coremltools.

    Raises:
        PararnnError: it is not installed, or does not work here.
    """
    try:
        with quiet():
            importlib.import_module("coremltools")
            importlib.import_module("coremltools.libmilstoragepython")
    except ImportError as error:
        raise PararnnError(
            f"Core ML export needs coremltools 9, which does not load here ({error}); it exists for Python "
            "3.11 to 3.13 on macOS and on Linux with an x86-64 processor: pip install 'coremltools>=9,<10'"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' warnings: of what only a Mac has, of libraries it was not tested with."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
