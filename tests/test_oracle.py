"""Oracles: what they reach equals their definitions, and no rank cutoff beats the best one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import decal
from decal.eval import exact, oracle, task
from decal.eval.exact import Interest, Outcome
from decal.samplers.trie import Policy, TokenTrie
from decal.samplers.valid_set import ValidSet

SCALES = (2.0, 1.0, 0.4, 0.0)
TOLERANCE = 0.01
STEPS = 1.01  # what the bound allows for its finite steps in dilution
"""Of the value of a choice of cutoffs, in nats: the oracle interpolates between prices."""


def ranking_of(trie: TokenTrie, logits: Tensor, scales: Sequence[float] = SCALES) -> tuple[oracle.Ranking, Outcome]:
    """The ranking that `flows` hands to the oracles, and the size oracle on the way."""
    ranking = oracle.Ranking(Interest.of(trie), scales)
    groups = [oracle.size_group(trie, scales, 0)]
    flow = exact.flows(trie, tiny.blocks(logits), groups, len(scales), observe=ranking)
    return ranking, exact.outcome(trie, flow)


def cut_law(z: np.ndarray, keep: int, scale: float) -> np.ndarray:
    """Probabilities of logits (V,) cut after the ``keep``-th most probable token (all its equals stay), then scaled."""
    kept = z >= np.sort(z)[::-1][keep - 1]
    e = np.where(kept & np.isfinite(z), np.exp(scale * np.where(np.isfinite(z), z - z.max(), 0.0)), 0.0)
    return e / e.sum()


def answers_under(trie: TokenTrie, laws: Sequence[np.ndarray]) -> np.ndarray:
    """Probability of each answer from the next-token law of each node."""
    mass = np.ones(len(trie))
    answers = np.zeros(trie.size)
    for node in range(len(trie)):
        if node:
            mass[node] = mass[trie.parent[node]] * laws[trie.parent[node]][trie.token[node]]
        if trie.answer[node] >= 0:
            answers[trie.answer[node]] += mass[node] * (laws[node][list(trie.ends)].sum() if trie.ends else 1.0)
    return answers


def case_of(seed: int, *, dead: bool = False) -> tuple[TokenTrie, Tensor]:
    rng = np.random.default_rng(seed)
    ends = ((0,), (0, 7), ())[seed % 3]
    if ends:
        answers = tiny.random_answers(rng, range(1, 6), 3, int(rng.integers(3, 10)))
    else:
        answers = list({(*head, int(t)) for head in [(1,), (2,)] for t in rng.choice(np.arange(1, 8), 3)} | {(4,), (6,)})
    trie = tiny.trie_of(sorted(answers), ends)
    logits = tiny.random_rows(rng, trie, 9)
    for node, children in enumerate(trie.children):  # a model that has some idea
        logits[node, [*children, *(ends if trie.answer[node] >= 0 else ())]] += 2.0
    if dead:
        logits[torch.from_numpy(rng.random(logits.shape) < 0.15)] = -torch.inf
        logits[:, 8] = 0.5
    return trie, logits


@pytest.mark.parametrize("seed", range(6))
def test_size_oracle_by_its_definition(seed: int) -> None:
    trie, logits = case_of(seed)
    _, result = ranking_of(trie, logits)
    valid = [len(c) + bool(trie.ends and a >= 0) for c, a in zip(trie.children, trie.answer, strict=True)]
    for number, scale in enumerate(SCALES):
        laws = [cut_law(row, max(k, 1), scale) for row, k in zip(logits.double().numpy(), valid, strict=True)]
        np.testing.assert_allclose(result.answers[number], answers_under(trie, laws), rtol=0, atol=1e-12)
    assert result.validity.max() > 0 or seed in (3, 4)  # whose most probable first tokens are none of the valid ones


def test_number_of_valid_next_tokens_by_hand() -> None:
    answers = [(1,), (1, 2), (1, 3), (4, 1)]
    expected = {(): 2, (1,): 3, (1, 2): 1, (1, 3): 1, (4,): 1, (4, 1): 1}
    for ends, less in (((0, 9), 0), ((), 1)):
        trie = tiny.trie_of(answers, ends)
        found = dict(zip((tuple(trie.path(n)) for n in range(len(trie))), oracle.valid_next(trie).tolist(), strict=True))
        assert found == {path: n - less * (path in answers) for path, n in expected.items()}


@pytest.mark.parametrize("seed", range(6))
def test_mask_oracle_is_always_valid_and_keeps_the_models_shape(seed: int) -> None:
    trie, logits = case_of(seed)
    ranking, _ = ranking_of(trie, logits)
    result = exact.outcome(trie, ranking.mask_flow(trie))
    np.testing.assert_allclose(result.validity, 1, rtol=0, atol=1e-12)
    for number, scale in enumerate(SCALES):
        laws = []
        for node, row in enumerate(logits.double().numpy()):
            valid = [*trie.children[node], *(trie.ends if trie.answer[node] >= 0 else ())]
            law = np.zeros(len(row))
            law[valid] = np.exp(scale * row[valid])
            laws.append(law / max(law.sum(), 1e-300))
        np.testing.assert_allclose(result.answers[number], answers_under(trie, laws), rtol=0, atol=1e-12)


def assert_perfect(trie: TokenTrie) -> None:
    result = exact.outcome(trie, oracle.count_flow(trie))
    np.testing.assert_allclose(result.answers, 1 / trie.size, rtol=1e-12)
    np.testing.assert_allclose(result.validity, 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.diversity, 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", task.builtin_names())
@pytest.mark.parametrize("merges", [0, 60])
def test_completion_counts_are_perfect_on_every_built_in_task(name: str, merges: int) -> None:
    question = task.load(name)
    tokenizer = tiny.byte_level([f" {answer}" for answer in question.answers], merges)
    trie, _ = tiny.compile_trie(tokenizer, question.valid, question.policy)
    assert trie.size == question.valid.size
    assert_perfect(trie)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("policy", [Policy(), Policy(case="any")], ids=["exact", "case"])
def test_completion_counts_are_perfect_on_random_sets(seed: int, policy: Policy) -> None:
    rng = np.random.default_rng(seed)
    answers = ["".join("bcdéf"[i] for i in a) for a in tiny.random_answers(rng, range(5), 4, int(rng.integers(1, 40)))]
    tokenizer = tiny.byte_level(answers, merges=int(rng.integers(0, 20)))
    trie, _ = tiny.compile_trie(tokenizer, ValidSet.from_list(answers), policy)
    assert_perfect(trie)


def test_masked_by_one_is_no_mask_by_counts() -> None:
    """The perfect oracle differs from the mask at scale 0, which is uniform over next tokens and not over answers."""
    trie = tiny.trie_of([(1,), (2, 1), (2, 2), (2, 3)], (0,))
    ranking, _ = ranking_of(trie, torch.zeros(len(trie), 5))
    mask = exact.outcome(trie, ranking.mask_flow(trie))
    np.testing.assert_allclose(mask.answers[-1], [1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert_perfect(trie)


def every_cutoff(trie: TokenTrie, logits: Tensor, scale: float) -> np.ndarray:
    """(combinations, A) answer probabilities of every choice of one cutoff at every node."""
    choices = []
    for node, row in enumerate(logits.double().numpy()):
        alive = int(np.isfinite(row).sum()) if trie.children[node] or (trie.ends and trie.answer[node] >= 0) else 1
        laws = [cut_law(row, keep, scale) for keep in range(1, alive + 1)]
        choices.append([law for i, law in enumerate(laws) if not any((law == other).all() for other in laws[:i])])
    return np.array([answers_under(trie, laws) for laws in itertools.product(*choices)])


def worth(answers: np.ndarray, price: float) -> np.ndarray:
    """What `BestCutoffs` maximises."""
    return -(answers * np.log(np.where(answers > 0, answers, 1.0))).sum(-1) + price * answers.sum(-1)


SMALL: list[tuple[list[tuple[int, ...]], tuple[int, ...]]] = [
    ([(1,), (2,), (3,)], (0,)),
    ([(1,), (1, 2), (3,)], (0,)),
    ([(1,), (2, 1), (2, 2), (2, 4)], ()),
    ([(1, 3), (2, 1), (2, 2), (1, 1), (4,)], ()),
    ([(1, 2, 3), (1, 2, 4), (1, 5), (2, 3)], ()),
    ([(1,), (1, 2)], (0, 5)),
]


def small_case(case: int, seed: int) -> tuple[TokenTrie, Tensor]:
    answers, ends = SMALL[case]
    trie = tiny.trie_of(answers, ends)
    rng = np.random.default_rng([case, seed])
    logits = tiny.random_rows(rng, trie, 6, spread=float(rng.choice([0.7, 2.0])))
    return trie, logits.round() if seed == 3 else logits  # the last has ties


@pytest.mark.parametrize("case", range(len(SMALL)))
@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_cutoffs_beats_the_best(case: int, seed: int) -> None:
    trie, logits = small_case(case, seed)
    ranking, _ = ranking_of(trie, logits)
    for number, scale in enumerate(SCALES):
        tried = every_cutoff(trie, logits, scale)
        best = oracle.BestCutoffs(trie, ranking, number)
        # At lower prices it may pay to dilute what is kept, of which the oracle tries only some amounts.
        prices = [price for price in oracle.PRICES if price >= 1]
        reached = exact.outcome(trie, best.flow(prices))
        for price, own in zip(prices, reached.answers, strict=True):
            # Reached by an actual choice of cutoffs, so it isn't too good ...
            assert np.abs(tried - own).max(-1).min() < 1e-9, "not a choice of cutoffs"
            # ... and as good as any, up to interpolation between the prices of the grid.
            assert worth(own, price) >= worth(tried, price).max() - TOLERANCE, (scale, price)
        assert_bounded(tried, best.bound())
        # The bound is reached, up to rounding to a validity of the grid, by what is best at some price.
        bound = best.bound()
        for validity, diversity in zip(reached.validity, reached.diversity, strict=True):
            if validity > 0.02:
                assert bound_behind(bound, validity) <= diversity * np.exp(TOLERANCE / validity)


def bound_before(bound: np.ndarray, validity: float) -> float:
    """The bound at the last validity of the grid up to this one; it holds, since the bound falls."""
    return float(bound[np.searchsorted(oracle.VALIDITIES, validity + 1e-12) - 1])


def bound_behind(bound: np.ndarray, validity: float) -> float:
    """The bound at the first validity of the grid from this one on; -inf if none is that valid."""
    return float(np.nan_to_num(bound, nan=-np.inf)[min(np.searchsorted(oracle.VALIDITIES, validity - 1e-9), len(bound) - 1)])


def assert_bounded(answers: np.ndarray, bound: np.ndarray) -> None:
    """No row of answer probabilities (S, A) is more diverse than the bound at its validity."""
    finite = bound[np.isfinite(bound)]
    assert (np.diff(finite) <= 1e-12).all(), "the bound falls with validity"
    for validity, diversity in zip(answers.sum(-1), exact.diversity(answers), strict=True):
        if validity >= oracle.VALIDITIES[0]:
            assert diversity <= bound_before(bound, validity) * STEPS, validity


def test_junk_behind_a_favourite_can_even_things_out() -> None:
    """Keeping tokens that are not valid costs validity but may help the other answers; a temperature does that too."""
    trie = tiny.trie_of([(1,), (2,)], (0,))
    p = torch.full((3, 4), 1e-9)
    p[0, [1, 2]] = torch.tensor([0.9, 0.1])
    p[1, [0, 3]] = torch.tensor([0.5, 0.5 - 1e-4])
    p[2, 0] = 1.0
    logits = p.log()
    plain = exact.evaluate(trie, tiny.blocks(logits), [decal.parse("temperature(1.0)")])
    ranking, _ = ranking_of(trie, logits, (1.0,))
    best = oracle.BestCutoffs(trie, ranking, 0)
    valid_only = exact.outcome(trie, best.flow([5.0]))
    assert valid_only.validity[0] == pytest.approx(1)
    assert plain.diversity[0] > 1.1 * valid_only.diversity[0], "no longer a case of its kind"
    assert_bounded(plain.answers, best.bound())


@pytest.mark.parametrize("seed", range(4))
def test_bound_on_means_over_prompts(seed: int) -> None:
    """Whatever cutoffs are chosen on each of two prompts, their mean stays below the bound on means."""
    parts = [small_case(2, 10 * seed + prompt) for prompt in (0, 1)]
    tried, bounds = [], []
    for trie, logits in parts:
        ranking, _ = ranking_of(trie, logits, (1.0,))
        bounds.append(oracle.BestCutoffs(trie, ranking, 0).bound())
        answers = every_cutoff(trie, logits, 1.0)
        tried.append((answers.sum(-1), exact.diversity(answers)))
    one = (tried[0][0][:, None] + tried[1][0]) / 2, (tried[0][1][:, None] + tried[1][1]) / 2
    stacked = np.stack(bounds)
    for floor in (0.02, 0.1, 0.2, 0.3, 0.5, 0.8):
        reaches = (one[0] >= floor) & np.isfinite(one[1])
        bound = oracle.mean_bound(stacked, floor)
        if reaches.any():
            assert one[1][reaches].max() <= bound * STEPS
            assert bound <= 1
        alone = (tried[0][0] >= floor) & np.isfinite(tried[0][1])
        if alone.any():
            assert tried[0][1][alone].max() <= oracle.mean_bound(stacked[:1], floor) * STEPS


@pytest.mark.parametrize("seed", range(6))
def test_rank_cutoff_chains_stay_below_the_hull(seed: int) -> None:
    trie, logits = case_of(seed, dead=True)
    chains = [
        f"{cut} | temperature({t:g})"
        for t in (0.5, 1.0, 2.5)
        for cut in [f"top_k({k})" for k in (1, 2, 3, 5, 8)]
        + [f"top_p({p})" for p in (0.1, 0.3, 0.5, 0.8, 0.95)]
        + [f"min_p({p})" for p in (0.01, 0.1, 0.3, 0.7)]
        + [f"{rule}({e})" for rule in ("epsilon", "eta") for e in (0.01, 0.05, 0.2)]
        + [f"{rule}({a})" for rule in ("top_a", "p_less") for a in (0.1, 0.5, 1.0)]
        + ["top_n_sigma(0.5)", "top_n_sigma(1)", "top_n_sigma(2)"]
    ]
    tried = exact.evaluate(trie, tiny.blocks(logits), [decal.parse(c) for c in chains]).answers
    scales, prices = (2.0, 1.0, 0.4), [1 + price / 8 for price in range(100)]
    ranking, _ = ranking_of(trie, logits, scales)
    cutoffs = [oracle.BestCutoffs(trie, ranking, i) for i in range(3)]
    best = np.concatenate([exact.outcome(trie, c.flow(prices)).answers for c in cutoffs])
    # At a price, all points of equal worth are a line in the plane of validity and entropy; the hull is below all of them.
    for price in prices:
        assert worth(best, price).max() >= worth(tried, price).max() - TOLERANCE, price
    assert_bounded(tried, np.fmax.reduce([c.bound() for c in cutoffs]))


def test_best_cutoff_by_hand() -> None:
    # Valid tokens 1 and 2 stand first and third of the ranking, so keeping both costs the one between.
    trie = tiny.trie_of([(1,), (2,)])
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).expand(len(trie), -1)
    ranking, _ = ranking_of(trie, logits, (1.0,))
    result = exact.outcome(trie, oracle.BestCutoffs(trie, ranking, 0).flow((1.0, 24.0)))
    np.testing.assert_allclose(result.answers, [[0.4 / 0.9, 0.2 / 0.9], [1, 0]], rtol=1e-6)
