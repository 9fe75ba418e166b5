"""Valid sets: what is in them, how many there are, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decal import DecalError
from decal.samplers.valid_set import ValidSet


def states(valid: ValidSet) -> dict[str, Any]:
    """Every prefix of an answer and the state it leads to."""
    found, stack = {}, [("", valid.start)]
    while stack:
        text, state = stack.pop()
        found[text] = state
        stack += [(text + character, after) for character, after in valid.edges(state).items()]
    return found


def assert_is(valid: ValidSet, expected: set[str]) -> None:
    """Members, size and completion counts are those of ``expected``."""
    listed = list(valid)
    assert len(listed) == len(set(listed)), "an answer comes twice"
    assert set(listed) == expected
    assert valid.size == len(expected)
    found = states(valid)
    assert set(found) == {text[:i] for text in expected for i in range(len(text) + 1)}
    for prefix, state in found.items():
        assert valid.count(state) == sum(text.startswith(prefix) for text in expected), prefix
        assert valid.final(state) == (prefix in expected), prefix


@given(st.sets(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), min_size=1, max_size=30))
def test_a_list_is_the_set_of_its_entries(answers: set[str]) -> None:
    valid = ValidSet.from_list(sorted(answers))
    assert_is(valid, answers)
    assert all(answer in valid for answer in answers)
    assert "".join(sorted(answers)) * 2 not in valid


def test_membership() -> None:
    valid = ValidSet.from_list(["May", "Maybe", "June"])
    assert "May" in valid
    assert "Maybe" in valid
    for other in ("", "Ma", "Mayb", "Mayor", "june", "July", None, 3, b"May"):
        assert other not in valid


def test_a_list_keeps_its_order_where_answers_begin_differently() -> None:
    assert list(ValidSet.from_list(["b", "a", "c"])) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("pattern", "alphabet", "longest"),
    [
        ("[ab]{1,3}c?|dd", "abcd", 5),
        ("(ab|a)(c|bc)?", "abc", 5),
        ("[1-9][0-9]?|100", "0123456789", 4),
        ("x(y|yy|yyy){0,2}", "xyz", 8),
        (r"\d-\d", "0159-", 4),
        ("(?!ab)[abc]{2}", "abc", 3),
        (r"a\.b", "a.b", 4),
    ],
)
def test_a_regex_is_what_matches_it_in_full(pattern: str, alphabet: str, longest: int) -> None:
    strings = ("".join(s) for n in range(longest + 1) for s in itertools.product(alphabet, repeat=n))
    expected = {s for s in strings if re.fullmatch(pattern, s)}
    if r"\d" in pattern:  # the alphabet leaves out some digits
        assert expected <= set(ValidSet.from_regex(pattern))
    else:
        assert_is(ValidSet.from_regex(pattern), expected)


def test_lookaheads_are_followed_at_the_beginning_only() -> None:
    for pattern in ("(?!a)x|ay", "(?=a)[ab]c|bc", "(?!a)(?!b)[abc]"):
        texts = ("".join(s) for n in range(1, 4) for s in itertools.product("abcxy", repeat=n))
        assert_is(ValidSet.from_regex(pattern), {text for text in texts if re.fullmatch(pattern, text)})
    for pattern in ("x(?=y)", "((?!.*b)a)b", "x(?!y)", "(?<=a)b", "a|x(?=y)"):
        with pytest.raises(DecalError, match="looks ahead or back, which is followed at its beginning only"):
            ValidSet.from_regex(pattern)
    with pytest.raises(DecalError, match="regex: a regular expression is a text, got 5"):
        ValidSet.from_regex(5)  # type: ignore[arg-type]


def digits_by_hand(n: int, sum_eq: int | None = None, sum_le: int | None = None) -> set[str]:
    return {
        ",".join(map(str, d))
        for d in itertools.product(range(10), repeat=n)
        if (sum_eq is None or sum(d) == sum_eq) and (sum_le is None or sum(d) <= sum_le)
    }


@pytest.mark.parametrize(
    ("n", "condition"),
    [
        *((n, {}) for n in (1, 2, 3)),
        *((n, {"sum_eq": total}) for n, total in ((2, 9), (3, 0), (3, 27), (4, 18))),
        *((n, {"sum_le": total}) for n, total in ((2, 0), (3, 13), (3, 1000))),
    ],
)
def test_digits_are_counted_as_they_are_enumerated(n: int, condition: dict[str, int]) -> None:
    assert_is(ValidSet.digits(n, **condition), digits_by_hand(n, **condition))


def test_forty_digits_are_counted_at_once() -> None:
    start = time.perf_counter()
    assert ValidSet.digits(40).size == 10**40
    # Half of all sums are at most the middle one, and those that equal it are in both halves.
    assert 2 * ValidSet.digits(40, sum_le=180).size == 10**40 + ValidSet.digits(40, sum_eq=180).size
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"n": -1}, {"n": 2, "sum_eq": 3, "sum_le": 4}])
def test_digits_without_a_meaning(kwargs: dict[str, int]) -> None:
    with pytest.raises(DecalError, match="n >= 1 and at most one of sum_eq and sum_le"):
        ValidSet.digits(**kwargs)


@pytest.mark.parametrize("condition", [{"sum_eq": 19}, {"sum_eq": -1}, {"sum_le": -1}])
def test_digits_that_no_sum_fits(condition: dict[str, int]) -> None:
    with pytest.raises(DecalError, match="the valid set is empty"):
        ValidSet.digits(2, **condition)


@pytest.mark.parametrize("pairs", [1, 2, 3, 5, 7])
def test_balanced_brackets_are_those_that_cancel(pairs: int) -> None:
    def cancels(text: str) -> bool:
        while "()" in text:
            text = text.replace("()", "")
        return not text

    strings = map("".join, itertools.product("()", repeat=2 * pairs))
    assert_is(ValidSet.dyck(pairs), {text for text in strings if cancels(text)})


@pytest.mark.parametrize("pairs", [*range(1, 20), 60, 200])
def test_balanced_brackets_are_counted_without_listing_them(pairs: int) -> None:
    valid = ValidSet.dyck(pairs)
    assert valid.size == math.comb(2 * pairs, pairs) // (pairs + 1)
    # Every string begins with a bracket that opens, and one that closes may follow unless it is the only pair's.
    first = valid.edges(valid.start)
    assert set(first) == {"("}
    assert valid.count(first["("]) == valid.size
    assert valid.count(valid.edges(first["("])[")"]) == (ValidSet.dyck(pairs - 1).size if pairs > 1 else 1)


def test_long_balanced_brackets() -> None:
    valid = ValidSet.dyck(50)
    for member in ("(" * 50 + ")" * 50, "()" * 50, "(())" * 25):
        assert member in valid
    for other in ("(" * 50, "(" * 51 + ")" * 51, "()" * 49, ")(" * 50, "()" * 49 + ")(", "[]" * 50, "(" * 50 + ")" * 49 + " "):
        assert other not in valid


@pytest.mark.parametrize("pairs", [0, -3])
def test_no_balanced_brackets(pairs: int) -> None:
    with pytest.raises(DecalError, match=f"^dyck: dyck needs at least one pair of brackets, got {pairs}$"):
        ValidSet.dyck(pairs)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "things: the valid set is empty"),
        (["a", "b", "a"], "things: 'a' is given twice, as answers 1 and 3"),
        (["a", ""], "things: answer 2 must be a non-empty string, got ''"),
        (["a", 5], "things: answer 2 must be a non-empty string, got 5"),
        ([None], "things: answer 1 must be a non-empty string, got None"),
        ([True], "things: answer 1 must be a non-empty string, got True"),
    ],
)
def test_bad_lists(answers: list[Any], message: str) -> None:
    with pytest.raises(DecalError) as caught:
        ValidSet.from_list(answers, "things")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a+", "infinite"),
        ("b(xy)*", "infinite"),
        ("a.b", "accepts every character somewhere"),
        ("[^a]", "accepts every character somewhere"),
        ("", "empty string"),
        ("a?", "empty string"),
        ("(?!a)a", "empty"),
        ("(", "can't read the regular expression '\\('"),
        ("[z-a]", "can't read the regular expression"),
        ("*a", "can't read the regular expression"),
    ],
)
def test_bad_regexes(pattern: str, message: str) -> None:
    with pytest.raises(DecalError, match=message) as caught:
        ValidSet.from_regex(pattern, "file.yaml:3: answers")
    assert str(caught.value).startswith("file.yaml:3: answers: ")
    assert "\n" not in str(caught.value)


def test_a_users_own_automaton() -> None:
    """Even numbers of up to three binary digits with no leading zero; one state leads nowhere."""
    edges = {
        "start": {"1": "odd"},
        "odd": {"0": "even", "1": "odd2", "x": "dead"},
        "even": {"0": "last"},
        "odd2": {"0": "last"},
    }
    valid = ValidSet("start", lambda s: edges.get(s, {}), lambda s: s in ("even", "last"), "binary")
    assert_is(valid, {"10", "100", "110"})
    assert repr(valid) == "<ValidSet of 3 answers from binary>"


def test_an_own_automaton_with_a_cycle_or_the_empty_string() -> None:
    with pytest.raises(DecalError, match="loop: the valid set is infinite"):
        ValidSet(0, lambda s: {"a": 1 - s}, lambda s: s == 1, "loop")
    with pytest.raises(DecalError, match="the empty string can't be an answer"):
        ValidSet(0, lambda s: {"a": 1} if s == 0 else {}, lambda s: True)


def test_states_that_are_shared_count_once_for_each_way() -> None:
    # A chain of diamonds: two ways through each.
    valid = ValidSet(0, lambda s: {"a": s + 1, "b": s + 1} if s < 200 else {}, lambda s: s == 200)
    assert valid.size == 2**200
    assert valid.count(190) == 2**10


def test_answers_longer_than_the_recursion_limit() -> None:
    long = "ab" * 4000
    valid = ValidSet.from_list([long, "x"])
    assert list(valid) == [long, "x"]


@pytest.mark.parametrize("seed", range(5))
def test_random_automata_equal_their_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 9
    edges = {s: {c: int(rng.integers(s + 1, size)) for c in "abc" if rng.random() < 0.6} for s in range(size - 1)}
    final = {int(s) for s in rng.choice(np.arange(1, size), 3, replace=False)} | {size - 1}
    expected, stack = set(), [("", 0)]
    while stack:
        text, state = stack.pop()
        if state in final:
            expected.add(text)
        stack += [(text + c, after) for c, after in edges.get(state, {}).items()]
    if not expected:
        with pytest.raises(DecalError, match="empty"):
            ValidSet(0, lambda s: edges.get(s, {}), final.__contains__)
        return
    valid = ValidSet(0, lambda s: edges.get(s, {}), final.__contains__)
    assert set(valid) == expected
    assert valid.size == len(expected)
