"""JSON schemas as regular expressions.

What is written is narrower than what a schema allows, never wider: properties in the schema's order and no others, one
spelling for each value of an enum, numbers of limited length. What a regular expression cannot keep is refused, with
its place in the schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ..core.errors import DgemmaError, quoted
from . import keywords
from .chars import from_pattern
from .keywords import Schema
from .numbers import integer, number
from .strings import CHARACTER, counted, string

DEPTH, DEEPEST = 3, 4
"""Objects and arrays inside each other, where a schema leaves open what a value is: one more doubles the states."""

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def regex_of_choices(choices: Sequence[str]) -> str:
    """Return the pattern of one of some answers.

    Raises:
        DgemmaError: no choices, or one that is no text.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise DgemmaError(f"the choices are {quoted(choices, 60)}, expected a list of one text or more")
    for one in choices:
        if not isinstance(one, str):
            raise DgemmaError(f"the choice {quoted(one, 60)} is a {type(one).__name__}, expected text")
        if any(0xD800 <= ord(c) < 0xE000 for c in one):
            raise DgemmaError(f"the choice {quoted(one, 60)} holds half a character, a surrogate; expected text")
    return f"(?:{'|'.join(map(re.escape, dict.fromkeys(choices)))})"


def regex_of_schema(schema: Any, *, indent: int | None = None, depth: int = DEPTH) -> str:
    """Return the pattern of the JSON texts that a schema allows.

    Args:
        schema: a mapping, True, or `{"type": "object"}` for any object.
        indent: lay objects and arrays out as `json.dumps(..., indent=indent)` does. None: on one line, with or without
            a space after a comma and a colon.
        depth: of objects and arrays inside each other, where the schema leaves open what a value is.

    Raises:
        DgemmaError: what a regular expression cannot keep, with its place; or a schema that nothing satisfies.
    """
    if not isinstance(schema, bool | dict):
        raise DgemmaError(f"the schema is a {type(schema).__name__}, expected a mapping such as {{'type': 'object'}}")
    if indent is not None and (isinstance(indent, bool) or not isinstance(indent, int) or not 0 <= indent <= 16):
        raise DgemmaError(f"the schema's indent is {quoted(indent)}, expected None or spaces from 0 to 16")
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= DEEPEST:
        raise DgemmaError(f"the schema's depth is {quoted(depth)}, expected 0 to {DEEPEST}")
    try:
        found = _Writer(schema, indent, depth).value(schema, "/", (), 0)
    except RecursionError:
        raise DgemmaError("the schema is nested too deeply; make it flatter") from None
    if found is None:
        raise DgemmaError("the schema allows no value at all")
    return found


