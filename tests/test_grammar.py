"""Grammars as valid sets: against Lark's own parser on every text over an alphabet."""

from __future__ import annotations

import itertools
import random

import pytest
from lark import Lark
from lark.exceptions import LarkError

from decal import DecalError, ValidSet

GRAMMARS = {
    "expressions": """
        start: sum
        sum: product (("+" | "-") product)*
        product: factor | product "*" factor
        factor: NUMBER | "(" sum ")"
        NUMBER: "1"
        """,
    "empty rules": 'start: a "x" a\na: | "y" a | b\nb: "x"?',
    "ambiguous": 'start: "x" | start start | start "x" start',
    "twice the same": 'start: a | b\na: "x" a "y" | "x"\nb: "x" b "y" | "x" | "z"',
    "overlapping terminals": 'start: (A | B)+ "y"\nA: /x+/\nB: /xy?/',
    "two kinds of brackets": 'start: part+\npart: "(" part* ")" | "x" part* "y"',
    "a terminal within a terminal": 'start: WORD ["-" WORD]\nWORD: LETTER~1..2\nLETTER: "x" | "y"',
    "left recursion twice": 'start: start "x" | start "y" | "z" | "(" start ")"',
    "empty in front": 'start: b start "x" | "y"\nb: "z"?',
    "repeats what may be empty": 'start: "x" a*\na: "y"?',
    "unused circles": 'start: "x" | d\nd: d d | e\ne: d "y"\nf: g "z"\ng: f "y" | "z"',
    "other names": 'start: a\na: b\nb: c | "x"\nc: a | "y"',
}
ALPHABET = {
    "expressions": "1+*()-",
    "two kinds of brackets": "()xy",
    "a terminal within a terminal": "xy-",
    "left recursion twice": "xyz()",
}


def derived(grammar: str, alphabet: str, longest: int, start: str = "start") -> set[str]:
    parser = Lark(grammar, parser="earley", lexer="dynamic_complete", start=start, maybe_placeholders=False)
    found = set()
    for size in range(1, longest + 1):
        for text in map("".join, itertools.product(alphabet, repeat=size)):
            try:
                parser.parse(text)
            except LarkError:
                continue
            found.add(text)
    return found


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_set_is_what_the_grammar_derives(name: str) -> None:
    grammar, alphabet = GRAMMARS[name], ALPHABET.get(name, "xyz")
    for longest in (1, 3, 5):
        valid = ValidSet.from_grammar(grammar, max_length=longest) if derived(grammar, alphabet, longest) else None
        texts = list(valid or ())
        assert set(texts) == derived(grammar, alphabet, longest)
        assert len(texts) == len(set(texts)) == (valid.size if valid else 0)


def random_grammar(chance: random.Random) -> str:
    rules = ["start", "a", "b", "c"][: chance.randrange(2, 5)]
    parts = [*rules, '"x"', '"y"', '"xy"', "/[xy]z?/", '("x" | b)?' if "b" in rules else '"z"?', "a*", '("y" a)+']

    def body() -> str:
        return " ".join(chance.choices(parts, k=chance.randrange(4))) if chance.random() < 0.9 else '"x"'

    return "\n".join(f"{name}: {' | '.join(body() for _ in range(chance.randrange(1, 4)))}" for name in rules)


@pytest.mark.parametrize("seed", range(4))
def test_random_grammars(seed: int) -> None:
    chance, compared = random.Random(seed), 0
    while compared < 12:
        grammar = random_grammar(chance)
        try:
            texts = set(ValidSet.from_grammar(grammar, max_length=4, source="g"))
            compared += 1
        except DecalError as error:
            refused = str(error)
            if "empty" not in refused:  # Lark's own reasons, and rules that begin with themselves by way of others
                continue
            if "the valid set is empty" not in refused:  # the empty text is derived
                grammar = 'whole: start "z"\n' + grammar
                try:
                    texts = set(ValidSet.from_grammar(grammar, start="whole", max_length=4))
                except DecalError:  # a rule that begins with itself by way of others
                    continue
                compared += 1
                assert "z" in texts
                assert texts == derived(grammar, "xyz", 4, "whole"), grammar
                continue
            texts = set()
        assert texts == derived(grammar, "xyz", 4), grammar


def test_long_texts_are_counted() -> None:
    catalan = [1]
    for n in range(50):
        catalan.append(catalan[-1] * 2 * (2 * n + 1) // (n + 2))
    assert ValidSet.from_grammar('start: pair+\npair: "(" pair* ")"', max_length=100).size == sum(catalan[1:])
    total, product, factor = [0], [0], [0]
    for n in range(1, 61):
        factor.append((n == 1) + (total[n - 2] if n > 2 else 0))
        product.append(factor[n] + sum(product[i] * factor[n - 1 - i] for i in range(n - 1)))
        total.append(product[n] + 2 * sum(total[i] * product[n - 1 - i] for i in range(n - 1)))
    assert ValidSet.from_grammar(GRAMMARS["expressions"], max_length=60).size == sum(total) > 10**23


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: (", "g: can't read the grammar: Unclosed parenthesis"),
        ("start: oops", "g: can't read the grammar: Rule 'oops' used but not defined"),
        ('other: "a"', "g: can't read the grammar"),
        ('start: "a" W\n%ignore W\nW: " "', "g: %ignore isn't followed; put what it names where it may stand"),
        ('start: "a"i', r"g: the flag i of \(\?i:a\) isn't followed"),
        ("start: /./", "accepts every character somewhere"),
        ('start: b "x"\nb: start "y" | "z"', r"g: a rule begins with itself by way of others: start b start;"),
        ('start: "a"?', "g: the empty string can't be an answer"),
        ("start: /[/", "g: can't read the "),
        ("start: A\n%declare A", "g: A has no pattern"),
        ("start: A\n%import .elsewhere.A", "g: %import takes from Lark's own common, not from files"),
        ("start: /a(?=b)/", "looks ahead or back, which is followed at its beginning only"),
        ('start: "a" start', "g, at most 5 characters: the valid set is empty"),
        (None, "g: a grammar is a text"),
    ],
)
def test_what_is_refused_is_said(grammar: str, message: str) -> None:
    with pytest.raises(DecalError, match=message):
        ValidSet.from_grammar(grammar, max_length=5, source="g")


def test_lengths_and_states_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (0, True, 2.0):
        with pytest.raises(DecalError, match="max_length is a whole number of at least 1"):
            ValidSet.from_grammar('start: "a"', max_length=length)
    monkeypatch.setattr("decal.samplers.grammar.MOST_STATES", 50)
    with pytest.raises(DecalError, match="more than 50 states; ask for shorter texts"):
        ValidSet.from_grammar(GRAMMARS["expressions"], max_length=40)
