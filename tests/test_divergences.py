"""Known defects of other implementations: decal does what the paper, or arithmetic, says.

Each test restates the other formula in a line or two, shows that it goes wrong, and checks decal against the right answer.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from against import alive, fresh_rows
from torch import Tensor

import decal
from decal import History, parse

NONE = History.of([[]])


def row(*p: float) -> Tensor:
    """(1, n) logits of the probabilities ``p``, which sum to 1."""
    return torch.tensor([p], dtype=torch.float64).log()


def kept(chain: decal.Chain, z: Tensor, history: History | None = None) -> list[list[bool]]:
    return alive(chain.mask(z, history=history)).tolist()


def entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum(-1))


# ---- top-H


@pytest.mark.parametrize(
    ("p", "alpha", "wrong", "right"), [((0.6, 0.2, 0.1, 0.06, 0.04), 0.5, 1, 2), ((0.3, 0.3, 0.2, 0.1, 0.1), 0.7, 3, 2)]
)
def test_top_h_bounds_the_entropy_of_the_law_that_is_drawn_from(
    p: tuple[float, ...], alpha: float, wrong: int, right: int
) -> None:
    """The paper bounds that of the kept tokens renormalised; the authors and transformers add up terms of the whole law."""
    q = torch.tensor([p], dtype=torch.float64)
    bound = alpha * entropy(q)
    summed = [entropy(q[:, :k]) <= bound for k in range(1, 6)]
    renormalised = [entropy(q[:, :k] / q[:, :k].sum()) <= bound for k in range(1, 6)]
    assert summed.index(False) == wrong
    assert renormalised.index(False) == right
    assert alive(decal.top_h(alpha).mask(row(*p))).sum() == right
    # The first two of the second row are tied, the third is not.
    assert alive(decal.top_h(alpha, variant="cumulative").mask(row(*p))).sum() == wrong


# ---- top-n-sigma


def half_dead() -> tuple[Tensor, Tensor]:
    """Rows, and the same with as many tokens again at -inf."""
    z = fresh_rows(seed=61, count=20)[::2]
    return z, torch.cat([z, torch.full_like(z, -torch.inf)], -1)


def test_top_n_sigma_takes_no_notice_of_dropped_tokens() -> None:
    z, padded = half_dead()
    right = z >= z.amax(-1, keepdim=True) - z.std(-1, correction=0, keepdim=True)
    as_zero = padded >= padded.amax(-1, keepdim=True) - padded.where(alive(padded), 0.0).std(-1, keepdim=True)
    assert not torch.equal(as_zero[:, : z.shape[1]], right), "text-generation-webui: tokens at -inf count as logits of 0"
    assert padded.std(-1).isnan().all(), "Aphrodite: a standard deviation with -inf is NaN, and nothing is below NaN"
    ours = alive(decal.top_n_sigma(1.0).mask(padded))
    assert torch.equal(ours[:, : z.shape[1]], right)
    assert not ours[:, z.shape[1] :].any()


def test_top_n_sigma_uses_the_population_deviation_of_the_paper() -> None:
    """Logits 0 and -1: the population deviation is 0.5, Bessel's 0.707, so at n = 1.5 the second one is out or in."""
    z = torch.tensor([[0.0, -1.0]])
    assert float(z[0, 1]) >= 0 - 1.5 * float(z.std())
    assert kept(decal.top_n_sigma(1.5), z) == [[True, False]]


# ---- quadratic


def test_quadratic_measures_from_the_largest_logit_of_the_row() -> None:
    """text-generation-webui takes that of the batch, so a text depends on who shares its batch."""
    z = torch.tensor([[3.0, 2.0, 0.0], [9.0, 1.0, 0.0]], dtype=torch.float64)
    theirs = (z.max() - 0.3 * (z - z.max()) ** 2).softmax(-1)
    alone = (3 - 0.3 * (z[:1] - 3) ** 2).softmax(-1)
    assert not torch.allclose(theirs[:1], alone)
    torch.testing.assert_close(decal.quadratic(0.3)(z).softmax(-1)[:1], alone)
    torch.testing.assert_close(decal.quadratic(0.3)(z)[:1], decal.quadratic(0.3)(z[:1]))


# ---- skew


