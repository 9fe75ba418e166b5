"""Order: numbers of one prefix against scikit-learn and brute force, and what is made of a trie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from sklearn import metrics
from torch import Tensor

from decal.eval import order
from decal.eval.order import Prefix
from decal.eval.theory import compounding
from decal.samplers.trie import TokenTrie

VOCABULARY = 40


def case_of(seed: int, ends: tuple[int, ...] = (0,)) -> tuple[TokenTrie, Tensor]:
    """Random answers over tokens 1 to 29, and rows of a vocabulary of 40 with ties and tokens that don't exist."""
    rng = np.random.default_rng(seed)
    answers = tiny.random_answers(rng, range(1, 30), 3, int(rng.integers(2, 25)))
    trie = tiny.trie_of(sorted(answers), ends)
    logits = torch.from_numpy(rng.standard_normal((len(trie), VOCABULARY)) * 2)
    if seed % 3 == 0:
        logits = (logits * 2).round() / 2
    if seed % 4 == 0:
        logits[:, 30:34] = -math.inf
    if seed % 8 == 1:
        logits[:, 36] = -math.inf
    return trie, logits


def labels_of(trie: TokenTrie, node: int, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each token is valid, its weight, and its logit; of several ends only the most probable is there."""
    count = np.zeros(len(z))
    for token, child in trie.children[node].items():
        count[token] = trie.count[child]
    there = np.isfinite(z)
    if trie.answer[node] >= 0:
        ends = sorted(trie.ends, key=lambda t: -z[t])
        count[ends[0]] = 1
        there[ends[1:]] = False
    return (count > 0)[there], count[there], z[there]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("ends", [(0,), (0, 35, 36)])
def test_numbers_of_a_prefix_are_those_of_scikit_learn(seed: int, ends: tuple[int, ...]) -> None:
    trie, logits = case_of(seed, ends)
    found = order.prefixes(trie, tiny.blocks(logits))
    assert {p.node for p in found} == set(range(len(trie)))
    for p in found:
        valid, count, z = labels_of(trie, p.node, logits[p.node].numpy())
        assert p.tokens == len(z)
        assert p.average_precision("unit") == pytest.approx(metrics.average_precision_score(valid, z))
        assert p.auroc == pytest.approx(metrics.roc_auc_score(valid, z))
        assert p.inversions == sum((z > v).astype(float)[~valid].sum() + 0.5 * (z == v)[~valid].sum() for v in z[valid])
        precision, recall, _ = metrics.precision_recall_curve(valid, z)
        assert p.recall_at(0.8, "unit") == pytest.approx(recall[:-1][precision[:-1] >= 0.8].max(initial=0.0))
        # Every cutoff, one by one: the cuts of a ranking lie between different logits.
        cuts = [z >= level for level in np.unique(z)]
        by_count = [(valid[cut].mean(), count[cut].sum() / count.sum()) for cut in cuts]
        assert p.recall_at(0.8) == pytest.approx(max((r for q, r in by_count if q >= 0.8), default=0.0))
        best = [max(q for q, r in by_count if r >= wanted - 1e-9) for wanted in order.RECALLS]
        np.testing.assert_allclose(p.best_precision(), best)
        ap = sum(count[i] / count.sum() * valid[z >= z[i]].mean() for i in np.flatnonzero(valid))
        assert p.average_precision() == pytest.approx(ap)
        within = [cut for cut in cuts if cut.sum() <= valid.sum()]
        assert p.r_precision == pytest.approx(max((valid[cut].sum() for cut in within), default=0) / valid.sum())
        p_valid = torch.softmax(logits[p.node], -1).numpy()
        assert p.share.sum() == pytest.approx(sum(p_valid[t] for t in valid_tokens(trie, p.node)))


def valid_tokens(trie: TokenTrie, node: int) -> list[int]:
    return [*trie.children[node], *(trie.ends if trie.answer[node] >= 0 else ())]


@pytest.mark.parametrize("seed", range(20))
def test_sizes_are_the_smallest_and_largest_that_keep_to_a_target(seed: int) -> None:
    trie, logits = case_of(seed)
    for p in order.prefixes(trie, tiny.blocks(logits)):
        valid, count, z = labels_of(trie, p.node, logits[p.node].numpy())
        cuts = sorted(((z >= level) for level in np.unique(z)), key=np.sum)
        for wanted in (0.3, 0.8, 1.0):
            assert p.size_at(wanted) == min(int(c.sum()) for c in cuts if count[c].sum() / count.sum() >= wanted - 1e-9)
            behind_valid = [int(c.sum()) for c in cuts if valid[c].mean() >= wanted and valid[z == z[c].min()].any()]
            assert p.size_with(wanted) == max(behind_valid, default=1)


@pytest.mark.parametrize("seed", range(20))
def test_a_sweep_sees_the_first_tokens_only(seed: int) -> None:
    trie, logits = case_of(seed)
    for p in order.prefixes(trie, tiny.blocks(logits)):
        valid, _, z = labels_of(trie, p.node, logits[p.node].numpy())
        swept = p.swept(10)
        # What stands at rank 10 or above together with all its equals.
        seen = np.asarray([(z >= v).sum() <= 10 for v in z])
        assert (swept is None) == (not (valid & seen).any())
        if swept is not None:
            assert len(swept.upto) == (valid & seen).sum()
            assert swept.recall("unit")[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(20))
def test_cutoffs_compound_as_their_kept_sets_do(seed: int) -> None:
    """`kept` against the sets themselves, followed through the theorem's own definition."""
    trie, logits = case_of(seed)
    found = order.prefixes(trie, tiny.blocks(logits))
    sizes = [p.size_at(0.7) for p in found]
    product = compounding(trie, order.kept(trie, found, sizes))
    sets = {}
    for p, k in zip(found, sizes, strict=True):
        z = logits[p.node].numpy()
        sets[p.node] = {int(t) for t in np.flatnonzero(np.isfinite(z)) if (z >= z[t]).sum() <= k}
        assert len(sets[p.node]) == k
    whole = 0
    precision = 0.0
    for leaf in np.flatnonzero(np.asarray(trie.answer) >= 0):
        node, mass, inside = int(leaf), 1.0, bool(sets[int(leaf)] & set(trie.ends))
        mass *= inside / len(sets[node])
        while node:
            parent = trie.parent[node]
            inside = inside and trie.token[node] in sets[parent]
            mass /= len(sets[parent])
            node = parent
        whole += inside
        precision += mass * inside
    assert product.recall == pytest.approx(whole / trie.size)
    assert product.precision == pytest.approx(precision)


def test_levels_are_weighted_as_a_uniform_answer_meets_them() -> None:
    trie, logits = case_of(3)
    found = order.prefixes(trie, tiny.blocks(logits))
    for one, some in zip(order.levels(found), order.by_depth(found), strict=True):
        weight = np.asarray([trie.count[p.node] for p in some])
        assert one.reach == pytest.approx(weight.sum() / trie.size)
        assert one.average_precision == pytest.approx(np.average([p.average_precision() for p in some], weights=weight))
        curves = np.stack([p.best_precision() for p in some])
        assert one.area == pytest.approx(np.trapezoid(np.average(curves, 0, weights=weight), order.RECALLS))
    unit = order.levels(found, "unit")[1]
    assert unit.r_precision == pytest.approx(np.mean([p.r_precision for p in order.by_depth(found)[1]]))


def test_a_valid_token_that_the_model_rules_out_stands_behind_everything() -> None:
    trie = tiny.trie_of([(1,), (2,)], (0,))
    logits = torch.zeros(3, 8)
    logits[0, 2] = -math.inf
    root: Prefix = order.prefixes(trie, tiny.blocks(logits))[0]
    assert root.share.tolist() == [pytest.approx(1 / 7), 0.0]
    assert root.upto.tolist() == [7, 8]
    assert root.size_at(1.0) == 8
