"""Values of options without pydantic, which Typer otherwise imports to look at each of them."""

import re
from typing import Any

from typer.core import TyperCommand

# What Python and pydantic read alike.
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_DECIMAL = re.compile(r"\d{1,18}(\.\d{1,18})?", re.ASCII)


class Command(TyperCommand):
    """A command that hands Typer only what is not plainly sound."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options and arguments."""
        return quick(super().get_params(ctx))


def quick(parameters: list[Any]) -> list[Any]:
    """Let these take what was left out, text, and numbers within their bounds as they are."""
    for parameter in parameters:
        # Typer documents neither: without them it looks at each value itself, as it does otherwise.
        descriptor, make = (
            getattr(parameter, name, None) for name in ("type_descriptor", "get_runtime_param")
        )
        if descriptor is not None and make is not None and "get_runtime_param" not in vars(parameter):
            later = _Later(descriptor, make)
            parameter.get_runtime_param = lambda later=later: later
    return parameters


class _Later:
    """In place of Typer's `RuntimeParam`, which is made for what it has to look at."""

    def __init__(self, descriptor: Any, make: Any) -> None:
        self._kind, self._info, self._make = descriptor.annotation, descriptor.parameter_info, make

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        if not several and self._info.parser is None:
            if self._kind is str and isinstance(value, str):
                return value
            number = self._number(value)
            if number is not None and self._is_in_bounds(number):
                return number
        return self._make().coerce(value, param=param, ctx=ctx)

    def _number(self, value: Any) -> int | float | None:
        pattern = {int: _WHOLE, float: _DECIMAL}.get(self._kind)
        if pattern is not None and type(value) is self._kind:  # a default
            return value  # type: ignore[no-any-return]
        if pattern is not None and isinstance(value, str) and pattern.fullmatch(value):
            number: int | float = self._kind(value)
            return number
        return None

    def _is_in_bounds(self, number: float) -> bool:
        low, high = self._info.min, self._info.max
        return (low is None or low <= number) and (high is None or number <= high)
