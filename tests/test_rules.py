"""Each rule against its formula, written out in numpy and float64 from the paper, with nothing of the product's in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import decal

Formula = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
CLOSE = 1e-9


def probabilities(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


# A formula takes one row and the parameter and returns (kept, close): close are the tokens so near the threshold, relatively,
# that rounding decides about them.


def at_least(p: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """p_i >= threshold, or the mode if there is none; only a token that is alive is kept."""
    kept = (p >= threshold) & (p > 0)
    if not kept.any():
        kept = p == p.max()
    return kept, (np.abs(p / threshold - 1) < CLOSE) & (p < p.max())


def top_k(z: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray]:
    alive = np.sort(z[np.isfinite(z)])[::-1]
    return (z >= alive[min(int(k), len(alive)) - 1]) & np.isfinite(z), np.zeros(len(z), bool)


def top_p(z: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities(z)
    levels, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    total = (levels * counts)[::-1].cumsum()[::-1]  # mass of the tokens at least as probable
    above = np.append(total[1:], 0.0)[inverse]  # mass of the tokens more probable
    return ((above < mass) & np.isfinite(z)) | (p == p.max()), np.abs(above - mass) < CLOSE * mass


def min_p(z: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities(z)
    return at_least(p, share * p.max())


def top_n_sigma(z: np.ndarray, n: float) -> tuple[np.ndarray, np.ndarray]:
    threshold = z.max() - n * np.std(z[np.isfinite(z)])
    return z >= threshold, (np.abs(z - threshold) < CLOSE) & (z < z.max())


def epsilon(z: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    return at_least(probabilities(z), eps)


def eta(z: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities(z)
    return at_least(p, min(eps, np.sqrt(eps) * np.exp(-entropy(p))))


def top_a(z: np.ndarray, a: float) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities(z)
    return at_least(p, a * p.max() ** 2)


def p_less(z: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities(z)
    return at_least(p, k * (p**2).sum())


def typical(z: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities(z)
    alive = np.flatnonzero(np.isfinite(z))
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    distance = np.full(len(z), np.inf)
    distance[alive] = np.abs(-log_p[alive] - entropy(p))
    order = alive[np.argsort(distance[alive], kind="stable")]
    reached = p[order].cumsum()
    last = min(int((reached < mass).sum()), len(order) - 1)
    tied = 1e-12 * max(1.0, distance[order[last]])
    close = np.zeros(len(z), bool)
    near = np.flatnonzero(np.abs(reached - mass) < CLOSE * mass)
    close[order[[i for n in near for i in (n, n + 1) if i < len(order)]]] = True
    return distance <= distance[order[last]] + tied, close


CASES: dict[str, tuple[Formula, tuple[float, ...]]] = {
    "top_k": (top_k, (1, 2, 5, 50, 1000, 10**6)),
    "top_p": (top_p, (0.0, 0.1, 0.5, 0.9, 0.95, 0.999)),
    "min_p": (min_p, (1e-6, 0.01, 0.1, 0.5, 1.0)),
    "top_n_sigma": (top_n_sigma, (0.0, 0.3, 1.0, 1.7, 3.0)),
    "epsilon": (epsilon, (1e-6, 3e-4, 9e-4, 0.02, 0.3, 1.0)),
    "eta": (eta, (1e-6, 3e-4, 2e-3, 0.02, 0.3, 1.0)),
    "top_a": (top_a, (1e-4, 0.02, 0.2, 1.0)),
    "typical": (typical, (0.0, 0.1, 0.5, 0.9, 0.95, 0.999)),
    "p_less": (p_less, (0.01, 0.2, 0.7, 1.0)),
}
RESHAPINGS = {"temperature", "flatten"}
SIZES = [1, 2, 7, 64, 1000, 32000, 151936]


def rows(size: int, seed: int = 0) -> np.ndarray:
    """Rows of several scales and shapes, half of them with dropped tokens."""
    rng = np.random.default_rng([size, seed])
    count = 2 if size > 100_000 else 6 if size > 10_000 else 12
    scales = rng.permutation([0.01, 0.3, 1.0, 3.0, 10.0, 30.0] * 2)[:count, None]
    z = rng.normal(size=(count, size)) * scales + rng.normal(size=(count, 1)) * 50
    z[::3] = -(rng.exponential(size=z[::3].shape) ** 1.5) * scales[::3]  # a steep head and a long tail
    z[1::4] = np.round(z[1::4])  # many ties
    dead = rng.random(z.shape) < rng.choice([0.1, 0.9], size=(count, 1))
    dead[::2] = False
    dead[np.arange(count), rng.integers(size, size=count)] = False
    return np.where(dead, -np.inf, z)


def test_every_rule_has_a_formula_here() -> None:
    assert set(CASES) | RESHAPINGS == set(decal.RULES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_kept_set_is_the_formula_s(name: str, size: int) -> None:
    formula, chosen = CASES[name]
    chosen = chosen[1::2] if size > 10_000 else chosen
    z = rows(size)
    excluded = 0
    for value in chosen:
        kept = decal.RULES[name](value).mask(torch.from_numpy(z)).isfinite().numpy()
        for i, row in enumerate(z):
            wanted, close = formula(row, value)
            wrong = np.flatnonzero((kept[i] != wanted) & ~close)
            assert not len(wrong), f"{name}({value}), row {i}: token {wrong[:5]}, kept {kept[i][wrong[:5]]}"
            excluded += int(close.sum())
    assert excluded <= max(3, 1e-5 * z.size * len(chosen)), "too many tokens were too close to tell"


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.8), ("top_p", 0.9), ("min_p", 0.1), ("typical", 0.5), ("typical", 0.9), ("top_n_sigma", 1.1)],
)
def test_a_threshold_can_fall_anywhere(name: str, value: float) -> None:
    """Many rows of a handful of tokens, where each cut lands at another place."""
    rng = np.random.default_rng(5)
    z = rng.normal(size=(4000, 4)) * 2
    kept = decal.RULES[name](value).mask(torch.from_numpy(z)).isfinite().numpy()
    for row, got in zip(z, kept, strict=True):
        wanted, close = CASES[name][0](row, value)
        assert ((got == wanted) | close).all(), row
    assert len(set(kept.sum(1))) >= 3


# Worked by hand, so that a shared misreading of a formula can't hide.
HALVES = [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("top_k(1)", 1),
        ("top_k(3)", 4),  # two tokens tie for the third place
        ("top_p(0.49)", 1),
        ("top_p(0.51)", 2),
        ("top_p(0.76)", 4),
        ("min_p(0.51)", 1),
        ("min_p(0.49)", 2),
        ("min_p(0.24)", 4),
        ("epsilon(0.9)", 1),
        ("epsilon(0.2)", 2),
        ("epsilon(0.1)", 4),
        ("eta(0.5)", 2),  # H = 1.75 ln 2, so sqrt(.5) exp(-H) = 0.2102
        ("eta(0.16)", 4),  # sqrt(.16) exp(-H) = 0.1189
        ("eta(0.9)", 1),  # sqrt(.9) exp(-H) = 0.2820
        ("top_a(0.9)", 2),  # 0.9 * 0.25
        ("top_a(1.0)", 2),
        ("top_a(0.49)", 4),  # 0.1225
        ("p_less(1.0)", 1),  # sum of squares = 0.34375
        ("p_less(0.7)", 2),  # 0.2406
        ("p_less(0.36)", 4),  # 0.12375
        ("top_n_sigma(0.5)", 1),  # logits in units of ln 2: 0, -1, -2, -2; sd 0.829
        ("top_n_sigma(1.3)", 2),
        ("top_n_sigma(2.5)", 4),
    ],
)
def test_worked_example(text: str, kept: int) -> None:
    masked = decal.parse(text).mask(torch.tensor([HALVES], dtype=torch.float64).log() + 2.5)
    assert masked.isfinite().tolist() == [[i < kept for i in range(4)]]


def test_typical_worked_example() -> None:
    """H = 1.75 ln 2; the surprises 1, 2, 3, 3 (times ln 2) are 0.75, 0.25, 1.25, 1.25 away."""
    z = torch.tensor([HALVES], dtype=torch.float64).log()
    for mass, kept in ((0.2, [False, True, False, False]), (0.6, [True, True, False, False]), (0.8, [True] * 4)):
        assert decal.RULES["typical"](mass).mask(z).isfinite().tolist() == [kept]


# ---- reshaping


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t", [1e-3, 0.3, 0.7, 1.4, 5.0, 1e4])
def test_temperature_is_its_formula(size: int, t: float) -> None:
    z = rows(size)
    processed = decal.RULES["temperature"](t)(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(processed, z / t, rtol=1e-12)
    for row, got in zip(z, processed, strict=True):
        p = np.where(np.isfinite(row), np.exp((row - row.max()) / t), 0.0)
        np.testing.assert_allclose(probabilities(got), p / p.sum(), rtol=1e-6, atol=1e-300)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9, 1.0])
def test_flatten_is_its_formula(size: int, strength: float) -> None:
    z = rows(size)
    processed = decal.RULES["flatten"](strength)(torch.from_numpy(z)).numpy()
    for row, got in zip(z, processed, strict=True):
        alive = np.isfinite(row)
        log_z = row.max() + np.log(np.exp(row - row.max()).sum())
        wanted = (1 - strength) * (row[alive] - log_z) - strength * np.log(alive.sum())
        np.testing.assert_allclose(got[alive] - log_z, wanted, rtol=1e-9, atol=1e-9)
        assert (got[~alive] == -np.inf).all()
        if strength == 1:
            np.testing.assert_allclose(probabilities(got)[alive], 1 / alive.sum(), rtol=1e-9)


def test_flatten_counts_the_tokens_left_by_the_cut() -> None:
    z = torch.randn(5, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    chain = decal.parse("min_p(0.05) | flatten(0.6)")
    for row, got in zip(z.numpy(), chain(z).numpy(), strict=True):
        p = probabilities(row)
        kept = p >= 0.05 * p.max()
        log_p = np.log(p[kept] / p[kept].sum())
        wanted = np.exp(0.4 * log_p - 0.6 * np.log(kept.sum()))
        np.testing.assert_allclose(probabilities(got)[kept], wanted / wanted.sum(), rtol=1e-9)
        assert np.isinf(got[~kept]).all()


def test_flatten_is_a_temperature_after_the_cut() -> None:
    z = torch.randn(5, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    flat = decal.parse("top_k(9) | flatten(0.6)")(z).softmax(-1)
    torch.testing.assert_close(flat, decal.parse(f"top_k(9) | temperature({1 / 0.4!r})")(z).softmax(-1))


def test_temperature_zero_leaves_the_modes() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [-5.0, -6.0, -7.0, -8.0]])
    wanted = torch.tensor([[-torch.inf, 3.0, 3.0, -torch.inf], [-5.0, -torch.inf, -torch.inf, -torch.inf]])
    assert torch.equal(decal.RULES["temperature"](0)(z), wanted)


def test_min_p_after_a_temperature_is_a_smaller_min_p_before_it() -> None:
    """p^(1/t) >= q max p^(1/t) is p >= q^t max p."""
    z = torch.randn(20, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    after = decal.parse("temperature(1.7) | min_p(0.1)").mask(z)
    before = decal.parse(f"min_p({0.1**1.7!r})").mask(z)
    assert torch.equal(after, before)


def test_top_n_sigma_does_not_see_the_temperature() -> None:
    z = torch.randn(20, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 3
    alone = decal.parse("top_n_sigma(1.1)").mask(z)
    assert torch.equal(decal.parse("temperature(1.7) | top_n_sigma(1.1)").mask(z), alone)
