"""JSON schemas as valid sets: against jsonschema, on every text that the set of another schema, or a slip, might write."""

from __future__ import annotations

import datetime
import itertools
import json
import random
import re
from typing import Any, Literal
from urllib.parse import unquote

import jsonschema
import pytest
from pydantic import BaseModel, Field

from decal import DecalError, ValidSet
from decal.samplers.json_schema import integers

COLOUR = {"enum": ["red", "light green", 'a "b"', "x\\y", "été", 3, 2.5, True, None, ["q", {"r": 1}]]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "values": COLOUR,
    "strings among values": {**COLOUR, "type": "string"},
    "numbers among values": {**COLOUR, "type": ["integer", "null"]},
    "const": {"const": {"a": [1, 2], "b": "c"}, "title": "one"},
    "const and enum": {"const": "red", "enum": ["red", "blue"]},
    "integers": {"type": "integer", "minimum": -12, "maximum": 103},
    "open integers": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 12},
    "boolean or null": {"type": ["boolean", "null"]},
    "pattern": {"type": "string", "pattern": "^[ab]{2}-?(c|d)$"},
    "pattern of alternatives": {"type": "string", "pattern": "^(a|b)[|c]$"},
    "length": {"type": "string", "minLength": 1, "maxLength": 2},
    "pair": {"prefixItems": [{"enum": [1, 2]}, {"type": "boolean"}], "minItems": 2, "items": False, "type": "array"},
    "up to three": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    "one to two": {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1, "maxItems": 2},
    "first and more": {
        "type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"enum": [3, 4]}, "minItems": 1, "maxItems": 4,
    },
    "object": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 1, "maximum": 12}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    },
    "optional members": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"const": None}, "c": {"enum": [1, 2]}, "d": {"const": "x"}},
        "required": ["c"],
    },
    "all optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"const": None}, 'c"': {"enum": [1, 2]}}},
    "nothing in it": {"type": "object", "properties": {}},
    "alternatives": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"enum": ["a", None]}]},
    "one of": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "boolean"}]},
    "one of several objects": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "boolean"}}, "required": ["kind", "x"]},
            {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}, "y": {"const": 1}}, "required": ["kind"]},
            {"type": "null"},
        ]
    },
    "equal values": {"const": 1, "enum": [1.0, 2]},
    "references with escapes": {"$defs": {"a%20b": {"const": 1}, "a b": {"const": 2}}, "$ref": "#/$defs/a%20b"},
    "references": {
        "$defs": {
            "side/x": {"enum": ["l", "r"]},
            "pair": {"type": "array", "prefixItems": [{"$ref": "#/$defs/side~1x"}] * 2, "minItems": 2},
        },
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/pair"}, "q": {"allOf": [{"$ref": "#/$defs/side~1x"}]}},
        "required": ["p"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "in": {"type": "object", "properties": {"x": {"type": "boolean"}}},
            "list": {"items": {"const": {}}, "type": "array", "maxItems": 2},
        },
        "required": ["in"],
    },
}  # fmt: skip


