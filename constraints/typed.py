"""Python types as JSON schemas, and values of JSON as those types: pydantic models, dataclasses, and what they hold."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import sys
import types
import typing
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import DgemmaError, quoted

Back = Callable[[Any], Any]
"""What makes a value of JSON the type's."""

_PLAIN: dict[Any, tuple[dict[str, Any], Back]] = {
    str: ({"type": "string"}, str),
    int: ({"type": "integer"}, int),
    float: ({"type": "number"}, float),
    bool: ({"type": "boolean"}, bool),
    type(None): ({"type": "null"}, lambda value: None),
    Any: ({}, lambda value: value),
    datetime.date: ({"type": "string", "format": "date"}, datetime.date.fromisoformat),
    datetime.datetime: ({"type": "string", "format": "date-time"}, datetime.datetime.fromisoformat),
    datetime.time: ({"type": "string", "format": "time"}, datetime.time.fromisoformat),
    uuid.UUID: ({"type": "string", "format": "uuid"}, uuid.UUID),
    list: ({"type": "array"}, list),
    dict: ({"type": "object"}, dict),
}


def schema_of(given: Any) -> Any:
    """Return the JSON schema of what a user gives as one: a mapping, a pydantic model, a dataclass.

    A field with a default may be missing. A field's keywords are given with it, as
    `Annotated[str, {"maxLength": 20}]`.

    Raises:
        DgemmaError: something else, or a type that has no schema.
    """
    if isinstance(given, bool):
        return given
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str | bytes | Path):
        raise DgemmaError(f"the schema is a {type(given).__name__}, expected a mapping: read it with json.loads")
    return _of(given, ())[0]


def parsed(text: str, given: Any) -> Any:
    """Return an answer as what its schema was given as: a value of JSON, or an instance of a model or dataclass.

    Raises:
        DgemmaError: the answer is not whole, or not valid.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DgemmaError(f"the answer is no whole JSON: {error}; give it a larger max_new_tokens") from None
    if isinstance(given, bool | Mapping):
        return value
    try:
        return _of(given, ())[1](value)
    except (ValueError, TypeError, KeyError) as error:  # pydantic's errors are ValueErrors
        said = " ".join(str(error).split())
        raise DgemmaError(f"the answer is no {_name(given)}: {said[:200]}") from None


def _name(given: Any) -> str:
    return quoted(getattr(given, "__name__", given), 60).strip("'")


def _of(given: Any, inside: tuple[Any, ...]) -> tuple[dict[str, Any], Back]:
    """Return a type's schema and what makes its values."""
    if (isinstance(given, type) or given is Any) and given in _PLAIN:
        return _PLAIN[given]
    if given is None:
        return _PLAIN[type(None)]
    if given in inside:
        raise DgemmaError(
            f"{_name(given)} holds itself, which no finite automaton keeps; write it out as deep as needed"
        )
    if model := _pydantic(given):
        return model
    if isinstance(given, enum.EnumMeta):
        members: list[enum.Enum] = list(given)  # type: ignore[arg-type]
        return {"enum": [one.value for one in members]}, given
    if isinstance(given, type) and dataclasses.is_dataclass(given):
        return _record(given, (*inside, given))
    return _composed(given, inside)


def _pydantic(given: Any) -> tuple[dict[str, Any], Back] | None:
    """What pydantic says of a type that is its own; it is there if anybody has such a type."""
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None or not _holds_a_model(given, pydantic):
        return None
    adapter = pydantic.TypeAdapter(given)
    try:
        schema = adapter.json_schema()
    except pydantic.errors.PydanticUserError as error:
        raise DgemmaError(f"{_name(given)} has no JSON schema: {str(error).partition(chr(10))[0]}") from None
    return schema, lambda value: adapter.validate_json(json.dumps(value))


def _holds_a_model(given: Any, pydantic: Any) -> bool:
    if isinstance(given, type) and not isinstance(given, types.GenericAlias):
        return issubclass(given, pydantic.BaseModel) or pydantic.dataclasses.is_pydantic_dataclass(given)
    return any(_holds_a_model(one, pydantic) for one in typing.get_args(given))


def _record(given: type, inside: tuple[Any, ...]) -> tuple[dict[str, Any], Back]:
    try:
        hints = typing.get_type_hints(given, include_extras=True)
    except (NameError, TypeError) as error:
        raise DgemmaError(f"{_name(given)} has an annotation that cannot be read: {error}") from None
    fields = [one for one in dataclasses.fields(given) if one.init]
    made = {one.name: _part(f"{_name(given)}.{one.name}", hints[one.name], inside) for one in fields}
    missing = dataclasses.MISSING
    schema = {
        "type": "object",
        "properties": {name: part for name, (part, _) in made.items()},
        "required": [one.name for one in fields if one.default is missing and one.default_factory is missing],
        "additionalProperties": False,
    }
    return schema, lambda value: given(**{name: back(value[name]) for name, (_, back) in made.items() if name in value})


def _part(where: str, given: Any, inside: tuple[Any, ...]) -> tuple[dict[str, Any], Back]:
    """A field's type; a model's references are made its own."""
    schema, back = _of(given, inside)
    if "$defs" in schema:
        raise DgemmaError(f"{where} is a pydantic model with parts of its own; make the dataclass a model too")
    return schema, back


def _composed(given: Any, inside: tuple[Any, ...]) -> tuple[dict[str, Any], Back]:
    """Types made of types: Optional, unions, Literal, Annotated, lists, tuples, mappings by name."""
    origin, parts = typing.get_origin(given), typing.get_args(given)
    if origin is typing.Annotated:
        schema, back = _of(parts[0], inside)
        more = [one for one in parts[1:] if isinstance(one, Mapping)]
        return ({"allOf": [schema, *map(dict, more)]} if more else schema), back
    if origin is typing.Literal:
        return {"enum": list(parts)}, lambda value: value
    if origin in (typing.Union, types.UnionType):
        made = [_part(_name(given), one, inside) for one in parts]
        return {"anyOf": [schema for schema, _ in made]}, lambda value: _first_that_fits(value, made)
    if origin is list:
        schema, back = _part(_name(given), parts[0], inside)
        return {"type": "array", "items": schema}, lambda value: [back(one) for one in value]
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        schema, back = _part(_name(given), parts[0], inside)
        return {"type": "array", "items": schema}, lambda value: tuple(back(one) for one in value)
    if origin is tuple and parts:
        made = [_part(_name(given), one, inside) for one in parts]
        schema = {
            "type": "array",
            "prefixItems": [one for one, _ in made],
            "minItems": len(made),
            "maxItems": len(made),
        }
        return schema, lambda value: tuple(back(one) for one, (_, back) in zip(value, made, strict=True))
    if origin is dict and parts[0] is str:
        schema, back = _part(_name(given), parts[1], inside)
        return {"type": "object", "additionalProperties": schema}, lambda value: {k: back(v) for k, v in value.items()}
    raise DgemmaError(
        f"the schema has the type {_name(given)}, which has none in JSON; expected a mapping, a pydantic model, or a "
        "dataclass of str, int, float, bool, None, dates, times, UUID, Enum, Literal, list, tuple, dict of str, unions"
    )


def _first_that_fits(value: Any, made: list[tuple[dict[str, Any], Back]]) -> Any:
    """Return a value as the first of some types whose schema it satisfies."""
    from .chars import from_pattern
    from .schema import regex_of_schema

    for schema, back in made:
        if from_pattern(regex_of_schema(schema)).matches(json.dumps(value, ensure_ascii=False)):
            return back(value)
    return value
