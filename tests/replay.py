"""An engine's model and requests in miniature, and what a chain gives behind a text, worked out from the text's beginning."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decal import Chain, History
from decal.serving.request import Request

VOCABULARY = 50
CHAINS = [
    "min_p(0.1)",
    "top_p(0.9)",
    "top_k(20) | temperature(0.7)",
    "temperature(1.5) | min_p(0.1)",
    "min_p(0.1) | temperature(1.5)",
    "temperature(1.4) | min_p(0.1) | flatten(0.7)",
    "repetition_penalty(1.3) | top_n_sigma(1.0)",
    "dry(0.8, 1.75, 1) | xtc(0.1, 0.5) | min_p(0.02)",
    "mirostat(3.0, 0.9)",
    "risk_budget(0.8)",
    "min_validity(0.3)",
    "temperature(0)",
]
"""Rules without and with text, coins and memory, for texts of a few tokens of a small vocabulary."""
REAL_CHAINS = [
    *CHAINS[:7],
    "dry(0.8) | xtc(0.1, 0.5) | min_p(0.02)",
    "mirostat(3.0)",
    "risk_budget(0.8)",
    "min_validity(0.3)",
    "guided(1.0)",
]
"""The same for real engines with a real model."""


def row(text: Sequence[int], vocabulary: int = VOCABULARY) -> Tensor:
    """(1, V) the model's logits: a function of the text."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(list(text)).encode()))
    return torch.randn(1, vocabulary, generator=generator) * 2


def law(request: Request, prompt: Sequence[int], output: Sequence[int], number: int, rows: Any = row) -> Tensor:
    """(1, V) what the request's chain makes of the row behind prompt and output, all steps done again, one request alone."""
    chain: Chain = request.chain
    state = chain.init(1) if "state" in chain.needs else None
    for length in range(len(output) + 1):
        text = [*prompt, *output[:length]]
        history = History.of([text], prompt=len(prompt), request=[number])
        scores, seen = chain.apply(rows(text), state, history=history, check=False)
        if length == len(output):
            break
        if state is not None:
            state = chain.observe(state, seen, torch.tensor([output[length]]))
    if request.seed is None:
        return scores
    given = {"history": history, "check": False}
    token = chain.draw(rows(text), [request.seed], [len(text)], state, **given)[0]
    return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)
