"""Diversity of samples, against brute force, mpmath, sacrebleu, and the laws that the samples come from."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from decal.eval import metrics
from decal.samplers.errors import DecalError

COUNTS = [
    [1],
    [2],
    [1, 1],
    [3, 1],
    [2, 1, 1],
    [5, 4, 1, 1, 1, 2, 2],
    [1] * 7,
    [2] * 6,
    [40, 1],
    [1, *[2] * 30],
    [1, 1, *[2] * 40],
    [100, 50, 20, 10, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1],
    [1] * 60 + [2] * 3 + [30],
    [1] * 300,
    [1] * 50 + [7] * 100,
]


def as_array(counts: list[int]) -> np.ndarray:
    return np.array(counts, dtype=np.int64)


def zipf(kinds: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, kinds + 1) ** -exponent
    return weights / weights.sum()


def chao_wang_jost(counts: list[int]) -> float:
    """Their equation by the letter, with enough digits for its cancellation."""
    with mpmath.workdps(400):
        n, f1, f2 = sum(counts), counts.count(1), counts.count(2)
        total = sum(mpmath.mpf(c) / n * sum(mpmath.mpf(1) / k for k in range(c, n)) for c in counts)
        if f2:
            a = mpmath.mpf(2 * f2) / ((n - 1) * f1 + 2 * f2)
        elif f1:
            a = mpmath.mpf(2) / ((n - 1) * (f1 - 1) + 2)
        else:
            a = mpmath.mpf(1)
        if a < 1:
            rest = -mpmath.log(a) - sum((1 - a) ** r / r for r in range(1, n))
            total += mpmath.mpf(f1) / n * (1 - a) ** (1 - n) * rest
        return float(total)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60))
def test_hill_1_is_that_of_scipy(counts: list[int]) -> None:
    assert metrics.hill(as_array(counts), 1) == pytest.approx(math.exp(stats.entropy(counts)))


@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: f"{len(c)} of {sum(c)}")
def test_hill_numbers_are_their_definitions(counts: list[int]) -> None:
    p = [c / sum(counts) for c in counts]
    assert metrics.hill(as_array(counts), 0) == pytest.approx(len(counts))
    assert metrics.hill(as_array(counts), 1) == pytest.approx(math.prod(x**-x for x in p))
    assert metrics.hill(as_array(counts), 2) == pytest.approx(1 / sum(x * x for x in p))
    assert metrics.hill(as_array([*counts, 0]), 0) == len(counts)


@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: f"{len(c)} of {sum(c)}")
def test_entropy_is_the_published_equation(counts: list[int]) -> None:
    assert metrics.entropy(as_array(counts)) == pytest.approx(chao_wang_jost(counts), rel=1e-9, abs=1e-12)


def test_entropy_of_random_counts_is_the_published_equation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        counts = rng.geometric(rng.uniform(0.05, 0.95), size=rng.integers(1, 60))
        assert metrics.entropy(counts) == pytest.approx(chao_wang_jost(counts.tolist()), rel=1e-9, abs=1e-12)


def test_entropy_of_large_samples_neither_cancels_nor_takes_long() -> None:
    for f1, f2, rest in ((100_000, 0, 0), (1, 49_999, 0), (90_000, 3, 10), (5, 40_000, 2)):
        counts = as_array([1] * f1 + [2] * f2 + [50] * rest)
        n = int(counts.sum())
        a = 2 * f2 / ((n - 1) * f1 + 2 * f2) if f2 else 2 / ((n - 1) * (f1 - 1) + 2)
        with mpmath.workdps(50):
            x, power, tail = mpmath.mpf(1) - a, mpmath.mpf(1), mpmath.mpf(0)
            if a * n < 1:
                for r in range(1, n):
                    power *= x
                    tail -= power / r
                tail = (tail - mpmath.log(a)) / power
            else:
                for r in range(n, n + int(100 / a)):
                    power *= x
                    tail += power / r
            kinds = Counter(counts.tolist()).items()
            seen = sum(c * many * (mpmath.digamma(n) - mpmath.digamma(c)) for c, many in kinds) / n
            assert metrics.entropy(counts) == pytest.approx(float(seen + f1 * tail / n), rel=1e-9)


def test_chao1_and_collision_and_coverage_by_hand() -> None:
    counts = as_array([5, 4, 1, 1, 1, 2, 2])
    assert metrics.chao1(counts) == 7 + 3 * 2 / (2 * 3)
    assert metrics.sample_coverage(counts) == pytest.approx(1 - 3 / 16 * (15 * 3 / (15 * 3 + 2 * 2)))
    singles = as_array([1, 1, 1, 3])
    assert metrics.chao1(singles) == 4 + 3 * 2 / 2
    assert metrics.sample_coverage(singles) == pytest.approx(1 - 3 / 6 * (5 * 2 / (5 * 2 + 2)))
    assert metrics.sample_coverage(as_array([4, 3])) == 1
    assert metrics.hill_corrected(counts, 0) == metrics.chao1(counts)
    with pytest.raises(DecalError, match="order must be 0, 1 or 2, got 3"):
        metrics.hill_corrected(counts, 3)


@pytest.mark.parametrize("counts", [c for c in COUNTS if 1 < sum(c) < 70])
def test_collision_is_the_share_of_agreeing_pairs(counts: list[int]) -> None:
    labels = [i for i, c in enumerate(counts) for _ in range(c)]
    pairs = list(itertools.combinations(labels, 2))
    share = sum(a == b for a, b in pairs) / len(pairs)
    assert metrics.collision(as_array(counts)) == pytest.approx(share)
    assert metrics.hill_corrected(as_array(counts), 2) == (pytest.approx(1 / share) if share else math.inf)
    assert metrics.collisions(np.array(labels), np.ones((1, len(labels))))[0] == pytest.approx(share)


@pytest.mark.parametrize("counts", [[1], [3, 1], [2, 1, 1], [4, 3, 1, 1], [1] * 6, [9, 1]])
def test_rarefied_is_the_mean_over_all_choices(counts: list[int]) -> None:
    labels = [i for i, c in enumerate(counts) for _ in range(c)]
    for m in range(1, len(labels) + 1):
        expected = np.mean([len(set(choice)) for choice in itertools.combinations(labels, m)])
        assert metrics.rarefied(as_array(counts), m) == pytest.approx(expected)
    assert math.isnan(metrics.rarefied(as_array(counts), len(labels) + 1))


def test_rarefied_is_unbiased_for_fresh_outputs() -> None:
    """distinct_k from 30 outputs has the expectation of arXiv 2504.05228's, sum of 1 - (1 - p)^k."""
    rng, p, k = np.random.default_rng(1), zipf(40, 1.0), 10
    found = [metrics.rarefied(rng.multinomial(30, p), k) for _ in range(3000)]
    assert abs(np.mean(found) - (1 - (1 - p) ** k).sum()) < 4 * np.std(found) / math.sqrt(3000)


