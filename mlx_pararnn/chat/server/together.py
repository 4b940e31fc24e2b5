"""A model that is divided among processes: rank 0 has the requests, and tells the others what is called.

All of them hold the same rows, each its own channels of the states, and call the model together. What is
asked, said and decided stays in rank 0; of a job the others know its tokens alone.
"""

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from ...distributed import Group, share
from .jobs import Job

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound="Led")

END, FORGET = "end", "forget"


def by_all(method: Callable[Concatenate[B, P], R]) -> Callable[Concatenate[B, P], R]:
    """A method that all processes call with the same arguments: a job, or none, and what JSON can write."""

    @wraps(method)
    def call(self: B, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            self.tell(method.__name__, *args, **kwargs)
            return method(self, *args, **kwargs)
        except BaseException:
            self.failed = self.leads
            raise

    return call


class Led:
    """What rank 0 leads; in one process, and in the others, nothing is told.

    Args:
        group: the processes; None for one alone.

    Attributes:
        failed: whether a call has failed here that others may be in the middle of: they cannot go on.
    """

    def __init__(self, group: Group | None) -> None:
        self._followers = group if group is not None and group.rank() == 0 else None
        self.failed = False
        self._numbers: dict[Job, int] = {}
        self._count = count()

    @property
    def leads(self) -> bool:
        """Whether there are others."""
        return self._followers is not None

    def tell(self, name: str, *arguments: Any, **named: Any) -> None:
        """What is called next; what a job is goes along with its first call."""
        if self._followers is None:
            return
        number = about = None
        if arguments:
            job, *arguments = arguments  # type: ignore[assignment]
            if job not in self._numbers:
                self._numbers[job] = next(self._count)
                about = [job.prompt, job.max_tokens, job.system_length]
            number = self._numbers[job]
        share(self._followers, [name, number, about, arguments, named])

    def forget(self, job: Job) -> None:
        """A job has ended, and is not a row any more."""
        if job in self._numbers:
            self.tell(FORGET, job)
            del self._numbers[job]

    def end(self) -> None:
        """The others' `follow` returns."""
        self.tell(END)
        self._followers = None


def follow(led: Led, group: Group) -> None:
    """Make the calls that rank 0 makes, in another process, until it ends."""
    jobs: dict[int, Job] = {}
    while True:
        name, number, about, rest, named = share(group)
        if about is not None:
            prompt, max_tokens, system_length = about
            text = cast(Any, None)  # rank 0 alone says what it is
            jobs[number] = Job(prompt, max_tokens, text, None, system_length=system_length)
        if name == END:
            return
        if name == FORGET:
            del jobs[number]
        else:
            getattr(led, name)(*([] if number is None else [jobs[number]]), *rest, **named)
