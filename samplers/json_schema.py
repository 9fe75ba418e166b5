"""JSON schemas as regular expressions, for those that finitely many texts satisfy.

Every keyword is followed or refused; none is left out silently.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

from decal.samplers.errors import DecalError
from decal.samplers.valid_set import ValidSet, automaton_of, bare, edges_of

if TYPE_CHECKING:
    from decal.samplers.free_text import FreeText

State = frozenset[int]

ANNOTATIONS = (
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly", "discriminator",
)  # fmt: skip
"""Keywords that say nothing of what is valid."""

TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer())),
    "number": lambda v: not isinstance(v, bool) and isinstance(v, (int, float)),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
"""Whether a value is of a type."""


KEYWORDS: dict[str, tuple[str, ...]] = {
    "string": ("pattern", "minLength", "maxLength"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": (),
    "boolean": (),
    "null": (),
    "array": ("prefixItems", "items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
"""What is followed for each type."""

FREE = tuple(map(chr, range(0xE001, 0xE100)))
"""Stand for texts that are left to the model."""
WITHIN_QUOTES = r'[^"\\\x00-\x1f]'
ESCAPES = r'\\["\\bfnrt]'
"""Characters of a string as JSON writes them."""

FIRST = "\ue000"
"""Stands before the members of an object, and takes away the separator before the first, as if each had one before it."""

SPACES = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
"""Beyond ASCII, where readers of patterns disagree on what is a space."""

NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?"
"""As JSON writes them, with exponents of at most two digits: with more they are soon beyond float64."""

LEAVE = "; from_json_schema(..., free=True) leaves it to the model"

MOST_COUNTED, FEW_CHARACTERS = 10_000, 16
"""Where texts may be left to the model, those of a pattern are counted if they are so few, or made of so few characters."""

HINTS = {
    "patternProperties": "names of members must be known: say them in properties",
    "format": "a pattern in its place can say it",
    "uniqueItems": "list the arrays in an enum",
    "multipleOf": "list the numbers in an enum",
}
"""What to do instead."""


def escaped(text: str) -> str:
    """A regular expression that matches a text only."""
    return "".join("\\" + c if c in r"\.^$*+?{}[]|()/-" else c for c in text)


def any_of(patterns: Sequence[str]) -> str:
    """A regular expression that matches what one of these does."""
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def any_text(texts: Sequence[str]) -> str:
    """A regular expression of some texts, letter by letter, which is read much faster than one after the other."""
    behind: dict[str, list[str]] = {}
    for text in texts:
        behind.setdefault(text[:1], []).append(text[1:])
    ended = behind.pop("", None) is not None
    if not behind:
        return ""
    # Texts that share no beginning need not be taken apart.
    parts = [escaped(c) + (escaped(rest[0]) if len(rest) == 1 else any_text(rest)) for c, rest in behind.items()]
    return f"(?:{'|'.join(parts)}){'?' if ended else ''}" if ended or len(parts) > 1 else parts[0]


def integers(low: int, high: int) -> str:
    """A regular expression of the whole numbers from ``low`` to ``high``, without zeros in front."""
    if low < 0:
        below = "-" + integers(max(1, -high), -low) if high < 0 else "-" + integers(1, -low)
        return below if high < 0 else any_of([below, integers(0, high)])
    found = []
    for size in range(len(str(low)), len(str(high)) + 1):
        start, stop = max(low, 10 ** (size - 1) if size > 1 else 0), min(high, 10**size - 1)
        found.append(_digits(str(start), str(stop)))
    return any_of(found)


def at_least(low: int) -> str:
    """A regular expression of the whole numbers from ``low`` on."""
    if low <= 0:
        return f"{integers(low, 0)}|[1-9][0-9]*"
    size = len(str(low))
    return f"{integers(low, 10**size - 1)}|[1-9][0-9]{{{size},}}"


def at_most(high: int) -> str:
    """A regular expression of the whole numbers up to ``high``."""
    return f"-(?:{at_least(-high)})" if high < 0 else f"-[1-9][0-9]*|{integers(0, high)}"


def _many(texts: ValidSet) -> bool:
    """Whether texts are better left to the model than counted; of their characters the sign in front is one."""
    return texts.size > MOST_COUNTED and len(texts.characters) > FEW_CHARACTERS + 1


def _digits(low: str, high: str) -> str:
    """Numbers of as many digits as these two."""
    if not low:
        return ""
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    rest = len(low) - 1
    zeros, nines = "0" * rest, "9" * rest
    first, last = int(low[0]) + (low[1:] != zeros), int(high[0]) - (high[1:] != nines)
    found = [low[0] + _digits(low[1:], nines)] if low[1:] != zeros else []
    if first <= last:
        found.append((str(first) if first == last else f"[{first}-{last}]") + ("[0-9]" if rest else "") + _times(rest))
    if high[1:] != nines:
        found.append(high[0] + _digits(zeros, high[1:]))
    return any_of(found)


def _anchored(pattern: str) -> bool:
    """Whether a pattern matches nothing but whole texts: ``^a|b$`` is ``^a`` or ``b$``."""
    plain, depth = bare(pattern), 0
    for character in plain:
        depth += (character == "(") - (character == ")")
        if depth < 0 or (character == "|" and not depth):
            return False
    return plain.startswith("^") and plain.endswith("$") and len(plain) > 1


def _times(count: int) -> str:
    return f"{{{count}}}" if count > 1 else ""


class Translation:
    """One schema on its way to a regular expression.

    Args:
        root: the schema, in which references are looked up.
        separators: what stands between members, and between a name and its value.
        alphabet: characters of strings that only have a length.
        source: for messages.
        free: whether what has no end is left to the model; it is in ``texts`` then, by the character that stands for it.
    """

    def __init__(self, root: Any, separators: tuple[str, str], alphabet: str, source: str, free: bool = False):
        self.root, self.separators, self.alphabet, self.source, self.free = root, separators, alphabet, source, free
        self.texts: dict[str, FreeText] = {}
        self._symbols: dict[tuple[Any, ...], str] = {}
        self._open: list[str] = []  # references on the way to here

    def refuse(self, where: str, why: str) -> NoReturn:
        """Raise DecalError about a place in the schema."""
        raise DecalError(f"{self.source}: {where or 'the schema'}: {why}")

    def pattern(self, schema: Any, where: str = "") -> str:
        """A regular expression of the texts that are valid for a part of the schema, which stands at ``where``."""
        if not isinstance(schema, Mapping):
            hint = "; json.loads makes one of a text" if isinstance(schema, (str, bytes)) else ""
            self.refuse(where, f"must be an object, got {str(schema)[:80]!r}{hint}")
        if "$id" in schema and where:
            self.refuse(f"{where}/$id", "isn't followed, as it changes what references are to")
        given = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        for key, follow in (("$ref", self._ref), ("anyOf", self._any_of), ("oneOf", self._one_of), ("allOf", self._all_of)):
            if key in given:
                self._known(given, where, {key})
                return follow(given[key], f"{where}/{key}")
        if "const" in given or "enum" in given:
            return self._values(given, where)
        wanted = given.get("type", "object" if "properties" in given else "array" if "prefixItems" in given else None)
        kinds = self._kinds(wanted, where)
        if len(kinds) > 1:
            of_kind = {name: {key: v for key, v in given.items() if key in words} for name, words in KEYWORDS.items()}
            self._known(given, where, {"type"}.union(*(KEYWORDS[kind] for kind in kinds)))
            return any_of([self.pattern({**of_kind[kind], "type": kind}, where) for kind in kinds])
        bounds = [key for key in KEYWORDS["integer"] if key in given]
        if kinds == ["number"] and self.free and bounds:
            self.refuse(f"{where}/{bounds[0]}", "isn't followed with numbers; integers have bounds, an enum has values")
        if kinds != ["number"] or self.free:  # which is refused whatever else is said of it
            self._known(given, where, {"type", *KEYWORDS[kinds[0]]})
        return getattr(self, f"_{kinds[0]}")(given, where)

    def _kinds(self, wanted: Any, where: str) -> list[str]:
        kinds = wanted if isinstance(wanted, list) else [wanted]
        if not kinds or not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
            self.refuse(where, f"type must be one of {', '.join(TYPES)}, or a list of them, got {wanted!r}")
        return kinds

    def _known(self, given: Mapping[str, Any], where: str, allowed: set[str]) -> None:
        for key in given:
            if key not in allowed:
                near = [f"did you mean {one}?" for one in difflib.get_close_matches(key, allowed, n=1)]
                hint = HINTS.get(key) or next(iter(near), f"{', '.join(sorted(allowed))} would be")
                self.refuse(f"{where}/{key}", f"isn't followed here; {hint}")

    def _size(self, given: Mapping[str, Any], where: str, key: str, default: int | None) -> int:
        value = given.get(key, default)
        if value is None:
            self.refuse(where, f"has no {key}, so it has no end")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(f"{where}/{key}", f"must be a whole number of at least 0, got {value!r}")
        return value

    def _left(self, where: str, pattern: str, low: int = 0, high: int | None = None, within: str = "") -> str:
        """The character that stands for a text of this pattern, and of that one if it is given, which is left to the model."""
        from decal.samplers.free_text import FreeText

        key = (pattern, low, high, within)
        if key not in self._symbols:
            if len(self._symbols) == len(FREE):
                self.refuse(where, f"more than {len(FREE)} kinds of free texts")
            fsm = automaton_of(pattern, self.source)
            if within:
                fsm = (fsm & automaton_of(within, self.source)).reduce()
            if fsm.empty():
                self.refuse(where, f"{pattern!r} matches no text without characters that JSON writes otherwise")
            self._symbols[key] = FREE[len(self._symbols)]
            self.texts[self._symbols[key]] = FreeText(fsm, low, high)
        return self._symbols[key]

    # ---- references and alternatives

    def _ref(self, ref: Any, where: str) -> str:
        found = self._find(ref, where)
        if ref in self._open:
            self.refuse(where, f"{ref} holds itself, so it has no end")
        self._open.append(ref)
        pattern = self.pattern(found, ref)
        self._open.pop()
        return pattern

    def _find(self, ref: Any, where: str) -> Any:
        """What a reference is to."""
        if not isinstance(ref, str) or not re.match("#(/|$)", ref):
            self.refuse(where, f"must begin with #/, in this schema, got {ref!r}")
        found = self.root
        for step in unquote(ref[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                self.refuse(where, f"there is no {ref}")
        return found

    def _list(self, given: Any, where: str) -> list[Any]:
        if not isinstance(given, list) or not given:
            self.refuse(where, f"must be a list that isn't empty, got {given!r}")
        return given

    def _any_of(self, given: Any, where: str) -> str:
        return any_of([self.pattern(one, f"{where}/{i}") for i, one in enumerate(self._list(given, where))])

    def _one_of(self, given: Any, where: str) -> str:
        pattern = self._any_of(given, where)  # which looks at each of them first
        if not all(self._apart(*pair) for pair in combinations(given, 2)):
            self.refuse(where, "can't tell that nothing is valid for several; use anyOf if one of them is enough")
        return pattern

    def _apart(self, one: Any, other: Any) -> bool:
        """Whether it is certain that no value is valid for both of two schemas."""
        one, other = self._resolved(one), self._resolved(other)
        values = [_values_of(schema) for schema in (one, other)]
        if values[0] is not None and values[1] is not None:
            return not any(_same(x, y) for x in values[0] for y in values[1])
        if not _kinds_of(one) & _kinds_of(other):
            return True
        # Alternatives of objects that say which one they are.
        named = [{n: s.get("properties", {}).get(n) for n in s.get("required", ())} for s in (one, other)]
        shared = named[0].keys() & named[1].keys()
        objects = all(_kinds_of(schema) == {"object"} for schema in (one, other))
        return objects and any(
            named[0][name] and named[1][name] and self._apart(named[0][name], named[1][name]) for name in shared
        )

    def _resolved(self, schema: Any) -> dict[str, Any]:
        for _ in range(100):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._find(schema["$ref"], "")
        return dict(schema) if isinstance(schema, Mapping) else {}

    def _all_of(self, given: Any, where: str) -> str:
        if len(self._list(given, where)) > 1:
            self.refuse(where, "several schemas at once aren't followed; join them into one")
        return self.pattern(given[0], f"{where}/0")

    # ---- values

    def _text(self, value: Any, where: str) -> str:
        try:
            text = json.dumps(value, ensure_ascii=False, separators=self.separators, allow_nan=False)
            taken = {FIRST, *(FREE if self.free else ())} & set(text)
            if not taken:
                return text
            raise ValueError(f"U+{ord(min(taken)):04X} has a use of its own here")
        except (TypeError, ValueError) as error:
            self.refuse(where, f"{value!r} is no value of JSON ({error})")

    def _values(self, given: Mapping[str, Any], where: str) -> str:
        self._known(given, where, {"const", "enum", "type"})
        key = "const" if "const" in given else "enum"
        values = [given["const"]] if key == "const" else self._list(given["enum"], f"{where}/enum")
        kinds = self._kinds(given.get("type", list(TYPES)), where)
        if key == "const" and "enum" in given:
            values = [value for value in values if any(_same(value, one) for one in self._list(given["enum"], where))]
        written = [(value, self._text(value, f"{where}/{key}")) for value in values]
        texts = list(dict.fromkeys(text for value, text in written if any(TYPES[kind](value) for kind in kinds)))
        if not texts:
            self.refuse(f"{where}/{key}", "no value is left of those and the type asked for")
        return any_text(texts)

    def _null(self, given: Mapping[str, Any], where: str) -> str:
        return "null"

    def _boolean(self, given: Mapping[str, Any], where: str) -> str:
        return "(?:true|false)"

    def _number(self, given: Mapping[str, Any], where: str) -> str:
        if not self.free:
            self.refuse(where, f"numbers have no end; use an enum, or an integer with a minimum and a maximum{LEAVE}")
        return self._left(where, NUMBER)

    def _integer(self, given: Mapping[str, Any], where: str) -> str:
        for key in given.keys() - {"type"}:
            if isinstance(given[key], bool) or not isinstance(given[key], int):
                self.refuse(f"{where}/{key}", f"must be a whole number, got {given[key]!r}")
        lows = [given[key] + extra for key, extra in (("minimum", 0), ("exclusiveMinimum", 1)) if key in given]
        highs = [given[key] - extra for key, extra in (("maximum", 0), ("exclusiveMaximum", 1)) if key in given]
        if not (self.free or (lows and highs)):
            self.refuse(where, f"an integer needs a minimum and a maximum, or it has no end{LEAVE}")
        if any(abs(bound) > 10**30 for bound in (*lows, *highs)):
            self.refuse(where, "an integer may have 30 digits")
        if not highs:
            return self._left(where, at_least(max(lows)) if lows else "0|-?[1-9][0-9]*")
        if not lows:
            return self._left(where, at_most(min(highs)))
        if max(lows) > min(highs):
            self.refuse(where, f"no whole number is from {max(lows)} to {min(highs)}")
        return integers(max(lows), min(highs))

    def _string(self, given: Mapping[str, Any], where: str) -> str:
        if "pattern" in given:
            for key in ("minLength", "maxLength"):
                if key in given and not self.free:
                    self.refuse(f"{where}/{key}", "isn't followed beside a pattern; say it there, as ^[a-z]{1,4}$ does")
            return f'"{self._inner(given, f"{where}/pattern")}"'
        low = self._size(given, where, "minLength", 0)
        if "maxLength" not in given and not self.free:
            self.refuse(where, f"has no maxLength, so it has no end{LEAVE}")
        high = self._size(given, where, "maxLength", None) if "maxLength" in given else None
        if high is not None and low > high:
            self.refuse(where, f"no text has from {low} to {high} characters")
        if self.free and (high is None or not self.alphabet):
            return f'"{self._left(where, f"({WITHIN_QUOTES}|{ESCAPES})*", low, high)}"'
        if high is None or not self.alphabet:
            self.refuse(where, f"of which characters? Give alphabet=, or a pattern{LEAVE}")
        written = [self._text(letter, where)[1:-1] for letter in dict.fromkeys(self.alphabet)]
        single = "".join(escaped(letter) for letter in written if len(letter) == 1)
        letters = "|".join([*([f"[{single}]"] if single else []), *(escaped(letter) for letter in written if len(letter) > 1)])
        return f'"(?:{letters}){{{low},{high}}}"'

    def _inner(self, given: Mapping[str, Any], where: str) -> str:
        pattern = given["pattern"]
        if not isinstance(pattern, str) or not _anchored(pattern):
            self.refuse(
                where,
                f"must begin with ^ and end with $, and have | in brackets only, or others may stand around, got {pattern!r}",
            )
        try:
            automaton_of(pattern[1:-1], "")
        except DecalError as error:
            self.refuse(where, str(error)[2:].replace(repr(pattern[1:-1]), repr(pattern)))
        # The sign in front is for those that match nothing at all.
        try:
            inner = ValidSet.from_regex(f"-(?:{pattern[1:-1]})", "")
        except DecalError as error:
            if not self.free:
                self.refuse(where, str(error)[2:].replace(f"-(?:{pattern[1:-1]})", pattern))
            inner = None
        if self.free and (inner is None or "minLength" in given or "maxLength" in given or _many(inner)):
            return self._pattern_left(given, where)
        assert inner is not None
        taken = {FIRST, *(FREE if self.free else ())} & inner.characters
        if taken:
            self.refuse(where, f"may match U+{ord(min(taken)):04X}, which has a use of its own here")
        odd = sorted({c for c in inner.characters if c in '"\\' or ord(c) < 32})
        if odd:
            self.refuse(where, f"may match {odd[0]!r}, which JSON writes otherwise")
        return f"(?:{pattern[1:-1]})"

    def _pattern_left(self, given: Mapping[str, Any], where: str) -> str:
        """The character that stands for a text of a pattern, without what JSON writes otherwise or is read in two ways."""
        above = where.removesuffix("/pattern")
        low = self._size(given, above, "minLength", 0)
        high = self._size(given, above, "maxLength", None) if "maxLength" in given else ""
        pattern = given["pattern"][1:-1]
        negated = re.search(r"\\[WD]", pattern) or (re.search(r"\\[wd]", pattern) and re.search(r"\[\^|\(\?!", pattern))
        character = r"[ !#-\[\]-~]" if negated else WITHIN_QUOTES
        if re.search(r"\\[sS]", pattern):
            character = character.replace("[^", f"[^{SPACES}")
        return self._left(where, pattern, within=f"{character}{{{low},{high}}}")

    def _array(self, given: Mapping[str, Any], where: str) -> str:
        first = given.get("prefixItems", [])
        if not isinstance(first, list):
            self.refuse(f"{where}/prefixItems", f"must be a list, got {first!r}")
        if "items" not in given and not first and given.get("maxItems") != 0:
            self.refuse(where, "has no items, so anything may stand in it")
        rest = given.get("items", False)
        low = self._size(given, where, "minItems", 0)
        high = self._size(given, where, "maxItems", len(first) if rest is False else None)
        if rest is False:
            high = min(high, len(first))
        if low > high:
            self.refuse(where, f"no list has from {low} to {high} items")
        between = escaped(self.separators[0])
        patterns = [self.pattern(one, f"{where}/prefixItems/{i}") for i, one in enumerate(first[:high])]
        after = ""
        if high > len(first):
            more, at_least = self.pattern(rest, f"{where}/items"), max(low - len(first), 0)
            if first:
                after = f"(?:{between}{more}){{{at_least},{high - len(first)}}}"
            else:
                after = f"{more}(?:{between}{more}){{{max(at_least - 1, 0)},{high - 1}}}"
                return rf"\[{after if low else f'(?:{after})?'}\]"
        for place in range(len(patterns) - 1, -1, -1):
            after = (between if place else "") + patterns[place] + after
            if place >= low:
                after = f"(?:{after})?"
        return rf"\[{after}\]"

    def _object(self, given: Mapping[str, Any], where: str) -> str:
        if "properties" not in given:
            self.refuse(where, "has no properties, so anything may stand in it")
        members, required = given["properties"], given.get("required", [])
        if not isinstance(members, Mapping) or not isinstance(required, list):
            self.refuse(where, "properties must be an object and required a list")
        for name in [*members, *required]:
            if not isinstance(name, str):
                self.refuse(where, f"names of members must be texts, got {name!r}")
        if not isinstance(given.get("additionalProperties", False), bool):
            self.refuse(f"{where}/additionalProperties", "must be true or false, as names of members must be known")
        for name in required:
            if name not in members:
                self.refuse(f"{where}/required", f"{name!r} is none of the properties")
        between, colon = map(escaped, self.separators)
        patterns = {
            name: escaped(self._text(name, where)) + colon + self.pattern(one, f"{where}/properties/{name}")
            for name, one in members.items()
        }
        inner = "".join(
            between + pattern if name in required else f"(?:{between}{pattern})?" for name, pattern in patterns.items()
        )
        return rf"\{{{FIRST}{inner}\}}"


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal: 1 is 1.0, and isn't true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _kinds_of(schema: Mapping[str, Any]) -> set[str]:
    """Types that values of a schema may have; integers are numbers."""
    given = schema.get("type", list(TYPES))
    values = _values_of(schema)
    if values is not None:
        given = [next((kind for kind, has in TYPES.items() if has(value)), "") for value in values]
    return {"number" if kind == "integer" else kind for kind in (given if isinstance(given, list) else [given])}


def _values_of(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values of a schema, or more, where it lists them."""
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema.get("type") == "integer" and isinstance(low, int) and isinstance(high, int) and high - low < 10_000:
        return list(range(low, high + 1))
    return None