@pytest.mark.parametrize(("kinds", "exponent", "n"), [(50, 0.0, 50), (50, 1.0, 60), (200, 0.7, 150), (12, 0.3, 20)])
def test_corrected_estimates_are_less_biased_than_plug_in(kinds: int, exponent: float, n: int) -> None:
    rng, p = np.random.default_rng(2), zipf(kinds, exponent)
    samples = [counts[counts > 0] for counts in rng.multinomial(n, p, size=1500)]
    for order in (0, 1, 2):
        truth = metrics.hill(p, order)
        plain = np.mean([metrics.hill(counts, order) for counts in samples])
        fixed = np.mean([metrics.hill_corrected(counts, order) for counts in samples])
        assert plain < truth, "the plug-in is said to be biased low"
        most = 1 if order == 2 else 0.5  # the inverse of something unbiased isn't
        assert abs(fixed - truth) < most * abs(plain - truth), (order, truth, plain, fixed)
    entropies = np.mean([metrics.entropy(counts) for counts in samples])
    assert abs(entropies - math.log(metrics.hill(p, 1))) < 0.3 * abs(
        np.mean([math.log(metrics.hill(counts, 1)) for counts in samples]) - math.log(metrics.hill(p, 1))
    )
    collisions = [metrics.collision(counts) for counts in samples]
    assert abs(np.mean(collisions) - (p**2).sum()) < 4 * np.std(collisions) / math.sqrt(len(collisions))


