"""Kept sets against the warpers of transformers, and where decal differs from them on purpose: ties and modes.

In float64 the kept sets are the same. In float32 transformers compares rounded probabilities and sums of up to V of them,
decal float64 ones, so tokens at the very threshold may differ: transformers' kept set must lie between those of the rule with
its parameter moved by 1e-4 of itself either way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import decal

Warper = Callable[[float], LogitsProcessor]

WARPERS: dict[str, tuple[Warper, tuple[float, ...]]] = {
    "top_k": (TopKLogitsWarper, (1, 3, 50, 400)),
    "top_p": (TopPLogitsWarper, (0.05, 0.5, 0.9, 0.99)),
    "min_p": (MinPLogitsWarper, (0.001, 0.1, 0.5, 0.9)),
    "typical": (TypicalLogitsWarper, (0.05, 0.5, 0.9, 0.99)),
    "epsilon": (EpsilonLogitsWarper, (1e-5, 3e-4, 0.02, 0.6)),
    "eta": (lambda eps: DoubleEta(epsilon=eps), (1e-5, 3e-4, 0.02, 0.6)),
}
CASES = [(name, value) for name, (_, chosen) in WARPERS.items() for value in chosen]
NO_IDS = torch.zeros(1, 0, dtype=torch.long)


class DoubleEta(EtaLogitsWarper):
    """transformers holds epsilon in float32; here it is compared with probabilities in float64."""

    def __init__(self, epsilon: float):
        super().__init__(epsilon=epsilon)
        self.epsilon = torch.tensor(epsilon, dtype=torch.float64)


def fresh_rows(seed: int, *, count: int = 60, size: int = 2000) -> Tensor:
    """Rows as a model gives them, peaked to flat, half of them with tokens at -inf."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.5, 1.5, 3.0, 6.0, 12.0], dtype=torch.float64).repeat(count // 5)[:, None]
    z = torch.randn(count, size, generator=g, dtype=torch.float64) * scale + 5
    dead = torch.rand(count, size, generator=g) < 0.3
    dead[::2] = False
    return z.masked_fill(dead, -torch.inf)


def alive(z: Tensor) -> Tensor:
    return z > -torch.inf


