"""Progress on stderr, for work that takes longer than a second."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any


@contextmanager
def progress_bar(
    columns: Callable[[Any], Iterable[Any]], *, description: str = "", total: float | None = None
) -> Iterator[Callable[..., None]]:
    """A bar while the block runs, if stderr is a terminal; gives the function that updates it.

    Args:
        columns: what the bar shows, out of the module `rich.progress`, which it is called with.
        description, total: of its one task; the function takes them too, and `completed`.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    with progress.Progress(
        *columns(progress), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield partial(bar.update, bar.add_task(description, total=total))


class PromptProgress:
    """MLX-LM's prompt_progress_callback: a bar once reading the prompt has taken a second."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("")
        self._begin = time.perf_counter()
        self._shown = False

    def __enter__(self) -> "PromptProgress":
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done; the bar appears after a second."""
        if done >= total:
            self._bar.stop()
        elif self._shown or time.perf_counter() - self._begin > 1:
            if not self._shown:
                self._bar.start()
                self._shown = True
            self._bar.update(self._task, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