def members_in_order(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether objects have declared members only, in their order, where properties say so."""
    if "$ref" in schema:
        schema = root["$defs"][unquote(schema["$ref"].rsplit("/", 1)[1]).replace("~1", "/")]
    if "allOf" in schema:
        return members_in_order(value, schema["allOf"][0], root)
    if "oneOf" in schema:
        return any(
            members_in_order(value, s, root) and jsonschema.Draft202012Validator(s).is_valid(value) for s in schema["oneOf"]
        )
    if "enum" in schema or "const" in schema:  # their members in the order given
        return json.dumps(value) in map(json.dumps, [schema["const"]] if "const" in schema else schema["enum"])
    if isinstance(value, dict):
        known = [name for name in schema.get("properties", {}) if name in value]
        return known == list(value) and all(members_in_order(value[k], schema["properties"][k], root) for k in known)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        of = [*first, *[schema.get("items") or {}] * len(value)]
        # Items beyond the declared ones would have no end.
        bounded = len(value) <= len(first) or bool(schema.get("items"))
        return bounded and all(members_in_order(v, s, root) for v, s in zip(value, of, strict=False))
    return True


def is_valid(text: str, schema: dict[str, Any], letters: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    written = json.dumps(value, ensure_ascii=False) == text
    known = schema.get("maxLength") is None or not isinstance(value, str) or set(value) <= set(letters)
    whole = not isinstance(value, float) or schema.get("type") != "integer"  # 3.0 is an integer, written otherwise
    return (
        written
        and known
        and whole
        and jsonschema.Draft202012Validator(schema).is_valid(value)
        and members_in_order(value, schema, schema)
    )


@pytest.fixture(scope="module")
def sets() -> dict[str, ValidSet]:
    return {name: ValidSet.from_json_schema(schema, alphabet='ab"\n') for name, schema in SCHEMAS.items()}


@pytest.fixture(scope="module")
def texts(sets: dict[str, ValidSet]) -> list[str]:
    """Valid texts of all schemas, each also with a character left out, doubled or replaced, and in other order."""
    chance, found = random.Random(5), {}
    for valid in sets.values():
        for text in valid:
            found[text] = None
            for _ in range(12):
                at = chance.randrange(len(text))
                other = chance.choice(' ,:"\\{}[]0123456789.abt-')
                found |= dict.fromkeys(
                    (text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:], text[:at] + other + text[at + 1 :])
                )
            value = json.loads(text)
            if isinstance(value, dict):
                found |= {json.dumps(dict(order)): None for order in itertools.permutations(value.items())}
    return list(found)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_set_is_what_the_schema_validates(name: str, sets: dict[str, ValidSet], texts: list[str]) -> None:
    wanted = {text for text in texts if is_valid(text, SCHEMAS[name], 'ab"\n')}
    assert {text for text in texts if text in sets[name]} == wanted
    assert set(sets[name]) <= wanted
    assert sets[name].size == len(set(sets[name])) > 0


@pytest.mark.parametrize("seed", range(6))
def test_ranges_of_integers(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        ends = [chance.choice([-1, 1]) * chance.randrange(10 ** chance.randrange(1, 5)) for _ in range(2)]
        low, high = min(ends), max(ends)
        pattern = re.compile(integers(low, high))
        near = {low - 1, low, low + 1, high - 1, high, high + 1, 0, *(chance.randrange(-20000, 20000) for _ in range(200))}
        for number in near:
            assert bool(pattern.fullmatch(str(number))) == (low <= number <= high), (low, high, number)
        assert not pattern.fullmatch("-0")
        assert not pattern.fullmatch("007")
        assert ValidSet.from_regex(f"={pattern.pattern}").size == high - low + 1


def test_many_members_that_may_be_left_out() -> None:
    flag = {"type": "boolean"}

    def record(members: int, depth: int) -> dict[str, Any]:
        properties = {f"m{i}": flag for i in range(members)}
        return {"type": "object", "properties": properties | ({"in": record(members, depth - 1)} if depth else {})}

    assert ValidSet.from_json_schema(record(40, 0)).size == 3**40
    assert ValidSet.from_json_schema(record(2, 3)).size == 9 * (1 + 9 * (1 + 9 * (1 + 9)))
    both = ValidSet.from_json_schema({"anyOf": [record(2, 0), {"enum": [{"m0": True, "q": 1}, {}, {"m1": False}]}]})
    assert both.size == 10 == len(set(both))
    with pytest.raises(DecalError, match=r"U\+E000 has a use of its own"):
        ValidSet.from_json_schema({"const": "\ue000"})


def test_alternatives_of_pydantic_that_say_which_they_are() -> None:
    class First(BaseModel):
        kind: Literal["first"]
        x: bool

    class Second(BaseModel):
        kind: Literal["second"]
        y: bool | None = None

    class Either(BaseModel):
        part: First | Second = Field(discriminator="kind")

    valid = ValidSet.from_json_schema(Either)
    assert valid.size == 2 + 4
    assert all(Either.model_validate_json(text) for text in valid)


def test_models_of_pydantic_and_other_separators() -> None:
    class Person(BaseModel):
        age: int = Field(ge=18, le=99)
        job: str = Field(pattern="^(nurse|cook)$")
        nick: bool | None = None

    valid = ValidSet.from_json_schema(Person, separators=(",", ":"))
    assert valid.size == 82 * 2 * 4
    assert '{"age":20,"job":"cook"}' in valid
    assert all(Person.model_validate_json(text) for text in valid)


def test_what_has_properties_is_an_object() -> None:
    assert set(ValidSet.from_json_schema({"properties": {"a": {"const": 1}}})) == {"{}", '{"a": 1}'}
    assert set(ValidSet.from_json_schema({"prefixItems": [{"const": 1}]})) == {"[]", "[1]"}


def test_sets_too_large_to_list_are_counted() -> None:
    members = {f"m{i}": {"type": "integer", "minimum": 1, "maximum": 1000} for i in range(9)}
    assert ValidSet.from_json_schema({"properties": members, "required": list(members)}).size == 1000**9


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"const": 1}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return schema


def test_arguments_are_checked() -> None:
    for separators in (None, (1, 2), (",",), ("}", ":")):
        with pytest.raises(DecalError, match="separators are two texts"):
            ValidSet.from_json_schema({"const": 1}, separators=separators)
    with pytest.raises(
        DecalError, match="can't tell that nothing is valid for several"
    ):  # b is, though a schema's alphabet lacks it
        ValidSet.from_json_schema({"oneOf": [{"type": "string", "maxLength": 1}, {"const": "b"}]}, alphabet="a")
    with pytest.raises(DecalError, match="alphabet is a text"):
        ValidSet.from_json_schema({"const": 1}, alphabet=5)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "format": "date"}, "/format: isn't followed here; a pattern in its place can say it$"),
        ({"properties": {"a": {"type": "number"}}}, "/properties/a: numbers have no end"),
        ({"type": "integer", "minimum": 3}, "the schema: an integer needs a minimum and a maximum"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no whole number is from 3 to 2"),
        ({"type": "integer", "minimum": 3, "maximum": 7.5}, "/maximum: must be a whole number, got 7.5"),
        ({"type": "integer", "minimum": 3, "maximum": 9, "multipleOf": 2}, "/multipleOf: isn't followed"),
        ({"type": "string"}, "the schema: has no maxLength, so it has no end"),
        ({"type": "string", "maxLength": 3}, "of which characters"),
        *(
            ({"type": "string", "pattern": pattern}, r"/pattern: must begin with \^ and end with \$")
            for pattern in ("a", "^a", "a$", "^a|b$", "^(a|b)|c$", "^a\\$", "^", "^[]]|a$", "^[^]|]|a$", "^\\[|a]$")
        ),
        ({"type": "string", "pattern": "^a+$"}, "/pattern: the valid set is infinite"),
        ({"type": "string", "pattern": '^["a]$'}, "may match '\"', which JSON writes otherwise"),
        ({"type": "string", "pattern": "^.$"}, "accepts every character somewhere"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "/maxLength: isn't followed beside a pattern"),
        ({"type": "string", "maxlength": 3}, "/maxlength: isn't followed here; did you mean maxLength"),
        ({"type": "boolean", "maximum": 3}, "/maximum: isn't followed here; type would be"),
        ({"type": "number", "minimum": 3}, "numbers have no end"),
        ('{"type": "string"}', "must be an object, got '{.*}'; json.loads makes one of a text"),
        ({"type": "string", "pattern": "^[0-9{3}$"}, r"/pattern: can't read the regular expression '\^\[0-9\{3\}\$'"),
        ({"type": "array", "items": {"const": 1}}, "has no maxItems"),
        ({"type": "array", "items": {"const": 1}, "maxItems": 2, "uniqueItems": True}, "/uniqueItems: isn't followed"),
        ({"type": "array", "items": {"const": 1}, "maxItems": 2, "minItems": 3}, "no list has from 3 to 2 items"),
        ({"type": "array", "items": {"const": 1}, "maxItems": -1}, "/maxItems: must be a whole number of at least 0"),
        ({"properties": {"a": {"const": 1}}, "required": ["b"]}, "/required: 'b' is none of the properties"),
        ({"properties": {"a": {"const": 1}}, "additionalProperties": {}}, "/additionalProperties: must be true or false"),
        ({"properties": {"a": {"const": 1}}, "minProperties": 1}, "/minProperties: isn't followed"),
        ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, "/oneOf: can't tell that nothing is valid for several"),
        ({"allOf": [{"const": 1}, {"const": 1}]}, "/allOf: several schemas at once"),
        ({"anyOf": []}, "/anyOf: must be a list that isn't empty"),
        ({"anyOf": [{"const": 1}], "type": "integer"}, "/type: isn't followed here"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"const": 1}, {"$ref": "#/$defs/a"}]}}}, "#/.defs/a holds itself"),
        ({"$ref": "#/$defs/b"}, r"/\$ref: there is no #/\$defs/b"),
        ({"$ref": "other.json"}, "must begin with #"),
        ({"enum": ["a"], "type": "integer"}, "/enum: no value is left"),
        ({"enum": []}, "/enum: must be a list that isn't empty"),
        ({"enum": [float("nan")]}, "is no value of JSON"),
        ({"type": "text"}, "type must be one of string, integer"),
        ({}, "type must be one of"),
        ({"items": {"const": 1}}, "type must be one of"),
        ({"type": ["string", "null"], "maximum": 3}, "/maximum: isn't followed"),
        ({"properties": []}, "properties must be an object"),
        (["a"], "the schema: must be an object"),
        *(
            ({"oneOf": parts}, "/oneOf: can't tell that nothing is valid for several")
            for parts in (
                [{"const": 1}, {"const": 1.0}],
                [{"type": "integer", "minimum": 0, "maximum": 3}, {"const": 2.0}],
                [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {"const": 1}}}],
                [{"type": "object", "properties": {"a": {"const": 1}}}, {"type": "object", "properties": {"a": {"const": 2}}}],
                [{"type": "string", "pattern": "^[ab]$"}, {"const": "b"}],
            )
        ),
        ({"oneOf": [{"type": {}}, {"const": 1}]}, "/oneOf/0: type must be one of"),
        ({"oneOf": [{"type": "object", "properties": [], "required": ["a"]}] * 2}, "/oneOf/0: properties must be an object"),
        ({"type": "object"}, "has no properties, so anything may stand in it"),
        ({"type": "array", "maxItems": 3}, "has no items, so anything may stand in it"),
        ({"properties": {1: {"const": 1}}}, "names of members must be texts, got 1"),
        ({"properties": {"1": {"const": 1}}, "required": [True]}, "names of members must be texts, got True"),
        *(({"type": "string", "pattern": p}, "must begin with") for p in ("^)|(a$", "^a)|(?:b$")),
        *(({"type": "string", "pattern": p}, "can't read the regular expression") for p in ("^a{1}{2}$", "^(?i)ab$")),
        ({"type": "string", "pattern": "^((?!.*b)a)b$"}, "looks ahead or back"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$id": "http://x/a", "const": 1}}}, r"/\$id: isn't followed"),
        ({"$ref": "#foo"}, "must begin with #/"),
        ({"enum": ["a", datetime.date(2020, 1, 1)]}, "is no value of JSON"),
        ({"enum": [1], "type": ["integer", "bogus"]}, "type must be one of"),
        ({"enum": [1], "type": {}}, "type must be one of"),
        ({"properties": {}, "additionalProperties": "x"}, "/additionalProperties: must be true or false"),
        ({"enum": ["\ud800"]}, "half of a surrogate pair"),
        ({"type": "integer", "minimum": 0, "maximum": 10**1500}, "an integer may have 30 digits"),
        (nested(2000), "nested too deep"),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(schema: Any, message: str) -> None:
    with pytest.raises(DecalError, match=f"JSON schema: .*{message}" if not message.startswith("accepts") else message):
        ValidSet.from_json_schema(schema)
