"""Rows of logits that are hard to get right, and chains of rules that can be traced."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decal.samplers.chain import Chain
from decal.samplers.rule import RULES, Step
from decal.samplers.trace import trace

KINDS = (
    "gaussian", "wide", "narrow", "rounded", "half dropped", "flat", "one hot", "denormal", "huge", "falling", "rising", "tied",
    "banned", "lowest", "peaked", "exponential", "nearly flat", "not numbers", "zeros of both signs", "certain",
)  # fmt: skip


class Source:
    """Random choices from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def below(self, end: int) -> int:
        return int(torch.randint(end, (1,), generator=self.generator))

    def one_of(self, options):
        return options[self.below(len(options))]

    def rows(self, kind: str, rows: int, width: int) -> Tensor:
        """(rows, width) float32."""
        x = 2 * self.normal(rows, width)
        where = self.uniform(rows, width)
        if kind == "wide":
            x *= 5
        elif kind == "narrow":
            x *= 0.05
        elif kind == "rounded":
            x = x.round()
        elif kind == "half dropped":
            x[where < 0.5] = -math.inf
            x[:, 0] = 0
        elif kind == "flat":
            x = x[:, :1].expand(rows, width).clone()
        elif kind == "one hot":
            x -= 20
            x[:, self.below(width)] = 5
        elif kind == "denormal":
            x *= 1e-41
        elif kind == "huge":
            x *= 1e37
        elif kind == "falling":
            x = x.sort(-1, descending=True).values
        elif kind == "rising":
            x = x.sort(-1).values
        elif kind == "tied":
            x = (x * 2).round() / 2
            x[:, : width // 2] = -math.inf
            x[:, -1] = 1
        elif kind == "banned":
            x[where < 0.3] = -1e9
        elif kind == "lowest":
            x[where < 0.3] = torch.finfo(torch.float32).min
        elif kind == "peaked":
            x -= 10
            n = min(width, 200)
            head = torch.randperm(width, generator=self.generator)[:n]
            x[:, head] = 12 - 2 * torch.arange(1, n + 1).log() + self.normal(rows, n)
        elif kind == "exponential":
            x = self.uniform(rows, width).log() * (1 + self.below(20))
        elif kind == "nearly flat":
            x = torch.where(where < 0.01, x, torch.zeros(()))
        elif kind == "not numbers":
            x[:, self.below(width)] = math.nan
            x[:, self.below(width)] = math.inf
        elif kind == "certain":
            x[:, self.below(width)] = 20.0 + 600 * float(where[0, 0])
        elif kind == "zeros of both signs":
            x = torch.where(where < 0.5, x * 0.0, -x.abs())
        return x

    def step(self, names: list[str]) -> Step:
        """A rule at one of its usual values."""
        rule = RULES[self.one_of(names)]
        offered = {name: getattr(p, "options", p.sweep) for name, p in rule.params.items()}
        values = {name: self.one_of(some) for name, some in offered.items() if some and self.below(4)}
        if rule.name == "temperature":
            values = {"t": self.one_of((0.0, 0.3, 0.7, 1.0, 1.5, 3.0))}
        return rule.step(**values)

    def chain(self) -> Chain:
        """One to three traceable rules."""
        usual = ["top_p", "top_k", "min_p", "typical", "temperature", "flatten"]
        return Chain(tuple(self.step(TRACEABLE if self.below(2) else usual) for _ in range(1 + self.below(3))))


def _is_traceable(name: str) -> bool:
    try:
        trace([RULES[name].step()])
    except Exception:
        return False
    return True


TRACEABLE = [name for name in RULES if _is_traceable(name)]
"""Rules whose defaults are programs."""
