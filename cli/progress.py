"""Progress on stderr, for work that takes longer than a second."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(
    columns: Callable[[Any], Iterable[Any]],
    *,
    description: str = "",
    total: float | None = None,
    above: Any = None,
) -> Iterator[Callable[..., None]]:
    """A bar while the block runs, if stderr is a terminal; gives the function that updates it.

    Args:
        columns: what the bar shows, out of the module `rich.progress`, which it is called with.
        description, total: of its one task; the function takes them too, and `completed`.
        above: what else is shown, drawn again with the bar; None for nothing.
    """
    from rich import progress
    from rich.console import Console

    class Bar(progress.Progress):
        def get_renderables(self) -> Iterable[Any]:
            yield from [] if above is None else [above]
            yield from super().get_renderables()

    console = Console(stderr=True)
    if not console.is_terminal:  # where Rich up to 14.2 writes an empty line
        yield lambda **_: None
        return
    with Bar(*columns(progress), console=console, transient=True) as bar:
        yield partial(bar.update, bar.add_task(description, total=total))


def loading(name: str) -> AbstractContextManager[None]:
    """One line on a terminal while a model is loaded and compiled for; it goes when that is done."""
    return working(f"Loading {name}")


@contextmanager
def working(what: str) -> Iterator[None]:
    """One line on a terminal that says what is done, and what is compiled for it; it goes with the block."""
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    if not sys.stderr.isatty() or dumb:
        yield
        return

    def show(text: str) -> None:
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        sys.stderr.write(f"\r\x1b[K{text[: width - 1]}")  # one line, which can be taken back
        sys.stderr.flush()

    def line_of_its_own(record: logging.LogRecord) -> bool:
        compiling = record.name == "mlx_pararnn.compute.cpu_build" and record.levelno == logging.INFO
        show(f"{what}: {record.getMessage()}" if compiling else "")
        return not compiling

    handlers = list(logging.getLogger("mlx_pararnn").handlers)
    for handler in handlers:
        handler.addFilter(line_of_its_own)
    show(f"{what} ...")
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(line_of_its_own)
        show("")


class PromptProgress:
    """MLX-LM's prompt_progress_callback: a bar on a terminal once reading the prompt has taken a second."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._begin: float | None = None

    def __enter__(self) -> "PromptProgress":
        return self

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` of `total`, if that is known, are done; the bar appears after a second."""
        if self._begin is None:  # until now the text may have been typed
            self._begin = time.perf_counter()
        if total is not None and done >= total:
            self._stop()
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif time.perf_counter() - self._begin > 1 and sys.stderr.isatty():
            self._bar = _prompt_bar(total is not None)
            self._bar.add_task("", completed=done, total=total)
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _prompt_bar(ends: bool) -> "Progress":
    from rich.console import Console  # a tenth of a second, which short prompts do without
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    known = (*columns, TimeRemainingColumn())
    unknown = (TextColumn("reading the prompt: {task.completed:,} tokens so far"),)
    return Progress(*(known if ends else unknown), console=Console(stderr=True), transient=True)
