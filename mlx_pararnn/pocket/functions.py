"""Functions that a model may call: an allow-list of typed Python functions, checked, limited, and run.

Nothing that a function or a model does wrong is raised: it becomes the text of the result, for the model.
"""

import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from ..errors import PararnnError
from ..process.interrupt import interrupt

if TYPE_CHECKING:
    from .arguments import Arguments

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
SECONDS = 5.0  # that a call may take
RESULT_BYTES = 4096  # of a result that the model gets to read
_ERROR_CHARACTERS = 300

Target = TypeVar("Target", bound=Callable[..., Any])


class Outcome(NamedTuple):
    """What a call came to: the text that the model reads, and whether it is an error."""

    text: str
    failed: bool


@dataclass(frozen=True)
class Function:
    """A function and what is known of it.

    Attributes:
        name, description: the description is the first paragraph of the docstring.
        types: type and default of each parameter, `inspect.Parameter.empty` for none.
    """

    name: str
    description: str
    types: dict[str, tuple[Any, Any]]
    target: Callable[..., Any]
    seconds: float | None

    @cached_property
    def arguments(self) -> "Arguments":
        """What it is called with."""
        from .arguments import Arguments

        return Arguments(self.name, self.types)

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of its arguments, from the signature."""
        return self.arguments.schema


class Functions:
    """An allow-list of functions.

    Args:
        functions: Python functions with a type for every parameter.
        seconds: how long a call may take; None runs it in the calling thread, without a limit.
        result_bytes: longer results are cut, and say so.
        known: the types are known to have JSON schemas, which are made when they are needed.
        instead: given the user's message, a function's name and its arguments (JSON), a sentence that is the
            result in place of the call, or None.
        check_answer: given the message, a function that is asked while the model answers without a call. Of
            what has been said and of whether that is all it gives what is to be said instead, or None.

    Raises:
        PararnnError: a function cannot be described; the sentence names it and the parameter.
    """

    def __init__(
        self,
        functions: Iterable[Callable[..., Any]] = (),
        *,
        seconds: float | None = SECONDS,
        result_bytes: int = RESULT_BYTES,
        known: bool = False,
        instead: Callable[[str, str, str], str | None] = lambda message, name, arguments: None,
        check_answer: Callable[[str], Callable[[str, bool], str | None]] = lambda message: (
            lambda said, ended: None
        ),
    ) -> None:
        self.instead, self.check_answer = instead, check_answer
        self._functions: dict[str, Function] = {}
        self._seconds, self._result_bytes = seconds, result_bytes
        self._late: dict[str, threading.Thread] = {}  # calls that took too long and may still run
        for function in functions:
            self._add(describe(function, None, seconds, known))

    def add(self, function: Target, name: str | None = None) -> Target:
        """Allow one more function; also a decorator. Raises as the class does, or where the name is taken."""
        self._add(describe(function, name, self._seconds))
        return function

    def _add(self, described: Function) -> None:
        if described.name in self._functions:
            raise PararnnError(f"there are two functions {described.name!r}; give one of them another name")
        self._functions[described.name] = described

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def __iter__(self) -> Iterator[Function]:
        return iter(self._functions.values())

    def __getitem__(self, name: str) -> Function:
        return self._functions[name]

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The functions as OpenAI's `tools`."""
        return [
            {
                "type": "function",
                "function": {"name": f.name, "description": f.description, "parameters": f.parameters},
            }
            for f in self
        ]

    def call(self, name: str, arguments: str) -> Outcome:
        """Run a function of the list, and nothing else.

        Args:
            name: any text.
            arguments: JSON, as a model wrote it.
        """
        function = self._functions.get(name)
        if function is None:
            names = ", ".join(self._functions) or "none"
            return _error(f"there is no function {name[:64]!r}; there are: {names}")
        try:
            keywords = function.arguments.read(arguments)
        except ValueError as error:
            return _error(str(error))
        late = self._late.get(name)
        if late is not None and late.is_alive():
            return _error(f"{name} is still busy with an earlier call")
        outcome = self._run(function, keywords)
        return Outcome(_cut(outcome.text, self._result_bytes), outcome.failed)

    def _run(self, function: Function, keywords: dict[str, Any]) -> Outcome:
        found: list[Outcome] = []

        def run() -> None:
            try:
                found.append(Outcome(_as_text(function.target(**keywords)), False))
            except PararnnError as error:  # a sentence for the user
                found.append(Outcome(str(error), True))
            except BaseException as error:  # SystemExit and the like end the call, not the program
                logger.debug("function %s failed", function.name, exc_info=True)
                found.append(_error(_in_one_line(error)))

        if function.seconds is None:
            run()
            return found[0]
        thread = threading.Thread(target=run, name=f"function {function.name}", daemon=True)
        thread.start()
        thread.join(function.seconds)
        if thread.is_alive():
            self._late[function.name] = thread
            interrupt(thread)
            return _error(f"{function.name} took longer than {function.seconds:g} seconds")
        return found[0]


def describe(
    function: Callable[..., Any],
    name: str | None = None,
    seconds: float | None = SECONDS,
    known: bool = False,
) -> Function:
    """What a model must know of a function, from its signature and docstring.

    Args:
        function, name: the function, and what models call it if that is not its own name.
        seconds, known: as for `Functions`.

    Raises:
        PararnnError: it has a parameter without a type, or one that cannot be given by name.
    """
    name = name or str(getattr(function, "__name__", ""))
    if not NAME.fullmatch(name):
        raise PararnnError(
            f"{name!r} is no name for a function that models call; give one of letters, digits and _"
        )
    if inspect.iscoroutinefunction(function):
        raise PararnnError(f"function {name} is async; give one that returns its result")
    try:
        types = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise PararnnError(f"function {name}: its types cannot be read ({error})") from error
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PararnnError(f"function {name}: parameter {parameter} cannot be given by name")
        if parameter.name not in types:
            raise PararnnError(
                f"function {name}: parameter {parameter.name} has no type; write one, such as "
                f"{parameter.name}: str"
            )
    description = " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())
    typed = {parameter.name: (types[parameter.name], parameter.default) for parameter in parameters.values()}
    described = Function(name, description, typed, function, seconds)
    if not known:
        described.arguments  # noqa: B018 - it raises for types without a schema
    return described


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "ok"
    from .arguments import in_json

    return in_json(value)


def _cut(text: str, most: int) -> str:
    """The text, or its first `most` bytes and how many there are."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most:
        return encoded.decode()
    return f"{encoded[:most].decode(errors='ignore')} [cut: {len(encoded):,} bytes in all]"


def _error(sentence: str) -> Outcome:
    return Outcome(f"error: {sentence}", True)


def _in_one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return (f"{type(error).__name__}: {said}" if said else type(error).__name__)[:_ERROR_CHARACTERS]
