"""Which settings are compared: lists of chains, each in a family that is tuned with the same number of settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decal.samplers.chain import Chain, parse
from decal.samplers.errors import DecalError
from decal.samplers.rule import RULES, NumbersParameter, Rule, find

TEMPERATURES = (0.01, 0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
"""Temperatures of arXiv 2605.11128."""

PAPER = {
    "top_k": (10, 20, 50, 80, 100, 500),
    "top_p": (0.1, 0.5, 0.7, 0.9, 0.95),
    "min_p": (0.01, 0.1, 0.5, 0.9),
}
"""Filter settings of arXiv 2605.11128; with no filter they make 16."""

FEW = (0.6, 0.8, 1.0, 1.4, 2.0, 3.0)
"""Half of them, for grids in which there are many rules."""

PARTNER = "min_p"
"""The cut that a rule which is none is tried after: reshaping alone would be a temperature or worse."""

ORDERS = 2 * len(FEW) - 1
"""Ways to put one of a few temperatures before or after a cut; at temperature 1 they are the same."""

MANY = tuple(float(f"{FEW[0] * (FEW[-1] / FEW[0]) ** (i / (ORDERS - 1)):.4g}") for i in range(ORDERS))
"""As many temperatures as that, over the same range, for cuts that don't see it."""

CUTS = tuple(float(f"{0.7 * (0.005 / 0.7) ** (i / (ORDERS - 1)):.3g}") for i in range(ORDERS))
"""As many values of the partner as that, from 0.7 to 0.005, evenly in logarithm."""

BUDGET = ORDERS * 6
"""Settings of every sampler, at the six settings each rule declares."""

FINE = tuple(float(f"{0.3 * 10 ** (i / (BUDGET - 1)):.4g}") for i in range(BUDGET))
"""As many temperatures as that, from 0.3 to 3, evenly in logarithm."""

NAMES = ("quick", "all", "paper")


ORACLE = "oracle: "
"""How the names of families begin that know the valid answers."""


def is_oracle(family: str) -> bool:
    """Whether a family knows the valid answers: it is shown, and neither ranked nor recommended."""
    return family.startswith(ORACLE)


@dataclass(frozen=True)
class Setting:
    """A chain and the family of samplers it is counted under."""

    family: str
    chain: Chain


def load(name: str) -> list[Setting]:
    """The grid ``quick``, ``all``, ``paper``, or that of a file; greedy and plain temperature are part of every grid.

    ``quick`` tries every declared rule but the slow ones at the six settings it declares worth comparing: a cut with a few
    temperatures before and after it, or more of them after it if the place makes no difference; another rule behind as many
    cuts of `PARTNER`. So all have the same number of settings, and plain temperature too. ``all`` has the slow ones as well.
    ``paper`` is the grid of arXiv 2605.11128. A file has one chain a line, where ``{a, b}`` stands for either value.

    Raises:
        DecalError: no such grid or file, or a line that isn't a chain.
    """
    if name in ("quick", "all"):
        fine = [Setting("temperature", find("temperature")(t)) for t in FINE]
        return _unique([_plain()[0], *fine, *_every_rule(slow=name == "all")])
    if name == "paper":
        return _unique(
            _plain() + [s for rule, values in PAPER.items() for s in _both_orders(find(rule), [(v,) for v in values])]
        )
    return _unique(_plain() + _from_file(name))


def _plain() -> list[Setting]:
    chains = [find("temperature")(t) for t in TEMPERATURES]
    return [Setting("greedy", find("temperature")(0.0)), *(Setting("temperature", chain) for chain in chains)]


def _both_orders(rule: Rule, values: Sequence[tuple[Any, ...]], temperatures: Sequence[float] = TEMPERATURES) -> list[Setting]:
    return [
        Setting(rule.name, chain)
        for t, value in itertools.product(temperatures, values)
        for chain in (find("temperature")(t) | rule(*value), rule(*value) | find("temperature")(t))
    ]


RANGE = (0.5, 3.0)
"""Temperatures that settings are drawn from, evenly in logarithm."""

READ = ("min_p", "top_p", "top_k", "top_n_sigma", "adapt", "split_temperature")
"""Rules that are tried on what several prompts say together."""


def drawn(budget: int, seed: int = 0, *, prompts: bool = False, rules: Sequence[str] = ()) -> list[Setting]:
    """``budget`` settings of every sampler, spread evenly over what its parameters declare worth comparing (Halton's sequence).

    They are drawn before anything is seen, so what is chosen among them on some prompts can be judged on others. Cuts stand
    before or after a temperature, or before it if they were made to; other rules stand behind a cut of `PARTNER`; slow rules
    are left out.

    Args:
        prompts: whether to try the rules of `READ` on the mean over other prompts too.
        rules: names of the rules to try beside plain temperature; all, if none are given.
    """
    whole = _Axis.of((0.0, 1.0))
    hot = [1.0, *(t for (t,) in _points([_Axis.of((0.3, 3.0))], budget - 1, seed))]
    settings = [Setting("temperature", find("temperature")(t)) for t in hot]
    for rule in [find(name) for name in rules] or _tried(slow=False):
        own = {name: _Axis.of(p.sweep, getattr(p, "integer", False)) for name, p in rule.params.items() if len(p.sweep) > 1}
        if rule.kind in ("truncation", "band", "projection"):
            for t, side, *values in _points([_Axis.of(RANGE), whole, *own.values()], budget, seed):
                cut = rule(**dict(zip(own, values, strict=True)))
                heat = find("temperature")(t)
                first = side < 0.5 and not rule.scale and rule.side != "before"
                settings.append(Setting(rule.name, heat | cut if first else cut | heat))
                if prompts and rule.name in READ:
                    settings.append(Setting(f"ensemble | {rule.name}", _read(side) | cut | heat))
        else:
            for p, *values, side in _points([_Axis.of((CUTS[-1], CUTS[0])), *own.values(), whole], budget, seed):
                chain = find(PARTNER)(p) | rule(**dict(zip(own, values, strict=True)))
                family = f"{PARTNER} | {rule.name}"
                settings.append(Setting(family, chain))
                if prompts and rule.name in READ:
                    settings.append(Setting(f"ensemble | {family}", _read(side) | chain))
    return settings