def test_skew_ranks_before_it_accumulates() -> None:
    """Aphrodite accumulates in the order of the vocabulary, so that what a token gets depends on its number."""
    p, g = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64), math.exp(0.5)
    theirs = torch.diff(p.cumsum(0) ** g, prepend=torch.zeros(1))
    moved = torch.diff(p.flip(0).cumsum(0) ** g, prepend=torch.zeros(1)).flip(0)
    assert not torch.allclose(theirs, moved)
    mass = {0.4: (0.0, 0.4), 0.3: (0.4, 0.7), 0.2: (0.7, 0.9), 0.1: (0.9, 1.0)}  # before and after, by rank
    right = torch.tensor([mass[float(q)][1] ** g - mass[float(q)][0] ** g for q in p], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        torch.testing.assert_close(decal.skew(0.5)(p[None, order].log()).softmax(-1)[0], right[order])


# ---- XTC and top-p


def test_xtc_finds_its_tokens_wherever_they_stand() -> None:
    """ExLlamaV2 asks the next token whether it is above the threshold, and compares an index with a probability."""
    p, threshold, probability = [0.15, 0.5, 0.05, 0.3], 0.1, 0.5
    above = [q for q in p if q >= threshold]
    mass = sum(above) - min(above)
    theirs = [
        q * (1 - probability) if nextone >= threshold and i != min(above) else q * (1 + probability * mass / (1 - mass))
        for i, (q, nextone) in enumerate(zip(p, [*p[1:], 0.0], strict=True))
    ]
    assert sum(theirs) != pytest.approx(1, abs=0.1)
    # Meant is the average over the coin: with the coin the law is 0.15 and 0.05 renormalised.
    right = [(1 - probability) * q + probability * (q / 0.2 if q < 0.2 else 0.0) for q in p]
    z = row(*p)
    dropped = decal.xtc(threshold, probability=1.0)(z, history=NONE).softmax(-1)
    ours = (1 - probability) * z.softmax(-1) + probability * dropped
    assert ours[0].tolist() == pytest.approx(right)


def test_xtc_leaves_the_least_probable_of_its_tokens() -> None:
    """llm-samplers removes all that are above the threshold, always."""
    z = row(0.5, 0.3, 0.2)
    assert (z.exp() < 0.25).tolist() == [[False, False, True]]
    assert kept(decal.xtc(0.25, probability=1.0), z, NONE) == [[False, True, True]]
    assert kept(decal.xtc(0.25, probability=0.0), z, NONE) == [[True, True, True]]


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    """llm-samplers and ExLlamaV2 drop it, so that less than p is kept, and of a sure row nothing or by exception one."""
    z = row(0.5, 0.3, 0.2)
    assert (z.exp().cumsum(-1) <= 0.6).tolist() == [[True, False, False]]
    assert kept(decal.top_p(0.6), z) == [[True, True, False]]
    assert not (row(0.9, 0.1).exp().cumsum(-1) <= 0.6).any()
    assert kept(decal.top_p(0.6), row(0.9, 0.1)) == [[True, False]]


def test_top_p_treats_tokens_of_one_probability_alike() -> None:
    """transformers, llama.cpp and others keep the ones that a sort puts first."""
    z = row(0.3, 0.1, 0.3, 0.3)
    order = z.argsort(descending=True, stable=True)
    theirs = torch.zeros(1, 4, dtype=torch.bool).scatter(1, order, z.exp().gather(1, order).cumsum(1) - 0.3 < 0.5)
    assert theirs.sum() == 2
    assert kept(decal.top_p(0.5), z) == [[True, False, True, True]]


# ---- typical


def test_typical_keeps_the_token_that_reaches_the_mass() -> None:
    """ExLlamaV2 leaves it out. 0.5, 0.3, 0.2 have an entropy of 1.03; 0.3 is nearest to it, then 0.5."""
    z = row(0.5, 0.3, 0.2)
    p = z.exp()[0]
    order = (-p.log() - entropy(p)).abs().argsort()
    assert order.tolist() == [1, 0, 2]
    assert (p[order].cumsum(0) < 0.6).sum() == 1, "ExLlamaV2 keeps 0.3 alone"
    assert kept(decal.typical(0.6), z) == [[True, True, False]]


def test_typical_has_an_entropy_where_probabilities_vanish() -> None:
    """0 log 0 is 0. In llama.cpp it is NaN, all distances with it, and the order is left to chance."""
    z = torch.cat([row(0.5, 0.3, 0.2), torch.tensor([[-torch.inf, -2000.0]])], -1)
    p = z.softmax(-1)
    assert (p * p.log()).sum().isnan()
    assert kept(decal.typical(0.25), z) == [[False, True, False, False, False]]
    assert kept(decal.typical(0.6), z) == [[True, True, False, False, False]]


# ---- tail-free


def test_tail_free_keeps_the_last_token_unless_it_is_in_the_tail() -> None:
    """text-generation-webui drops it, always: two second differences fewer than tokens, and True behind them."""
    uniform = torch.zeros(1, 5, dtype=torch.float64)
    bend = np.abs(np.diff(np.full(5, 0.2), 2))
    with np.errstate(invalid="ignore"):
        removed = [False, *(np.cumsum(bend / bend.sum()) > 0.95), True]
    assert removed == [False, False, False, False, True]
    assert alive(decal.tail_free(0.95).mask(uniform)).all()


# ---- repetition


@pytest.mark.parametrize(("shift", "legacy"), [(0.0, 0.490), (-5.0, 0.383), (5.0, 0.232)])
def test_a_repetition_penalty_does_not_depend_on_a_constant(shift: float, legacy: float) -> None:
    """Adding a constant to the logits changes nothing a model says, but everything that dividing them does."""
    z, seen = torch.tensor([[2.0, 1.5, -1.0]], dtype=torch.float64) + shift, History.of([[0]])
    theirs = z.clone()
    theirs[0, 0] = z[0, 0] / 1.3 if z[0, 0] > 0 else z[0, 0] * 1.3
    assert float(theirs.softmax(-1)[0, 0]) == pytest.approx(legacy, abs=5e-4)
    as_theirs = decal.repetition_penalty(1.3, form="legacy")(z, history=seen)
    torch.testing.assert_close(as_theirs, theirs)
    weights = z.softmax(-1)[0] ** torch.tensor([1.3, 1.0, 1.0])
    ours = decal.repetition_penalty(1.3)(z, history=seen).softmax(-1)[0]
    torch.testing.assert_close(ours, weights / weights.sum())
    assert float(ours[0]) == pytest.approx(0.567, abs=5e-4)


def test_no_repeat_ngram_never_bans_everything() -> None:
    """transformers and others leave a row of -inf, whose softmax is NaN."""
    z, text = torch.zeros(1, 2), [0, 1, 0, 0, 1, 1, 0]
    banned = {text[i + 1] for i in range(len(text) - 1) if text[i] == text[-1]}
    assert banned == {0, 1}
    assert kept(decal.no_repeat_ngram(2), z, History.of([text])) == [[True, True]]


# ---- thresholds and rounding


def test_p_less_keeps_every_token_of_a_uniform_row() -> None:
    """1 / n is not below n times its square; in float32 rounding says so of some n, and nothing is left."""
    empty = 0
    for n in range(2, 600):
        p = np.full(n, np.float32(1) / np.float32(n))
        empty += bool(p[0] < np.cumsum(p * p)[-1])
        assert alive(decal.p_less().mask(torch.zeros(1, n))).all()
        assert alive(decal.p_less_norm().mask(torch.zeros(1, n))).all()
    assert empty > 0


def test_ees_is_its_formula() -> None:
    """The authors' published file reads a variable that it never sets, so it runs for nobody."""
    z = fresh_rows(seed=62, count=20, size=200)
    for ours, p in zip(alive(decal.ees().mask(z)), z.softmax(-1), strict=True):
        ranked = p.sort(descending=True).values
        size = 1
        while size < int((p > 0).sum()):
            head = ranked[: size + 1] / ranked[: size + 1].sum()
            if entropy(head) / math.log(size + 1) < float(ranked[: size + 1].sum()):
                break
            size += 1
        assert ours.sum() == size


# ---- mirostat


def test_mirostat_runs_beside_other_rules() -> None:
    """llama.cpp drops every other sampler but temperature when it is on, without a word; a converted chain says so."""
    chain, report = decal.from_llama_cpp({"mirostat": 2, "top_k": 20, "temperature": 0.7})
    assert str(chain).startswith("temperature(0.7) | mirostat(")
    assert any(line.startswith("top_k: ") for line in report)
    z = row(0.4, 0.3, 0.2, 0.1)
    both = parse("top_k(2) | mirostat(3)")
    ours, _ = both.apply(z, both.init(1))
    assert alive(ours).tolist() == [[True, True, False, False]]


def test_mirostat_learns_from_the_surprise_of_the_model() -> None:
    """The paper's surprise is -log2 of the model's probability. llama.cpp takes it after the cut, where it is smaller: of a
    token that is the only one left it is 0, however little the model expected it."""
    z, chain = row(0.25, *[0.75 / 96] * 96), decal.mirostat(1.0, 0.5)
    state = chain.init(1)
    ours, seen = chain.apply(z, state)
    assert alive(ours).sum() == 1
    assert float(-ours.log_softmax(-1)[0, 0]) == 0
    state = chain.observe(state, seen, torch.tensor([0]))
    assert float(state[0]["mu"]) == pytest.approx(2 - 0.5 * (2 - 1))
