"""Draws: the right law, down to rare tokens, and the same token in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny import llama

import decal
from decal.kernels import mass, random
from decal.kernels.dispatch import use
from decal.samplers.errors import DecalError

N = 400_000


def drawn(chain, logits, seed=0):
    """N tokens, each at a position of its own."""
    found = []
    for start in range(0, N, 50_000):
        places = torch.arange(start, start + 50_000)
        found.append(chain.sample(logits.expand(50_000, -1), seed, places, check=False))
    return torch.cat(found)


@pytest.mark.parametrize("text", ["temperature(1)", "temperature(1.7) | top_p(0.9)", "top_k(4) | flatten(0.6)", "typical(0.7)"])
def test_frequencies_are_the_probabilities(text):
    """Chi-square at a false-alarm rate of 1e-4; the seeds are fixed, so it is tossed once and for all."""
    chain = decal.parse(text)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    p = chain(logits).double().softmax(-1)[0]
    counts = torch.bincount(drawn(chain, logits), minlength=40).double()
    assert counts[p == 0].sum() == 0
    rare = (p * N < 8) & (p > 0)
    seen = torch.cat([counts[(p > 0) & ~rare], counts[rare].sum()[None]])
    expected = torch.cat([p[(p > 0) & ~rare] * N, (p[rare].sum() * N)[None]])
    alive = expected > 0
    assert stats.chisquare(seen[alive], expected[alive], sum_check=False).pvalue > 1e-4


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Each of 262,144 tail tokens has probability 1e-9; 24-bit noise, whose race ends at 16.6 nats, never draws one."""
    tail = 262_144
    logits = torch.full((1, tail + 1), -20.7)
    logits[0, 0] = 0.0
    p = 1 - float(logits.double().softmax(-1)[0, 0])
    rows = 3000
    chain = decal.parse("temperature(1)")
    hits = sum(int((chain.sample(logits, 1, i, check=False) > 0).sum()) for i in range(rows))
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], rows, p)
    assert low <= hits <= high
    # And with so few rows that hit, the same from the noise itself: its smallest values are as frequent as they should be.
    noise = random.exponential(torch.tensor(5), torch.arange(2000)[:, None], torch.arange(2000)[None])
    for level in (1e-5, 1e-6):
        count = int((noise < level).sum())
        low, high = stats.binom.ppf([5e-5, 1 - 5e-5], noise.numel(), -math.expm1(-level))
        assert low <= count <= high


def test_seeds_and_positions_are_independent_streams():
    logits = torch.zeros(1, 6)
    chain = decal.parse("temperature(1)")
    a, b = drawn(chain, logits, seed=1), drawn(chain, logits, seed=2)
    for one, other in ((a, b), (a[1:], a[:-1]), (a[2:], a[:-2])):
        table = torch.bincount(one * 6 + other, minlength=36).reshape(6, 6)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4


def test_the_same_with_and_without_compiled_code():
    chain = decal.parse("temperature(1.3) | top_p(0.95)")
    x = torch.randn(40, 3000, generator=torch.Generator().manual_seed(5))
    seeds, places = torch.arange(40) ** 5 - 1000, torch.arange(40) * 123457
    tokens = chain.sample(x, seeds, places)
    with use("reference"):
        assert torch.equal(chain.sample(x, seeds, places), tokens)
    assert torch.equal(chain.sample(x, seeds.tolist(), places.tolist()), tokens)


def test_a_chain_with_memory_draws_too():
    chain = decal.parse("temperature(1.3) | mirostat(3)")
    x = torch.randn(3, 50)
    state = chain.init(3)
    tokens, seen = chain.draw(x, [1, 2, 3], 0, state)
    assert tokens.shape == (3,)
    moved = chain.observe(state, seen, tokens)
    assert not torch.equal(moved[1]["mu"], state[1]["mu"])


@pytest.mark.parametrize("given", [0.5, "a", None, [1, 2], [1], torch.tensor([1]), [[1, 2, 3]], [1.0, 2.0, 3.0], 2**64, True])
def test_seeds_are_whole_numbers(given):
    with pytest.raises(DecalError, match="seeds must be a whole number, or 3 of them"):
        decal.parse("top_p(0.5)").sample(torch.zeros(3, 4), given, 0)


