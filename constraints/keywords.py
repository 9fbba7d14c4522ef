"""What a JSON schema's keywords say before any of it is written: references, allOf, types, and alternatives apart."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from ..core.errors import DgemmaError, quoted

Schema = dict[str, Any]

OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"},
    "object": {
        *("properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties"),
        "unevaluatedProperties",
    },
}
"""Keywords that speak of values of one type."""

COMMON = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "nullable"}
NOTES = {
    *(
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
    ),
    *("$comment", "$defs", "definitions", "discriminator", "contentMediaType", "contentEncoding", "contentSchema"),
    *("$anchor", "$vocabulary", "xml", "externalDocs", "id", "propertyOrdering"),
}
"""Keywords that change nothing."""

REFUSED = {
    *("patternProperties", "not", "if", "then", "else", "contains", "minContains", "maxContains", "$dynamicAnchor"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
}
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
KNOWN = {*COMMON, *NOTES, *REFUSED, *(key for keys in OF_TYPE.values() for key in keys)}


def place(at: str, *names: object) -> str:
    return at.rstrip("/") + "".join(f"/{quoted(str(one), 40)[1:-1]}" for one in names)


def asks(schema: Schema) -> bool:
    """Whether any keyword of a schema says something about values."""
    return any(key not in NOTES and not key.startswith("x-") for key in schema)


def check(schema: Any, at: str) -> None:
    """Refuse what is no schema, and keywords that cannot be kept or are not known.

    Raises:
        DgemmaError: which, and where.
    """
    if not isinstance(schema, dict):
        raise DgemmaError(f"the schema at {at} is {quoted(schema, 60)}, expected a mapping, True or False")
    for key in schema:
        if not isinstance(key, str):
            raise DgemmaError(f"the schema at {at} has the key {quoted(key, 40)}, expected text")
        if key in REFUSED:
            raise DgemmaError(f"the schema at {at} has {key}, which no finite automaton keeps here; say it without")
        if key not in KNOWN and not key.startswith("x-"):
            near = difflib.get_close_matches(key, KNOWN, 1)
            hint = f"; is {near[0]} meant?" if near else ""
            raise DgemmaError(f"the schema at {at} has {quoted(key, 40)}, a keyword that is not known here{hint}")
    for key in ("anyOf", "oneOf", "allOf", "enum", "required", "prefixItems"):
        if key in schema and (not isinstance(schema[key], list) or (not schema[key] and key.endswith("Of"))):
            raise DgemmaError(f"the schema at {at} has the {key} {quoted(schema[key], 40)}, expected a list")
    if not isinstance(schema.get("properties", {}), dict):
        raise DgemmaError(f"the schema at {at} has the properties {quoted(schema['properties'], 40)}, expected names")
    if not all(isinstance(one, str) for one in schema.get("required", [])):
        raise DgemmaError(f"the schema at {at} requires what is no name: {quoted(schema['required'], 60)}")
    if not isinstance(schema.get("nullable", False), bool):
        raise DgemmaError(
            f"the schema at {at} has the nullable {quoted(schema['nullable'], 40)}, expected True or False"
        )
    kinds = _listed(schema.get("type", "null"))
    if not kinds or not all(isinstance(one, str) and one in TYPES for one in kinds):
        bad = next((one for one in kinds if not isinstance(one, str) or one not in TYPES), kinds)
        raise DgemmaError(f"the schema at {at} has the type {quoted(bad, 40)}, expected one of {', '.join(TYPES)}")
    for key in ("pattern", "format"):
        if not isinstance(schema.get(key, ""), str) and not (key == "pattern" and isinstance(schema[key], tuple)):
            raise DgemmaError(f"the schema at {at} has the {key} {quoted(schema[key], 40)}, expected text")


def flat(schema: Any, root: Any, at: str, refs: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Return a schema without references, allOf, const and nullable → False or a mapping; the references followed.

    Raises:
        DgemmaError: a reference that leads nowhere or in a circle, or an allOf that cannot be put together.
    """
    if isinstance(schema, bool):
        return (schema if not schema else {}), refs
    check(schema, at)
    found: Any = {key: one for key, one in schema.items() if key in KNOWN - NOTES}
    parts, target = found.pop("allOf", []), found.pop("$ref", None)
    if target is not None:
        # Siblings in allOf may refer to one thing, each for itself: a circle comes by again and again.
        if refs.count(target) > 2:
            raise DgemmaError(
                f"the schema at {at} refers to {quoted(target, 60)} inside itself: recursion, which no finite "
                "automaton keeps; write it out as deep as it is needed"
            )
        refs = (*refs, target)
        resolved, refs = flat(_resolved(target, root, at), root, at, refs)
        found = both(resolved, found, at)
    if found and "const" in found:
        const = found.pop("const")
        found = both(found, {"enum": [const]}, at)
    for i, one in enumerate(parts):
        made, refs = flat(one, root, place(at, "allOf", i), refs)
        found = both(found, made, at)
    if found and found.pop("nullable", False):
        found = {"anyOf": [found, {"type": "null"}]}
    return found, refs


