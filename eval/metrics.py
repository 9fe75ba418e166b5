"""Diversity of sampled outputs, as functions of counts, texts and embeddings; and the list of what is reported.

Legend: n outputs, S distinct answers, c their counts (S,), f_j the number of answers seen j times.
A number that isn't defined (for too few outputs, say) is NaN; `hill_corrected` may also be infinite.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from decal.samplers.errors import DecalError

PAIRS = 500
"""Outputs of a prompt up to which all are embedded and compared in pairs; of more, so many at random."""
REFERENCES = 50
"""The same for Self-BLEU, which grows with the number of outputs anyway."""
NGRAMS = (1, 2, 3)
"""Lengths of the word n-grams of expectation-adjusted distinct."""
Z = 1.959963984540054
"""Standard normal quantile of two-sided 95 % intervals."""


@dataclass(frozen=True)
class Metric:
    """What is known of a reported number.

    Attributes:
        name: its key in results.
        label: its heading.
        meaning: one line.
        bias: one line: what few outputs do to it, and whether that is corrected.
        sized: whether its expectation depends on the number of outputs.
        alone: how its interval is made when there is one prompt; empty for none.
    """

    name: str
    label: str
    meaning: str
    bias: str
    sized: bool = True
    alone: str = ""


_COLWELL = "normal interval, variance of Colwell et al. 2012"
_PAIRS = "bootstrap over outputs, none paired with itself"
_LOW = "Biased low for few outputs; not corrected"

METRICS = (
    Metric(
        "validity",
        "validity",
        "share of the outputs that are valid",
        "Unbiased. An interval over prompts has no width where it is the same on all of them.",
        sized=False,
        alone="Wilson's score interval",
    ),
    Metric(
        "coverage",
        "coverage",
        "share of the known valid answers that were given",
        f"{_LOW}: it grows with the number of outputs, and with validity.",
    ),
    Metric(
        "diversity",
        "plug-in diversity",
        "exp(H) / |V| of the valid outputs, arXiv 2605.11128; undefined where none is valid",
        f"{_LOW}. Fewer valid outputs bias it more, so it favours settings of high validity.",
    ),
    Metric(
        "diversity_corrected",
        "diversity",
        "the same with the entropy of Chao, Wang and Jost 2013; at most 1",
        "Largely corrected; still low where most valid answers were seen once or never.",
    ),
    Metric("distinct", "distinct answers", "number of different answers, Hill number of order 0", f"{_LOW}.", alone=_COLWELL),
    Metric(
        "distinct_at_m",
        "distinct at m",
        "expected number of different answers among m outputs, m the same everywhere (rarefaction)",
        "Unbiased for m outputs, so numbers of outputs may differ.",
        sized=False,
        alone=_COLWELL,
    ),
    Metric(
        "distinct_k",
        "distinct_k",
        "expected number of different answers among k outputs, arXiv 2504.05228; mean over all choices of k",
        "Unbiased; undefined for fewer than k outputs.",
        sized=False,
        alone=_COLWELL,
    ),
    Metric(
        "chao1",
        "Chao1",
        "number of different answers there are, seen or not: S + f1 (f1 - 1) / (2 (f2 + 1)), Chao 1984",
        "Partly corrected: in expectation about a lower bound.",
        alone="log-normal interval of Chao 1987",
    ),
    Metric("hill_1", "plug-in Hill 1", "exp(H), effective number of answers", f"{_LOW}."),
    Metric(
        "hill_1_corrected",
        "Hill 1",
        "exp of the entropy estimator of Chao, Wang and Jost 2013",
        "Largely corrected; still low where most answers were seen once or never.",
    ),
    Metric(
        "hill_2",
        "plug-in Hill 2",
        "1 / sum p^2, effective number of frequent answers",
        f"{_LOW}: never more than the number of outputs.",
    ),
    Metric(
        "hill_2_corrected",
        "Hill 2",
        "1 / collision",
        "The collision is unbiased, its inverse somewhat high for few outputs; infinite where no two outputs agree.",
        alone=_PAIRS,
    ),
    Metric("collision", "collision", "chance that two outputs agree", "Unbiased.", sized=False, alone=_PAIRS),
    Metric(
        "sample_coverage",
        "sample coverage",
        "probability of the answers seen so far, Good and Turing, in the form of Chao and Jost 2012",
        "Nearly unbiased for the sample at hand; it grows with the number of outputs.",
        alone="normal interval of Esty 1983",
    ),
    Metric(
        "distance",
        "embedding distance",
        "mean of 1 - cosine over pairs of outputs",
        f"Unbiased. The embedder cuts long outputs. Of more than {PAIRS} outputs so many are drawn.",
        sized=False,
        alone=_PAIRS,
    ),
    Metric(
        "vendi",
        "Vendi score",
        "exp of the entropy of the eigenvalues of the cosine kernel / n, arXiv 2210.02410",
        f"{_LOW}: never more than the number of outputs. Of more than {PAIRS} so many are drawn.",
    ),
    Metric(
        "self_bleu",
        "Self-BLEU-4",
        "mean BLEU-4 of an output against the others, arXiv 1802.01886; low is diverse",
        f"Grows with the number of outputs; not corrected. Of one-word outputs it is the share "
        f"that another repeats. Of more than {REFERENCES} outputs so many are drawn.",
    ),
    *(
        Metric(
            f"ead_{n}",
            f"EAD of {n}-grams",
            f"different word {n}-grams / the number expected of uniform draws from the file's vocabulary, arXiv 2202.13587",
            "Corrected for length under that assumption only; comparable within one file.",
        )
        for n in NGRAMS
    ),
    Metric(
        "compression",
        "compression ratio",
        "bytes of the outputs / bytes after zlib; low is diverse",
        "Grows with the amount of text, and short texts don't compress; not corrected.",
    ),
)


def classes(answers: Sequence[str], same: Callable[[str, str], bool] | None = None) -> list[int]:
    """The class of each answer, numbered from 0 in order of appearance.

    Args:
        same: whether two answers are equivalent; equality by default. As in arXiv 2504.05228, an answer joins the first class
            whose first member it is equivalent to.
    """
    if same is None:
        numbers: dict[str, int] = {}
        return [numbers.setdefault(answer, len(numbers)) for answer in answers]
    firsts: list[str] = []
    known: dict[str, int] = {}
    for answer in answers:
        if answer not in known:
            number = next((i for i, first in enumerate(firsts) if same(first, answer)), len(firsts))
            if number == len(firsts):
                firsts.append(answer)
            known[answer] = number
    return [known[answer] for answer in answers]


def count(labels: Sequence[Any]) -> np.ndarray:
    """(S,) how often each label occurs, in order of appearance."""
    return np.bincount(classes(labels)) if len(labels) else np.zeros(0, dtype=np.int64)


def hill(counts: np.ndarray, order: float) -> float:
    """Plug-in Hill number, (sum p^order)^(1 / (1 - order)); order 1 is exp of the entropy. NaN without outputs."""
    from scipy.special import xlogy

    seen = counts[counts > 0]
    if not len(seen):
        return math.nan
    p = seen / seen.sum()
    if order == 1:
        return float(np.exp(-xlogy(p, p).sum()))
    return float((p**order).sum() ** (1 / (1 - order)))


def hill_corrected(counts: np.ndarray, order: int) -> float:
    """Hill number with what few outputs miss added, order 0, 1 or 2.

    Order 0 is `chao1`, 1 the exponential of `entropy`, 2 the inverse of `collision`: infinite where no two outputs agree.

    Raises:
        DecalError: another order.
    """
    if order == 0:
        return chao1(counts)
    if order == 1:
        return math.exp(entropy(counts))
    if order != 2:
        raise DecalError(f"hill_corrected: order must be 0, 1 or 2, got {order}")
    agree = collision(counts)
    return 1 / agree if agree else math.inf


def chao1(counts: np.ndarray) -> float:
    """Estimated number of answers there are, S + f1 (f1 - 1) / (2 (f2 + 1)): the bias-corrected form of Chao 1984."""
    f1, f2 = _seen(counts, 1), _seen(counts, 2)
    return float((counts > 0).sum() + f1 * (f1 - 1) / (2 * (f2 + 1))) if len(counts) else math.nan


def entropy(counts: np.ndarray) -> float:
    """Estimated entropy in nats, Chao, Wang and Jost 2013 (doi 10.1111/2041-210X.12108), equation 10."""
    from scipy.special import digamma

    n = int(counts.sum())
    if not n:
        return math.nan
    c = counts[(counts > 0) & (counts < n)]
    seen = float((c / n * (digamma(n) - digamma(c))).sum())
    f1 = _seen(counts, 1)
    if not f1:
        return seen
    return seen + f1 / n * _log_series_tail(n, _unseen_odds(n, f1, _seen(counts, 2)))


def _unseen_odds(n: int, f1: int, f2: int) -> float:
    """A of Chao, Wang and Jost 2013: estimated mean probability of the answers seen once."""
    return 2 * f2 / ((n - 1) * f1 + 2 * f2) if f2 else 2 / ((n - 1) * (f1 - 1) + 2)


def _log_series_tail(n: int, a: float) -> float:
    """(1 - a)^(1 - n) (-log a - sum over r < n of (1 - a)^r / r), for 0 < a <= 1.

    It equals the sum over r >= n of (1 - a)^(r - n + 1) / r, which is short where a n is large; there the difference would
    cancel.
    """
    if a == 1:
        return 0.0
    log = math.log1p(-a)
    if a * n > 10:
        r = np.arange(n, n + int(40 / a) + 1)
        return float((np.exp((r - n + 1) * log) / r).sum())
    r = np.arange(1, n)
    return float(np.exp((1 - n) * log) * (-math.log(a) - (np.exp(r * log) / r).sum()))


def collision(counts: np.ndarray) -> float:
    """Unbiased estimate of sum p^2: the share of pairs of outputs that agree. NaN for fewer than two outputs."""
    n = int(counts.sum())
    return float((counts * (counts - 1.0)).sum() / (n * (n - 1.0))) if n > 1 else math.nan


def sample_coverage(counts: np.ndarray) -> float:
    """Estimated probability of the answers seen, Chao and Jost 2012 (doi 10.1890/11-1952.1). NaN for fewer than two outputs.

    1 - f1/n (n-1) f1 / ((n-1) f1 + 2 f2); with f1 - 1 and 2 in place of f1 and 2 f2 in the fraction where f2 is 0.
    """
    n, f1, f2 = int(counts.sum()), _seen(counts, 1), _seen(counts, 2)
    if n < 2:
        return math.nan
    return 1 - f1 / n * (1 - _unseen_odds(n, f1, f2)) if f1 else 1.0


def rarefied(counts: np.ndarray, m: int) -> float:
    """Expected number of different answers among m of the n outputs, drawn without replacement. NaN for m > n.

    Sum over answers of 1 - C(n - c, m) / C(n, m): unbiased for m fresh outputs; with m = k the distinct_k of arXiv 2504.05228.
    """
    return float((1 - _missed(counts, m)).sum()) if m <= counts.sum() and len(counts) else math.nan


def _missed(counts: np.ndarray, m: int) -> np.ndarray:
    """(S,) chance that none of m of the outputs gives each answer."""
    from scipy.special import gammaln

    n, c = int(counts.sum()), np.asarray(counts, dtype=float)
    possible = n - c >= m
    left = np.where(possible, n - c, m)
    log = gammaln(left + 1) - gammaln(left - m + 1) - gammaln(n + 1) + gammaln(n - m + 1)
    return np.where(possible, np.exp(np.minimum(log, 0.0)), 0.0)


def rarefied_interval(counts: np.ndarray, m: int) -> tuple[float, float] | None:
    """95 % interval of `rarefied`, for fresh outputs of the same law: Colwell et al. 2012 (doi 10.1093/jpe/rtr044), equation 5.

    None where the variance is 0, or m > n.
    """
    value = rarefied(counts, m)
    if math.isnan(value):
        return None
    variance = float(((1 - _missed(counts, m)) ** 2).sum() - value**2 / chao1(counts))
    if variance < 1e-9:
        return None
    reach = Z * math.sqrt(variance)
    return max(1.0, value - reach), min(float(m), value + reach)


def chao1_interval(counts: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of `chao1`, log-normal above S: Chao 1987 (doi 10.2307/2531532). None where Chao1 is S."""
    f1, f2 = _seen(counts, 1), _seen(counts, 2)
    if f1 < 2:
        return None
    estimate, seen = chao1(counts), int((counts > 0).sum())
    if f2:
        variance = (
            f1 * (f1 - 1) / (2 * (f2 + 1))
            + f1 * (2 * f1 - 1) ** 2 / (4 * (f2 + 1) ** 2)
            + f1**2 * f2 * (f1 - 1) ** 2 / (4 * (f2 + 1) ** 4)
        )
    else:
        variance = f1 * (f1 - 1) / 2 + f1 * (2 * f1 - 1) ** 2 / 4 - f1**4 / (4 * estimate)
    more = estimate - seen
    factor = math.exp(Z * math.sqrt(math.log1p(variance / more**2)))
    return seen + more / factor, seen + more * factor


