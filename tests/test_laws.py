"""Laws that hold for every declared rule, whatever its formula: the public conformance suite, and the same on random rows.

They run over ``decal.RULES``, so a new rule is tested here from the day it is declared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import decal
from decal import RULES, Keep, Map, Param
from decal.samplers import testing
from decal.samplers.row import Row
from decal.samplers.testing import ConformanceError, Trial, check

NAMES = sorted(decal.RULES)
FAST = [name for name in NAMES if not decal.RULES[name].slow]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BIG = [(50257, torch.float16), (151936, torch.bfloat16), (262144, torch.float32)]


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("name", NAMES)
def test_law(name: str, law: str) -> None:
    testing.LAWS[law](decal.RULES[name])


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


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60)
@given(z=rows(), data=st.data())
def test_random_rows(name: str, z: Tensor, data: st.DataObject) -> None:
    rule = decal.RULES[name]
    trial = Trial.of(rule(**data.draw(st.sampled_from(testing.values(rule)))), len(z), z.shape[1])
    testing.is_sane(trial, z)
    testing.is_of_its_kind(rule, trial, z)


@pytest.mark.parametrize(("size", "dtype"), BIG)
def test_large_vocabularies(size: int, dtype: torch.dtype) -> None:
    z = big_rows(size, dtype)
    for name in FAST:
        rule = decal.RULES[name]
        trial = Trial.of(rule(), len(z), size)
        testing.is_sane(trial, z)
        testing.is_of_its_kind(rule, trial, z)


def test_every_rule_is_of_a_known_kind_and_cites_a_paper() -> None:
    kinds = {"truncation", "band", "selection", "reshaping", "projection"}
    assert {rule.kind for rule in RULES.values()} == kinds
    assert len(RULES) >= 38
    for name, rule in decal.RULES.items():
        assert getattr(decal, name) is rule
        assert name in dir(decal)
        assert "\n" not in rule.summary


# ---- the suite catches what it should

P = Param(0.1, low=0.01, high=1)


@pytest.fixture
def registry() -> Iterator[dict[str, decal.Rule]]:
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


def test_a_good_rule_passes_every_law(registry: dict[str, decal.Rule]) -> None:
    @decal.rule(paper="arXiv:0000.00000")
    def twice_min_p(row: Row, p: Tensor = P) -> Tensor:
        """Keep tokens at least half of ``p`` times as probable as the most probable one."""
        return row.max + torch.log(p / 2)

    assert check(twice_min_p) == list(testing.LAWS)


def broken(name: str) -> decal.Rule:
    """Rules that each break a law."""

    def declare(body: object, **kwargs: object) -> decal.Rule:
        body.__name__ = name  # type: ignore[attr-defined]
        body.__doc__ = body.__doc__ or "Keep something."  # type: ignore[attr-defined]
        return decal.rule(paper="arXiv:0000.00000", **kwargs)(body)  # type: ignore[arg-type]

    p = P
    if name == "no_sentence":
        return _undocumented(name)
    if name == "sees_shift":
        return declare(lambda row, p=p: p * row.max - 1)
    if name == "sees_temperature":
        return declare(lambda row, p=p: row.max + torch.log(p), scale=True)
    if name == "hides_that_it_does_not":
        return declare(lambda row, p=p: row.max - row.std * p)
    if name == "wrong_move":
        return declare(lambda row, p=p: row.max + torch.log(p), moved=lambda t, p: {"p": p ** (2 * t)})
    if name == "empties":
        return declare(lambda row, p=p: Map(lambda z: torch.where(z >= z.amax(-1, keepdim=True) - 4, z, -torch.inf)))
    if name == "gives_nan":
        return declare(lambda row, p=p: Map(lambda z: torch.where(z < row.max, torch.nan, z)))
    if name == "splits_ties":
        return declare(lambda row, p=p: Map(lambda z: z + torch.arange(z.shape[1]), monotone=False))
    if name == "changes_order":
        return declare(lambda row, p=p: Map(lambda z: -z))
    if name == "sees_others":
        return declare(lambda row, p=p: row.max.amax() + torch.log(p))
    if name == "knows_names":
        return declare(lambda row, p=p: Keep(lambda z: torch.arange(z.shape[1]).expand_as(z) % 2 == 0))
    if name == "draws":
        return declare(lambda row, p=p: row.max - torch.rand(1))
    raise AssertionError(name)


def _undocumented(name: str) -> decal.Rule:
    def body(row: Row, p: Tensor = P) -> Tensor:
        """keeps something"""
        return row.max + torch.log(p)

    body.__name__ = name
    return decal.rule(paper="arXiv:0000.00000")(body)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("no_sentence", "is declared well"),
        ("sees_shift", "a shift changes nothing"),
        ("sees_temperature", "a temperature changes what is declared"),
        ("hides_that_it_does_not", "a temperature changes what is declared"),
        ("wrong_move", "a temperature changes what is declared"),
        ("empties", "acts as its kind says"),
        ("gives_nan", "gives sane rows"),
        ("splits_ties", "acts as its kind says"),
        ("changes_order", "acts as its kind says"),
        ("sees_others", "rows do not see each other"),
        ("knows_names", "renaming tokens renames the answer"),
        ("draws", "gives sane rows"),
    ],
)
def test_a_rule_that_breaks_a_law_is_told(name: str, law: str, registry: dict[str, decal.Rule]) -> None:
    rule = broken(name)
    with pytest.raises(ConformanceError):
        testing.LAWS[law](rule)
    with pytest.raises(ConformanceError, match=f"^{name} breaks the law "):
        check(rule)