def _resolved(target: Any, root: Any, at: str) -> Any:
    wrong = DgemmaError(
        f"the schema at {at} refers to {quoted(target, 80)}, which is not in it; expected such as '#/$defs/name'"
    )
    if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
        raise wrong
    found = root
    for name in target.split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise wrong
    return found


def both(one: Any, other: Any, at: str) -> Any:
    """Return the schema of what two flat ones allow together.

    Raises:
        DgemmaError: two of a keyword that cannot be one.
    """
    if one is False or other is False:
        return False
    made = dict(one)
    for key, second in other.items():
        if key not in made or made[key] == second:
            made[key] = second
            continue
        first = made[key]
        if key.startswith(("min", "exclusiveMin")) and _numbers(first, second):
            made[key] = max(first, second)
        elif key.startswith(("max", "exclusiveMax")) and _numbers(first, second):
            made[key] = min(first, second)
        elif key == "type":
            shared = _shared(_listed(first), _listed(second))
            if not shared:
                return False
            made[key] = shared
        elif key == "enum":
            made[key] = [value for value in first if any(same(value, another) for another in second)]
        elif key == "required":
            made[key] = list(dict.fromkeys([*first, *second]))
        elif key == "pattern":
            made[key] = tuple(dict.fromkeys([*_tuple(first), *_tuple(second)]))
        elif key in ("items", "additionalProperties", "propertyNames"):
            made[key] = {"allOf": [first, second]}
        elif key in ("anyOf", "oneOf"):
            made[key] = [{"allOf": [a, b]} for a in first for b in second]
        elif key != "properties":
            raise DgemmaError(
                f"the schema at {at} asks for two {key} at once, which cannot be put together; ask for one"
            )
    if "properties" in one or "properties" in other:
        made["properties"] = _properties(one, other)
    return made


def _properties(one: Schema, other: Schema) -> Schema:
    """Properties of both; one that a side does not declare is what the side says of additional ones."""
    names = dict.fromkeys([*one.get("properties", {}), *other.get("properties", {})])
    made = {}
    for name in names:
        sides = [side.get("properties", {}).get(name, side.get("additionalProperties", True)) for side in (one, other)]
        asked = [side for side in sides if side is not True]
        made[name] = asked[0] if len(asked) == 1 else {"allOf": asked} if asked else True
    return made


def _listed(kinds: Any) -> list[Any]:
    return list(kinds) if isinstance(kinds, list) else [kinds]


def _tuple(pattern: str | tuple[str, ...]) -> tuple[str, ...]:
    return (pattern,) if isinstance(pattern, str) else pattern


def _numbers(*found: Any) -> bool:
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in found)


