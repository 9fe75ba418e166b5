"""Shape: the split of the divergence, the geometric model and the fit of sorted logits, each against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_order import case_of

import decal
from decal.eval import exact, order, shape


def law_of(trie, logits):
    """Probability of each answer at temperature 1."""
    chains = [decal.temperature(1)]
    return exact.evaluate(trie, tiny.blocks(logits), chains).answers[0]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("ends", [(0,), (0, 35, 36)])
def test_the_parts_sum_to_the_divergence_from_uniform(seed, ends):
    trie, logits = case_of(seed, ends)
    logits = logits.clamp(min=-20)
    found = order.prefixes(trie, tiny.blocks(logits))
    parts = shape.total_divergence(found, trie.size)
    answers = law_of(trie, logits)
    assert parts.total == pytest.approx(-np.log(trie.size * answers).mean(), abs=1e-9)
    assert min(parts.order, parts.tail, parts.shape) >= 0
    by_depth = [shape.total_divergence(some, trie.size) for some in order.by_depth(found)]
    assert sum(d.total for d in by_depth) == pytest.approx(parts.total, abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_what_each_part_is_zero_for(seed):
    trie, logits = case_of(seed)
    ideal = torch.full_like(logits, -9.0)
    for node in range(len(trie)):
        for token, child in trie.children[node].items():
            ideal[node, token] = math.log(trie.count[child])
        if trie.answer[node] >= 0:
            ideal[node, 0] = 0.0
    calibrated = shape.total_divergence(order.prefixes(trie, tiny.blocks(ideal)), trie.size)
    assert calibrated.order == pytest.approx(0, abs=1e-12)
    assert calibrated.shape == pytest.approx(0, abs=1e-12)
    assert calibrated.tail > 0
    # A cutoff behind the last valid token takes the tail away, and nothing else.
    cut = shape.total_divergence(order.prefixes(trie, tiny.blocks(ideal.masked_fill(ideal == -9, -math.inf))), trie.size)
    assert cut.total == pytest.approx(0, abs=1e-12)
    found = order.prefixes(trie, tiny.blocks(logits))
    for p in found:
        parts = shape.divergence(p)
        perfect = p.average_precision("unit") == 1
        assert (parts.order < 1e-12) == perfect


def test_a_valid_token_that_is_ruled_out_is_infinitely_far():
    trie = tiny.trie_of([(1,), (2,)], (0,))
    logits = torch.zeros(3, 8)
    logits[0, 2] = -math.inf
    assert shape.total_divergence(order.prefixes(trie, tiny.blocks(logits)), 2).total == math.inf


@given(st.integers(1, 400), st.floats(1e-3, 60))
def test_the_geometric_gap_is_that_of_the_law(v, a):
    p = np.exp(-a * np.arange(v) / v)
    p /= p.sum()
    assert shape.geometric_gap(v, a) == pytest.approx(math.log(v) + (p * np.log(p)).sum(), abs=1e-9)


@given(st.lists(st.integers(2, 200), min_size=1, max_size=6))
def test_the_bound_lies_above_the_curve_it_is_for(valid):
    """Theorem F.4, for vocabularies much larger than the valid tokens: then validity is a product of 1 - exp(-z)."""
    validity, diversity = shape.geometric_curve(valid)
    exact = validity < 1 - 1e-7  # beyond, what is left of 1 - validity has few digits
    assert (shape.geometric_bound(valid, validity[exact]) >= diversity[exact] - 1e-6).all()


def test_the_bound_is_the_curve_for_one_step():
    validity, diversity = shape.geometric_curve([50])
    inside = validity < 1 - 1e-12
    np.testing.assert_allclose(shape.geometric_bound([50], validity[inside]), diversity[inside], atol=1e-3)


def test_a_line_and_a_logarithm_are_found_again():
    ranks = shape.fitted_ranks(50_000)
    k = ranks.astype(float)
    true = np.where(k <= 40, -0.05 * k - 1, 2.0 - 1.5 * np.log(k + 20))
    noise = np.random.default_rng(0).standard_normal(len(k)) * 0.01
    fit = shape.fit_logits(ranks, true + noise)
    assert fit.r2 > 0.9999
    assert 25 <= fit.split <= 60
    assert fit.fall == pytest.approx(-1.5, abs=0.05)
    assert fit.mse == pytest.approx(((fit(k) - true - noise) ** 2).mean())
    # No split and shift that was tried does better.
    worse = np.polyfit(np.log(k), true + noise, 1)
    assert fit.mse < ((np.polyval(worse, np.log(k)) - true - noise) ** 2).mean()


def test_a_fit_needs_ranks():
    with pytest.raises(ValueError, match="at least eight ranks, got 3"):
        shape.fit_logits(np.arange(1, 4), np.zeros(3))


def test_entropy_is_of_proportions():
    assert shape.entropy(np.asarray([2.0, 2.0, 0.0])) == pytest.approx(math.log(2))
    assert shape.entropy(np.zeros(3)) == 0.0
