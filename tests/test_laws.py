"""Laws that hold for every declared rule, whatever its formula, on random and adversarial rows.

They run over ``decal.RULES``, so a new rule is tested here from the day it is declared.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import decal
from decal.samplers.chain import Chain

NAMES = sorted(decal.RULES)
CUTS = [name for name in NAMES if decal.RULES[name].kind != "reshaping"]
TRUNCATIONS = [name for name in NAMES if decal.RULES[name].kind == "truncation"]
BANDS = [name for name in NAMES if decal.RULES[name].kind == "band"]
RESHAPINGS = [name for name in NAMES if decal.RULES[name].kind == "reshaping"]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BIG = [(4099, torch.float64), (50257, torch.float16), (151936, torch.bfloat16), (262144, torch.float32)]
MORE = {"temperature": (0.0, 1e-6, 0.3, 0.7, 1.4, 30.0, 1e6), "top_k": (1, 7, 10**6), "eta": (1.0,), "p_less": (0.3,)}


def values(rule: decal.Rule, *, awkward: bool = False) -> list[tuple[float, ...]]:
    """Parameter values worth testing. ``awkward`` ones sit at no coincidence, so that no threshold lands on a token."""
    each = []
    for name, p in rule.params.items():
        found = {*p.sweep, p.default, p.low, *MORE.get(rule.name, ())} | ({p.high} if math.isfinite(p.high) else set())
        if awkward and not p.integer:
            found = {v * 0.99173 if v else 0.0137 for v in found}
        assert found - {p.off}, f"{rule.name}: {name} has no value to test"
        each.append(sorted(found - {p.off}))
    return list(product(*each))


def off(rule: decal.Rule) -> tuple[float, ...]:
    return tuple(p.off for p in rule.params.values())


# ---- rows


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """A (B, V) batch; each row of some nasty kind, at least one token of each finite."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 40]))
    return torch.stack([draw(one_row(size, dtype)) for _ in range(draw(st.integers(1, 3)))])