def _shared(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Types of both; integers are numbers."""
    found = [one for one in first if one in second or (one == "integer" and "number" in second)]
    return found + [one for one in second if one == "integer" and "number" in first and one not in found]


def same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal; True is not 1, and 1 is 1.0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def is_one_of(value: Any, kinds: Sequence[str]) -> bool:
    """Whether a value is of one of some types."""
    plain = {bool: {"boolean"}, str: {"string"}, type(None): {"null"}, list: {"array"}, dict: {"object"}}
    if isinstance(value, int | float) and not isinstance(value, bool):
        own = {"number", "integer"} if math.isfinite(value) and value == int(value) else {"number"}
    else:
        own = plain.get(type(value), set())
    return bool(own & set(kinds))


def types(schema: Schema, at: str) -> list[str] | None:
    """Return the types that a flat schema allows; None for all. Without `type`, keywords of one type ask for that.

    Raises:
        DgemmaError: keywords of several types without one.
    """
    if "type" in schema:
        return _listed(schema["type"])
    found = [kind for kind, keys in OF_TYPE.items() if keys & schema.keys()]
    if len(found) > 1:
        raise DgemmaError(f"the schema at {at} speaks of {' and '.join(found)} without a type; add type")
    return found or None


def as_string(schema: Any) -> Any:
    """Return the schema of names: always strings."""
    return {"allOf": [{"type": "string"}, schema]} if schema is not True else {"type": "string"}


def span(schema: Schema, low: str, high: str, at: str) -> tuple[int, int | None]:
    """Return two bounds of a length.

    Raises:
        DgemmaError: one that is no length.
    """
    for key in (low, high):
        one = schema.get(key, 0)
        if not _numbers(one) or not 0 <= one < math.inf or one != int(one):
            raise DgemmaError(f"the schema at {at} has the {key} {quoted(one, 40)}, expected 0 or more")
    most = schema.get(high)
    return int(schema.get(low, 0)), None if most is None else int(most)


def check_apart(found: Sequence[Any], at: str, root: Any, refs: tuple[str, ...]) -> None:
    """Refuse alternatives of oneOf of which two may hold for one value.

    Raises:
        DgemmaError: which two.
    """
    for j, other in enumerate(found):
        for i, one in enumerate(found[:j]):
            if not _apart(one, other, root, at, refs):
                raise DgemmaError(
                    f"the schema at {at} has oneOf, of which {i + 1} and {j + 1} may hold at once; use anyOf, or a "
                    "property that is required in both and tells them apart"
                )


def _apart(one: Any, other: Any, root: Any, at: str, refs: tuple[str, ...]) -> bool:
    """Whether it is sure that no value satisfies two flat schemas."""
    if one is False or other is False:
        return True
    for first, second in ((one, other), (other, one)):
        for key in ("anyOf", "oneOf"):
            if key in first:
                rest = {name: one for name, one in first.items() if name != key}
                parts = [flat({"allOf": [rest, part]}, root, at, refs)[0] for part in first[key]]
                return all(_apart(part, second, root, at, refs) for part in parts)
    kinds = [_kinds(side) for side in (one, other)]
    if kinds[0] is not None and kinds[1] is not None and not _shared(list(kinds[0]), list(kinds[1])):
        return True
    if "enum" in one and "enum" in other:
        return not any(same(a, b) for a in one["enum"] for b in other["enum"])
    if kinds[0] != {"object"} or kinds[1] != {"object"}:
        return False
    for first in (one, other):
        for name in first.get("required", []):
            sides = [
                side.get("properties", {}).get(name, side.get("additionalProperties", True)) for side in (one, other)
            ]
            a, b = (flat(side, root, at, refs)[0] for side in sides)
            if _apart(a, b, root, at, refs):
                return True
    return False


def _kinds(schema: Schema) -> set[str] | None:
    if "type" in schema:
        return set(_listed(schema["type"]))
    if "enum" in schema:
        names = [kind for kind in TYPES if any(is_one_of(value, [kind]) for value in schema["enum"])]
        return set(names)
    return None