def automaton(
    schema: Any, separators: tuple[str, str], alphabet: str, source: str, free: bool = False
) -> tuple[State, Callable[[State], dict[str, State]], Callable[[State], bool], dict[str, FreeText]]:
    """First state, edges, final states and free texts of what is valid for a schema; see `decal.ValidSet.from_json_schema`."""
    if not isinstance(separators, tuple) or [str(one).strip() for one in separators] != [",", ":"]:
        raise DecalError(f"{source}: separators are two texts, a comma and a colon with spaces around them, got {separators!r}")
    if not isinstance(alphabet, str):
        raise DecalError(f"{source}: alphabet is a text of characters, got {alphabet!r}")
    translation = Translation(schema, separators, alphabet, source, free)
    try:
        pattern = translation.pattern(schema)
        parsed = automaton_of(pattern, source)
    except RecursionError:
        raise DecalError(f"{source}: the schema is nested too deep") from None
    edges = edges_of(parsed, pattern, source)

    def steps(at: int) -> Iterator[tuple[str, int]]:
        for character, target in edges(at).items():
            if character != FIRST:
                yield character, target
                continue
            yield from ((c, t) for c, t in edges(target).items() if not separators[0].startswith(c))
            for c in separators[0]:
                target = edges(target).get(c, -1)
            yield from edges(target).items() if target >= 0 else ()

    # States are sets, as an object that is listed may begin like one that is described.
    def after(state: State) -> dict[str, State]:
        found: dict[str, set[int]] = {}
        for at in state:
            for character, target in steps(at):
                found.setdefault(character, set()).add(target)
        return {character: frozenset(targets) for character, targets in sorted(found.items())}

    return frozenset({parsed.initial}), after, lambda state: not parsed.finals.isdisjoint(state), translation.texts