@st.composite
def one_row(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    huge = 60000.0 if dtype is torch.float16 else 1e30
    element = {
        "spread": st.floats(-30, 30),
        "ties": st.sampled_from([0.0, -1.0, -2.5, 3.25]),
        "huge": st.sampled_from([huge, -huge, huge / 3, 0.0, 1.0, -5.0]),
        "tiny": st.floats(-1e-30, 1e-30),
        "flat": st.just(draw(st.sampled_from([0.0, -7.0, huge, -huge]))),
        "peak": st.sampled_from([-20.0, -21.0, -50.0, 5.0]),
        "steps": st.integers(-8, 8).map(float),
    }[draw(st.sampled_from(["spread", "ties", "huge", "tiny", "flat", "peak", "steps"]))]
    row = draw(st.lists(element, min_size=size, max_size=size))
    dead = draw(st.one_of(st.just(set()), st.sets(st.integers(0, size - 1)), st.just(set(range(size)))))
    alive = draw(st.integers(0, size - 1))
    return torch.tensor([-math.inf if i in dead and i != alive else z for i, z in enumerate(row)], dtype=torch.float64).to(
        dtype
    )


def big_rows(size: int, dtype: torch.dtype) -> Tensor:
    """Bell-shaped, peaked, flat, few-valued and mostly dropped rows over a large vocabulary."""
    g = torch.Generator().manual_seed(size)
    bell = torch.randn(size, generator=g, dtype=torch.float64) * 3
    peaked = bell.clone()
    peaked[size // 2] = 40
    few = torch.randint(0, 4, (size,), generator=g).double()
    dropped = torch.where(torch.rand(size, generator=g) < 0.999, -torch.inf, bell)
    dropped[-1] = 0.5
    if size > 100_000:
        return torch.stack([few, torch.maximum(dropped, peaked - 45)]).to(dtype)
    return torch.stack([bell, peaked, torch.full_like(bell, -2.0), few, dropped]).to(dtype)


# ---- the laws, each about one batch


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, signs of zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def applied(chain: Chain, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept set, mask and processed logits, after checking what every rule owes: shape, type, -inf stays, a mask touches no
    kept logit."""
    before = z.clone()
    masked, processed = chain.mask(z), chain(z)
    assert same_bits(z, before), "the input was written to"
    assert masked.shape == processed.shape == z.shape
    assert masked.dtype == processed.dtype == z.dtype
    kept = masked.isfinite()
    assert torch.equal(kept, processed.isfinite())
    assert not processed.isnan().any()
    assert not processed.isposinf().any()
    assert not (kept & z.isneginf()).any(), "a token at -inf came back"
    assert kept.any(-1).all(), "nothing is left of a row"
    assert same_bits(masked, z.masked_fill(~kept, -math.inf)), "a kept logit was touched"
    return kept, masked, processed


def kept_by(chain: Chain, z: Tensor) -> Tensor:
    return applied(chain, z)[0]


def is_mode(z: Tensor) -> Tensor:
    return z == z.amax(-1, keepdim=True)


def check_cut(chain: Chain, z: Tensor, *, band: bool) -> None:
    kept, masked, processed = applied(chain, z)
    assert same_bits(processed, masked), "a truncation reshaped"
    lowest = torch.where(kept, z, math.inf).amin(-1, keepdim=True)
    highest = torch.where(kept, z, -math.inf).amax(-1, keepdim=True)
    if not band:
        assert torch.equal(highest, z.amax(-1, keepdim=True)), "the mode was dropped"
    # All of the alive tokens between the ends, and with them all ties.
    assert torch.equal(kept, (z >= lowest) & (z <= highest) & z.isfinite())


def check_reshaping(chain: Chain, z: Tensor) -> None:
    kept, _, processed = applied(chain, z)
    wanted = is_mode(z) if str(chain) == "temperature(0.0)" else z.isfinite()
    assert torch.equal(kept, wanted)
    order = z.sort(dim=-1, stable=True).indices
    ranked, before = processed.gather(-1, order), z.gather(-1, order)
    assert (ranked[:, 1:] >= ranked[:, :-1]).all(), "the order of tokens changed"
    tied = (before[:, 1:] == before[:, :-1]) & ranked[:, :-1].isfinite()
    assert (ranked[:, 1:] == ranked[:, :-1])[tied].all(), "ties came apart"


@pytest.mark.parametrize("name", CUTS)
@settings(max_examples=80)
@given(z=rows(), data=st.data())
def test_cuts_keep_the_top_together_and_untouched(name: str, z: Tensor, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    check_cut(rule(*data.draw(st.sampled_from(values(rule)))), z, band=name in BANDS)


@pytest.mark.parametrize("name", RESHAPINGS)
@settings(max_examples=80)
@given(z=rows(), data=st.data())
def test_reshapings_keep_support_and_order(name: str, z: Tensor, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    check_reshaping(rule(*data.draw(st.sampled_from(values(rule)))), z)


@pytest.mark.parametrize(("size", "dtype"), BIG)
def test_laws_on_large_vocabularies(size: int, dtype: torch.dtype) -> None:
    z = big_rows(size, dtype)
    for rule in decal.RULES.values():
        chosen = values(rule)
        chain = rule(*chosen[len(chosen) // 2])
        if rule.kind == "reshaping":
            check_reshaping(chain, z)
        else:
            check_cut(chain, z, band=rule.kind == "band")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(z=rows())
def test_off_changes_no_bit(name: str, z: Tensor) -> None:
    rule = decal.RULES[name]
    chain = rule(*off(rule))
    assert same_bits(chain(z), z)
    assert same_bits(chain.mask(z), z)
    everywhere = rule(*(torch.full((len(z), 1), v, dtype=torch.float64) for v in off(rule)))
    assert same_bits(everywhere(z), z)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(z=rows(), data=st.data())
def test_values_per_row_are_values_row_by_row(name: str, z: Tensor, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    chosen = data.draw(st.lists(st.sampled_from([*values(rule), off(rule)]), min_size=len(z), max_size=len(z)))
    columns = [torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*chosen, strict=True)]
    together = rule(*columns)
    assert together.per_row == (len(z) if rule.params else None)
    one_by_one = [rule(*value) for value in chosen]
    assert same_bits(together(z), torch.cat([one(z[i : i + 1]) for i, one in enumerate(one_by_one)]))
    assert same_bits(together.mask(z), torch.cat([one.mask(z[i : i + 1]) for i, one in enumerate(one_by_one)]))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(z=rows(), data=st.data())
def test_rows_do_not_see_each_other(name: str, z: Tensor, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    chain = rule(*data.draw(st.sampled_from(values(rule))))
    assert same_bits(chain(z), torch.cat([chain(z[i : i + 1]) for i in range(len(z))]))


# Logits are multiples of 2^-8 below 2^5 and the shift a multiple of 2^-8 below 2^11: 20 bits, exact in float32.
GRID = st.integers(-(2**12), 2**12).map(lambda n: n / 2**8)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data())
def test_a_constant_added_to_the_logits_changes_nothing(name: str, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    size = data.draw(st.integers(1, 30))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    z = torch.tensor([data.draw(st.lists(st.one_of(GRID, st.just(-math.inf)), min_size=size, max_size=size))], dtype=dtype)
    z[0, data.draw(st.integers(0, size - 1))] = data.draw(GRID)
    c = data.draw(st.integers(-(2**19), 2**19)) / 2**8
    assert torch.equal((z + c) - c, z), "the test's own shift rounds"
    chain = rule(*data.draw(st.sampled_from(values(rule, awkward=True))))
    kept = kept_by(chain, z)
    assert torch.equal(kept_by(chain, z + c), kept)
    if rule.kind == "reshaping":
        before, after = chain(z.double()).softmax(-1), chain((z + c).double()).softmax(-1)
        torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data())
def test_renaming_tokens_renames_the_answer(name: str, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    z = data.draw(rows(dtype=torch.float64))
    order = torch.tensor(data.draw(st.permutations(range(z.shape[1]))))
    chain = rule(*data.draw(st.sampled_from(values(rule, awkward=True))))
    assert torch.equal(kept_by(chain, z[:, order]), kept_by(chain, z)[:, order])
    torch.testing.assert_close(chain(z[:, order]), chain(z)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_type_of_the_logits_changes_no_kept_set(name: str) -> None:
    """float32, bfloat16 and float16 logits are cut as the same numbers in float64 are."""
    rule = decal.RULES[name]
    for dtype in DTYPES[1:]:
        z = (torch.randn(6, 500, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
        for value in values(rule):
            assert torch.equal(rule(*value).mask(z).isfinite(), rule(*value).mask(z.double()).isfinite()), (dtype, value)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_token_stays(name: str) -> None:
    rule = decal.RULES[name]
    for value in values(rule):
        for z in (torch.tensor([[-3.5]]), torch.tensor([[-math.inf, 7.0, -math.inf]])):
            assert torch.equal(rule(*value).mask(z), z)


def test_every_rule_is_of_a_known_kind_and_cites_a_paper() -> None:
    assert sorted(TRUNCATIONS + BANDS + RESHAPINGS) == NAMES
    assert set(NAMES) >= {"temperature", "top_k", "top_p", "min_p", "top_n_sigma", "epsilon", "eta", "top_a"}
    assert set(NAMES) >= {"typical", "p_less", "flatten"}
    assert BANDS == ["typical"]
    assert RESHAPINGS == ["flatten", "temperature"]
    for name, rule in decal.RULES.items():
        assert getattr(decal, name) is rule
        assert name in dir(decal)
        assert rule.paper.startswith(("arXiv:", "doi:", "github.com/")), name
        assert "\n" not in rule.summary
        assert rule.summary.endswith("."), name
