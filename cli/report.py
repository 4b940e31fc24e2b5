"""What a user sees when a command fails: one sentence on stderr, and the exit code."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from mlx_pararnn.errors import LOST, PararnnError, first_line, is_lost
from mlx_pararnn.process.address_space import too_small

P = ParamSpec("P")
R = TypeVar("R")

# Commands that several processes carry out together.
SHARED = {"train", "generate", "chat", "bench", "serve", "lm"}

_debug = False


def show_tracebacks(value: bool) -> bool:
    """What --debug does."""
    global _debug
    _debug = value
    return value


# Every command takes this option; its callback is all there is to it.
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=show_tracebacks, help="Show Python's traceback when a command fails."),
]


def launched() -> bool:
    """Whether mlx.launch started this process."""
    return "MLX_RANK" in os.environ


def launched_rank() -> int:
    """Which of the processes of mlx.launch this is; 0 for one that was started alone."""
    rank = os.environ.get("MLX_RANK", "")
    return int(rank) if rank.isdecimal() else 0


def leave_the_word_to_rank_0() -> None:
    """Of several processes the others show their errors alone, and do what rank 0 does when Ctrl-C comes.

    A command that nobody shares is rank 0's.
    """
    if launched_rank():
        if not SHARED.intersection(sys.argv[1:2]):
            raise SystemExit(0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _say(text: str) -> None:
    """A line on stderr; of several processes the others name themselves."""
    rank = launched_rank()
    typer.echo(f"rank {rank}: {text}" if rank else text, file=sys.__stderr__ if rank else None, err=True)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what `command` raises into one sentence and an exit code: 1, or 130 for Ctrl-C.

    Of paths among its arguments ~ is replaced by the home folder, which no shell does in --output='~/x'.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = command(*args, **{name: _expanded(value) for name, value in kwargs.items()})
            sys.stdout.flush()
            return result
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            if _debug:
                raise
            _end_as_interrupted()
        except BrokenPipeError:  # the reader left, as `head` does: nothing to say, and to no one
            _drop_output()
            raise typer.Exit(1) from None
        except Exception as error:
            if _debug:
                raise
            # Python 3.11 wraps what is raised while a class is made, as when a signal comes during an import.
            if isinstance(error.__cause__, SystemExit):
                raise error.__cause__ from None
            if isinstance(error.__cause__, KeyboardInterrupt):
                _end_as_interrupted()
            _say(f"error: {_sentence(error)}")
            try:
                sys.stdout.flush()
            except OSError:  # as on a full disk, which was said
                _drop_output()
            raise typer.Exit(1) from None
        except BaseException as error:
            if _debug or type(error).__name__ != "PanicException":
                raise
            # A panic of a library written in Rust (tokenizers, safetensors), which is no Exception.
            _say(f"error: a library failed on this input: {first_line(error)}")
            raise typer.Exit(1) from None

    return wrapper


def _end_as_interrupted() -> NoReturn:
    _say("interrupted")
    raise typer.Exit(130) from None


def _drop_output() -> None:
    """What standard output did not take, Python would try to write again as it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage_error(message: str) -> NoReturn:
    """Say what is wrong with the options, and exit with code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def expand_home(value: str | None) -> str | None:
    """A path or a name, with ~ in front replaced by the home folder, for options that are either."""
    return value if value is None else os.path.expanduser(value)


def size(nbytes: float) -> str:
    """A number of bytes, in words."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def passed_or_not(passed: bool) -> str:
    """The mark of a check: green or red on a terminal, unless NO_COLOR is set."""
    mark = "ok  " if passed else "FAIL"
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return mark
    return typer.style(mark, fg="green" if passed else "red")


def _expanded(value: Any) -> Any:
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _sentence(error: Exception) -> str:
    if isinstance(error, PararnnError):
        return str(error)
    if is_lost(error):
        return LOST
    if isinstance(error, MemoryError | ImportError | OSError) and (said := too_small()):
        return said
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file: {error.filename}"
    if isinstance(error, IsADirectoryError) and error.filename:
        return f"{error.filename} is a folder; give a file"
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    if isinstance(error, ImportError) and (error.name or "").startswith(("mlx", "libmlx")):
        return (
            f"MLX cannot be loaded here ({error}); on Linux install it with pip install 'mlx-pararnn[cpu]' "
            "or, for an NVIDIA GPU, 'mlx-pararnn[cuda]'"
        )
    return f"{type(error).__name__}: {first_line(error)} (run again with --debug for the traceback)"
