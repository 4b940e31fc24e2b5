"""coreai-core, where it is to be had."""

import importlib
from importlib.metadata import PackageNotFoundError, version

from mlx_pararnn.errors import PararnnError

# The one version whose numbers were compared: it is a beta, and its interface may change.
VERSION = "1.0.0b3"


def is_installed() -> bool:
    """Whether `require_coreai` would find what it needs."""
    try:
        require_coreai()
    except PararnnError:
        return False
    return True


def require_coreai() -> None:
    """Import coreai-core, which writes .aimodel folders and carries Apple's runtime.

    Raises:
        PararnnError: it is not installed, is another version, or does not work here.
    """
    try:
        found = version("coreai-core")
        if found != VERSION:
            raise PararnnError(
                f"Core AI packages were tried with coreai-core {VERSION} only, and {found} is installed: "
                f"pip install 'mlx-pararnn[coreai]', or coreai-core=={VERSION}"
            )
        importlib.import_module("coreai.authoring")
        importlib.import_module("coreai.runtime")
    except (ImportError, PackageNotFoundError) as error:
        raise PararnnError(
            "Core AI packages need coreai-core, which does not load here; it comes with the extra `coreai`: "
            f"pip install 'mlx-pararnn[coreai]' ({error})"
        ) from error
