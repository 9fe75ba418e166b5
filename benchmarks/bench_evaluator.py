"""The evaluator on sorted rows beside a full pass over the vocabulary for each setting, for the grid of the paper.

pytest benchmarks/bench_evaluator.py
"""

from __future__ import annotations

import pytest
import torch

from decal.eval import grid
from decal.eval.exact import dense_flow, evaluate
from decal.samplers.trie import TokenTrie

SETTINGS = grid.load("paper")


@pytest.fixture(scope="module")
def problem():
    trie = TokenTrie(size=8, ends=(0,))
    for answer in range(8):
        trie.insert([answer * 1000 + 1], answer)
    logits = torch.randn(len(trie), 49152, generator=torch.Generator().manual_seed(0)) * 3
    return trie, [(list(range(len(trie))), logits)]


def test_ranked(benchmark, problem):
    trie, rows = problem
    benchmark.pedantic(evaluate, (trie, rows, [s.chain for s in SETTINGS]), rounds=3)


def test_dense(benchmark, problem):
    trie, rows = problem
    chains = [s.chain for s in SETTINGS]
    benchmark.pedantic(dense_flow, (trie, rows, chains), rounds=1)
