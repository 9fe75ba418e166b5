"""Every rule as its paper (or, without one, its first code) states it, in numpy and float64: nothing of the product's is in it.

A formula takes one row of logits (-inf: dropped), the rule's parameters by name, and whatever else the rule looks at. Obvious
beats fast: where a paper defines something as a minimum, it is searched for; where as a solution, it is bracketed.

The papers rank tokens and don't say what to do about ties. The rule here is one for all: tokens that tie with the last one kept
are kept too. Where that isn't the whole story, the formula says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq, linprog

CLOSE = 1e-9
NEGLIGIBLE = -700.0  # exp of that is as good as 0
Row = np.ndarray


class Answer(NamedTuple):
    """What a rule makes of a row.

    Attributes:
        log_q: log of the law, -inf where dropped.
        close: tokens so near the threshold that rounding decides about them.
        gone: tokens of a probability below every float64, which may as well be dropped.
        absolute: an error of a probability that is as good as none, where the formula can't do better.
        relative: an error of a log-probability that is, relatively.
    """

    log_q: Row
    close: np.ndarray
    absolute: float = 0.0
    relative: float = CLOSE
    gone: np.ndarray | None = None


# ---- tools


def probabilities(z: Row) -> Row:
    e = np.exp(z - z.max())
    return e / e.sum()


def log_probabilities(z: Row) -> Row:
    d = z - z.max()
    return d - math.log(math.fsum(np.exp(d)))


def entropy(p: Row) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def exact_entropy(z: Row) -> float:
    """Also where it is far below 1e-16."""
    d = np.sort(z[np.isfinite(z)] - z.max())[::-1]
    e = np.exp(d)
    return float(np.log1p(e[1:].sum()) - (d * e).sum() / e.sum())


def alive(z: Row) -> Row:
    """The kept logits in decreasing order."""
    return np.sort(z[np.isfinite(z)])[::-1]


def nothing(z: Row) -> np.ndarray:
    return np.zeros(len(z), bool)


def cut(z: Row, kept: np.ndarray, close: np.ndarray) -> Answer:
    """The law of a truncation: the kept tokens, renormalised."""
    return Answer(log_probabilities(np.where(kept, z, -np.inf)), close & np.isfinite(z))


def by_mass(z: Row, answer: Answer) -> Answer:
    """For rules that see probabilities alone: whether a token of none is kept is nothing they can tell."""
    return answer._replace(gone=log_probabilities(z) < NEGLIGIBLE)


def reshaped(z: Row, scores: Row, **more: float) -> Answer:
    return Answer(log_probabilities(np.where(np.isfinite(z), scores, -np.inf)), nothing(z), **more)


def at_least(z: Row, p: Row, threshold: float) -> Answer:
    """p_i >= threshold, or the mode if there is none; only a token that is alive is kept."""
    kept = (p >= threshold) & (p > 0)
    if not kept.any():
        kept = p == p.max()
    close = (np.abs(p - threshold) < CLOSE * threshold) & (p < p.max()) if threshold > 0 else nothing(z)
    return cut(z, kept, close)


def prefix(z: Row, size: float, *others: float) -> Answer:
    """The first tokens of the ranking and all that tie with the last; the sizes ``others`` are right as well."""
    ranked = alive(z)
    levels = [ranked[int(min(max(k, 1), len(ranked))) - 1] for k in (size, *others)]
    return cut(z, z >= levels[0], (z >= min(levels)) & (z < max(levels)))


def first(bad: np.ndarray) -> int:
    return int(np.argmax(bad)) if bad.any() else len(bad)


def longest_prefix(z: Row, score: Row, bound: float, doubt: float) -> Answer:
    """The longest prefix of the ranking with score <= bound for it and for every shorter one."""
    return by_mass(z, prefix(z, *[first(score > level) for level in (bound, bound - doubt, bound + doubt)]))


def prefix_entropies(ranked: Row) -> tuple[Row, Row]:
    """Entropy of the law of the first k, renormalised, and its mass, for every k."""
    d = (ranked - ranked[0]).astype(np.longdouble)
    e = np.exp(d)
    rest = e[1:].cumsum()
    total = np.concatenate([[np.longdouble(1)], 1 + rest])
    log_total = np.concatenate([[np.longdouble(0)], np.log1p(rest)])
    return log_total - (d * e).cumsum() / total, total / total[-1]


# ---- truncation


def top_k(z: Row, k: float) -> Answer:
    return prefix(z, k)


def top_p(z: Row, p: float) -> Answer:
    """The mass of the tokens more probable than i is below p: of tied tokens all or none."""
    q = probabilities(z)
    levels, inverse, counts = np.unique(q, return_inverse=True, return_counts=True)
    total = (levels * counts)[::-1].cumsum()[::-1]  # mass of the tokens at least as probable
    above = np.append(total[1:], 0.0)[inverse]  # mass of the tokens more probable
    return cut(z, ((above < p) & np.isfinite(z)) | (q == q.max()), np.abs(above - p) < CLOSE * p)


def min_p(z: Row, p: float) -> Answer:
    q = probabilities(z)
    return at_least(z, q, p * q.max())


def top_n_sigma(z: Row, n: float) -> Answer:
    threshold = z.max() - n * np.std(z[np.isfinite(z)])
    return cut(z, z >= threshold, (np.abs(z - threshold) < CLOSE * (1 + z.max() - threshold)) & (z < z.max()))


def epsilon(z: Row, eps: float) -> Answer:
    return at_least(z, probabilities(z), eps)


def eta(z: Row, eps: float) -> Answer:
    p = probabilities(z)
    return at_least(z, p, min(eps, np.sqrt(eps) * np.exp(-entropy(p))))


def top_a(z: Row, a: float) -> Answer:
    p = probabilities(z)
    return at_least(z, p, a * p.max() ** 2)


def typical(z: Row, p: float) -> Answer:
    """Tokens as far from the entropy as the last one needed are kept, on either side of it."""
    q, log_p = probabilities(z), log_probabilities(z)
    index = np.flatnonzero(np.isfinite(z))
    distance = np.full(len(z), np.inf)
    distance[index] = np.abs(-log_p[index] - entropy(q))
    order = index[np.argsort(distance[index], kind="stable")]
    reached = q[order].cumsum()
    last = min(int((reached < p).sum()), len(order) - 1)
    tied = 1e-12 * max(1.0, distance[order[last]])
    close = nothing(z)
    near = np.flatnonzero(np.abs(reached - p) < CLOSE * p)
    close[order[[i for n in near for i in (n, n + 1) if i < len(order)]]] = True
    return cut(z, distance <= distance[order[last]] + tied, close)


def p_less(z: Row, k: float) -> Answer:
    p = probabilities(z)
    return at_least(z, p, k * (p**2).sum())


def p_less_norm(z: Row, k: float) -> Answer:
    """Collision probability less the average probability that two draws give a certain pair of different tokens, times n."""
    p = probabilities(z)
    n = int(np.isfinite(z).sum())
    different = 1 - (p**2).sum()
    return at_least(z, p, k * max((p**2).sum() - different / max(n - 1, 1), 0.0))


def tail_free(row: Row, z: float) -> Answer:
    """The last token goes whenever the curve bends at all and z < 1; without a bend all stay."""
    ranked = alive(row)
    p = probabilities(ranked)
    second = np.abs(np.diff(np.diff(p)))
    if second.sum() == 0:
        return prefix(row, len(ranked))
    share = second.cumsum() / second.sum()
    noise = 1e-15 * 4 * p.sum() / second.sum()
    return by_mass(row, prefix(row, *[1 + first(share > level) for level in (z, z - CLOSE - noise, z + CLOSE + noise)]))


def top_h(z: Row, alpha: float, variant: str) -> Answer:
    ranked = alive(z)
    if variant == "paper":
        found, _ = prefix_entropies(ranked)
        budget = alpha * found[-1]
        return longest_prefix(z, found, budget, CLOSE * budget + min(1e-15, 0.01 * budget))
    q = probabilities(ranked[:100])
    terms = np.array([-v * np.log(v) if v > 0 else 0.0 for v in q])
    budget = alpha * terms.sum()
    return longest_prefix(z, terms.cumsum(), budget, CLOSE * budget + min(1e-15, 0.01 * budget))


def min_k(z: Row, tau: float) -> Answer:
    ranked = alive(z)
    n = len(ranked)
    weight = (ranked[:-1] - ranked[1:]) / np.arange(1, n)
    cliff = int(np.argmax(weight)) + 1 if n > 1 else 1
    span = ranked[0] - ranked[-1]
    fallback = tau / span if span > 0 else (np.inf if tau > 0 else 0.0)
    rivals = [i + 1 for i in range(n - 1) if weight[i] > weight[cliff - 1] * (1 - 1e-12)]
    floors = [math.floor(min(fallback * nudge, n)) for nudge in (1 - CLOSE, 1 + CLOSE)]
    exact = bool((ranked == np.round(ranked)).all())  # then equal falls are equal, and the first counts
    others = [] if exact else [max(i, f, 1) for i in rivals for f in floors]
    return prefix(z, max(cliff, math.floor(min(fallback, n)), 1), *others)


def ees(z: Row, c: float) -> Answer:
    found, mass = prefix_entropies(alive(z))
    size = np.arange(1, len(found) + 1)
    shortfall = np.full(len(found), -np.inf)  # one token is never uneven
    with np.errstate(all="ignore"):
        shortfall[1:] = (c * mass - found / np.log(size))[1:]
    return longest_prefix(z, shortfall, 0.0, CLOSE * c)


def zipf_sizes(z: Row, mu: float) -> tuple[float, ...]:
    """k of Mirostat 1, and the ones that rounding might give instead."""
    ranked = alive(z)
    m = min(100, len(ranked) - 1)
    t = np.array([math.log((i + 1) / i) for i in range(1, m + 1)])
    b = ranked[:m] - ranked[1 : m + 1]
    if m == 0 or not b.any():
        return (np.inf,)
    s = (t @ b) / (t @ t)
    e, n = s - 1, float(len(ranked))
    with np.errstate(all="ignore"):
        lost = 1 / np.log(n) if abs(e) < 1e-12 else e / (1 - np.longdouble(n) ** -e)  # the limit at e = 0
        size = float((lost * np.longdouble(2) ** mu) ** (1 / np.longdouble(s)))
    if not size < 1e12:
        return (np.inf,)
    # Close to e = 0 the quotient loses digits.
    doubt = CLOSE + 1e-17 / max(abs(e), 1e-12)
    return tuple(round(size * (1 + nudge)) + 1 for nudge in (0, -doubt, doubt))


def mirostat_k(z: Row, mu: float) -> Answer:
    return prefix(z, *zipf_sizes(z, mu))


# ---- reshaping


def with_temperature(z: Row, t: float, relative: float = CLOSE) -> Answer:
    """At t = 0 the modes, alike. What is as good as gone may be gone."""
    d = z - z.max()
    if t <= 1e-300:
        log_q = log_probabilities(np.where(d == 0, 0.0, -np.inf))
    else:
        with np.errstate(over="ignore"):
            log_q = log_probabilities(d / t)
    return Answer(log_q, nothing(z), relative=relative, gone=log_q < NEGLIGIBLE)


def with_temperature_of_entropy(z: Row, t: Callable[[float], float]) -> Answer:
    """Entropy is a difference of numbers about 1, so far below that it is known to few digits."""
    h = exact_entropy(z)
    found, other = t(h), t(h + 3e-16)
    return with_temperature(z, found, CLOSE + abs(other - found) / max(found, 1e-300))


def temperature(z: Row, t: float) -> Answer:
    return with_temperature(z, t)


def split_temperature(z: Row, t: float, end: float, ends: Sequence[int]) -> Answer:
    """A coin decides whether it ends; then a law of its own decides how, or how it goes on."""
    stops = np.isin(np.arange(len(z)), ends)
    stop, go = np.where(stops, z, -np.inf), np.where(stops, -np.inf, z)
    odds = (exact_log_sum(stop) - exact_log_sum(go)) / end
    log_q = np.full(len(z), -np.inf)
    for some, sign in ((stop, 1), (go / t, -1)):
        if np.isfinite(some).any():
            alive = np.isfinite(some)
            log_q[alive] = log_probabilities(some)[alive] - np.logaddexp(0, -sign * odds)
    size = max(1.0, np.abs(odds)) if np.isfinite(odds) else 1.0
    return Answer(log_q, nothing(z), relative=CLOSE * size, gone=log_q < NEGLIGIBLE)


def exact_log_sum(z: Row) -> float:
    return float(np.logaddexp.reduce(z - z.max()) + z.max()) if np.isfinite(z).any() else -math.inf


def flatten(z: Row, strength: float) -> Answer:
    n = int(np.isfinite(z).sum())
    return reshaped(z, (1 - strength) * np.where(np.isfinite(z), log_probabilities(z), 0.0) - strength * np.log(n))


def dynamic_temperature(z: Row, t: float, spread: float, exponent: float) -> Answer:
    n = int(np.isfinite(z).sum())
    low, high = max(t - spread, 0.0), t + spread
    return with_temperature_of_entropy(
        z, lambda h: low + (high - low) * min(max(h / math.log(n), 0.0), 1.0) ** exponent if n > 1 else low
    )


def edt(z: Row, t: float, theta: float, n: float) -> Answer:
    return with_temperature_of_entropy(z, lambda h: t * n ** (theta / h) if theta < 1e6 * h else 0.0)


def quadratic(z: Row, factor: float, curve: float) -> Answer:
    k, s = (3 - curve) / 2, (curve - 1) / 2
    d = np.where(np.isfinite(z), z - z.max(), 0.0)
    return reshaped(z, -k * factor * d**2 + s * factor * d**3)


def target_entropy(z: Row, h: float, unit: str) -> Answer:
    """At the ends of what temperatures give: the uniform law, or the modes."""
    live = z[np.isfinite(z)]
    n, d = len(live), np.where(np.isfinite(z), z - z.max(), -np.inf)
    wanted = h * math.log(n) if unit == "fraction" else h
    modes = int((live == live.max()).sum())
    if wanted >= math.log(n) * (1 - 1e-12) or modes == n:
        return reshaped(z, np.zeros(len(z)))
    if wanted <= math.log(modes) * (1 + 1e-12):
        return reshaped(z, np.where(d == 0, 0.0, -1e4), absolute=1e-9)

    def excess(log_scale: float) -> float:
        return exact_entropy(d * math.exp(log_scale)) - wanted

    unit_scale = -math.log(-d[np.isfinite(d)].min())
    if excess(unit_scale + 27) > 0:  # the next token behind the modes is nearer than any temperature of use can tell
        return reshaped(z, np.where(d == 0, 0.0, -1e4), absolute=1.0)
    solution = brentq(excess, unit_scale - 27, unit_scale + 27, xtol=1e-14, rtol=1e-15, maxiter=500)
    # Where entropy hardly sees temperature, neither do we.
    slope = (excess(solution - 1e-4) - excess(solution + 1e-4)) / 2e-4
    return reshaped(z, d * math.exp(solution), absolute=1e-10, relative=CLOSE + 1e-14 / max(slope, 1e-12))


def cap(z: Row, p: float) -> Answer:
    """min(c p_i, p) with the c at which they sum to 1, found by bisection on log c."""
    log_p = log_probabilities(z)
    n = int(np.isfinite(z).sum())
    if p * n <= 1:
        return reshaped(z, np.zeros(len(z)))

    def filled(log_c: float) -> Row:
        return np.minimum(log_p + log_c, math.log(p))

    low, high = 0.0, math.log(p) - log_p[np.isfinite(z)].min() + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(filled(middle)).sum() < 1 else (low, middle)
    return reshaped(z, filled(high))


def bell(z: Row, center: float) -> Row:
    u = np.abs(probabilities(z) - center) / 0.3
    return 5 - 10 * u**2 / (1 + u)


def power_law(z: Row, target: float) -> Answer:
    return reshaped(z, bell(z, target))


def skew(z: Row, s: float) -> Answer:
    """Tokens that tie share the increment of F^g over all of them."""
    p = probabilities(z)
    q, before = np.zeros(len(z)), np.longdouble(0)
    levels, inverse, counts = np.unique(-z, return_inverse=True, return_counts=True)
    shares = np.zeros(len(levels))
    mass = np.zeros(len(levels))
    np.add.at(mass, inverse, p)
    ends = np.minimum(mass.astype(np.longdouble).cumsum(), 1)
    ends[mass.cumsum() >= mass.sum()] = 1
    for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
        shares[i] = (end ** np.exp(s) - before ** np.exp(s)) / count
        before = end
    q = shares[inverse]
    with np.errstate(divide="ignore"):
        log_q = np.where(np.isfinite(z), np.log(np.maximum(q, 1e-300)), -np.inf)
    return Answer(log_q, nothing(z), absolute=1e-12)


# ---- the simplex


def projected(z: Row, q: Row, doubtful: np.ndarray) -> Answer:
    """A law that drops what it gives nothing; close to nothing rounding decides."""
    with np.errstate(divide="ignore"):
        return Answer(np.where(np.isfinite(z) & (q > 0), np.log(q), -np.inf), doubtful, absolute=1e-10)


def sparsemax(z: Row, gamma: float) -> Answer:
    """Algorithm 1 of the paper, by sorting."""
    x = (z - z.max()) / gamma
    ranked = alive(x)
    support = int((1 + np.arange(1, len(ranked) + 1) * ranked > ranked.cumsum()).sum())
    tau = (ranked[:support].sum() - 1) / support
    return projected(z, np.maximum(x - tau, 0.0), np.abs(x - tau) < CLOSE)


def entmax(z: Row, alpha: float) -> Answer:
    """tau by Brent's method, between the largest logit's taking all and its taking 1 / n."""
    if alpha == 1:
        return reshaped(z, z)
    x = (alpha - 1) * (z - z.max())

    def law(tau: float) -> Row:
        return np.maximum(x - tau, 0.0) ** (1 / (alpha - 1))

    n = int(np.isfinite(z).sum())
    tau = brentq(lambda t: law(t).sum() - 1, -1.0, -((1 / n) ** (alpha - 1)) + 1e-15, xtol=1e-16, rtol=1e-15) if n > 1 else -1.0
    q = law(tau)
    return projected(z, q / q.sum(), np.abs(x - tau) < CLOSE)


def bregman_law(p: Row, alpha: float) -> Row:
    """The law nearest to ``p``, of which some tokens are missing: q^(alpha - 1) = p^(alpha - 1) + nu, nu by bisection."""
    if alpha == 1:
        return p / p.sum()
    power = alpha - 1
    low, high = 0.0, 1.0
    for _ in range(80):
        nu = (low + high) / 2
        low, high = (nu, high) if ((p**power + nu) ** (1 / power)).sum() < 1 else (low, nu)
    return (p**power + (low + high) / 2) ** (1 / power)


def bregman_divergence(q: Row, p: Row, alpha: float) -> float:
    """Sum over tokens of phi(q) - phi(p) - phi'(p)(q - p); the sum of q and p is the same, so for alpha = 1 it is KL."""
    if alpha == 1:
        return float((q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum())
    scale = alpha * (alpha - 1)
    return float(((q**alpha - p**alpha - alpha * p ** (alpha - 1) * (q - p)) / scale).sum())


def l0_bregman(z: Row, lam: float, alpha: str) -> Answer:
    """Every size is tried. Tokens that tie with the last are kept, and the law is the nearest one on all of these."""
    a, p = float(alpha), probabilities(z)
    ranked = np.sort(p[np.isfinite(z)])[::-1]
    losses = []
    for k in range(1, len(ranked) + 1):
        q = np.zeros(len(ranked))
        q[:k] = bregman_law(ranked[:k], a)
        losses.append(bregman_divergence(q, ranked, a) + lam * k)
        if k > 300 and losses[-1] > min(losses) + 50 * lam:
            break
    best = int(np.argmin(losses))
    rivals = np.flatnonzero(np.array(losses) < losses[best] + 1e-13)
    kept, close = (lambda answer: (np.isfinite(answer.log_q), answer.close))(prefix(z, best + 1, *(rivals + 1)))
    q = np.zeros(len(z))
    q[kept] = bregman_law(p[kept], a)
    return projected(z, q, close)._replace(absolute=1e-11)


def best_of_k(
    z: Row,
    samples: float,
    t: float,
    lam: float,
    kl: float,
    js: float,
    entropy: float,
    coverage: float,
    diversity: float,
    top: int,
    gap: float,
    rate: float,
    steps: int,
) -> Answer:
    """Tokens that tie with the last of the ``top`` are covered too, each at the weight of a set without ties.

    With nothing but KL and entropy it is the maximum itself: log q = (s / lam + kl log p) / (kl + entropy), up to a constant.
    """
    live = np.isfinite(z)
    x, p = z[live], probabilities(z[live])
    s = x / t
    scores = np.full(len(z), -np.inf)
    if js == coverage == diversity == 0:
        scores[live] = (s / lam + kl * log_probabilities(x)) / (kl + entropy)
        return reshaped(z, scores)
    w = np.zeros(len(x))
    r = min(int(top), len(x))
    w[x >= alive(x)[r - 1]] = 1 / math.sqrt(r)
    d = x.max() - x
    v = d * np.exp(-d / gap)
    v = v / v.sum() if v.sum() > 0 else v
    log_p = log_probabilities(x)
    log_q = log_p.copy()
    for _ in range(int(steps)):
        q = np.exp(log_q)
        g = s - lam * kl * (log_q - log_p + 1)
        g -= lam * js * 0.5 * (log_q - np.log((np.maximum(q, 1e-320) + np.maximum(p, 1e-320)) / 2)) if js else 0.0
        g -= lam * entropy * (log_q + 1)
        g += lam * coverage * w * samples * (1 - q) ** (samples - 1)
        g += lam * diversity * v * samples * (1 - q) ** (samples - 1)
        log_q = log_probabilities(log_q + rate * g)
    scores[live] = log_q
    return reshaped(z, scores, absolute=1e-12 if js else 0.0)


# ---- the tokens so far


def window_of(text: Sequence[int], prompt: int, window: int, scope: str) -> list[int]:
    inside = list(text) if scope == "all" else list(text[prompt:])
    return inside[-window:] if window else inside


def repetition_penalty(z: Row, r: float, window: int, scope: str, form: str, text: Sequence[int], prompt: int) -> Answer:
    out = z.copy() if form == "legacy" else log_probabilities(z)
    for token in set(window_of(text, prompt, window, scope)):
        if token < len(z) and np.isfinite(out[token]):
            out[token] = out[token] / r if form == "legacy" and z[token] > 0 else out[token] * r
    return reshaped(z, out)


def presence_penalty(z: Row, a: float, window: int, scope: str, text: Sequence[int], prompt: int) -> Answer:
    out = z.copy()
    for token in set(window_of(text, prompt, window, scope)):
        if token < len(z):
            out[token] -= a
    return reshaped(z, out)


def frequency_penalty(z: Row, a: float, window: int, scope: str, text: Sequence[int], prompt: int) -> Answer:
    out = z.copy()
    for token, count in Counter(window_of(text, prompt, window, scope)).items():
        if token < len(z):
            out[token] -= a * count
    return reshaped(z, out)


def adapt(z: Row, first: float, rest: float, text: Sequence[int], prompt: int) -> Answer:
    return with_temperature(z, rest if len(text) > prompt else first)


def no_repeat_ngram(z: Row, n: int, text: Sequence[int], prompt: int) -> Answer:
    """A row where every token would be dropped is left alone."""
    seen = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    end = tuple(text[len(text) - n + 1 :])
    kept = np.array([np.isfinite(z[v]) and (len(end) < n - 1 or (*end, v) not in seen) for v in range(len(z))])
    return cut(z, kept if kept.any() else np.isfinite(z), nothing(z))


def dry(
    z: Row,
    multiplier: float,
    base: float,
    allowed_length: float,
    window: int,
    breakers: Sequence[int],
    text: Sequence[int],
    prompt: int,
) -> Answer:
    seen = list(text)[-window:] if window else list(text)
    length: dict[int, int] = {}
    for place in range(1, len(seen)):
        for m in range(place + 1):
            end = seen[len(seen) - m :]
            if seen[place - m : place] == end and not set(end) & set(breakers):
                length[seen[place]] = max(length.get(seen[place], 0), m)
    out = z.copy()
    for token, m in length.items():
        if m >= allowed_length and token not in breakers and token < len(z):
            most = math.floor(88.7228391 / math.log(base)) if base > 1.000001 else math.inf
            out[token] -= multiplier * base ** min(m - allowed_length, most)
    return reshaped(z, out)


def xtc(z: Row, threshold: float, happens: bool, spared: Sequence[int]) -> Answer:
    """All that are as probable as the least probable of the candidates stay."""
    p = probabilities(z)
    candidates = np.flatnonzero((p >= threshold) & np.isfinite(z))
    if not happens or len(candidates) < 2:
        return cut(z, np.isfinite(z), nothing(z))
    kept = np.isfinite(z)
    least = z[candidates].min()
    for token in candidates:
        if z[token] > least and token not in spared:
            kept[token] = False
    doubt = np.abs(p - threshold) < CLOSE * threshold
    # Whether one token is a candidate decides about the next one above it.
    return cut(z, kept, doubt | (z == least) if doubt.any() else doubt)


def mirostat(z: Row, mu: float, version: str) -> Answer:
    return at_least(z, probabilities(z), 2.0**-mu) if version == "2" else mirostat_k(z, mu)


def mirostat_update(z: Row, mu: float, token: int, tau: float, eta: float) -> float:
    """The surprise is in the law before the cut."""
    return mu - eta * (-math.log2(probabilities(z)[token]) - tau)


def adaptive_p(z: Row, target: float, drawn: Sequence[float], decay: float) -> Answer:
    """``drawn`` are the probabilities of the tokens so far; behind them an endless past at the target."""
    weights = [decay**age for age in range(len(drawn))][::-1]
    past = decay ** len(drawn) / (1 - decay)
    average = (sum(w * p for w, p in zip(weights, drawn, strict=True)) + past * target) / (sum(weights) + past)
    return reshaped(z, bell(z, min(max(2 * target - average, 0.0), 1.0)))


# ---- calibrated


def estimated_validity(z: Row, offset: float, gap: float, entropy: float, peak: float, spread: float) -> np.ndarray:
    """Log odds of every token."""
    alive = z[np.isfinite(z)]
    shape = entropy * exact_entropy(z) + peak * math.log(probabilities(z).max()) + spread * float(alive.std())
    return offset + gap * (z - z.max()) + shape


def of_odds(z: Row, odds: np.ndarray, needed: float) -> Answer:
    kept = np.isfinite(z) & (odds >= needed) | (z == z.max())
    close = np.isclose(odds, needed, rtol=CLOSE, atol=CLOSE) & (z < z.max()) if math.isfinite(needed) else nothing(z)
    return cut(z, kept, close)


def min_validity(z: Row, level: float, **weights: float) -> Answer:
    with np.errstate(divide="ignore"):
        return of_odds(z, estimated_validity(z, **weights), float(np.log(level) - np.log1p(-level)))


def risk_budget(z: Row, risk: float, share: float, drawn: Sequence[float], **weights: float) -> Answer:
    """``drawn`` are the log odds of the tokens so far."""
    left = math.inf if risk == 1 else -math.log1p(-risk)
    for odds in drawn:
        left = max(left - math.log1p(math.exp(-odds)), 0.0)
    with np.errstate(divide="ignore"):
        return of_odds(z, estimated_validity(z, **weights), float(-np.log(np.expm1(share * left))))


def conformal_nucleus(z: Row, p: Sequence[float], edges: Sequence[float]) -> Answer:
    h = exact_entropy(z)
    answer = top_p(z, p[sum(h >= edge for edge in edges)])
    doubtful = any(abs(h - edge) < 1e-9 for edge in edges)
    return answer._replace(close=np.ones_like(answer.close)) if doubtful else answer


def calibrated_top_k(z: Row, k: Sequence[float], edges: Sequence[float]) -> Answer:
    confidence = probabilities(z).max()
    answer = top_k(z, math.floor(k[sum(confidence >= edge for edge in edges)]))
    doubtful = any(abs(confidence - edge) < 1e-12 for edge in edges)
    return answer._replace(close=np.ones_like(answer.close)) if doubtful else answer


# ---- embeddings


def top_w(
    z: Row, beta: float, lam: float, geometry: float, pool: int, rounds: int, embedding: np.ndarray, doubt: float = 1e-6
) -> Answer:
    """The published alternation, step by step; ``close`` is everything where two sets are as good."""
    n = int(np.isfinite(z).sum())
    p = probabilities(z)
    x = embedding.astype(np.float64)
    x = (x - x.mean(0)) / np.sqrt(np.maximum(x.var(0), 1e-6))
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    order = np.argsort(-z, kind="stable")[: min(pool, n)]
    masses = p[order].cumsum()
    chosen = set(order[: int(np.searchsorted(masses, 0.999 * masses[-1])) + 1].tolist())
    near = {int(i): row for i, row in zip(order, np.clip(x[order] @ x[order].T, -1, 1), strict=True)}
    position = {int(i): k for k, i in enumerate(order)}
    unsure = False
    for _ in range(rounds):
        inside = [position[i] for i in chosen]
        phi = {i: lam * math.log(max(p[i], 1e-12)) - geometry * (1 - near[i][inside].max()) for i in near}
        line = sorted(near, key=lambda i: (-phi[i], position[i]))
        scores, mass, weighted = [], 0.0, 0.0
        for i in line:
            mass += p[i]
            weighted += p[i] * phi[i]
            scores.append(weighted / max(mass, 1e-12) + (beta - lam) * math.log(max(mass, 1e-12)))
        best = int(np.argmax(scores))
        # Distances known to ``doubt`` leave scores in doubt by no more than that times the mass between two sets.
        masses = p[line].cumsum()
        lead = scores[best] - np.delete(scores, best)
        unsure |= bool((lead < geometry * doubt * np.abs(np.delete(masses, best) - masses[best]) + 1e-14).any())
        unsure |= best + 1 < len(line) and phi[line[best]] - phi[line[best + 1]] < geometry * doubt + 1e-12
        if set(line[: best + 1]) == chosen:
            break
        chosen = set(line[: best + 1])
    kept = np.isin(np.arange(len(z)), list(chosen))
    return cut(z, kept, np.full(len(z), unsure))


def singular_directions(head: np.ndarray, rank: int) -> np.ndarray:
    """(V, rank) the embeddings along their first right singular vectors; their scale changes no feasible set."""
    basis = head @ np.linalg.svd(head.astype(np.float64), full_matrices=False)[2][:rank].T
    return basis / np.abs(basis).max(0)


def basis_aware(z: Row, eps: float, tries: int, basis: np.ndarray) -> Answer:
    """A token is dropped if a law q without it looks like p and is nowhere more than 1 / (1 - t) times p.

    The least such multiple, less 1, is the minimum of a linear program in u = q / p - 1. What is below 1e-5 is dropped.
    """
    p = probabilities(z)
    t = min(eps, math.sqrt(eps) * math.exp(-entropy(p)))
    kept = (p >= t) | (z == z.max())
    close = (np.abs(p - t) < CLOSE * t) & (z < z.max())
    below = [i for i in np.argsort(-p, kind="stable") if not kept[i]][:tries]
    for token in below:
        if p[token] <= 1e-5:
            continue
        others = np.flatnonzero((p > 0) & (np.arange(len(z)) != token))
        n = len(others)
        table = np.vstack([basis[others].T * p[others], p[others]]) / p[token]
        table = np.column_stack([table, np.zeros(len(table))])
        missing = np.append(basis[token], 1.0)
        at_most = np.column_stack([np.eye(n), -np.ones(n)])
        bounds = [(-1.0, None)] * n + [(0.0, None)]
        found = linprog(np.eye(n + 1)[n], at_most, np.zeros(n), table, missing, bounds, method="highs") if n else None
        least = found.fun if found is not None and found.status == 0 else np.inf
        kept[token] = least > t / (1 - t)
        close[token] = abs(least - t / (1 - t)) < 1e-5 * t
    return cut(z, kept, close)


def guided(
    z: Row, strength: float, text: Sequence[int], prompt: int, answers: Sequence[tuple[int, ...]], ends: Sequence[int]
) -> Answer:
    """p_i^(1 - s) N_i^s, N_i the number of answers that go on with i; an end is shared between the tokens that end one."""
    close = np.zeros(len(z), bool)
    so_far = tuple(text[prompt:])
    behind = np.zeros(len(z))
    for answer in answers:
        if answer == so_far:
            behind[list(ends)] += 1 / len(ends)
        elif answer[: len(so_far)] == so_far:
            behind[answer[len(so_far)]] += 1
    good = (behind > 0) & np.isfinite(z)
    if strength == 0 or not good.any():
        return Answer(log_probabilities(z), close)
    log_q = np.full(len(z), -np.inf)
    log_q[good] = strength * np.log(behind[good])
    if strength < 1:
        log_q[good] += (1 - strength) * log_probabilities(z)[good]
    return Answer(log_probabilities(log_q), close)


def ensemble(z: Row, weight: float, form: str, others: Sequence[Row]) -> Answer:
    """The weighted mean of log p with the mean, or the least, behind other prompts, none of which says less than -50."""
    told = [log_probabilities(other) for other in others]
    other = np.maximum(np.min(told, 0) if form == "least" else np.mean(told, 0), -50)
    log_q = np.where(np.isfinite(z), (1 - weight) * np.where(np.isfinite(z), log_probabilities(z), 0) + weight * other, -np.inf)
    return Answer(log_probabilities(log_q), np.zeros(len(z), bool))


def contrast(z: Row, strength: float, against: str, others: Sequence[Row]) -> Answer:
    """log p less a share of what blank prompts, or a smaller model, say on average, none less than -50."""
    blank = np.maximum(np.mean([log_probabilities(other) for other in others], 0), -50)
    return Answer(log_probabilities(np.where(np.isfinite(z), z - strength * blank, -np.inf)), np.zeros(len(z), bool))


FORMULAS: dict[str, Callable[..., Any]] = {
    rule.__name__: rule
    for rule in (
        *(top_k, top_p, min_p, top_n_sigma, epsilon, eta, top_a, typical, p_less, p_less_norm, tail_free, top_h, min_k, ees),
        *(mirostat_k, temperature, split_temperature, flatten, dynamic_temperature, edt, quadratic, target_entropy, cap),
        *(power_law, skew),
        *(sparsemax, entmax, l0_bregman, best_of_k),
        *(repetition_penalty, presence_penalty, frequency_penalty, adapt, no_repeat_ngram, dry, xtc, mirostat, adaptive_p),
        *(min_validity, risk_budget, conformal_nucleus, calibrated_top_k, top_w, basis_aware, guided, ensemble, contrast),
    )
}