def _read(share: float) -> Chain:
    """The mean over other prompts, at a share of the weights worth comparing: few, as rows are written anew for each."""
    weights = find("ensemble").params["weight"].sweep
    return find("ensemble")(weights[min(int(share * len(weights)), len(weights) - 1)])


@dataclass(frozen=True)
class _Axis:
    """Where a parameter's values are drawn from: evenly, or evenly in logarithm where they span a lot."""

    low: float
    high: float
    integer: bool = False

    @classmethod
    def of(cls, sweep: Sequence[Any], integer: bool = False) -> _Axis:
        return cls(float(min(sweep)), float(max(sweep)), integer)

    def at(self, share: float) -> float:
        """The value at a share in [0, 1), to three digits."""
        if self.low > 0 and self.high / self.low > 4:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return round(value) if self.integer else float(f"{value:.3g}")


def _points(axes: Sequence[_Axis], count: int, seed: int) -> list[list[float]]:
    from scipy.stats import qmc

    shares = qmc.Halton(len(axes), seed=seed).random(count)
    return [[axis.at(share) for axis, share in zip(axes, point, strict=True)] for point in shares.tolist()]


def points(*ranges: tuple[float, float], count: int, seed: int) -> list[list[float]]:
    """``count`` points spread evenly over ranges (Halton's sequence), to three digits; see `_Axis`."""
    return _points([_Axis.of(one) for one in ranges], count, seed)


def _tried(slow: bool) -> list[Rule]:
    """The rules that samplers are compared by: none that has to be given something, or whose table has to be fitted."""
    given = {"answers", "prompts"}
    return [
        r
        for r in RULES.values()
        if r.name != "temperature"
        and (slow or not r.slow)
        and not r.needs & given
        and not any(isinstance(p, NumbersParameter) for p in r.params.values())
    ]


def _every_rule(slow: bool) -> list[Setting]:
    settings: list[Setting] = []
    partner = find(PARTNER)
    for rule in _tried(slow):
        # A parameter without values worth comparing stays at its default.
        values = list(itertools.product(*(p.sweep or (p.default,) for p in rule.params.values())))
        if rule.kind in ("truncation", "band", "projection"):
            settings += _cooled(rule, values) if rule.scale else _both_orders(rule, values, FEW)
        else:
            family = f"{PARTNER} | {rule.name}"
            settings += [Setting(family, partner(cut) | rule(*value)) for cut in CUTS for value in values]
    return settings


def _cooled(rule: Rule, values: Sequence[tuple[Any, ...]]) -> list[Setting]:
    """A cut that keeps the same before and after a temperature, with as many temperatures as others have places for theirs."""
    return [Setting(rule.name, rule(*value) | find("temperature")(t)) for t in MANY for value in values]


def _from_file(name: str) -> list[Setting]:
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DecalError(f"unknown grid {name!r}: neither {' nor '.join(NAMES)}, and not a readable file ({reason})") from None
    settings = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        try:
            settings += [_family_of(parse(variant)) for variant in _variants(text)] if text else []
        except DecalError as error:
            raise DecalError(f"{name}:{number}: {error}") from None
    if not settings:
        raise DecalError(
            f"{name}: no chain in the file; write one a line, such as temperature({{0.7, 1}}) | min_p({{0.05, 0.1}})"
        )
    return settings


def _variants(text: str) -> list[str]:
    """``f({a, b})`` as ``f(a)`` and ``f(b)``; several braces multiply."""
    parts = re.split(r"\{([^{}]*)\}", text)
    if any(not choice.strip() for part in parts[1::2] for choice in part.split(",")):
        raise DecalError(f"braces hold values separated by commas, got {text!r}")
    choices = [[part] if i % 2 == 0 else part.split(",") for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _family_of(chain: Chain) -> Setting:
    if chain.per_row is not None:
        raise DecalError(f"a grid needs one value per parameter, got {chain}")
    names = [step.rule.name for step in chain.steps if step.rule.name != "temperature"]
    told = ORACLE if "answers" in chain.needs else ""
    return Setting(told + (" | ".join(names) or "temperature"), chain)


def _unique(settings: list[Setting]) -> list[Setting]:
    """The first of chains that are written alike, or that differ only in steps that do nothing."""
    seen: dict[tuple[str, ...], Setting] = {}
    for setting in settings:
        seen.setdefault(tuple(str(step) for step in setting.chain.steps if not step.is_off), setting)
    return list(seen.values())
