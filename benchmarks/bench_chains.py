"""A step of sampling: decal's chains beside the warpers of transformers, on the same rows.

    pytest benchmarks/bench_chains.py --benchmark-group-by=group

Read the ratio within a group; absolute times depend on the machine.
"""

from __future__ import annotations

import pytest
import torch
from transformers import generation

import decal

PEERS = {
    "top_k(50)": lambda: generation.TopKLogitsWarper(50),
    "top_p(0.9)": lambda: generation.TopPLogitsWarper(0.9),
    "min_p(0.1)": lambda: generation.MinPLogitsWarper(0.1),
    "typical(0.9)": lambda: generation.TypicalLogitsWarper(0.9),
    "eta(0.002)": lambda: generation.EtaLogitsWarper(0.002),
}


@pytest.fixture(params=[(1, 49152), (8, 49152), (8, 262144)], ids=lambda s: f"B{s[0]}-V{s[1]}")
def scores(request):
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("text", PEERS)
@pytest.mark.parametrize("who", ["decal", "transformers"])
def test_step(benchmark, scores, text, who):
    benchmark.group = f"{text} {tuple(scores.shape)}"
    if who == "decal":
        chain = decal.parse(text)
        benchmark(lambda: chain(scores, check=False))
    else:
        warper = PEERS[text]()
        benchmark(lambda: warper(None, scores.clone()))