def test_weights_and_limbs():
    d = -torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    assert ((mass.weight(d) / d.exp()) - 1).abs().max() < 1.2e-12
    assert mass.weight(torch.tensor([0.0, -math.inf, math.nan, -1e300], dtype=torch.float64)).tolist() == [
        1.0,
        *[2.0**-1000] * 3,
    ]
    x = torch.rand(1000, dtype=torch.float64) - 0.5
    high, low = mass.limbs(x)
    assert torch.equal(mass.joined(high, low), x)
    order = torch.randperm(1000)
    assert torch.equal(mass.joined(high.sum(), low.sum()), mass.joined(high[order].sum(), low[order].sum()))
    assert abs(float(mass.joined(high.sum(), low.sum())) - math.fsum(x.tolist())) < 1e-15


# ---- in generate


@pytest.fixture(scope="module")
def model():
    return llama(64, dtype=torch.float32)


def texts(model, ids, seeds, text, **kwargs):
    chain = decal.parse(text)
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, **kwargs}
    mask = (ids != 0).long()
    return model.generate(ids, attention_mask=mask, **chain.generate_kwargs(seeds=seeds, **kwargs))[:, ids.shape[1] :]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("text", ["temperature(1.5) | top_p(0.95)", "repetition_penalty(1.3) | xtc(0.01, 0.5)", "mirostat(3)"])
def test_a_request_gives_the_same_text_alone_and_in_any_batch(model, text, direct):
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13], [0, 21, 22, 23, 24]])
    seeds = [100, 200, 300]
    whole = texts(model, ids, seeds, text, direct=direct)
    assert len({tuple(row) for row in whole.tolist()}) == 3
    torch.manual_seed(1)  # draws owe nothing to torch's generator
    backwards = texts(model, ids.flip(0), seeds[::-1], text, direct=direct)
    assert torch.equal(backwards.flip(0), whole)
    for row, skipped in enumerate((2, 0, 1)):
        assert torch.equal(texts(model, ids[row : row + 1, skipped:], seeds[row : row + 1], text, direct=direct)[0], whole[row])
    assert not torch.equal(texts(model, ids, [1, 2, 3], text, direct=direct), whole)


def test_a_loop_of_its_own_knows_padding_from_the_attention_mask(model):
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])
    chain = decal.parse("temperature(1.5)")

    def text(ids, seeds):
        asked = chain.generate_kwargs(seeds=seeds, direct=True, max_new_tokens=8, min_new_tokens=8)
        return model.generate(ids, attention_mask=(ids != 0).long(), **asked)[:, ids.shape[1] :]

    assert torch.equal(text(ids, [1, 2])[0], text(ids[:1, 2:], [1])[0])


def test_several_sequences_of_a_request_differ_and_the_first_is_the_request_s(model):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    one = texts(model, ids, [7, 8], "temperature(2)")
    three = texts(model, ids, [7, 8], "temperature(2)", num_return_sequences=3)
    assert torch.equal(three[::3], one)
    assert len({tuple(row) for row in three.tolist()}) == 6


def test_a_text_is_the_one_that_sample_draws(model):
    ids = torch.tensor([[5, 6, 7]])
    chain = decal.parse("temperature(1.5) | min_p(0.01)")
    wanted = ids
    for _ in range(8):
        logits = model(wanted).logits[:, -1].float()
        wanted = torch.cat([wanted, chain.sample(logits, 42, wanted.shape[1])[:, None]], 1)
    assert torch.equal(texts(model, ids, [42], str(chain)), wanted[:, 3:])


def test_what_seeds_do_not_go_with(model):
    chain = decal.parse("top_p(0.9)")
    with pytest.raises(DecalError, match="beams want the scores of all"):
        chain.generate_kwargs(seeds=[1], num_beams=2)
    with pytest.raises(DecalError, match="seeds must be a list of whole numbers"):
        chain.generate_kwargs(seeds=[0.5])
    with pytest.raises(DecalError, match="there are 2 requests, and seeds for 1"):
        chain.generate_kwargs(seeds=[1], requests=[1, 2])
    with pytest.raises(DecalError, match="numbers of 2 requests, the scores have 3 rows"):
        texts(model, torch.tensor([[5], [6], [7]]), [1, 2], "top_p(0.9)")
