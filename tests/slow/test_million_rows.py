"""Compiled code and plain torch keep the same tokens on a million rows: any chain, any kind of row, any width."""

from __future__ import annotations

import os

import pytest
import torch
from rows import KINDS, Source

from decal.kernels.dispatch import choose, use

ROWS = int(os.environ.get("DECAL_ROWS", "1000000"))
SHARES = 8
WIDTHS = ((400, 256), (400, 256), (3000, 32), (400, 256), (400, 256), (20_000, 4), (400, 256), (400, 256))
"""Largest width, and rows at once, of each of the tests that share the rows."""


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_kept_sets_and_draws(share):
    assert choose("cpu").name == "cpu"
    source, (widest, most) = Source(1000 + share), WIDTHS[share]
    # Wide rows take their time, so there are fewer of them.
    left = ROWS // SHARES * (8 if widest == 400 else 1) * SHARES // (6 * 8 + 2)
    while left > 0:
        chain, kind = source.chain(), source.one_of(KINDS)
        x = source.rows(kind, most, 1 + source.below(widest))
        if not source.below(5):
            x = x.to(source.one_of((torch.float16, torch.bfloat16)))
        seeds, places = torch.arange(most) + left, torch.arange(most)
        kept, tokens = chain.mask(x, check=False), chain.sample(x, seeds, places, check=False)
        with use("reference"):
            wanted, drawn = chain.mask(x, check=False), chain.sample(x, seeds, places, check=False)
        assert torch.equal(kept, wanted), f"{chain} on {kind} rows of {x.shape[1]} {x.dtype}"
        assert torch.equal(tokens, drawn), f"{chain} on {kind} rows of {x.shape[1]} {x.dtype}"
        left -= most