class _Writer:
    """Writes schemas as patterns; None is what nothing satisfies.

    Args of its methods: the schema, its place in the root schema, the references that led there, how deep the value is
    inside objects and arrays.
    """

    def __init__(self, root: Any, indent: int | None, depth: int) -> None:
        self.root, self.indent, self.depth = root, indent, depth

    def value(self, schema: Any, at: str, refs: tuple[str, ...], level: int) -> str | None:
        if schema is False:
            return None
        flat, refs = keywords.flat(schema, self.root, at, refs)
        if flat is False:
            return None
        for key in ("anyOf", "oneOf"):
            if key in flat:
                return self.alternatives(flat, key, at, refs, level)
        if "enum" in flat:
            return self.enumerated(flat, at, refs, level)
        kinds = keywords.types(flat, at)
        if kinds is None:
            return self.anything(level, self.depth)
        if "number" in kinds:
            kinds = [one for one in kinds if one != "integer"]
        writers = {"object": self.object, "array": self.array, "string": self.string}
        found: list[str | None] = []
        for kind in kinds:
            if kind in writers:
                found.append(writers[kind](flat, at, refs, level))
            elif kind in ("number", "integer"):
                found.append(self.number(flat, at, kind))
            else:
                found.append("(?:true|false)" if kind == "boolean" else "null")
        return _either(found)

    def alternatives(self, flat: Schema, key: str, at: str, refs: tuple[str, ...], level: int) -> str | None:
        rest = {name: one for name, one in flat.items() if name != key}
        places = [keywords.place(at, key, i) for i in range(len(flat[key]))]
        if key == "oneOf":
            whole = [
                keywords.flat({"allOf": [rest, one]}, self.root, place, refs)[0]
                for one, place in zip(flat[key], places, strict=True)
            ]
            keywords.check_apart(whole, at, self.root, refs)
        found = [
            self.value({"allOf": [rest, one]} if keywords.asks(rest) else one, place, refs, level)
            for one, place in zip(flat[key], places, strict=True)
        ]
        return _either(found)

    def enumerated(self, flat: Schema, at: str, refs: tuple[str, ...], level: int) -> str | None:
        """Values one by one, those that the rest of the schema allows."""
        values, rest = flat["enum"], {name: one for name, one in flat.items() if name != "enum"}
        if (kinds := rest.pop("type", None)) is not None:
            values = [one for one in values if keywords.is_one_of(one, [kinds] if isinstance(kinds, str) else kinds)]
        texts = [self.literal(one, at, level) for one in values]
        if keywords.asks(rest) and texts:
            pattern = self.value(rest, at, refs, level)
            allowed = None if pattern is None else from_pattern(pattern)
            texts = [one for one in texts if allowed is not None and allowed.matches(one)]
        return _either([re.escape(one) for one in dict.fromkeys(texts)])

    def literal(self, value: Any, at: str, level: int) -> str:
        """One value, laid out like any other."""
        try:
            text = json.dumps(value, ensure_ascii=False, indent=self.indent, allow_nan=False)
            if not text.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in text):
                text = json.dumps(value, indent=self.indent)
            if not keywords.same(json.loads(text), value):  # as of keys that are no text
                raise ValueError
        except (TypeError, ValueError):
            raise DgemmaError(f"the schema at {at} names {quoted(value, 60)}, which is no value of JSON") from None
        return text.replace("\n", "\n" + " " * ((self.indent or 0) * level))

    def string(self, flat: Schema, at: str, refs: tuple[str, ...], level: int) -> str | None:
        patterns = flat.get("pattern", ())
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        least, most = keywords.span(flat, "minLength", "maxLength", at)
        return string(least, most, patterns, flat.get("format"), at)

    def number(self, flat: Schema, at: str, kind: str) -> str | None:
        least, above = _bound(flat, "minimum", "exclusiveMinimum", at, max)
        most, below = _bound(flat, "maximum", "exclusiveMaximum", at, min)
        step = flat.get("multipleOf")
        if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < 1e15):
            raise DgemmaError(f"the schema at {at} has the multipleOf {quoted(step, 40)}, expected a positive number")
        if step is not None and step != int(step) and (kind == "number" or (1 / step) != int(1 / step)):
            raise DgemmaError(f"the schema at {at} has the multipleOf {step}, which float64 does not keep; drop it")
        if kind == "number" and step is None:
            return number(least, most, above, below)
        low = None if least is None else math.floor(least) + 1 if above else math.ceil(least)
        high = None if most is None else math.ceil(most) - 1 if below else math.floor(most)
        if step is None or step <= 1:
            return integer(low, high)
        return _multiples(int(step), low, high, at)

    def array(self, flat: Schema, at: str, refs: tuple[str, ...], level: int) -> str | None:
        least, most = keywords.span(flat, "minItems", "maxItems", at)
        first, rest = flat.get("prefixItems", []), flat.get("items")
        if isinstance(rest, list):  # before 2020-12
            first, rest = rest, flat.get("additionalItems")
        rest = flat.get("unevaluatedItems") if rest is None else rest
        if flat.get("uniqueItems") and (most is None or most > 1):
            return self.permuted(flat, at, least, most)
        found = [
            self.value(one, keywords.place(at, "prefixItems", i), refs, level + 1)
            for i, one in enumerate(first[: most if most is not None else None])
        ]
        if rest is None and first and least <= len(first):  # what follows is open, and may be nothing
            most = min(len(first), len(first) if most is None else most)
        further = None
        if most is None or most > len(first):
            place = keywords.place(at, "items")
            further = (
                self.anything(level + 1, self.depth - 1)
                if rest in (None, True)
                else self.value(rest, place, refs, level + 1)
            )
        if None in found:
            cut = found.index(None)
            found, most, further = found[:cut], cut, None
        if further is None:
            most = min(len(found), len(found) if most is None else most)
        if most is not None and least > most:
            return None
        return self.listed([one for one in found if one is not None], further, least, most, level)

    def listed(self, first: list[str], further: str | None, least: int, most: int | None, level: int) -> str:
        """An array: `first` in order, then any number of `further`, between `least` and `most` in all."""
        tail = ""
        comma = self.comma(level + 1)
        if further is not None and (most is None or most > len(first)):
            more = (max(0, least - len(first)), None if most is None else most - len(first))
            if first:
                tail = f"(?:{comma}{further}){counted(*more)}"
            else:
                again = (max(0, more[0] - 1), None if more[1] is None else more[1] - 1)
                tail = f"{further}(?:{comma}{further}){counted(*again)}"
        for i in range(len(first) - 1, -1, -1):
            tail = (comma if i else "") + first[i] + tail
            if i >= least and i:
                tail = f"(?:{tail})?"
        if not tail:
            return r"\[\]"
        whole = rf"\[{self.line(level + 1)}{tail}{self.line(level)}\]"
        return f"(?:{whole}|\\[\\])" if least == 0 else whole

    def permuted(self, flat: Schema, at: str, least: int, most: int | None) -> str | None:
        """An array of different values, which has to be written out."""
        items, _ = keywords.flat(flat.get("items", True), self.root, at, ())
        values = items.get("enum") if isinstance(items, dict) else None
        if not values or len(values) > 5 or "prefixItems" in flat:
            raise DgemmaError(
                f"the schema at {at} has uniqueItems, which no automaton keeps but of at most 5 values by enum; drop it"
            )
        from itertools import permutations

        sizes = range(least, min(len(values), len(values) if most is None else most) + 1)
        found = [list(one) for size in sizes for one in permutations(values, size)]
        return self.enumerated({"enum": found}, at, (), 0)

    def object(self, flat: Schema, at: str, refs: tuple[str, ...], level: int) -> str | None:
        properties, required = flat.get("properties", {}), flat.get("required", [])
        least, most = keywords.span(flat, "minProperties", "maxProperties", at)
        others = flat.get("additionalProperties", flat.get("unevaluatedProperties", True))
        if not properties and not required and others is not False:
            return self.mapping(flat, others, at, refs, level, least, most)
        wanted = {name: True for name in properties} | {name: False for name in required if name not in properties}
        found: list[tuple[str, bool]] = []
        for name, declared in wanted.items():
            place = keywords.place(at, "properties", name)
            value = self.value(properties[name] if declared else others, place, refs, level + 1)
            if value is not None and "propertyNames" in flat:
                names = self.value(keywords.as_string(flat["propertyNames"]), at, refs, level)
                allowed = names is not None and from_pattern(names).matches(json.dumps(name, ensure_ascii=False))
                value = value if allowed else None
            if value is not None:
                key = re.escape(self.literal(name, at, level))
                found.append((f"{key}:{self.space()}{value}", name in required))
            elif name in required:
                return None
        sure = sum(needed for _, needed in found)
        if least > len(found) or (most is not None and most < sure):
            return None
        if (least > max(sure, 1) and least < len(found)) or (most is not None and most < len(found)):
            raise DgemmaError(
                f"the schema at {at} counts properties, of which some may be left out; require them, or drop the count"
            )
        return self.record([(one, needed or least == len(found)) for one, needed in found], least, level)

    def record(self, found: list[tuple[str, bool]], least: int, level: int) -> str:
        """An object of these properties, in order, of which some may be missing."""
        if not found:
            return r"\{\}"
        comma, end = self.comma(level + 1), self.line(level) + r"\}"
        first = next((i for i, (_, needed) in enumerate(found) if needed), None)
        if first is None:
            # A comma is followed by another property, and no comma by the end.
            after = f'(?:{comma}(?=")|(?={end}))'
            whole = "".join(f"(?:{one}{after})?" for one, _ in found)
            some = rf'\{{{self.line(level + 1)}(?="){whole}{end}'
            return some if least else rf"(?:{some}|\{{\}})"
        before = "".join(f"(?:{one}{comma})?" for one, _ in found[:first])
        behind = "".join(comma + one if needed else f"(?:{comma}{one})?" for one, needed in found[first + 1 :])
        return rf"\{{{self.line(level + 1)}{before}{found[first][0]}{behind}{end}"

    def mapping(
        self, flat: Schema, others: Any, at: str, refs: tuple[str, ...], level: int, least: int, most: int | None
    ) -> str | None:
        """An object with any keys."""
        if least > 1:
            raise DgemmaError(
                f"the schema at {at} has minProperties of free names, which may be equal; name properties and require "
                "them instead"
            )
        place = keywords.place(at, "additionalProperties")
        value = (
            self.anything(level + 1, self.depth - 1) if others is True else self.value(others, place, refs, level + 1)
        )
        names = self.value(keywords.as_string(flat.get("propertyNames", True)), at, refs, level)
        if value is None or names is None or most == 0:
            return None if least else r"\{\}"
        one = f"{names}:{self.space()}{value}"
        more = counted(0, None if most is None else most - 1)
        some = rf"\{{{self.line(level + 1)}{one}(?:{self.comma(level + 1)}{one}){more}{self.line(level)}\}}"
        return some if least else rf"(?:{some}|\{{\}})"

    def anything(self, level: int, depth: int) -> str:
        """Any value, of so many objects and arrays inside each other."""
        plain = [f'"{CHARACTER}*"', number(None, None), "true", "false", "null"]
        if depth <= 0:
            return f"(?:{'|'.join(map(str, plain))})"
        inner = self.anything(level + 1, depth - 1)
        pair = f'"{CHARACTER}*":{self.space()}{inner}'
        comma, inside, end = self.comma(level + 1), self.line(level + 1), self.line(level)
        return (
            rf"(?:{'|'.join(map(str, plain))}|\[\]|\{{\}}|\[{inside}{inner}(?:{comma}{inner})*{end}\]"
            rf"|\{{{inside}{pair}(?:{comma}{pair})*{end}\}})"
        )

    def comma(self, level: int) -> str:
        return ", ?" if self.indent is None else "," + self.line(level)

    def space(self) -> str:
        return " ?" if self.indent is None else " "

    def line(self, level: int) -> str:
        return "" if self.indent is None else rf"\n {{{self.indent * level}}}"


