"""Functions that a model may call: an allow-list of typed Python functions, checked, limited, and run.

Nothing that a function or a model does wrong is raised: it becomes the text of the result, for the model.
"""

import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined, to_json

from ..errors import PararnnError, first_line
from ..process.interrupt import interrupt

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
        parameters: the JSON schema of its arguments, from the signature.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    target: Callable[..., Any]
    arguments: type[BaseModel]
    seconds: float | None


class Functions:
    """An allow-list of functions.

    Args:
        functions: Python functions with a type for every parameter.
        seconds: how long a call may take; None runs it in the calling thread, without a limit.
        result_bytes: longer results are cut, and say so.

    Raises:
        PararnnError: a function cannot be described; the sentence names it and the parameter.
    """

    def __init__(
        self,
        functions: Iterable[Callable[..., Any]] = (),
        *,
        seconds: float | None = SECONDS,
        result_bytes: int = RESULT_BYTES,
    ) -> None:
        self._functions: dict[str, Function] = {}
        self._seconds, self._result_bytes = seconds, result_bytes
        self._late: dict[str, threading.Thread] = {}  # calls that took too long and may still run
        for function in functions:
            self.add(function)

    def add(self, function: Target, name: str | None = None) -> Target:
        """Allow one more function; also a decorator. Raises as the class does, or where the name is taken."""
        described = describe(function, name, self._seconds)
        if described.name in self._functions:
            raise PararnnError(f"there are two functions {described.name!r}; give one of them another name")
        self._functions[described.name] = described
        return function

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
            given = function.arguments.model_validate_json(arguments)
        except ValidationError as error:
            return _error(_what_is_wrong(error))
        keywords = {
            str(function.arguments.model_fields[field].alias): getattr(given, field)
            for field in given.model_fields_set
        }
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
    function: Callable[..., Any], name: str | None = None, seconds: float | None = SECONDS
) -> Function:
    """What a model must know of a function, from its signature and docstring.

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
    fields: dict[str, Any] = {}
    for n, parameter in enumerate(parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PararnnError(f"function {name}: parameter {parameter} cannot be given by name")
        if parameter.name not in types:
            raise PararnnError(
                f"function {name}: parameter {parameter.name} has no type; write one, such as "
                f"{parameter.name}: str"
            )
        default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
        # Numbered: a parameter may be called as an attribute of pydantic's models is.
        fields[f"argument{n}"] = (types[parameter.name], Field(default, alias=parameter.name))
    try:
        arguments = create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
        schema = arguments.model_json_schema(schema_generator=_Untitled)
    except (PydanticUserError, TypeError) as error:
        raise PararnnError(f"function {name}: no JSON schema for its types ({first_line(error)})") from error
    schema.pop("title", None)
    description = " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())
    return Function(name, description, schema, function, arguments, seconds)


class _Untitled(GenerateJsonSchema):
    """Without the titles that would be made of the parameters' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "ok" if value is None else to_json(value, fallback=str).decode()


def _cut(text: str, most: int) -> str:
    """The text, or its first `most` bytes and how many there are."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most:
        return encoded.decode()
    return f"{encoded[:most].decode(errors='ignore')} [cut: {len(encoded):,} bytes in all]"


def _error(sentence: str) -> Outcome:
    return Outcome(f"error: {sentence}", True)


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the arguments"
    return f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"[:_ERROR_CHARACTERS]


def _in_one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return (f"{type(error).__name__}: {said}" if said else type(error).__name__)[:_ERROR_CHARACTERS]