def test_sample_coverage_is_the_probability_of_what_was_seen() -> None:
    rng, p = np.random.default_rng(3), zipf(100, 0.8)
    errors = []
    for counts in rng.multinomial(60, p, size=3000):
        errors.append(metrics.sample_coverage(counts[counts > 0]) - p[counts > 0].sum())
    assert abs(np.mean(errors)) < 0.005


def covered(truth: float, intervals: list[tuple[float, float] | None]) -> float:
    made = [interval for interval in intervals if interval is not None]
    assert len(made) > 0.9 * len(intervals)
    return float(np.mean([low <= truth <= high for low, high in made]))


def test_intervals_of_the_literature_cover() -> None:
    rng, p = np.random.default_rng(4), zipf(60, 0.6)
    samples = [counts[counts > 0] for counts in rng.multinomial(80, p, size=1200)]
    at = lambda m: (1 - (1 - p) ** m).sum()  # noqa: E731
    # The nominal level is 95 %; these are approximations for large samples.
    assert 0.93 < covered(at(30), [metrics.rarefied_interval(c, 30) for c in samples]) <= 1
    assert 0.93 < covered(at(80), [metrics.rarefied_interval(c, 80) for c in samples]) <= 1
    assert 0.88 < covered(60, [metrics.chao1_interval(c) for c in samples]) < 0.99
    drawn = rng.multinomial(80, p, size=1200)
    hits = []
    for counts in drawn:
        interval = metrics.sample_coverage_interval(counts[counts > 0])
        assert interval is not None
        hits.append(interval[0] <= p[counts > 0].sum() <= interval[1])
    assert 0.9 < np.mean(hits) < 0.99


def test_where_there_is_no_interval() -> None:
    assert metrics.chao1_interval(as_array([3, 1])) is None
    assert metrics.chao1_interval(as_array([3, 2])) is None
    assert metrics.rarefied_interval(as_array([6, 6]), 12) is None
    assert metrics.rarefied_interval(as_array([6, 6]), 13) is None
    assert metrics.sample_coverage_interval(as_array([6, 6])) is None
    assert set(metrics.closed_intervals(as_array([5, 4, 1, 1, 1, 2, 2]), 10, 5)) == {
        metric.name for metric in metrics.METRICS if metric.alone and "bootstrap" not in metric.alone
    } - {"validity"}


