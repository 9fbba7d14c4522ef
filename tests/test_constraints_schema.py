"""JSON schemas as patterns, judged by jsonschema and llguidance, and answers back as what the schema was given as."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import json
import os
import random
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import llguidance
import pydantic
import pytest

from dgemma.constraints import parsed, regex_of_choices, regex_of_schema, schema_of
from dgemma.constraints.chars import CharDfa, from_pattern
from dgemma.constraints.keywords import KNOWN
from dgemma.constraints.minimal import distances
from dgemma.constraints.numbers import integer, number
from dgemma.constraints.strings import FORMATS
from dgemma.core.errors import DgemmaError

SCHEMAS = int(os.environ.get("DGEMMA_TEST_SCHEMAS", "40"))
"""Random schemas; the figure in docs/LOG.md is of 400."""


def said(draw: random.Random, found: CharDfa, length: int = 120) -> str:
    """Return a text that an automaton accepts: at random, and the shortest way to an end after some length."""
    sources, labels = (found.table >= 0).nonzero()
    left = distances(sources, found.table[sources, labels], found.accepting)
    members: dict[int, list[int]] = {}
    for code in [*range(0x20, 0x7F), 0x0A, 0x7F, 0x85, 0xE9, 0x20AC, 0x1F600, 0x0663]:
        members.setdefault(int(found.atoms[code]), []).append(code)
    state, text = found.start, ""
    while True:
        if found.accepting[state] and (len(text) > length or draw.random() < 0.2):
            return text
        ways = [(int(atom), int(to)) for atom, to in enumerate(found.table[state]) if to >= 0 and atom in members]
        if len(text) > length:
            ways = sorted(ways, key=lambda way: left[way[1]])[:1]
        elif not ways:
            return text
        atom, state = draw.choice(ways)
        text += chr(draw.choice(members[atom]))


JUDGE = llguidance.LLTokenizer("byte")


def accepted(grammar: str, text: str) -> bool:
    """Whether llguidance takes the whole text."""
    matcher = llguidance.LLMatcher(JUDGE, grammar)
    assert not matcher.get_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def judged(schema: Any, text: str) -> None:
    """Both judges take the text as a value of the schema."""
    value = json.loads(text)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    written = json.dumps(schema)
    text = text.replace("\x7f", "\x80")  # which JSON allows in a string and llguidance does not
    if not re.search(r"\.[0-9]*0(?![0-9])", text):  # numbers such as 0.10 it refuses where there is a bound
        assert accepted(llguidance.LLMatcher.grammar_from_json_schema(written), text), text


def random_schema(draw: random.Random, depth: int) -> Any:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "format", "pattern", "const"]
    kind = draw.choice(
        [*kinds, *(["object", "array", "anyOf", "object", "array", "tuple", "map", "types", "allOf"] if depth else [])]
    )
    if kind == "object":
        names = draw.sample(["a", "b c", 'd"e', "é", "name", "x1", "/"], draw.randrange(4))
        made = {"type": "object", "properties": {name: random_schema(draw, depth - 1) for name in names}}
        made["required"] = [name for name in names if draw.random() < 0.6]
        return made | ({"additionalProperties": False} if draw.random() < 0.7 or not names else {})
    if kind == "array":
        made = {"type": "array", "items": random_schema(draw, depth - 1)}
        return made | draw.choice(
            [{}, {"minItems": 1}, {"maxItems": 2}, {"minItems": 2, "maxItems": 3}, {"maxItems": 0}]
        )
    if kind == "tuple":
        parts = [random_schema(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
        return {"type": "array", "prefixItems": parts, "items": draw.choice([False, {"type": "null"}])} | draw.choice(
            [{}, {"minItems": 1}, {"minItems": len(parts)}]
        )
    if kind == "map":
        return {"type": "object", "additionalProperties": random_schema(draw, depth - 1)} | draw.choice(
            [{}, {"minProperties": 1}]
        )
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
    if kind == "allOf":
        return {"allOf": [{"type": "string", "minLength": 1}, {"maxLength": draw.randrange(1, 4), "title": "t"}]}
    if kind == "types":
        return {"type": draw.choice([["string", "null"], ["integer", "boolean"], ["number", "string"]])}
    if kind == "string":
        return {"type": "string"} | draw.choice(
            [{}, {"minLength": 2}, {"maxLength": 3}, {"minLength": 1, "maxLength": 4}]
        )
    if kind in ("integer", "number"):
        low = draw.choice([draw.randrange(-50, 50), 0, draw.randrange(-500, 500) / 100 if kind == "number" else 7])
        return {"type": kind} | draw.choice(
            [
                {},
                {"minimum": low},
                {"maximum": low},
                {"minimum": low, "maximum": low + draw.randrange(40)},
                {"exclusiveMinimum": low},
            ]
        )
    if kind in ("boolean", "null"):
        return {"type": kind}
    values = [1, -2.5, True, None, "a", 'q"\\', "é\n", [1, "x"], {"k": [1]}, "😀", 10**20]
    if kind == "const":
        return {"const": draw.choice(values)}
    if kind == "enum":
        return {"enum": draw.sample(values, 3)}
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "date-time", "uuid", "ipv4", "email", "time"])}
    return {"type": "string", "pattern": draw.choice(["^[a-z]{2,4}$", "^x", "z$", "\\d+-", '^(?:a|b")+$', "^.$"])}


def test_random_schemas() -> None:
    """What is written is valid, says jsonschema; and llguidance takes it too."""
    checked = 0
    for seed in range(SCHEMAS):
        draw = random.Random(seed)
        schema = random_schema(draw, 3)
        indent = draw.choice([None, None, 2])
        found = from_pattern(regex_of_schema(schema, indent=indent))
        for _ in range(6):
            text = said(draw, found)
            assert re.fullmatch(regex_of_schema(schema, indent=indent), text)
            judged(schema, text)
            checked += 1
    assert checked == 6 * SCHEMAS


ODD = [None, True, False, 0, -1, 2, 1.5, float("inf"), float("nan"), 10**30, "", "a", "#", "#/properties/a", [], [1]]
ODD += [["a"], {}, {"type": "string"}, [{}], [[]], {"a": {}}, {"a": 1}, [None], b"x", (1,), {1: 2}, "object", [3], "("]


def mutated(draw: random.Random, schema: Any) -> Any:
    """Return a schema with some keywords that say anything."""
    for _ in range(draw.randrange(1, 4)):
        node = schema
        for _ in range(draw.randrange(4)):
            parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
            node = draw.choice([part for part in parts if isinstance(part, dict | list)] or [node])
        if isinstance(node, dict):
            node[draw.choice(sorted(KNOWN - {"nullable"}))] = copy.deepcopy(draw.choice(ODD))
        elif isinstance(node, list):
            node.append(copy.deepcopy(draw.choice(ODD)))
    return schema


def test_mutated_schemas_are_kept_or_refused_in_a_line() -> None:
    kept = refused = 0
    for seed in range(3 * SCHEMAS):
        draw = random.Random(seed)
        schema = mutated(draw, copy.deepcopy(random_schema(draw, 2)))
        try:
            found = from_pattern(regex_of_schema(schema))
        except DgemmaError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
            continue
        value = json.loads(said(draw, found, 60))
        kept += 1
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
            jsonschema.Draft202012Validator(schema).validate(value)
        except jsonschema.SchemaError:  # nothing to judge by: a keyword without meaning for the type
            pass
    assert kept and refused


def holds(schema: Any, text: str, **layout: Any) -> bool:
    return from_pattern(regex_of_schema(schema, **layout)).matches(text)


OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"enum": ["x", 'y"']}},
    "required": ["b"],
}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            OBJECT,
            ['{"b": null}', '{"a":1,"b":null}', '{"b": null, "c": "y\\""}'],
            ["{}", '{"a": 1}', '{"c": "x", "b": null}', '{"b": null,}', '{"b": null, "d": 1}'],
        ),
        (
            {**OBJECT, "required": []},
            ["{}", '{"a": 1}', '{"c": "x"}', '{"a": 1, "c": "x"}'],
            ['{"a": 1,}', "{, }", '{"c": "x", "a": 1}', '{"a": 1 "b": null}'],
        ),
        ({**OBJECT, "required": [], "minProperties": 1}, ['{"c": "x"}'], ["{}"]),
        ({**OBJECT, "minProperties": 3}, ['{"a": 1, "b": null, "c": "x"}'], ['{"b": null}', '{"a": 1, "b": null}']),
        (
            {"type": "object", "properties": {"a": False, "b": True}, "required": ["b"]},
            ['{"b": [{"k": 1}]}'],
            ['{"a": 1, "b": 1}'],
        ),
        (
            {"type": "object", "required": ["z"], "additionalProperties": {"type": "null"}},
            ['{"z": null}'],
            ["{}", '{"z": 1}'],
        ),
        (
            {
                "type": "object",
                "additionalProperties": {"type": "boolean"},
                "propertyNames": {"pattern": "^[a-z]+$"},
                "maxProperties": 2,
            },
            ["{}", '{"ab": true}', '{"a": true, "b": false}'],
            ['{"A": true}', '{"a": 1}', '{"a": true, "b": false, "c": true}'],
        ),
        ({"type": "object"}, ["{}", '{"a": {"b": [1, null]}}'], ["[]", "1", '{"a": [{"b": [1]}]}']),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            ["[1]", "[1, 2]", "[1,2]"],
            ["[]", "[1, 2, 3]", "[1,]"],
        ),
        (
            {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 1},
            ["[1]", "[1, 2]", "[1, 2, 3, 3]"],
            ["[]", "[1, 3]"],
        ),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}]}, ["[]", "[1]", "[1, 2]"], ["[1, 2, 3]"]),
        ({"type": "array", "items": [{"const": 1}], "additionalItems": False}, ["[]", "[1]"], ["[1, 1]"]),
        (
            {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3},
            ["[1, 2, 2]", "[1, 2, 2, 2]"],
            ["[1, 2]", "[1]"],
        ),
        (
            {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
            ["[]", "[2]", "[2, 1]"],
            ["[1, 1]", "[1, 2, 1]"],
        ),
        ({"type": "array", "items": False}, ["[]"], ["[1]"]),
        ({"enum": [1, "a", None, [1, {"b": 2}]], "type": ["string", "array"]}, ['"a"', '[1, {"b": 2}]'], ["1", "null"]),
        ({"enum": ["a", "abc", "b"], "minLength": 2}, ['"abc"'], ['"a"', '"b"']),
        ({"const": 'é\n"/\\'}, ['"é\\n\\"/\\\\"'], ['"e"']),
        (
            {"type": "string", "minLength": 2, "maxLength": 3},
            ['"ab"', '"\\n\\""', '"😀é߀"', '"\x7f\x85"'],
            ['"a"', '"abcd"', '"a\nb"', '"\\x"'],
        ),
        ({"type": "string", "pattern": "b+"}, ['"b"', '"abbc"', '"\\"b"'], ['""', '"a"']),
        ({"type": "string", "pattern": "^b|c$"}, ['"bx"', '"xc"', '"b"'], ['"xb"', '"cx"']),
        ({"type": "string", "pattern": r"^\S+\W\D$"}, ['"ab -"', '"a-x"'], ['"\u00a0--"', '"ab-٣"', '"abéd"']),
        ({"type": "string", "pattern": '^[a"\\\\\n]*$'}, ['"a\\"\\\\\\n"'], ['"b"']),
        (
            {"type": "string", "pattern": "^[a-z]*$", "minLength": 2, "maxLength": 3},
            ['"ab"'],
            ['"a"', '"abcd"', '"a1"'],
        ),
        (
            {"type": "string", "pattern": "^(?=.*1)(?!.*2)", "maxLength": 3},
            ['"1"', '"ab1"'],
            ['"abc"', '"12"', '"1234"'],
        ),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}, {"type": "string"}]}, ['"ab"', '"ba"'], ['"a"', '"b"']),
        (
            {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
            ["-3", "0", "11"],
            ["-4", "12", "-0", "01", "1.0"],
        ),
        ({"type": "integer", "minimum": 5}, ["5", "123456"], ["4", "-5"]),
        ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 30}, ["0", "28"], ["1", "35"]),
        ({"type": "integer", "multipleOf": 100}, ["0", "-1200"], ["50", "10"]),
        ({"type": "number", "multipleOf": 2, "minimum": 1, "maximum": 5}, ["2", "4"], ["1", "3", "2.5"]),
        (
            {"type": "number", "minimum": 0.5, "maximum": 2},
            ["0.5", "0.75", "1", "1.999", "2"],
            ["0.4", "0.49", "2.1", "1e0", "-1"],
        ),
        ({"type": "number", "minimum": 1, "exclusiveMinimum": True}, ["1.1", "2"], ["1", "1.0"]),
        ({"type": "number"}, ["1", "-2.5e-7", "0.1"], ["01", ".5", "1.", "NaN", "1e400"]),
        ({"type": "integer", "minimum": 1.5, "maximum": 2.5}, ["2"], ["1", "3"]),
        ({"type": ["string", "null"], "maxLength": 1}, ["null", '"a"'], ['"ab"', "1"]),
        ({"type": "string", "nullable": True}, ["null", '"a"'], ["1"]),
        ({"properties": {"a": {"minLength": 1}}, "required": ["a"]}, ['{"a": "x"}'], ["1", '{"a": 1}']),
        ({"anyOf": [{"const": 1}, {"const": 2}], "type": "integer"}, ["1", "2"], ["3"]),
        (
            {
                "type": "object",
                "properties": {"k": {"type": "string"}},
                "required": ["k"],
                "anyOf": [
                    {"properties": {"v": {"const": 1}}, "required": ["v"]},
                    {"properties": {"w": {"const": 2}}, "required": ["w"]},
                ],
            },
            ['{"k": "", "v": 1}', '{"k": "", "w": 2}'],
            ['{"k": ""}', '{"v": 1}'],
        ),
        (
            {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": k}, k: {"type": "null"}},
                        "required": ["kind", k],
                    }
                    for k in "ab"
                ]
            },
            ['{"kind": "a", "a": null}', '{"kind": "b", "b": null}'],
            ['{"kind": "a", "b": null}'],
        ),
        (
            {
                "$defs": {
                    "p": {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "required": ["x"]},
                    "n": {"type": "integer"},
                },
                "type": "array",
                "items": {"$ref": "#/$defs/p"},
            },
            ['[{"x": 1}, {"x": 2}]'],
            ['[{"x": null}]', "[1]"],
        ),
        (
            {
                "definitions": {"a/b": {"enum": [1]}},
                "allOf": [{"$ref": "#/definitions/a~1b"}, {"$ref": "#/definitions/a~1b"}],
            },
            ["1"],
            ["2"],
        ),
        (
            {
                "allOf": [
                    {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
                    {"properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "additionalProperties": False},
                ]
            },
            ['{"a": 1}', '{"a": 1, "b": null}'],
            ['{"a": 1.5}', '{"b": null}'],
        ),
        (
            {
                "allOf": [
                    {"properties": {"a": True}, "required": ["a"]},
                    {"properties": {"b": True}, "additionalProperties": False},
                ],
                "anyOf": [{"type": "object"}, {"type": "null"}],
            },
            ["null"],
            ['{"a": 1}'],
        ),
    ],
)
def test_keywords(schema: Any, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert holds(schema, text), text
        if (
            "nullable" not in schema
            and schema.get("exclusiveMinimum") is not True
            and not isinstance(schema.get("items"), list)
        ):
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert not [text for text in wrong if holds(schema, text)]


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str) -> None:
    schema = {"type": "string", "format": form}
    found, draw = from_pattern(regex_of_schema(schema)), random.Random(5)
    for _ in range(40):
        judged(schema, said(draw, found))


def test_dates_are_days_that_there_are() -> None:
    found = from_pattern(regex_of_schema({"type": "string", "format": "date"}))
    for year in (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024, 9999):
        for day in range(12 * 33 + 40):
            text = f"{year:04}-{day // 33:02}-{day % 33:02}"
            try:
                real = bool(datetime.date.fromisoformat(text))
            except ValueError:
                real = False
            assert found.matches(f'"{text}"') == real, text


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_numbers(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        low, high = (draw.choice([None, draw.randrange(-1500, 1500), draw.randrange(-20, 20)]) for _ in range(2))
        if pattern := integer(low, high):
            judge = re.compile(pattern)
            for value in [
                *range(-2000, 2001, 37),
                *range(-25, 25),
                *(one + d for one in (low, high) if one is not None for d in (-1, 0, 1)),
            ]:
                assert bool(judge.fullmatch(str(value))) == (
                    (low is None or value >= low) and (high is None or value <= high)
                )
        else:
            assert low is not None and high is not None and low > high
    for _ in range(30):
        bounds = [
            draw.choice([None, Decimal(draw.randrange(-300, 300)) / 100, Decimal(draw.randrange(-3, 4))])
            for _ in range(2)
        ]
        strict = [draw.random() < 0.5 for _ in range(2)]
        pattern = number(*bounds, *strict)
        least, most = bounds
        if pattern is None or bounds == [None, None]:
            continue
        judge = re.compile(pattern)
        for _ in range(60):
            value = Decimal(draw.randrange(-9999, 9999)) / draw.choice([1000, 10000, 100000])
            if draw.random() < 0.4:
                value = (least if least is not None else most or Decimal(0)) + Decimal(draw.randrange(-2, 3)) / 1000
            value = value.normalize() if value else Decimal(0)
            above = least is None or (value > least if strict[0] else value >= least)
            below = most is None or (value < most if strict[1] else value <= most)
            length = max(len(str(abs(int(one)))) for one in bounds if one is not None)
            if abs(value) < 10**length:
                assert bool(judge.fullmatch(format(value, "f"))) == (above and below), (bounds, strict, value)


def test_layouts() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": OBJECT},
            "b": {"enum": [{"k": [1, 2]}]},
            "c": {"type": "object"},
        },
        "required": ["a", "b", "c"],
    }
    value = {"a": [{"a": 1, "b": None}, {"b": None}], "b": {"k": [1, 2]}, "c": {"x": [], "y": [{}, 1]}}
    for indent in (None, 0, 2):
        text = json.dumps(value, indent=indent)
        assert holds(schema, text, indent=indent) and not holds(schema, text + "\n", indent=indent)
    assert holds({"type": "object"}, json.dumps(value["c"], indent=1), indent=1)
    assert holds(schema, json.dumps(value | {"b": {"k": [1, 2]}})) and not holds(schema, json.dumps(value, indent=2))
    deep: Any = 1
    for depth in range(1, 3):
        deep = {"k": deep}
        assert holds({"type": "object"}, json.dumps(deep), depth=depth) and not holds(
            {"type": "object"}, json.dumps({"k": deep}), depth=depth
        )


RECURSIVE = {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (RECURSIVE, r"at /properties/next/properties/next.* refers to '#/\$defs/n' inside itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "inside itself"),
        ({"properties": {"a": {"patternProperties": {}}}}, "at /properties/a has patternProperties"),
        ({"not": {}}, "has not"),
        ({"if": {}, "then": {}}, "has if"),
        ({"type": "array", "contains": {}}, "has contains"),
        ({"type": "string", "maxLenght": 3}, "'maxLenght', a keyword that is not known here; is maxLength meant"),
        ({"type": "strin"}, "the type 'strin', expected one of"),
        ({"type": []}, "expected one of"),
        ({"type": ["integer", None]}, "the type None, expected one of"),
        ({"type": ["integer", ["a"]]}, "expected one of"),
        ({"type": "null", "nullable": [1]}, "expected True or False"),
        ({"type": "array", "maxItems": float("inf")}, "expected 0 or more"),
        ({"type": "string", "minLength": float("nan")}, "expected 0 or more"),
        ({"type": "integer", "minimum": False}, "expected a number"),
        ({"const": {1: 2}}, "no value of JSON"),
        ({"type": "string", "format": "colour"}, "the format 'colour', which is not known"),
        ({"type": "string", "pattern": "("}, "no regular expression"),
        ({"type": "string", "pattern": "a^b"}, "an anchor inside"),
        ({"type": "string", "pattern": r"(a)\1"}, "a backreference"),
        ({"type": "string", "pattern": 3}, "expected text"),
        ({"type": "string", "minLength": -1}, "minLength -1, expected 0 or more"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "allows no value"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "allows no value"),
        ({"type": "integer", "minimum": "a"}, "the minimum 'a', expected a number"),
        ({"type": "number", "maximum": 1e300}, "within"),
        ({"type": "integer", "multipleOf": 7}, "multipleOf 7 over too wide a range"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf 0.01, which float64 does not keep"),
        ({"type": "integer", "multipleOf": 0}, "expected a positive number"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 1}, "allows no value"),
        ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2}, "counts properties"),
        (
            {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2},
            "minProperties of free names",
        ),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "allows no value"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf, of which 1 and 2 may hold at once"),
        (
            {"oneOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]},
            "may hold at once",
        ),
        ({"allOf": [{"type": "string", "format": "date"}, {"format": "uuid"}]}, "two format at once"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "allows no value"),
        ({"$ref": "#/nowhere"}, "'#/nowhere', which is not in it"),
        ({"$ref": "https://example.com/a.json"}, "which is not in it"),
        ({"enum": [float("nan")]}, "no value of JSON"),
        ({"enum": []}, "allows no value"),
        ({"enum": {1}}, "expected a list"),
        ({"const": {1}}, "no value of JSON"),
        ({"anyOf": []}, "expected a list"),
        ({"properties": []}, "expected names"),
        ({"properties": {"a": 3}}, "at /properties/a is 3, expected a mapping"),
        ({"required": "a"}, "expected a list"),
        ({"required": [1]}, "no name"),
        ({"minLength": 1, "minimum": 1}, "without a type"),
        ({3: 4}, "expected text"),
        (False, "allows no value"),
        ("object", "expected a mapping"),
        (None, "expected a mapping"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name_and_place(schema: Any, said: str) -> None:
    with pytest.raises(DgemmaError, match=said) as caught:
        regex_of_schema(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_schema_too_deep_or_laid_out_otherwise() -> None:
    deep: Any = {"type": "null"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(DgemmaError, match="too deeply"):
        regex_of_schema(deep)
    for wrong in ({"indent": -1}, {"indent": 2.0}, {"indent": True}, {"depth": 7}, {"depth": None}):
        with pytest.raises(DgemmaError, match="expected"):
            regex_of_schema({}, **wrong)


def test_choices() -> None:
    choices = ["yes", "no.", "a|b", "", "é\n", "yes"]
    found = from_pattern(regex_of_choices(choices))
    assert all(map(found.matches, choices)) and not any(map(found.matches, ["a", "nox", "YES", "yesno."]))
    for wrong in ([], "yes", [1], {"a"}, None, ["\ud800"]):
        with pytest.raises(DgemmaError, match="choice"):
            regex_of_choices(wrong)  # type: ignore[arg-type]


class Colour(enum.Enum):
    RED = "red"
    BLUE = 3


class Street(pydantic.BaseModel):
    name: str = pydantic.Field(min_length=1, max_length=20)
    number: int = pydantic.Field(ge=1, lt=1000)


class Person(pydantic.BaseModel):
    name: Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Z][a-z]{1,10}$")]
    born: datetime.date
    streets: list[Street] = pydantic.Field(max_length=2)
    kind: Literal["a", "b"] = "a"
    colour: Colour | None = None
    pair: tuple[int, bool] = (1, True)
    home: Street | None = None
    id: uuid.UUID
    table: dict[str, float] = {}


@dataclasses.dataclass
class Point:
    x: float
    y: Annotated[float, {"minimum": 0, "maximum": 1}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    name: Annotated[str, {"maxLength": 5}]
    points: list[Point]
    colour: Colour = Colour.RED
    when: datetime.datetime | None = None
    pair: tuple[int, Point] | None = None
    rest: tuple[str, ...] = ()
    either: int | list[Point] | Literal["none"] = "none"
    notes: dict[str, list[Point]] = dataclasses.field(default_factory=dict)
    hidden: int = dataclasses.field(init=False, default=7)


@dataclasses.dataclass
class Node:
    next: Node | None


class Tree(pydantic.BaseModel):
    children: list[Tree]


def test_models_in_lists_and_unions() -> None:
    given = list[Person | Street]
    text = '[{"name": "Elm", "number": 4}]'
    assert holds(schema_of(given), text) and parsed(text, given) == [Street(name="Elm", number=4)]


@pytest.mark.parametrize("given", [Person, Street, Shape, Point], ids=lambda given: given.__name__)
def test_answers_come_back_as_what_the_schema_was_given_as(given: Any) -> None:
    schema = schema_of(given)
    found, draw = from_pattern(regex_of_schema(schema)), random.Random(6)
    for _ in range(15):
        text = said(draw, found, 60)
        judged(schema, text)
        made = parsed(text, given)
        assert isinstance(made, given)
        again = made.model_dump(mode="json") if isinstance(made, pydantic.BaseModel) else None
        assert again is None or all(
            again[key] == value for key, value in json.loads(text).items() if not isinstance(value, float | dict | list)
        )


def test_dataclasses_in_dataclasses() -> None:
    text = (
        '{"name": "tri", "points": [{"x": 1, "y": 0.5}], "colour": 3, "when": "2024-02-29T10:00:00Z", '
        '"pair": [1, {"x": 0, "y": 0}], "rest": ["a"], "either": [{"x": 2, "y": 1}], '
        '"notes": {"k": [{"x": 3, "y": 0}]}}'
    )
    assert holds(schema_of(Shape), text)
    made = parsed(text, Shape)
    assert made.points == [Point(1.0, 0.5)] and made.colour is Colour.BLUE and made.pair == (1, Point(0.0, 0.0))
    assert made.when == datetime.datetime(2024, 2, 29, 10, tzinfo=datetime.UTC) and made.rest == ("a",)
    assert made.either == [Point(2.0, 1.0)] and made.notes == {"k": [Point(3.0, 0.0)]} and made.hidden == 7
    assert parsed('{"name": "", "points": []}', Shape) == Shape(name="", points=[])
    assert parsed('{"a": [1]}', {"type": "object"}) == {"a": [1]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Node, "Node holds itself"),
        (complex, "has none in JSON"),
        (set[int], "has none in JSON"),
        (dict[int, str], "has none in JSON"),
        (3, "has none in JSON"),
        ('{"type": "object"}', "read it with json.loads"),
        (Path("schema.json"), "read it with json.loads"),
        (dataclasses.make_dataclass("Bad", [("a", "Nowhere")]), "annotation that cannot be read"),
        (dataclasses.make_dataclass("Mixed", [("a", Person)]), "Mixed.a is a pydantic model with parts of its own"),
    ],
)
def test_types_without_a_schema(given: Any, said: str) -> None:
    with pytest.raises(DgemmaError, match=said) as caught:
        schema_of(given)
    assert "\n" not in str(caught.value)


def test_recursion_in_a_model_is_refused() -> None:
    with pytest.raises(DgemmaError, match="inside itself"):
        regex_of_schema(schema_of(Tree))


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ('{"x": 1', Point, "no whole JSON"),
        ('{"x": 1}', Point, "the answer is no Point"),
        ('{"name": ""}', Street, "the answer is no Street"),
        ("[1", {}, "no whole JSON"),
    ],
)
def test_answers_that_are_not_valid(text: str, given: Any, said: str) -> None:
    with pytest.raises(DgemmaError, match=said) as caught:
        parsed(text, given)
    assert "\n" not in str(caught.value)