@pytest.mark.parametrize(("name", "value"), CASES)
def test_kept_sets_are_the_same_in_float64(name: str, value: float) -> None:
    z = fresh_rows(seed=11)
    ours = decal.RULES[name](value).mask(z)
    theirs = WARPERS[name][0](value)(NO_IDS, z)
    assert torch.equal(alive(ours), alive(theirs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_kept_sets_differ_only_by_rounding_in_float32(name: str, value: float) -> None:
    z = fresh_rows(seed=12).float()
    theirs = alive(WARPERS[name][0](value)(NO_IDS, z))
    ours = alive(decal.RULES[name](value).mask(z))
    if name == "top_k":
        assert torch.equal(ours, theirs)
        return
    one, other = (alive(decal.RULES[name](value * factor).mask(z)) for factor in (1 - 1e-4, 1 + 1e-4))
    assert not (theirs & ~(one | other)).any()
    assert not (one & other & ~theirs).any()
    assert (ours != theirs).sum() <= 1e-4 * z.numel()


@pytest.mark.parametrize("t", [0.3, 0.7, 1.4, 10.0])
def test_temperature_is_the_same(t: float) -> None:
    z = fresh_rows(seed=13)
    theirs = TemperatureLogitsWarper(t)(NO_IDS, z)
    torch.testing.assert_close(decal.RULES["temperature"](t)(z), theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(decal.RULES["temperature"](t)(z.float()), theirs.float(), rtol=1e-6, atol=0)


def test_a_usual_pipeline_is_the_same() -> None:
    z = fresh_rows(seed=14)
    theirs = z
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(100), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        theirs = warper(NO_IDS, theirs)
    ours = decal.parse("temperature(0.8) | top_k(100) | top_p(0.9) | min_p(0.05)")(z)
    assert torch.equal(alive(ours), alive(theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


# ---- ties


def test_top_p_keeps_ties_that_transformers_splits_by_sort_order() -> None:
    """Three modes of 0.3 and a tail of 0.1: 0.5 needs two of them, which is no reason to drop the third."""
    z = torch.tensor([[0.3, 0.1, 0.3, 0.3]], dtype=torch.float64).log()
    ours = alive(decal.RULES["top_p"](0.5).mask(z))
    theirs = alive(TopPLogitsWarper(0.5)(NO_IDS, z))
    assert ours.tolist() == [[True, False, True, True]]
    assert theirs.sum() == 2
    assert not (theirs & ~ours).any()


def test_top_p_and_transformers_differ_only_in_ties() -> None:
    z = fresh_rows(seed=15, size=300).mul(2).round().div(2)
    for p in (0.3, 0.8, 0.95):
        ours = decal.RULES["top_p"](p).mask(z)
        theirs = alive(TopPLogitsWarper(p)(NO_IDS, z))
        cutoff = torch.where(alive(ours), ours, torch.inf).amin(-1, keepdim=True)
        assert not (theirs & ~alive(ours)).any()
        assert torch.equal(theirs & (z > cutoff), z > cutoff)
        assert (theirs & (z == cutoff)).any(-1).all()
        assert (theirs != alive(ours)).any(), "no row of this test has a tie at its cutoff"


def test_top_k_keeps_ties_as_transformers_does() -> None:
    z = torch.tensor([[1.0, 4.0, 4.0, 5.0, 4.0, 0.0]])
    for k in (1, 2, 3, 4, 5):
        ours, theirs = decal.RULES["top_k"](k).mask(z), TopKLogitsWarper(k)(NO_IDS, z)
        assert torch.equal(ours, theirs)
    assert alive(decal.RULES["top_k"](2).mask(z)).sum() == 4


def test_min_p_keeps_ties_as_transformers_does() -> None:
    z = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.1]], dtype=torch.float64).log()
    assert alive(decal.RULES["min_p"](0.49).mask(z)).tolist() == alive(MinPLogitsWarper(0.49)(NO_IDS, z)).tolist()
    assert alive(decal.RULES["min_p"](0.49).mask(z)).sum() == 4


# ---- the mode


@pytest.mark.parametrize(("name", "value"), [("epsilon", 0.9), ("eta", 0.9999)])
def test_a_threshold_above_every_probability_leaves_the_modes(name: str, value: float) -> None:
    """transformers' epsilon and eta then keep the largest token and what ties with it; so does decal."""
    z = torch.tensor([[1.0, 3.0, 2.0, 3.0]], dtype=torch.float64)
    ours = alive(decal.RULES[name](value).mask(z))
    assert ours.tolist() == [[False, True, False, True]]
    assert torch.equal(ours, alive(WARPERS[name][0](value)(NO_IDS, z)))


@pytest.mark.parametrize("name", ["top_p", "min_p"])
def test_the_strictest_value_leaves_the_mode(name: str) -> None:
    z = fresh_rows(seed=16)
    value = {"top_p": 0.0, "min_p": 1.0}[name]
    ours = alive(decal.RULES[name](value).mask(z))
    assert torch.equal(ours, z == z.amax(-1, keepdim=True))
    assert torch.equal(ours, alive(WARPERS[name][0](value)(NO_IDS, z)))


def test_typical_may_drop_the_mode_as_transformers_does() -> None:
    """A mode of 0.4 over a flat tail: the entropy is that of the tail, and the mode is too predictable."""
    z = torch.tensor([[0.4] + [0.6 / 99] * 99], dtype=torch.float64).log()
    ours = alive(decal.RULES["typical"](0.3).mask(z))
    assert not ours[0, 0]
    assert ours[0, 1:].all()
    assert torch.equal(ours, alive(TypicalLogitsWarper(0.3)(NO_IDS, z)))


def test_top_k_beyond_the_tokens_left_keeps_them_all() -> None:
    z = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    assert torch.equal(decal.RULES["top_k"](3).mask(z), z)
    assert torch.equal(TopKLogitsWarper(3)(NO_IDS, z), z)
