"""Formulas that become programs, and those that can't."""

from __future__ import annotations

import math

import pytest
import torch

import decal
from decal.kernels.program import Builder, Op, Untraceable
from decal.samplers.errors import DecalError
from decal.samplers.row import Band
from decal.samplers.rule import RULES
from decal.samplers.trace import trace


def ops(text: str) -> list[str]:
    return [Op(one[0]).name for one in trace(decal.parse(text).steps).program.code]


def test_a_chain_reads_as_it_is_written():
    assert ops("temperature(0.5)") == ["AFFINE", "END"]
    assert ops("min_p(0.1)") == ["PEAK", "ADD", "PEAK", "MIN", "BAND", "END"]  # log(0.1) is folded
    assert ops("top_k(50) | top_p(0.9)") == [*ops("top_k(50)")[:-1], *ops("top_p(0.9)")]


def test_statistics_of_a_rule_are_summed_at_once():
    assert ops("eta(0.002)").count("MOMENTS") == 1
    assert ops("typical(0.9)").count("MOMENTS") == 1
    assert ops("top_n_sigma(1)").count("MOMENTS") == 1


def test_what_is_off_is_not_there():
    assert ops("top_p(1.0) | temperature(1.0)") == ["END"]
    x = torch.randn(2, 9)
    assert torch.equal(decal.parse("top_p(1.0) | temperature(1.0)")(x), x)


def test_constants_have_the_bits_that_torch_gives_them():
    builder = Builder()
    found = builder.number(0.1).log() * 3 - torch.exp(builder.number(2.0)) ** 2
    wanted = torch.tensor(0.1, dtype=torch.float64).log() * 3 - torch.tensor(2.0, dtype=torch.float64).exp() ** 2
    assert float(found.constant) == float(wanted)
    assert builder.program().code == ((0,) * 7,)


def test_signed_zeros_and_nan_are_constants_of_their_own():
    builder = Builder()
    places = {builder.register_of(v) for v in (0.0, -0.0, math.nan, 1.0)}
    assert len(places) == 4
    assert builder.register_of(math.nan) in places
    assert builder.register_of(-0.0) in places


P = decal.Param(0.5, low=0, high=1)


def _behind_a_head(row, p=P):
    return row.upper(count=row.head(5).longest(lambda top: top.value - top.below, at_most=p))


def _curvature_of_a_head(row, p=P):
    return row.upper(count=row.head(5).longest(lambda top: top.curvature, at_most=p))


def _branches(row, p=P):
    return row.max - 1 if row.entropy > 1 else row.max - 2


def _own_tensor(row, p=P):
    return row.max - torch.rand(1)


def _numpy(row, p=P):
    return row.max - float(row.entropy)


def _method(row, p=P):
    return row.max.amax() + torch.log(p)


def _function(row, p=P):
    return row.max - torch.sinh(p)


def _not_a_number(row, p=P):
    return row.max - (row.entropy.item() if isinstance(row.entropy, torch.Tensor) else row.entropy["nats"])


def _state(row, p=P):
    return row.max - row.history.length


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_branches, "decides by the numbers of a row in Python"),
        (_own_tensor, "brings a tensor of its own"),
        (_numpy, "needs the numbers of a row in Python"),
        (_method, r"uses Tensor\.amax"),
        (_function, r"uses torch\.sinh"),
        (_not_a_number, "_not_a_number: "),
        (_state, "reads history"),
        (_behind_a_head, "asks the top sets of a head for what lies behind them"),
        (_curvature_of_a_head, "asks the top sets of a head for what lies behind them"),
    ],
)
def test_formulas_that_are_no_programs_say_why_and_run_in_torch(body, reason, monkeypatch, capsys):
    monkeypatch.setattr("decal.samplers.rule.RULES", dict(RULES))
    body.__doc__ = "Keep something."
    chain = decal.rule(shift=False)(body)()
    with pytest.raises(Untraceable, match=reason):
        trace(chain.steps)
    history = decal.History.of([[1, 2]]) if body is _state else None
    assert chain(torch.randn(1, 8), history=history).isfinite().any()
    chain.explain()
    assert "but plain torch for" in capsys.readouterr().out


def test_a_rule_of_ones_own_runs_compiled(monkeypatch):
    monkeypatch.setattr("decal.samplers.rule.RULES", dict(RULES))

    @decal.rule()
    def middle(row, width=decal.Param(1.0, low=0)):
        """Keep logits between two levels."""
        center = torch.where(row.count > 3, row.mean, row.max)
        return Band(center - width * row.std, torch.maximum(center + width * row.std, center))

    @decal.rule()
    def much_of_few(row, share=decal.Param(0.7, low=0, high=1)):
        """Keep a share of what ten tokens have."""
        few = row.head(10)
        size = few.longest(lambda top: torch.maximum(top.mass, top.count / few.count), at_most=share)
        return torch.minimum(row.upper(count=size), few.logz + few.mean - few.std)

    @decal.rule()
    def widest_gap(row, most=decal.Param(50.0, low=0, high=100)):
        """Keep tokens down to the widest gap among the first ones."""

        def gap(top):
            return torch.where(top.count <= most, (top.value - top.below).nan_to_num(posinf=0.0), -1.0)

        return row.upper(count=row.best(gap, later=lambda top: torch.where(top.count < most, top.below - top.least, -1.0)))

    @decal.rule()
    def bounded_by_moments(row, p=decal.Param(0.5, low=0, high=1)):
        """Keep the top set of the largest count, which is everything, as no bound is reached before."""
        return row.upper(count=row.best(lambda top: top.count, later=lambda top: 1e6 + top.log_half + top.logz))

    @decal.rule()
    def bounded_by_nan(row, p=decal.Param(0.5, low=0, high=1)):
        """Keep everything, as no score is beyond what is no number."""
        return row.upper(count=row.longest(lambda top: top.count, at_most=0 * row.std / (0 * row.std)))

    assert (bounded_by_moments()(torch.randn(2, 3000)) > -math.inf).all()
    for chain in (
        bounded_by_moments(),
        bounded_by_nan(),
        middle(0.5),
        much_of_few(),
        middle(0.9) | much_of_few(0.35),
        widest_gap(),
        widest_gap(2) | middle(),
    ):
        for x in (torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)), torch.eye(4, 9), torch.zeros(2, 7)):
            with decal.kernels.dispatch.use("reference"):
                wanted = chain(x)
            assert trace(chain.steps)
            assert torch.equal(chain(x), wanted)


def test_vocabularies_without_bound_are_refused():
    with pytest.raises(DecalError, match="at most 2097151 tokens, got 2097152"):
        decal.parse("top_p(0.5)")(torch.zeros(1, 2**21))
