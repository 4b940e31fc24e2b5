"""`mlx-pararnn` and `python -m mlx_pararnn`: the command line, from its first moment on."""

import signal
import sys


def main() -> None:
    """`mlx-pararnn`, and `python -m mlx_pararnn`."""
    # While the commands are imported there is nothing to clean up: Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from .cli.app import main as run
    except (ImportError, MemoryError, OSError):
        from .process.address_space import too_small

        said = too_small()
        if said is None:
            raise
        sys.exit(f"error: {said}")
    try:
        run()
    except KeyboardInterrupt:  # between a command and the end
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
