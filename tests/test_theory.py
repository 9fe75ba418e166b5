"""Theorem E.1: sequence precision and recall are products of the local ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch

import decal
from decal.eval.theory import Kept, compounding
from decal.samplers.trie import TokenTrie

Answer = tuple[int, ...]


def kept_of(trie: TokenTrie, sets: dict[Answer, set[int]]) -> Kept:
    """What decal wants to know of the kept sets, given one for each prefix."""
    size, step, ends = np.ones(len(trie), int), np.ones(len(trie), bool), np.zeros(len(trie), int)
    for node in range(len(trie)):
        here = sets[tuple(trie.path(node))]
        size[node] = len(here)
        for token, child in trie.children[node].items():
            step[child] = token in here
        if trie.answer[node] >= 0:
            ends[node] = len(here & set(trie.ends))
    return Kept(size, step, ends)


def enumerate_precision(sets: dict[Answer, set[int]], answers: set[Answer], ends: tuple[int, ...]) -> float:
    """Mass of valid answers when every token is drawn uniformly from the kept set of its prefix."""
    total, stack = 0.0, [((), 1.0)]
    while stack:
        prefix, mass = stack.pop()
        if prefix not in sets:
            continue
        share = mass / len(sets[prefix])
        for token in sets[prefix]:
            if token in ends:
                total += share * (prefix in answers)
            else:
                stack.append(((*prefix, token), share))
    return total


def enumerate_recall(sets: dict[Answer, set[int]], answers: set[Answer], ends: tuple[int, ...]) -> float:
    """Share of answers of which every token, and some end, is kept."""
    whole = [
        all(answer[i] in sets[answer[:i]] for i in range(len(answer))) and bool(sets[answer] & set(ends)) for answer in answers
    ]
    return sum(whole) / len(answers)


@pytest.mark.parametrize("seed", range(60))
def test_products_equal_direct_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ends = ((0,), (0, 9), (0, 8, 9))[seed % 3]
    answers = set(tiny.random_answers(rng, range(1, 8), int(rng.integers(1, 5)), int(rng.integers(1, 7))))
    trie = tiny.trie_of(sorted(answers), ends)
    generous = seed % 2
    sets = {}
    for node in range(len(trie)):
        chosen = {int(t) for t in np.flatnonzero(rng.random(10) < (0.95 if generous else 0.6))}
        sets[tuple(trie.path(node))] = chosen or {5}
    result = compounding(trie, kept_of(trie, sets))
    assert abs(result.precision - enumerate_precision(sets, answers, ends)) < 1e-12
    assert abs(result.recall - enumerate_recall(sets, answers, ends)) < 1e-12
    for part in (result.alpha, result.beta):
        assert len(part) <= max(map(len, answers)) + 1
        assert ((part >= 0) & (part <= 1 + 1e-15)).all()


def test_the_seeds_reach_interesting_cases() -> None:
    """Answers that begin with another, with precision and recall strictly between 0 and 1."""
    answers = {(1,), (1, 2), (1, 2, 3), (4,)}
    trie = tiny.trie_of(sorted(answers), (0,))
    sets = {(): {1, 4, 5}, (1,): {0, 2}, (1, 2): {0, 6}, (1, 2, 3): {0}, (4,): {0, 1}}
    result = compounding(trie, kept_of(trie, sets))
    # By hand: 4 then end, 1/3 * 1/2; 1 then end, 1/3 * 1/2; 1, 2, end, 1/3 * 1/2 * 1/2. The answer (1, 2, 3) is lost.
    assert result.precision == pytest.approx(1 / 6 + 1 / 6 + 1 / 12, abs=1e-15)
    assert result.recall == pytest.approx(3 / 4, abs=1e-15)
    # Step 1 goes wrong with token 5 only; all answers survive it.
    assert result.alpha[0] == pytest.approx(2 / 3, abs=1e-15)
    assert result.beta[0] == 1
    # Step 2: after 1 all is well, after 4 half is.
    assert result.alpha[1] == pytest.approx(3 / 4, abs=1e-15)
    assert result.beta[1] == 1
    # Step 3: given success, a third is (1, 2) and loses half; of the four answers (1, 2, 3) is lost.
    assert result.alpha[2] == pytest.approx(2 / 3 + 1 / 3 / 2, abs=1e-15)
    assert result.beta[2] == pytest.approx(3 / 4, abs=1e-15)


def test_keeping_everything_has_recall_one_and_only_the_valid_precision_one() -> None:
    answers = {(1,), (1, 2), (3, 3)}
    trie = tiny.trie_of(sorted(answers), (0,))
    paths = [tuple(trie.path(n)) for n in range(len(trie))]
    everything = compounding(trie, kept_of(trie, {path: set(range(6)) for path in paths}))
    assert everything.recall == 1
    assert everything.precision < 0.2
    valid = {p: {a[len(p)] for a in answers if a[: len(p)] == p != a} | ({0} if p in answers else set()) for p in paths}
    only = compounding(trie, kept_of(trie, valid))
    assert only.recall == 1
    assert only.precision == pytest.approx(1, abs=1e-15)


def test_nothing_valid_kept_stops_with_zero() -> None:
    trie = tiny.trie_of([(1, 2), (3,)], (0,))
    result = compounding(trie, kept_of(trie, {(): {5}, (1,): {2}, (1, 2): {0}, (3,): {0}}))
    assert result.precision == 0
    assert result.recall == 0
    assert len(result.alpha) == 1


@pytest.mark.parametrize("text", ["top_k(3)", "min_p(0.2)", "typical(0.4)", "temperature(2) | top_p(0.6)"])
def test_what_a_chain_keeps(text: str) -> None:
    rng = np.random.default_rng(4)
    answers = set(tiny.random_answers(rng, range(1, 6), 3, 12))
    trie = tiny.trie_of(sorted(answers), (0, 7))
    logits = tiny.random_rows(rng, trie, 8)
    chain = decal.parse(text)
    kept = Kept.of(trie, tiny.blocks(logits, 3), chain.mask)
    alive = chain.mask(logits).isfinite()
    sets = {tuple(trie.path(n)): set(torch.nonzero(alive[n])[:, 0].tolist()) for n in range(len(trie))}
    assert len({len(s) for s in sets.values()}) > 1 or text == "top_k(3)"
    expected = kept_of(trie, sets)
    np.testing.assert_array_equal(kept.size, expected.size)
    np.testing.assert_array_equal(kept.step, expected.step)
    np.testing.assert_array_equal(kept.ends, expected.ends)
    result = compounding(trie, kept)
    assert abs(result.precision - enumerate_precision(sets, answers, (0, 7))) < 1e-12
    assert abs(result.recall - enumerate_recall(sets, answers, (0, 7))) < 1e-12


@pytest.mark.parametrize("kind", ["no end", "several sequences"])
def test_tries_the_theorem_is_not_about(kind: str) -> None:
    trie = tiny.trie_of([(1, 2), (3,)], () if kind == "no end" else (0,))
    if kind == "several sequences":
        trie.insert([4], 0, weight=0)
    kept = Kept(np.ones(len(trie), int), np.ones(len(trie), bool), np.ones(len(trie), int))
    with pytest.raises(decal.DecalError, match="an end and one token sequence each"):
        compounding(trie, kept)


def test_errors_compound_over_steps() -> None:
    """Keeping the same share of junk at each step multiplies: the paper's point."""
    answers = set(itertools.product((1, 2), repeat=3))
    trie = tiny.trie_of(sorted(answers), (0,))
    sets = {tuple(trie.path(n)): {1, 2, 5} if trie.children[n] else {0, 5} for n in range(len(trie))}
    result = compounding(trie, kept_of(trie, sets))
    np.testing.assert_allclose(result.alpha, [2 / 3, 2 / 3, 2 / 3, 1 / 2], rtol=1e-15)
    np.testing.assert_allclose(result.beta, 1)
