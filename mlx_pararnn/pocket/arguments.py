"""What functions are called with, checked by pydantic, whose import takes longer than the first token."""

import inspect
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined, to_json

from ..errors import PararnnError, first_line

_ERROR_CHARACTERS = 300


class Arguments:
    """The arguments of a function.

    Args:
        name: the function's.
        parameters: type and default of each, `inspect.Parameter.empty` for none.

    Attributes:
        schema: their JSON schema.

    Raises:
        PararnnError: there is no JSON schema for a type.
    """

    def __init__(self, name: str, parameters: dict[str, tuple[Any, Any]]) -> None:
        # Numbered: a parameter may be called as an attribute of pydantic's models is.
        fields: dict[str, Any] = {
            f"argument{n}": (
                kind,
                Field(PydanticUndefined if default is inspect.Parameter.empty else default, alias=parameter),
            )
            for n, (parameter, (kind, default)) in enumerate(parameters.items())
        }
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        try:
            self._model: type[BaseModel] = create_model(name, __config__=config, **fields)
            self.schema = self._model.model_json_schema(schema_generator=_Untitled)
        except (PydanticUserError, TypeError) as error:
            raise PararnnError(
                f"function {name}: no JSON schema for its types ({first_line(error)})"
            ) from error
        self.schema.pop("title", None)

    def read(self, text: str) -> dict[str, Any]:
        """The arguments that `text`, JSON, gives.

        Raises:
            ValueError: they are not the function's; the sentence says which.
        """
        try:
            given = self._model.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(_what_is_wrong(error)) from error
        return {
            str(self._model.model_fields[field].alias): getattr(given, field)
            for field in given.model_fields_set
        }


def in_json(value: Any) -> str:
    """A result as JSON; what is none as the text of it."""
    return to_json(value, fallback=str).decode()


class _Untitled(GenerateJsonSchema):
    """Without the titles that would be made of the parameters' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the arguments"
    return f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"[:_ERROR_CHARACTERS]
