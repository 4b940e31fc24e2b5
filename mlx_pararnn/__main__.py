"""`mlx-pararnn` and `python -m mlx_pararnn`: the command line, from its first moment on."""

import signal


def main() -> None:
    """`mlx-pararnn`, and `python -m mlx_pararnn`."""
    # While the commands are imported there is nothing to clean up: Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.app import main as run

    run()


if __name__ == "__main__":
    main()
