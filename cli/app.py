"""`mlx-pararnn`: the list of commands. Each command imports what it needs when it runs."""

import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

import mlx_pararnn
from mlx_pararnn.process.watchdog import ending_signals

from .quick_values import Command, quick
from .report import leave_the_word_to_rank_0

UsageError: Any = typer.BadParameter.__base__  # Typer has no public name for it


# The file of this folder that holds each command; it is imported when the command is asked for.
COMMANDS = {
    "convert": "convert",
    "add-tokenizer": "add_tokenizer",
    "generate": "generate",
    "draw": "draw",
    "chat": "chat",
    "serve": "serve",
    "train": "train",
    "verify": "verify",
    "inspect": "inspect",
    "bench": "bench",
    "lm": "lm",
    "doctor": "doctor",
    "cache": "cache_command",
}
# `lm` hands what follows its COMMAND on.
_SETTINGS: dict[str, Any] = {
    "lm": {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
}


class Commands(TyperGroup):
    """The commands; wrong usage is told as every other error is, in one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of them; None for another name, after which all are known, for the one that was meant."""
        if cmd_name not in COMMANDS:
            self.commands.update((name, _command(name)) for name in COMMANDS)
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _command(cmd_name)
        return self.commands[cmd_name]

    def get_params(self, ctx: Any) -> list[Any]:
        """The options before a command."""
        return quick(super().get_params(ctx))

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command line, as Typer's groups do."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except UsageError as error:
            _say_usage_error(error)
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _command(name: str) -> Any:
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    function = getattr(import_module(f".{COMMANDS[name]}", __package__), name.replace("-", "_"))
    alone.command(name, cls=Command, context_settings=_SETTINGS.get(name))(function)
    return typer.main.get_command(alone)


def _say_usage_error(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        error.show()
        return
    # What pydantic, which reads the values for Typer, writes besides.
    said = re.sub(r"Value error, |, unable to parse \w+ as an? \w+", "", error.format_message()).rstrip(".")
    if error.ctx is not None:
        said += f"{_meant_prompt(error.ctx, said)} (see {error.ctx.command_path} --help)"
    typer.echo(f"error: {said}", err=True)


def _meant_prompt(context: Any, said: str) -> str:
    """How to give the prompt that stands after MODEL, or as MODEL, as some programs take it."""
    extra = re.fullmatch(r"Got unexpected extra argument\(s\) \((.*)\)", said, re.DOTALL)
    given = context.params
    if not extra or context.command.name not in ("generate", "chat") or given.get("prompt") is not None:
        return ""
    from .options import meant_prompt

    return f"; {meant_prompt(given.get('model'), extra[1])}"


app = typer.Typer(
    name="mlx-pararnn",
    cls=Commands,
    help="Run ParaRNN language models on Apple silicon: convert a checkpoint, generate, chat.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(value: bool) -> None:
    if value:
        from mlx_pararnn import __version__  # slow: it is looked up

        typer.echo(f"mlx-pararnn {__version__}")
        raise typer.Exit


@app.callback()
def main_options(  # noqa: D103 - its docstring would be the help
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The command line; returns where a command does."""
    _open_streams()
    for number in ending_signals():
        signal.signal(number, _leave)
    sys.unraisablehook = _raise_again
    leave_the_word_to_rank_0()
    show_messages()
    app()


def _open_streams() -> None:
    """Standard streams that the caller closed: their numbers would go to the first files that are opened."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    # What is said while a command works is no reason to end it: on a full disk it is lost.
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_LosingFile(2, "w", closefd=False)),
        encoding=sys.stderr.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


class _LosingFile(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any) -> int:
        """As files do; no error is raised."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def show_messages() -> None:
    """What the library logs and warns of, a line each on stderr; on a terminal also what it waits for."""
    handler = logging.StreamHandler()
    logger = logging.getLogger("mlx_pararnn")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    show = warnings.showwarning

    def show_ours(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).is_relative_to(Path(mlx_pararnn.__file__).parent):
            logger.warning("%s", message)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_ours


def _leave(number: int, frame: FrameType | None) -> None:
    """A signal ends the program by way of what cleans up.

    While a library's native code is loaded it ends it as if nobody handled it: nanobind aborts at an
    exception, with a page of its own.
    """
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _raise_again(unraisable: Any) -> None:
    """What a signal raised where nothing can leave, as in a `__del__`, is raised again a moment later."""
    from mlx_pararnn.process.interrupt import interrupt  # brings ctypes

    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
        kind: type[BaseException] = KeyboardInterrupt
    elif isinstance(error, SystemExit):
        kind = type("Left", (SystemExit,), {"code": error.code})
    else:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.05, interrupt, (threading.main_thread(), kind))
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
