"""Chains: order, plan, text and JSON form, what is refused and how, extreme values, and rules declared by a user."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import decal
from decal import Affine, Band, Chain, DecalError, from_json, parse
from decal.samplers import testing
from decal.samplers.row import Row
from decal.samplers.rule import RULES, Param
from decal.samplers.testing import Trial

INF = math.inf
NAN = math.nan


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def run(chain: Chain, z: Tensor) -> Tensor:
    """The chain, with whatever its rules want to know made up."""
    return Trial.of(chain, *z.shape)(z)


def step_by_step(chain: Chain, z: Tensor) -> Tensor:
    """Each step alone, on what the one before it left."""
    for step in chain.steps:
        z = run(Chain((step,)), z)
    return z


@pytest.fixture
def registry() -> Iterator[dict[str, decal.Rule]]:
    """The rules, as they were afterwards."""
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


# ---- composition and order


def test_steps_apply_left_to_right() -> None:
    chain = decal.temperature(2) | decal.top_p(0.5)
    assert [step.rule.name for step in chain.steps] == ["temperature", "top_p"]
    assert str(chain | decal.min_p(0.1)) == str(decal.temperature(2) | (decal.top_p(0.5) | decal.min_p(0.1)))


def test_temperature_before_and_after_a_cut_differ() -> None:
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    before, after = parse("temperature(4) | top_p(0.7)"), parse("top_p(0.7) | temperature(4)")
    assert before.mask(z).isfinite().sum() == 3
    assert after.mask(z).isfinite().sum() == 2
    kept = after(z)[0, :2]
    torch.testing.assert_close(kept, z[0, :2] / 4)


def test_two_cuts_keep_what_both_would_in_order() -> None:
    z = logits(50, 300)
    assert not torch.equal(parse("top_p(0.9) | top_n_sigma(1)")(z), parse("top_n_sigma(1) | top_p(0.9)")(z))
    assert not torch.equal(parse("typical(0.3) | top_k(3)")(z), parse("top_k(3) | typical(0.3)")(z))


def test_only_chains_compose() -> None:
    with pytest.raises(TypeError):
        decal.min_p(0.1) | 3
    with pytest.raises(TypeError):
        decal.min_p(0.1) | "top_k"
    assert (decal.min_p(0.1) | decal.top_k) == (decal.min_p(0.1) | decal.top_k())


def test_a_chain_needs_a_step() -> None:
    with pytest.raises(DecalError, match=r"^a chain needs at least one step; temperature\(1\) changes nothing$"):
        Chain(())


STEPS = {
    "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7, 6.0]),
    "flatten": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    "top_k": st.sampled_from([0, 1, 3, 10, 25, 1000]),
    "top_p": st.sampled_from([0.0, 0.21, 0.53, 0.87, 0.99, 1.0]),
    "min_p": st.sampled_from([0.0, 0.003, 0.07, 0.4, 1.0]),
    "top_n_sigma": st.sampled_from([0.0, 0.51, 1.03, 2.2, INF]),
    "epsilon": st.sampled_from([0.0, 0.0011, 0.023, 0.3]),
    "eta": st.sampled_from([0.0, 0.0011, 0.023, 0.3]),
    "top_a": st.sampled_from([0.0, 0.017, 0.23, 1.0]),
    "typical": st.sampled_from([0.0, 0.19, 0.57, 0.93, 1.0]),
    "p_less": st.sampled_from([0.0, 0.09, 0.43, 0.97]),
}


OTHERS = {name: testing.values(rule, awkward=True) for name, rule in decal.RULES.items() if name not in STEPS and not rule.slow}
"""The rules of the catalogue that have no values picked for this test."""


@st.composite
def chains(draw: st.DrawFn, rows: int | None = None) -> Chain:
    steps = []
    for name in draw(st.lists(st.sampled_from([*sorted(STEPS) * 2, *OTHERS]), min_size=1, max_size=6)):
        if "chance" in decal.RULES[name].needs and any("chance" in step.rule.needs for step in steps):
            continue  # of several coins each is another one, which a chain of one step can't toss
        if name in OTHERS:
            steps += decal.RULES[name](**draw(st.sampled_from(OTHERS[name]))).steps
            continue
        if rows and draw(st.booleans()):
            value = column(*draw(st.lists(STEPS[name], min_size=rows, max_size=rows)))
            if name == "top_k":
                value = value.clamp(min=1)
        else:
            value = draw(STEPS[name])
        steps += decal.RULES[name](value).steps
    return Chain(tuple(steps))


@settings(max_examples=400)
@given(chain=chains(rows=4), seed=st.integers(0, 10**6), rounded=st.booleans())
def test_the_plan_computes_what_the_steps_do_one_by_one(chain: Chain, seed: int, rounded: bool) -> None:
    z = logits(4, 60, seed=seed)
    z[:, 7:20] = -INF
    z[0, 0] = 9.0
    if rounded:
        z = z.round()
    wanted = step_by_step(chain, z)
    trial = Trial.of(chain, *z.shape)
    got = trial(z)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    masked = trial.mask(z)
    assert torch.equal(masked, z.masked_fill(~wanted.isfinite(), -INF))


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("temperature(1)", 1),
        ("min_p(0.1)", 1),
        ("top_k(50) | min_p(0.1)", 1),
        ("min_p(0.1) | top_k(50)", 1),
        ("top_p(0.9) | top_k(50) | min_p(0.1)", 1),
        ("top_k(50) | top_p(0.9) | min_p(0.1)", 2),
        ("temperature(0.8) | top_k(50) | min_p(0.1) | temperature(1.4)", 1),
        ("temperature(0.8) | top_k(50) | top_p(0.9) | min_p(0.1)", 2),
        ("temperature(0.8) | temperature(1.2) | top_p(0.9)", 1),
        ("min_p(0.1) | temperature(0.8) | temperature(2)", 1),
        ("min_p(0.1) | temperature(0.8) | min_p(0.1)", 2),
        ("flatten(0.5)", 1),
        ("min_p(0.1) | flatten(0.5)", 2),
        ("temperature(2) | flatten(0.5) | top_k(3)", 2),
        ("top_p(0.9) | top_p(0.9) | top_p(0.9)", 3),
        ("typical(0.9) | top_k(50)", 2),
        ("top_k(0) | top_p(1.0) | min_p(0.0) | top_p(0.9)", 1),
        ("top_p(0.9) | epsilon(0.0) | min_p(0.1)", 1),
    ],
)
def test_number_of_passes(text: str, passes: int) -> None:
    assert len(parse(text).plan) == passes


def test_what_the_plan_puts_where() -> None:
    first, second = parse("temperature(0.8) | top_k(50) | top_p(0.9) | min_p(0.1) | temperature(1.4) | top_k(0)").plan
    assert [[str(s) for s in steps] for steps in (first.read, first.cut, first.write)] == [
        ["temperature(0.8)"],
        ["top_k(50)"],
        [],
    ]
    assert [str(s) for s in second.cut] == ["top_p(0.9)", "min_p(0.1)"]
    assert [str(s) for s in second.write] == ["temperature(1.4)"]
    assert not second.read
    assert first.reason == "first read of the logits"
    assert second.reason == "top_p reads upper(mass), which top_k changes"
    assert parse("min_p(0.1) | temperature(0.8) | top_k(4)").plan[1].reason == "top_k cuts what temperature has reshaped"
    assert parse("flatten(0.5) | flatten(0.1)").plan[1].reason == "flatten reads what flatten has reshaped"


def test_explain_says_what_runs() -> None:
    out = io.StringIO()
    parse("temperature(0.8) | top_k(50) | top_p(0.9) | flatten(0.5) | min_p(0.0)").explain(file=out)
    lines = out.getvalue().splitlines()
    assert lines[0] == "temperature(0.8) | top_k(50) | top_p(0.9) | flatten(0.5) | min_p(0.0)"
    assert [line.strip() for line in lines if line.strip().startswith("pass ")] == [
        "pass 1: first read of the logits",
        "pass 2: top_p reads upper(mass), which top_k changes",
        "pass 3: flatten reads count, logz, which top_p changes",
    ]
    assert any("on reading" in line and "temperature(0.8)" in line and "[reads nothing]" in line for line in lines)
    assert any("cut" in line and "top_p(0.9)" in line and "[reads upper(mass)]" in line for line in lines)
    assert any("on writing" in line and "flatten(0.5)" in line and "[reads count, logz]" in line for line in lines)
    assert "  off: min_p(0.0)" in lines
    assert any(re.fullmatch(r"  backend: \w+ \(.+\)", line) for line in lines)


def test_explain_prints_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    decal.min_p(0.25).explain()
    assert "min_p(0.25)" in capsys.readouterr().out


# ---- text and JSON


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("temperature(1.4) | min_p(0.1)", "temperature(1.4) | min_p(0.1)"),
        ("  temperature( 1.4 )|min_p( p=.1 )  ", "temperature(1.4) | min_p(0.1)"),
        ("top_k(50)", "top_k(50)"),
        ("top_k(50.0)", "top_k(50)"),
        ("top_p(1)", "top_p(1.0)"),
        ("min_p", "min_p(0.1)"),
        ("min_p()", "min_p(0.1)"),
        ("top_n_sigma(inf)", "top_n_sigma(inf)"),
        ("top_n_sigma([1, inf])", "top_n_sigma([1.0, inf])"),
        ("min_p([0.1, 0.2]) | top_p(0.9)", "min_p([0.1, 0.2]) | top_p(0.9)"),
        ("epsilon(eps=9e-4)", "epsilon(0.0009)"),
        ("flatten(strength=1)", "flatten(1.0)"),
        ("(min_p(0.1) | top_k(3)) | temperature(2)", "min_p(0.1) | top_k(3) | temperature(2.0)"),
        ("min_p(+0.1)", "min_p(0.1)"),
    ],
)
def test_parse(text: str, canonical: str) -> None:
    chain = parse(text)
    assert str(chain) == repr(chain) == canonical
    assert parse(canonical) == chain


def test_parse_gives_one_row_per_list_entry() -> None:
    chain = parse("min_p([0.5, 0.01])")
    assert chain.per_row == 2
    z = logits(2, 40)
    assert torch.equal(chain(z), torch.cat([decal.min_p(0.5)(z[:1]), decal.min_p(0.01)(z[1:])]))


@given(chain=chains(rows=3))
def test_text_and_json_round_trip(chain: Chain) -> None:
    z = logits(3, 30)
    for again in (parse(str(chain)), from_json(chain.to_json())):
        assert again == chain
        assert hash(again) == hash(chain)
        assert str(again) == str(chain)
        assert torch.equal(run(again, z), run(chain, z))
    json.loads(chain.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("name", ["top_k", "min_p", "top_n_sigma"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16, torch.float32, torch.float64], ids=str)
def test_round_trip_of_tensors_of_any_type(name: str, dtype: torch.dtype) -> None:
    chain = decal.RULES[name](torch.tensor([[1], [0]] if name != "top_k" else [[5], [2]], dtype=dtype))
    assert parse(str(chain)) == chain
    assert from_json(chain.to_json()) == chain


def test_integers_stay_integers_in_text() -> None:
    assert str(decal.top_k(torch.tensor([[5], [2]]))) == "top_k([5, 2])"
    assert str(decal.top_k(column(5, 2))) == "top_k([5, 2])"


def test_json_form() -> None:
    chain = parse("temperature(1.4) | top_k(5) | top_n_sigma(inf) | min_p([0.1, 0.2])")
    assert json.loads(chain.to_json()) == {
        "chain": [
            {"rule": "temperature", "t": 1.4},
            {"rule": "top_k", "k": 5},
            {"rule": "top_n_sigma", "n": "inf"},
            {"rule": "min_p", "p": [0.1, 0.2]},
        ]
    }


def test_equality_is_equality_of_text() -> None:
    a = decal.temperature(1.4) | decal.min_p(0.1)
    assert a == parse("temperature(1.4)|min_p(p=0.1)")
    assert a != decal.min_p(0.1) | decal.temperature(1.4)
    assert a != decal.temperature(1.4) | decal.min_p(0.2)
    assert a != str(a)
    assert len({a, parse(str(a)), decal.min_p(0.1)}) == 2


def test_copies() -> None:
    chain = parse("temperature(1.4) | min_p([0.1, 0.3])")
    z = logits(2, 30)
    for again in (copy.copy(chain), copy.deepcopy(chain)):
        assert again == chain
        assert torch.equal(again(z), chain(z))


def test_pickling() -> None:
    """What worker processes and distributed generation need."""
    chain = parse("temperature(1.4) | min_p([0.1, 0.3])")
    again = pickle.loads(pickle.dumps(chain))
    assert again == chain
    assert torch.equal(again(logits(2, 30)), chain(logits(2, 30)))


# ---- errors: chains


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minp(0.1)", r"^unknown rule 'minp'; did you mean min_p\?$"),
        ("top_q(0.1)", r"^unknown rule 'top_q'; did you mean top_[pkawh]\?$"),
        ("zzzz", r"^unknown rule 'zzzz'; known are adapt, adaptive_p, .*, xtc$"),
        ("min_p(q=0.1)", r"^min_p has no parameter 'q'; it has p$"),
        ("min_p(0.1, 0.2)", r"^min_p takes at most 1 parameters \(p\), got 2$"),
        ("min_p(0.1, p=0.2)", r"^min_p: p was given twice$"),
        ("min_p(p=0.1, p=0.2)", r"^min_p: p was given twice$"),
        ("min_p(1.5)", r"^min_p: p must be in \[0, 1\] \(0 = off\), got 1\.5$"),
        ("min_p(-0.1)", r"^min_p: p must be in \[0, 1\] \(0 = off\), got -0\.1$"),
        ("min_p(nan)", r"^min_p: p must be in \[0, 1\] \(0 = off\), got nan$"),
        ("min_p(inf)", r"^min_p: p must be in \[0, 1\] \(0 = off\), got inf$"),
        ("temperature(-1)", r"^temperature: t must be in \[0, inf\) \(1 = off\), got -1$"),
        ("temperature(inf)", r"^temperature: t must be in \[0, inf\) \(1 = off\), got inf$"),
        ("top_n_sigma(-1)", r"^top_n_sigma: n must be in \[0, inf\) \(or inf = off\), got -1$"),
        ("top_k(2.5)", r"^top_k: k must be an integer in \[1, inf\) \(or 0 = off\), got 2\.5$"),
        ("top_k(-3)", r"^top_k: k must be an integer in \[1, inf\) \(or 0 = off\), got -3$"),
        ("top_k(inf)", r"^top_k: k must be an integer in \[1, inf\) \(or 0 = off\), got inf$"),
        ("top_k([3, inf])", r"^top_k: k must be an integer in \[1, inf\) \(or 0 = off\), got inf in row 1$"),
        ("top_k(nan)", r"^top_k: k must be an integer in \[1, inf\) \(or 0 = off\), got nan$"),
        ("min_p(1" + "0" * 400 + ")", r"^min_p: p must be in \[0, 1\] \(0 = off\), got "),
        ("top_p([0.5, 1.5])", r"^top_p: p must be in \[0, 1\] \(1 = off\), got 1\.5 in row 1$"),
        ("top_p([0.5, nan])", r"^top_p: p must be in \[0, 1\] \(1 = off\), got nan in row 1$"),
        ("min_p('0.1')", r"^min_p: p must be a number in \[0, 1\] \(0 = off\) or a \(B, 1\) tensor of them, got '0\.1'$"),
        ("min_p(True)", r"^min_p: p must be a number in .*, got True$"),
        ("min_p(None)", r"^min_p: p must be a number in .*, got None$"),
        ("min_p(1j)", r"^min_p: p must be a number in .*, got 1j$"),
        ("min_p([])", r"^min_p: a list must hold one number per row, got \[\]$"),
        ("min_p(['a'])", r"^min_p: a list must hold one number per row, got \['a'\]$"),
        ("min_p([True])", r"^min_p: a list must hold one number per row, got \[True\]$"),
        ("min_p([[0.1]])", r"^min_p: a list must hold one number per row"),
        ("min_p({[1]: 2})", r"^min_p: "),
        (
            "min_p(x)",
            r"^min_p: a value must be a number, inf, a list of them, a word in quotes, or token ids in brackets, got x$",
        ),
        (
            "min_p(top_k(3))",
            r"^min_p: a value must be a number, inf, a list of them, a word in quotes, .*, got top_k\(3\)$",
        ),
        ("min_p(*[0.1])", r"^min_p: \* and \*\* have no meaning in a chain's text"),
        ("min_p(**{'p': 0.1})", r"^min_p: \* and \*\* have no meaning in a chain's text"),
        ("min_p(self=0.1)", r"^min_p has no parameter 'self'; it has p$"),
        ("", r"^a chain is written rule\(value\) \| rule\(value\) \| \.\.\., got ''$"),
        ("min_p(0.1) |", r"^a chain is written rule\(value\) \| rule\(value\) .*got 'min_p\(0.1\) \|': .*character 13$"),
        ("top_k(3) min_p(0.1)", r"^a chain is written .*, character 10$"),
        ("min_p(0.1) & top_k(3)", r"^a chain is written .*got 'min_p\(0\.1\) & top_k\(3\)' in "),
        ("min_p(0.1); top_k(3)", r"^a chain is written "),
        ("min-p(0.1)", r"^a chain is written "),
        (
            "min_p([0.1, 0.2]) | top_p([0.5])",
            r"^the steps of a chain are given for different numbers of rows: .* for 2, .* for 1$",
        ),
    ],
)
def test_texts_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DecalError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "__import__('os').system('echo broken')",
        "().__class__.__bases__[0].__subclasses__()",
        "min_p.__class__",
        "min_p(__import__('os').getpid())",
        "min_p([__import__('os').getpid()])",
        "[min_p(0.1) for _ in (1,)]",
        "(lambda: min_p(0.1))()",
        "(x := min_p(0.1))",
        "exec('1')",
        "eval",
        "min_p(0.1) if True else top_k(1)",
        "min_p(f'{1}')",
        "'min_p'",
        "min_p\x00(0.1)",
        "min_p(0.1)\ntop_k(3)",
        "min_p(" + "-" * 3000 + "1)",
        "min_p(" + "[" * 3000 + "]" * 3000 + ")",
        "(" * 3000 + "min_p" + ")" * 3000,
        "a" + ".a" * 3000,
        "\ud800",
    ],
    ids=lambda text: text[:30].encode("ascii", "replace").decode(),
)
def test_code_is_refused(text: str) -> None:
    with pytest.raises(DecalError):
        parse(text)


def test_a_long_chain_is_parsed_or_refused() -> None:
    for count in (100, 800, 20_000):
        try:
            assert len(parse(" | ".join(["min_p"] * count)).steps) == count
        except DecalError:
            assert count > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^a chain in JSON is "),
        ("[]", r"^a chain in JSON is "),
        ("{}", r"^a chain in JSON is "),
        ('{"chain": 3}', r"^a chain in JSON is "),
        ('{"chain": "min_p"}', r"^a chain in JSON is "),
        ('{"chain": []}', r"^a chain needs at least one step"),
        ('{"chain": [{"p": 0.1}]}', r"^a chain in JSON is "),
        ('{"chain": [["rule"]]}', r"^a chain in JSON is "),
        ('{"chain": [{"rule": 5}]}', r"."),
        ('{"chain": [{"rule": ["min_p"]}]}', r"."),
        ('{"chain": [{"rule": "minp"}]}', r"^unknown rule 'minp'; did you mean min_p\?"),
        ('{"chain": [{"rule": "min_p", "q": 1}]}', r"^min_p has no parameter 'q'; it has p$"),
        ('{"chain": [{"rule": "min_p", "self": 1}]}', r"^min_p has no parameter 'self'; it has p$"),
        ('{"chain": [{"rule": "min_p", "p": NaN}]}', r"^min_p: p must be in .*, got nan$"),
        ('{"chain": [{"rule": "min_p", "p": "inf"}]}', r"^min_p: p must be in .*, got inf$"),
        ('{"chain": [{"rule": "min_p", "p": null}]}', r"^min_p: p must be a number in .*, got None$"),
        ('{"chain": [{"rule": "min_p", "p": [0.1, "x"]}]}', r"^min_p: a list must hold one number per row"),
        ('{"chain": [{"rule": "min_p", "p": {"a": 1}}]}', r"^min_p: p must be a number in "),
        ("[" * 100_000, r"^a chain in JSON is "),
    ],
    ids=lambda text: text[:40],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(DecalError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(0.1), r"^min_p: p as a tensor must have shape \(B, 1\), one value per row, got \(\)$"),
        (torch.tensor([0.1, 0.2]), r"^min_p: p as a tensor must have shape \(B, 1\), one value per row, got \(2,\)$"),
        (torch.tensor([[0.1, 0.2]]), r"^min_p: p as a tensor must have shape \(B, 1\), one value per row, got \(1, 2\)$"),
        (torch.zeros(0, 1), r"^min_p: p as a tensor must have shape \(B, 1\), one value per row, got \(0, 1\)$"),
        (torch.zeros(2, 1, 1), r"^min_p: p as a tensor must have shape \(B, 1\)"),
        (torch.tensor([[True]]), r"^min_p: p as a tensor must hold numbers, got torch\.bool$"),
        (torch.tensor([[1j]]), r"^min_p: p as a tensor must hold numbers, got torch\.complex64$"),
        (torch.tensor([[0.1], [NAN]]), r"^min_p: p must be in \[0, 1\] \(0 = off\), got nan in row 1$"),
        (torch.tensor([[0.1], [0.5], [2.0]]), r"^min_p: p must be in \[0, 1\] \(0 = off\), got 2\.0 in row 2$"),
        ([0.1], r"^min_p: p must be a number in .* or a \(B, 1\) tensor of them, got \[0\.1\]$"),
    ],
    ids=str,
)
def test_values_that_are_refused(value: object, message: str) -> None:
    with pytest.raises(DecalError, match=message):
        decal.min_p(value)


def test_enormous_values_are_values_or_refused() -> None:
    z = logits(2, 20)
    for k in (2**31, 2**63, 10**30):
        assert torch.equal(decal.top_k(k)(z), z)
    with pytest.raises(DecalError, match=r"^top_k: k must be an integer"):
        decal.top_k(10**400)


def test_unknown_attributes_name_the_rules() -> None:
    with pytest.raises(AttributeError, match=r"^module 'decal' has no attribute 'minp'; its rules are .*min_p"):
        _ = decal.minp
    with pytest.raises(ImportError):
        from decal import top_z  # noqa: F401


def test_decal_errors_are_value_errors() -> None:
    assert issubclass(DecalError, ValueError)


# ---- errors: logits


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (torch.zeros(3), r"torch\.float32 \(3,\)"),
        (torch.zeros(2, 3, 4), r"torch\.float32 \(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.long), r"torch\.int64 \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.bool), r"torch\.bool \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), r"torch\.complex64 \(2, 3\)"),
        (torch.zeros(2, 0), r"torch\.float32 \(2, 0\)"),
        (torch.zeros(0, 5), r"torch\.float32 \(0, 5\)"),
        ([[0.0, 1.0]], "list"),
    ],
    ids=str,
)
@pytest.mark.parametrize("check", [True, False])
def test_logits_that_are_refused(bad: Tensor, got: str, check: bool) -> None:
    for apply in (decal.min_p(0.1), decal.min_p(0.1).mask):
        with pytest.raises(DecalError, match=rf"^logits must be a floating-point tensor of shape \(B, V\), got {got}$"):
            apply(bad, check=check)


def test_per_row_parameters_fit_the_logits() -> None:
    chain = decal.min_p(column(0.1, 0.2))
    with pytest.raises(DecalError, match=r"^the chain has parameters for 2 rows, the logits have 3$"):
        chain(logits(3, 5))
    with pytest.raises(DecalError, match=r"^the steps of a chain are given for different numbers of rows: .* for 2, .* for 3$"):
        chain | decal.top_p(column(0.1, 0.2, 0.3))


@pytest.mark.parametrize(("value", "shown"), [(NAN, "nan"), (INF, "inf")])
@pytest.mark.parametrize("text", ["min_p(0.1)", "temperature(0.7) | top_p(0.9)", "top_k(0)"])
def test_values_no_model_should_produce_are_named(text: str, value: float, shown: str) -> None:
    z = logits(4, 9)
    z[2, 5] = value
    z[3, 1] = value
    message = rf"^logits must be finite or -inf, got {shown} in row 2 at token 5$"
    with pytest.raises(DecalError, match=message):
        parse(text)(z)
    with pytest.raises(DecalError, match=message):
        parse(text).mask(z)


def test_rows_with_nothing_finite_are_named() -> None:
    z = logits(4, 9)
    z[1] = -INF
    with pytest.raises(DecalError, match=r"^every row of logits needs a finite value, row 1 has none$"):
        decal.min_p(0.1)(z)


# ---- extreme values


def test_tiny_temperature_on_half_precision() -> None:
    z = torch.tensor([[60000.0, 59968.0, 0.0, -60000.0, -INF], [-1.0, -1.0, -3.0, -4.0, -5.0]], dtype=torch.float16)
    got = decal.temperature(1e-6)(z)
    assert got.dtype == torch.float16
    assert torch.equal(got > -INF, z > -INF)
    assert got[z > -INF].isfinite().all()
    torch.testing.assert_close(got.softmax(-1), torch.tensor([[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]], dtype=torch.float16))


@pytest.mark.parametrize("text", ["temperature(1e-6)", "temperature(1e-6) | min_p(0.1)", "top_k(3) | temperature(1e-6)"])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_float32_logits_stay_finite(text: str, sign: int) -> None:
    z = torch.tensor([[3e38, 2e38, 1e30, 1e30, -INF, 0.0, -3e38]]) * torch.tensor([sign, sign, 1, 1, 1, 1, sign])
    got = parse(text)(z)
    mode = int(z.argmax())
    assert not got.isnan().any()
    assert not got.isposinf().any()
    assert got[0, mode].isfinite()
    assert got.argmax() == mode
    assert got[0, 4] == -INF
    torch.testing.assert_close(got.softmax(-1)[0, mode], torch.tensor(1.0))


@pytest.mark.parametrize("t", [1e-30, 1e-200, 1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_tend_to_the_mode(t: float) -> None:
    rows = [[5.0, 1.0, -2.0], [-2.0, -3.0, -9.0], [1e30, 1e29, -1e30], [-1e30, -3e30, -1e31], [0.0, 0.0, -1.0]]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        z = torch.tensor(rows, dtype=dtype)
        modes = z == z.amax(-1, keepdim=True)
        for chain in (
            decal.temperature(t),
            decal.temperature(t) | decal.top_p(0.9),
            decal.temperature(t) | decal.temperature(t),
        ):
            got = chain(z)
            assert not got.isnan().any()
            assert not got.isposinf().any()
            torch.testing.assert_close(got.double().softmax(-1), modes.double() / modes.sum(-1, keepdim=True))
            assert torch.equal(chain.mask(z)[modes], z[modes])


def test_temperature_keeps_probabilities_whatever_the_level() -> None:
    z = torch.tensor([[0.0, -1.0, -2.0]]) + torch.tensor([[0.0], [60000.0], [-60000.0]])
    got = decal.temperature(0.5)(z)
    torch.testing.assert_close(got.softmax(-1), torch.tensor([[0.0, -2.0, -4.0]] * 3).softmax(-1))
    half = decal.temperature(0.5)(z[:1].half() + torch.tensor([[40000.0]], dtype=torch.float16))
    assert half.isfinite().all()
    assert half[0, 0] == half.amax()


def test_temperature_zero_anywhere_in_a_chain() -> None:
    z = logits(6, 30).float()
    z[0, 3] = z[0, 9] = z[0].max() + 1
    modes = z == z.amax(-1, keepdim=True)
    for text in (
        "temperature(0)",
        "temperature(0) | top_p(0.9)",
        "top_p(0.9) | temperature(0)",
        "temperature(0) | temperature(3)",
    ):
        got = parse(text)(z)
        assert torch.equal(got.isfinite(), modes), text
        torch.testing.assert_close(got.softmax(-1), modes / modes.sum(-1, keepdim=True))
    mixed = decal.temperature(column(0, 1, 2, 0, 1, 2))(z)
    assert torch.equal(mixed.isfinite().sum(-1), torch.tensor([2, 30, 30, 1, 30, 30]))
    assert torch.equal(mixed[1], z[1])


# ---- per-row parameters


def test_a_row_can_be_off_while_another_is_not() -> None:
    z = logits(3, 100)
    single = {name: rule for name, rule in decal.RULES.items() if len(rule.params) == 1 and not rule.needs}
    assert len(single) > 15
    for name, rule in single.items():
        (param,) = rule.params.values()
        if param.off is None or param.static:
            continue
        got = rule(column(param.default if param.default != param.off else 2.0, param.off, param.off))(z)
        assert torch.equal(got[1:], z[1:]), name
        assert not torch.equal(got[0], z[0]), name


def test_parameters_from_tensors_of_any_type() -> None:
    z = logits(2, 50)
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64, torch.float16):
        assert torch.equal(decal.top_k(torch.tensor([[3], [7]], dtype=dtype))(z).isfinite().sum(-1), torch.tensor([3, 7]))
    parameter = torch.tensor([[0.5], [0.25]], requires_grad=True)
    assert not decal.min_p(parameter)(z).requires_grad


# ---- rules declared by a user


def test_a_declared_rule_is_a_rule_like_any_other(registry: dict[str, decal.Rule]) -> None:
    @decal.rule(paper="none")
    def gap(row: Row, width: Tensor = Param(1.0, low=0, high=100, off=math.inf, sweep=(1, 2))) -> Tensor:
        """Keep logits within ``width`` of the largest."""
        return row.max - width

    z = logits(3, 40)
    wanted = z.masked_fill(z < z.amax(-1, keepdim=True) - 2, -INF)
    assert registry["gap"] is gap is decal.gap
    assert gap.kind == "truncation"
    assert gap.reads == {"max"}
    assert gap.summary == "Keep logits within ``width`` of the largest."
    assert torch.equal(gap(2)(z), wanted)
    assert torch.equal(parse("gap(2)")(z), wanted)
    assert str(gap(2)) == "gap(2.0)"
    assert parse("gap") == gap()
    assert from_json(gap(INF).to_json()) == gap(INF)
    assert torch.equal(gap(INF)(z), z)
    with pytest.raises(DecalError, match=r"^gap: width must be in \[0, 100\] \(or inf = off\), got -1$"):
        gap(-1)
    with pytest.raises(DecalError, match=r"^gap has no parameter 'w'; it has width$"):
        gap(w=1)
    with pytest.raises(DecalError, match=r"did you mean gap\?"):
        parse("gapp(1)")
    per_row = gap(column(2, 0, INF))(z)
    assert torch.equal(per_row, torch.cat([wanted[:1], gap(0)(z[1:2]), z[2:]]))
    assert len((decal.top_k(3) | gap(1)).plan) == 1
    assert len((decal.top_k(3) | gap(1) | decal.top_p(0.5)).plan) == 2


def test_a_rule_without_parameters(registry: dict[str, decal.Rule]) -> None:
    @decal.rule(paper="none")
    def above_average(row: Row) -> Tensor:
        """Keep tokens at least as probable as the average one."""
        return row.logz - torch.log(row.count)

    z = logits(3, 40)
    kept = z.softmax(-1) >= 1 / 40
    for chain in (above_average(), parse("above_average"), parse("above_average()")):
        assert torch.equal(chain(z), z.masked_fill(~kept, -INF))
        assert str(chain) == "above_average()"
        assert len(chain.plan[0].cut) == 1, "a rule without parameters is never off"
        assert from_json(chain.to_json()) == chain
    with pytest.raises(DecalError, match=r"^above_average has no parameter 'p'; it has none$"):
        above_average(p=1)
    with pytest.raises(DecalError, match=r"^above_average takes at most 0 parameters"):
        above_average(1)
    with pytest.raises(DecalError, match="got 1"):
        parse("above_average(1)")


def test_a_rule_with_two_parameters(registry: dict[str, decal.Rule]) -> None:
    @decal.rule(paper="none")
    def either(
        row: Row,
        p: Tensor = Param(0.1, low=0, high=1, off=0.0),
        k: Tensor = Param(3, low=1, off=0, integer=True),
    ) -> Tensor:
        """Keep the ``k`` largest and what is at least ``p`` times as probable as the mode."""
        return torch.minimum(row.max + torch.log(p), row.upper(count=k.clamp(min=1)))

    z = logits(2, 40)

    def wanted(p: float, k: int, row: Tensor) -> Tensor:
        return (row >= row.max() + math.log(p)) | (row >= row.sort(descending=True).values[k - 1])

    chain = either(0.5, k=4)
    assert str(chain) == "either(0.5, 4)"
    assert torch.equal(chain(z).isfinite(), torch.stack([wanted(0.5, 4, row) for row in z]))
    assert parse("either(0.5, k=4)") == parse("either(k=4, p=0.5)") == parse(str(chain)) == chain
    assert from_json(chain.to_json()) == chain
    assert str(either(k=5)) == "either(0.1, 5)"
    mixed = either(column(0.5, 0.01), 4)
    assert torch.equal(mixed(z).isfinite(), torch.stack([wanted(0.5, 4, z[0]), wanted(0.01, 4, z[1])]))
    assert parse(str(mixed)) == mixed
    off = either(0.0, 0)
    assert torch.equal(off(z), z)
    assert [str(s) for s in off.plan[0].cut] == []
    half_off = either(column(0.0, 0.5), column(0, 4))
    assert torch.equal(half_off(z)[0], z[0])
    assert torch.equal(half_off(z)[1].isfinite(), wanted(0.5, 4, z[1]))
    with pytest.raises(DecalError, match=r"^either: parameters are given for different numbers of rows: \[2, 3\]$"):
        either(column(0.1, 0.2), column(3, 4, 5))
    with pytest.raises(DecalError, match=r"^either: k must be an integer in \[1, inf\) \(or 0 = off\), got 1\.5$"):
        either(0.1, 1.5)


def test_a_declared_reshaping_and_a_declared_band(registry: dict[str, decal.Rule]) -> None:
    @decal.rule(paper="none")
    def squash(row: Row, by: Tensor = Param(0.5, low=0, high=1, off=0.0)) -> Affine:
        """Move every logit towards the largest."""
        return Affine(1 - by, by * row.max)

    @decal.rule(paper="none")
    def middle(row: Row, width: Tensor = Param(1.0, low=0, off=math.inf)) -> Band:
        """Keep logits about as far below the largest as one standard deviation."""
        return Band(row.max - row.std - width, row.max)

    z = logits(3, 40)
    assert (squash.kind, middle.kind) == ("reshaping", "band")
    torch.testing.assert_close(squash(0.25)(z), 0.75 * z + 0.25 * z.amax(-1, keepdim=True))
    low = z.amax(-1, keepdim=True) - z.std(-1, correction=0, keepdim=True) - 0.5
    assert torch.equal(middle(0.5)(z).isfinite(), z >= low)
    for text in ("squash(0.3) | middle(1.0) | squash(0.5) | top_k(3)", "min_p(0.01) | squash(0.5) | temperature(2)"):
        torch.testing.assert_close(parse(text)(z), step_by_step(parse(text), z))


def test_a_reshaping_switched_off_in_a_row_leaves_it_alone(registry: dict[str, decal.Rule]) -> None:
    """Whatever its formula gives there: sin(s)/s has no value at 0."""

    @decal.rule(paper="none")
    def sinc(row: Row, s: Tensor = Param(1.0, low=0, high=3, off=0.0)) -> Affine:
        """Multiply the logits by sin(s) / s."""
        return Affine(torch.sin(s) / s, torch.zeros_like(s))

    z = logits(2, 10)
    got = sinc(column(0.0, 1.0))(z)
    assert torch.equal(got[0], z[0])
    torch.testing.assert_close(got[1], z[1] * math.sin(1))


def test_a_rule_that_uses_the_kth_logit_sees_the_cut_before_it(registry: dict[str, decal.Rule]) -> None:
    """The k-th largest logit is not the same before and after a cut that leaves fewer than k."""

    @decal.rule(paper="none")
    def halfway(row: Row, k: Tensor = Param(5, low=1, off=0, integer=True)) -> Tensor:
        """Keep logits above the middle of the largest and the k-th largest."""
        return (row.max + row.upper(count=k.clamp(min=1))) / 2

    z = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0, -40.0]], dtype=torch.float64)
    chain = decal.top_k(3) | halfway(6)
    assert step_by_step(chain, z).isfinite().sum() == 2
    assert torch.equal(chain(z), step_by_step(chain, z))


def test_a_fixed_threshold_after_a_band_empties_no_row(registry: dict[str, decal.Rule]) -> None:
    @decal.rule(paper="none")
    def floor(row: Row, z: Tensor = Param(0.0, low=-100, high=100, off=-100.0)) -> Tensor:
        """Keep logits of at least ``z``."""
        return z

    z = torch.tensor([[0.4] + [0.6 / 99] * 99], dtype=torch.float64).log()
    chain = decal.typical(0.3) | floor(-2.0)
    assert not decal.typical(0.3)(z)[0, 0].isfinite()
    assert torch.equal(chain(z), step_by_step(chain, z))
    assert chain(z).isfinite().any()


def test_a_name_is_declared_once(registry: dict[str, decal.Rule]) -> None:
    with pytest.raises(DecalError, match=r"^rule min_p is declared already, in decal\.samplers\.truncation$"):

        @decal.rule(paper="none")
        def min_p(row: Row) -> Tensor:
            """Something else."""
            return row.max

    assert str(decal.min_p(0.5)) == "min_p(0.5)"


def test_arguments_need_a_declaration(registry: dict[str, decal.Rule]) -> None:
    with pytest.raises(
        DecalError,
        match=r"^rule half: argument 'p' needs a Param\(\.\.\.\), Choice\(\.\.\.\), Numbers\(\.\.\.\) or Tokens\(\) "
        r"as its default$",
    ):

        @decal.rule(paper="none")
        def half(row: Row, p: float = 0.5) -> Tensor:
            """Something."""
            return row.max - p

    assert "half" not in registry


def test_a_body_that_asks_for_the_unknown_fails_when_declared(registry: dict[str, decal.Rule]) -> None:
    wanted = r"^rule above_median, line \d+: a row has no statistic 'median'; it has max, min, logz, entropy"
    with pytest.raises(DecalError, match=wanted):

        @decal.rule(paper="none")
        def above_median(row: Row) -> Tensor:
            """Keep the upper half."""
            return row.median

    assert "above_median" not in registry


def test_a_rule_shows_its_parameters_and_paper() -> None:
    assert repr(decal.min_p) == "<rule min_p(p=0.1), arXiv:2407.01082>"


# ---- imports


def test_importing_decal_imports_nothing_heavy_but_torch() -> None:
    code = (
        "import sys, decal; decal.parse('temperature(0.8) | top_k(5)').plan;"
        "print([name for name in ('transformers', 'triton', 'numba', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- what explain says of the order


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "temperature(1.5) | ees(1)",
            "warning: ees was made to stand before temperature; here it comes after temperature(1.5)",
        ),
        ("temperature(0.5) | eta(0.01)", "warning: eta was made to stand before temperature"),
        (
            "p_less(1) | temperature(2)",
            "warning: p_less was made to stand after temperature; here it comes before temperature(2.0)",
        ),
        ("adaptive_p(0.5) | temperature(2)", "warning: adaptive_p was made to stand after temperature"),
        (
            "temperature(2) | min_p(0.1)",
            f"note: min_p(0.1) after temperature(2.0) keeps the same tokens as min_p({0.1**2!r}) before it",
        ),
        ("temperature(2) | top_n_sigma(1)", "note: top_n_sigma(1.0) keeps the same tokens before temperature(2.0) as after it"),
        ("temperature(2) | top_k(5)", "note: top_k(5) keeps the same tokens before temperature(2.0) as after it"),
    ],
)
def test_explain_notes_what_the_order_means(text: str, note: str) -> None:
    assert note in explained(text)


@pytest.mark.parametrize(
    "text",
    [
        "ees(1) | temperature(1.5)",
        "temperature(1) | ees(1)",
        "temperature(2) | p_less(1)",
        "temperature(2) | top_p(0.9)",
        "temperature(0) | min_p(0.1)",
        "temperature(2) | ees(0)",
        "min_p(0.1) | temperature(2)",
    ],
)
def test_explain_has_nothing_to_say_of_a_usual_order(text: str) -> None:
    assert "warning:" not in explained(text)
    assert "note:" not in explained(text)


def explained(text: str) -> str:
    out = io.StringIO()
    parse(text).explain(out)
    return out.getvalue()


def test_notes_are_true() -> None:
    """What explain says is the same is the same."""
    z = logits(20, 300)
    for after in ("min_p(0.13)", "top_n_sigma(1.3)", "top_k(7)"):
        note = next(line for line in explained(f"temperature(1.7) | {after}").splitlines() if "note:" in line)
        before = note.split(" as ")[1].removesuffix(" before it") if "note: min_p" in note else after
        assert torch.equal(parse(f"temperature(1.7) | {after}").mask(z).isfinite(), parse(before).mask(z).isfinite()), note