def sample_coverage_interval(counts: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of `sample_coverage`, normal: Esty 1983 (doi 10.1214/aos/1176346256). None where its width is 0."""
    n, f1, f2 = int(counts.sum()), _seen(counts, 1), _seen(counts, 2)
    if n < 2 or f1 + f2 == 0:
        return None
    variance = f1 * (1 - f1 / n) + 2 * f2
    if variance <= 0:
        return None
    value, reach = sample_coverage(counts), Z * math.sqrt(variance) / n
    return max(0.0, value - reach), min(1.0, value + reach)


def _seen(counts: np.ndarray, times: int) -> int:
    """f of the legend: how many answers were seen so many times."""
    return int((counts == times).sum())


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU-4 of each text against all others, in [0, 1], arXiv 1802.01886. NaN for fewer than two texts.

    sacrebleu's tokeniser and exponential smoothing; n-gram orders that a short text lacks are left out.
    """
    from sacrebleu import sentence_bleu

    if len(texts) < 2:
        return math.nan
    scores = [sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return float(np.mean(scores) / 100)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The word n-grams of a text; words are runs of letters, digits and underscores, case ignored."""
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def ead(texts: Sequence[str], n: int, vocabulary: int) -> float:
    """Expectation-adjusted distinct, arXiv 2202.13587: N / (V (1 - ((V - 1) / V)^C)). NaN without n-grams.

    N of the C word n-grams in the texts differ; the divisor is how many would if they were drawn uniformly.

    Args:
        vocabulary: V, the number of n-grams there are; at least 1.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    if not found:
        return math.nan
    unused = math.exp(len(found) * math.log1p(-1 / vocabulary)) if vocabulary > 1 else 0.0
    return len(set(found)) / (vocabulary * (1 - unused))


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the texts, one a line, divided by their bytes after zlib's best compression. NaN without any text."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else math.nan


def pairwise_distance(vectors: np.ndarray) -> float:
    """Mean of 1 - cosine over pairs of different rows of (n, d) unit vectors, in [0, 2]. NaN for fewer than two.

    The sum of all cosines is the squared length of the summed vectors, so no pair is visited.
    """
    return distances(vectors, np.ones((1, len(vectors))))[0] if len(vectors) > 1 else math.nan


def distances(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) `pairwise_distance` with row i counted weights[r, i] times, but never paired with itself. Weights are (R, n)."""
    summed = weights @ vectors
    squares = (weights**2).sum(-1)
    return 1 - ((summed**2).sum(-1) - squares) / (weights.sum(-1) ** 2 - squares)


def collisions(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) share of pairs that agree, with output i counted weights[r, i] times, but never paired with itself.

    Args:
        labels: (n,) class numbers from 0.
        weights: (R, n).
    """
    summed = np.stack([np.bincount(labels, row) for row in weights])
    squares = (weights**2).sum(-1)
    return ((summed**2).sum(-1) - squares) / (weights.sum(-1) ** 2 - squares)


def vendi(kernel: np.ndarray) -> float:
    """Vendi score of order 1 of an (n, n) similarity kernel with ones on its diagonal, in [1, n]; arXiv 2210.02410.

    exp of the entropy of the eigenvalues of kernel / n. NaN for n = 0.

    Raises:
        DecalError: not symmetric, or a diagonal other than ones.
    """
    from scipy.linalg import eigvalsh
    from scipy.special import xlogy

    if not len(kernel):
        return math.nan
    square = kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1]
    if not square or not np.allclose(kernel, kernel.T, atol=1e-5) or not np.allclose(np.diag(kernel), 1, atol=1e-4):
        raise DecalError(f"vendi: the kernel must be symmetric with ones on its diagonal, got shape {kernel.shape}")
    p = np.maximum(eigvalsh(np.asarray(kernel, dtype=float)), 0.0)
    return float(np.exp(-xlogy(p / p.sum(), p / p.sum()).sum()))


def from_counts(counts: np.ndarray, k: int, m: int) -> dict[str, float]:
    """The metrics that are functions of the counts of answers."""
    return {
        "distinct": float((counts > 0).sum()) if len(counts) else math.nan,
        "distinct_at_m": rarefied(counts, m),
        "distinct_k": rarefied(counts, k),
        "chao1": chao1(counts),
        "hill_1": hill(counts, 1),
        "hill_1_corrected": hill_corrected(counts, 1),
        "hill_2": hill(counts, 2),
        "hill_2_corrected": hill_corrected(counts, 2),
        "collision": collision(counts),
        "sample_coverage": sample_coverage(counts),
    }


def from_known(counts: np.ndarray, size: int) -> dict[str, float]:
    """The metrics that are functions of the counts of the valid answers and of how many there are."""
    return {
        "coverage": len(counts) / size,
        "diversity": hill(counts, 1) / size,
        "diversity_corrected": min(1.0, hill_corrected(counts, 1) / size) if len(counts) else math.nan,
    }


def from_texts(texts: Sequence[str], vocabularies: dict[int, int]) -> dict[str, float]:
    """The metrics that are functions of the words alone. ``vocabularies`` gives the number of n-grams there are for each n."""
    return {f"ead_{n}": ead(texts, n, many) for n, many in vocabularies.items()} | {"compression": compression_ratio(texts)}


def from_vectors(vectors: np.ndarray) -> dict[str, float]:
    """The metrics that are functions of embeddings, (n, d) of length 1."""
    return {"distance": pairwise_distance(vectors), "vendi": vendi(vectors @ vectors.T)}


def closed_intervals(counts: np.ndarray, k: int, m: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of the literature for one prompt, of the metrics that have one here and where it is defined."""
    makers: dict[str, Callable[[np.ndarray], tuple[float, float] | None]] = {
        "distinct": partial(rarefied_interval, m=int(counts.sum())),
        "distinct_at_m": partial(rarefied_interval, m=m),
        "distinct_k": partial(rarefied_interval, m=k),
        "chao1": chao1_interval,
        "sample_coverage": sample_coverage_interval,
    }
    found = {name: make(counts) for name, make in makers.items()}
    return {name: interval for name, interval in found.items() if interval is not None}