def _either(found: Sequence[str | None]) -> str | None:
    parts = list(dict.fromkeys(one for one in found if one is not None))
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})" if parts else None


def _bound(flat: Schema, name: str, exclusive: str, at: str, tighter: Any) -> tuple[Decimal | None, bool]:
    """Return a bound, and whether it is left out itself."""
    limit, strict = flat.get(name), flat.get(exclusive)
    for key, one in ((name, limit), (exclusive, strict)):
        right = one is None or (isinstance(one, int | float) and abs(one) <= 1e15)  # and so is neither inf nor NaN
        if not right or (isinstance(one, bool) and key == name):
            raise DgemmaError(f"the schema at {at} has the {key} {quoted(one, 40)}, expected a number within ±1e15")
    if isinstance(strict, bool):  # draft 4
        return (None if limit is None else Decimal(repr(limit))), strict
    if strict is None or limit is None:
        one = limit if strict is None else strict
        return (None if one is None else Decimal(repr(one))), strict is not None
    return Decimal(repr(tighter(limit, strict))), tighter(limit, strict) == strict


def _multiples(step: int, low: int | None, high: int | None, at: str) -> str | None:
    if low is not None and high is not None and high - low <= 1000 * step:
        return _either([str(one) for one in range(-(-low // step) * step, high + 1, step)])
    zeros = len(str(step)) - 1
    if step == 10**zeros and low is None and high is None:
        return f"(?:0|-?[1-9][0-9]{{0,{17 - zeros}}}0{{{zeros}}})"
    raise DgemmaError(
        f"the schema at {at} has the multipleOf {step} over too wide a range; bound it to 1,000 values, or drop it"
    )