def test_weighted_pairs_are_those_of_the_drawn_outputs_without_an_output_and_itself() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(6, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.array([0, 0, 1, 2, 1, 1])
    drawn = rng.integers(0, 6, size=(20, 6))
    weights = np.stack([np.bincount(d, minlength=6) for d in drawn]).astype(float)
    for d, distance, collision in zip(
        drawn, metrics.distances(vectors, weights), metrics.collisions(labels, weights), strict=True
    ):
        pairs = [(i, j) for i, j in itertools.product(d, d) if i != j]
        assert distance == pytest.approx(np.mean([1 - vectors[i] @ vectors[j] for i, j in pairs]))
        assert collision == pytest.approx(np.mean([labels[i] == labels[j] for i, j in pairs]))
    apart = [1 - vectors[i] @ vectors[j] for i, j in itertools.permutations(range(6), 2)]
    assert metrics.pairwise_distance(vectors) == pytest.approx(np.mean(apart))


def test_vendi_with_identity_of_classes_is_hill_1() -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        labels = rng.integers(0, rng.integers(1, 9), size=rng.integers(1, 30))
        kernel = (labels[:, None] == labels[None]).astype(float)
        assert metrics.vendi(kernel) == pytest.approx(metrics.hill(metrics.count(labels.tolist()), 1))
    assert metrics.vendi(np.eye(7)) == pytest.approx(7)


def test_vendi_of_a_gram_matrix_is_the_entropy_of_singular_values() -> None:
    rng = np.random.default_rng(7)
    vectors = rng.normal(size=(9, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    p = np.linalg.svd(vectors / 3, compute_uv=False) ** 2
    assert metrics.vendi(vectors @ vectors.T) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("kernel", [np.ones((2, 3)), np.array([[1, 0.5], [0.1, 1]]), 2 * np.eye(3), np.ones(3)])
def test_vendi_refuses_what_is_no_kernel(kernel: np.ndarray) -> None:
    with pytest.raises(DecalError, match="symmetric with ones on its diagonal"):
        metrics.vendi(kernel)


def test_self_bleu_is_sacrebleu_against_the_others() -> None:
    import sacrebleu

    texts = ["the cat sat on the mat", "the cat sat on a hat", "a dog ran far away from here"]
    expected = [
        sacrebleu.sentence_bleu(texts[0], [texts[1], texts[2]]).score,
        sacrebleu.sentence_bleu(texts[1], [texts[0], texts[2]]).score,
        sacrebleu.sentence_bleu(texts[2], [texts[0], texts[1]]).score,
    ]
    assert metrics.self_bleu(texts) == pytest.approx(sum(expected) / 300)
    assert 0 < metrics.self_bleu(texts) < 1
    assert metrics.self_bleu(["same words in all of them"] * 3) == pytest.approx(1)
    # As the list of metrics says: of single words, the share that another repeats.
    assert metrics.self_bleu(["Ohio", "Texas", "Ohio", "Iowa"]) == pytest.approx(0.5)


def test_ead_is_distinct_divided_by_its_expectation() -> None:
    texts = ["A b c a", "b, B d!"]
    assert metrics.ngrams(texts[1], 2) == [("b", "b"), ("b", "d")]
    assert metrics.ead(texts, 1, 20) == pytest.approx(4 / (20 * (1 - (19 / 20) ** 7)))
    assert metrics.ead(texts, 2, 30) == pytest.approx(5 / (30 * (1 - (29 / 30) ** 5)))
    assert metrics.ead(["a a"], 1, 1) == 1
    # Uniform words give 1 in expectation whatever the length: that is its point.
    rng = np.random.default_rng(8)
    for length in (20, 200):
        found = [metrics.ead([" ".join(f"w{i}" for i in rng.integers(0, 100, length))], 1, 100) for _ in range(400)]
        assert np.mean(found) == pytest.approx(1, abs=0.01)


def test_compression_ratio() -> None:
    import zlib

    assert metrics.compression_ratio(["ab", "é"]) == len(b"ab\n\xc3\xa9") / len(zlib.compress(b"ab\n\xc3\xa9", 9))
    rng = np.random.default_rng(9)
    mixed = ["".join(rng.choice(list("abcdefghij"), 50)) for _ in range(20)]
    assert metrics.compression_ratio(["".join(mixed[0])] * 20) > 3 * metrics.compression_ratio(mixed) > 3


def test_classes() -> None:
    assert metrics.classes(["b", "a", "b", "c"]) == [0, 1, 0, 2]
    asked = []

    def close(first: str, other: str) -> bool:
        asked.append((first, other))
        return abs(int(first) - int(other)) <= 2

    # Greedy, by the first member: 4 is near 2 but 2 joined 0.
    assert metrics.classes(["0", "2", "4", "2", "5"], close) == [0, 0, 1, 0, 1]
    assert ("2", "4") not in asked
    assert len(asked) == len(set(asked))
    assert metrics.count(["x", "y", "x"]).tolist() == [2, 1]


def test_nothing_and_little_are_undefined_and_no_error() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert all(math.isnan(value) for value in metrics.from_counts(none, 10, 1).values())
    assert metrics.from_known(none, 5)["coverage"] == 0
    assert math.isnan(metrics.from_known(none, 5)["diversity_corrected"])
    assert all(math.isnan(value) for value in metrics.from_texts([], {1: 1, 2: 1}).values())
    assert all(math.isnan(value) for value in metrics.from_vectors(np.zeros((0, 1))).values())
    one = metrics.from_counts(as_array([1]), 10, 1)
    undefined = {"distinct_k", "collision", "hill_2_corrected", "sample_coverage"}
    assert {name for name, value in one.items() if math.isnan(value)} == undefined
    assert all(one[name] == 1 for name in set(one) - undefined)
    assert math.isnan(metrics.self_bleu(["alone"]))
    assert metrics.from_known(as_array([1] * 50), 50)["diversity_corrected"] == 1


def test_every_metric_says_what_it_is_and_what_few_outputs_do() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(names) == len(set(names))
    for metric in metrics.METRICS:
        assert metric.label
        assert metric.meaning
        assert any(word in metric.bias.lower() for word in ("biased", "corrected", "grows"))
