"""A step of sampling: decal's chains beside who else does the same, on the same rows.

    pytest benchmarks/bench_chains.py --benchmark-group-by=group

Read the ratio within a group; absolute times depend on the machine. speed.py measures more of it, in turns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
import cases

NAMES = ("decal", "transformers", "torch", "softmax")
PAIRS = [(case, name) for case in cases.CASES for name in NAMES if name not in cases.PEERS or name in case.peers]
"""Cases, and who has them."""


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_step(benchmark: Any, case: cases.Case, name: str, size: int) -> None:
    vocabulary = cases.SMOLLM2
    x = cases.rows("flat", vocabulary)[:size]
    make = {"decal": cases.ours, "softmax": cases.softmax, **cases.PEERS}[name]
    one = make(case, size, vocabulary)
    mine = cases.ours(case, size, vocabulary)
    if name in cases.PEERS:
        cases.compare(case, x, mine.outcome(mine.call(x)), one.outcome(one.call(one.prepare(x))))
    benchmark.group = f"{case.name}, flat rows, V = {vocabulary}, B = {size}"
    benchmark.pedantic(one.call, setup=lambda: ((one.prepare(x),), {}), rounds=10, warmup_rounds=1)
