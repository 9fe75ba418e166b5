"""Grids: how many settings, which, and what a file of them may hold."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

import decal
from decal import DecalError
from decal.eval import grid

TEMPERATURES = [0.01, 0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0]
FILTERS = (
    [f"top_k({k})" for k in (10, 20, 50, 80, 100, 500)]
    + [f"top_p({p})" for p in (0.1, 0.5, 0.7, 0.9, 0.95)]
    + [f"min_p({p})" for p in (0.01, 0.1, 0.5, 0.9)]
)


def test_the_papers_grid() -> None:
    settings = grid.load("paper")
    chains = [str(s.chain) for s in settings]
    # 12 temperatures, 16 filter settings (one of them none) and 2 orders; at temperature 1 and without a filter both orders
    # are the same.
    assert len(FILTERS) == 15
    expected = {f"temperature({t})" for t in TEMPERATURES}
    expected |= {f"temperature({t}) | {f}" for t in TEMPERATURES for f in FILTERS}
    expected |= {f"{f} | temperature({t})" for t in TEMPERATURES if t != 1 for f in FILTERS}
    assert len(expected) == 12 * 16 * 2 - 12 - 15 == 357
    assert set(chains) == expected | {"temperature(0.0)"}
    assert len(chains) == len(set(chains))
    assert Counter(s.family for s in settings) == {
        "greedy": 1, "temperature": 12, "top_k": 6 * 23, "top_p": 5 * 23, "min_p": 4 * 23,
    }  # fmt: skip


def families(slow: bool) -> set[str]:
    """One for each rule but those with a table to fit: cuts by themselves, others behind min_p."""
    return {
        name if rule.kind in ("truncation", "band", "projection") else f"min_p | {name}"
        for name, rule in decal.RULES.items()
        if name not in ("temperature", "conformal_nucleus", "calibrated_top_k")
        and (slow or not rule.slow)
        and not rule.needs & {"answers", "prompts"}
    }


@pytest.mark.parametrize("name", ["quick", "all"])
def test_every_sampler_has_the_same_number_of_settings(name: str) -> None:
    counts = Counter(s.family for s in grid.load(name))
    assert counts.pop("greedy") == 1
    assert set(counts) == families(slow=name == "all") | {"temperature"}
    assert len(counts) >= 35
    assert set(counts.values()) == {grid.BUDGET} == {66}


def test_temperatures_and_partners_are_spread_evenly() -> None:
    for values, ends in ((grid.FINE, (0.3, 3.0)), (grid.CUTS, (0.7, 0.005))):
        assert (values[0], values[-1]) == ends
        steps = [b / a for a, b in itertools.pairwise(values)]
        assert max(steps) / min(steps) < 1.02
    assert len(grid.FINE) == grid.BUDGET
    assert set(grid.FEW) < set(grid.TEMPERATURES)


def test_quick_tries_temperature_before_and_after() -> None:
    chains = {str(s.chain) for s in grid.load("quick")}
    for name, rule in decal.RULES.items():
        if name in families(slow=False):
            values = {p: param.sweep[0] for p, param in rule.params.items() if param.sweep}
            own = rule(**values)
            behind = {str(own | decal.temperature(t)) for t in (grid.MANY if rule.scale else grid.FEW) if t != 1}
            before = {str(decal.temperature(t) | own) for t in grid.FEW if t != 1}
            assert behind <= chains, name
            assert before <= chains or (rule.scale and not before & chains), name


@pytest.mark.parametrize("name", grid.NAMES)
def test_no_setting_comes_twice(name: str) -> None:
    settings = grid.load(name)
    effective = [tuple(str(step) for step in s.chain.steps if not step.is_off) for s in settings]
    assert len(set(effective)) == len(effective)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "own.txt"


def chains_of(file: Path) -> list[tuple[str, str]]:
    """What a file adds to what every grid has."""
    settings = [(s.family, str(s.chain)) for s in grid.load(str(file))]
    plain = [("greedy", "temperature(0.0)"), *(("temperature", f"temperature({t})") for t in TEMPERATURES)]
    assert settings[:13] == plain
    return settings[13:]


def test_a_file(file: Path) -> None:
    file.write_text(
        "# what we use\n"
        "\n"
        "temperature({0.7, 1.5}) | min_p({0.05,0.1})   # four\n"
        "top_p(0.9)\n"
        "  top_p(0.9) | flatten(0.5)\n"
        "temperature(4)\n"
    )
    assert chains_of(file) == [
        ("min_p", "temperature(0.7) | min_p(0.05)"),
        ("min_p", "temperature(0.7) | min_p(0.1)"),
        ("min_p", "temperature(1.5) | min_p(0.05)"),
        ("min_p", "temperature(1.5) | min_p(0.1)"),
        ("top_p", "top_p(0.9)"),
        ("top_p | flatten", "top_p(0.9) | flatten(0.5)"),
        ("temperature", "temperature(4.0)"),
    ]


def test_a_file_that_repeats_itself(file: Path) -> None:
    file.write_text("temperature(1.4)\ntop_p(0.9)\ntop_p(0.9)|temperature(1)\ntemperature({2, 2})\ntop_k({5, 5})\n")
    assert chains_of(file) == [("top_p", "top_p(0.9)"), ("top_k", "top_k(5)")]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("top_p(0.9)\ntop_pp(0.9)\n", 2, "unknown rule 'top_pp'; did you mean top_p?"),
        ("# comment\n\nmin_p({0.1, 2})", 3, "min_p: p must be in [0, 1]"),
        ("min_p(nan)", 1, "min_p: p must be in [0, 1]"),
        ("top_p(0.9) |", 1, "a chain is written rule(value) | rule(value)"),
        ("temperature({0.7, 1)", 1, "a chain is written rule(value) | rule(value)"),
        ("top_p(q=0.9)", 1, "top_p has no parameter 'q'"),
        ("top_k([1, 2])", 1, "a grid needs one value per parameter"),
    ],
)
def test_errors_name_the_line(text: str, line: int, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(DecalError) as caught:
        grid.load(str(file))
    assert str(caught.value).startswith(f"{file}:{line}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing here\n"])
def test_an_empty_file(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(DecalError, match="no chain in the file"):
        grid.load(str(file))


def test_no_such_grid(tmp_path: Path) -> None:
    for name in ("quik", str(tmp_path), str(tmp_path / "missing.txt")):
        with pytest.raises(DecalError, match="neither quick nor all nor paper, and not a readable file") as caught:
            grid.load(name)
        assert repr(name) in str(caught.value)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DecalError, match="not a readable file"):
        grid.load(str(binary))
