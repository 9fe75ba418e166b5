"""A chain inside ``model.generate`` of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from decal.samplers.chain import Chain
from decal.samplers.errors import DecalError

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": None,
}
"""Settings of ``generate`` that reshape the distribution, at the values that don't. Hub models carry some in their generation
configs, and ``generate`` would apply them beside the chain."""


class ChainProcessor(LogitsProcessor):
    """Applies a chain to the scores of each step.

    It has no state, so batches, left padding, beams and assisted decoding need nothing special. Rows without a finite score
    come back as they are; see `Chain.mask`.

    Per-row parameters are one per request: with beams or several sequences per request, where ``generate`` repeats each
    request's rows next to each other, they are repeated alike.
    """

    def __init__(self, chain: Chain):
        self.chain = chain
        self.supports_continuous_batching = chain.per_row is None
        self._spread: dict[int, Chain] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._for_rows(len(scores))(scores, check=False)

    def _for_rows(self, rows: int) -> Chain:
        requests = self.chain.per_row
        if requests in (None, rows) or rows % requests:
            return self.chain
        if rows not in self._spread:
            self._spread[rows] = _repeat(self.chain, rows // requests)
        return self._spread[rows]

    def __repr__(self) -> str:
        return f"ChainProcessor({self.chain})"


def _repeat(chain: Chain, times: int) -> Chain:
    return Chain(
        tuple(
            replace(
                step,
                values={
                    name: v.repeat_interleave(times, 0) if isinstance(v, torch.Tensor) else v for name, v in step.values.items()
                },
            )
            for step in chain.steps
        )
    )


def generate_kwargs(chain: Chain, kwargs: dict[str, Any]) -> dict[str, Any]:
    """See `Chain.generate_kwargs`."""
    beside = sorted((set(kwargs) & set(NEUTRAL)) | ({"generation_config"} & set(kwargs)))
    if beside:
        raise DecalError(f"generate_kwargs: {', '.join(beside)} would act beside the chain {chain}; put it into the chain")
    processors = [*(kwargs.pop("logits_processor", None) or []), chain.processor()]
    known = GenerationConfig()
    neutral = {name: value for name, value in NEUTRAL.items() if hasattr(known, name)}
    beams = kwargs["num_beams"] = kwargs.get("num_beams") or 1
    # A beam's score adds up log-probabilities, which a chain's output is only up to a constant of its row.
    normalised = {"renormalize_logits": True} if beams > 1 else {}
    return {"do_sample": True, **neutral, **normalised, **kwargs, "logits_processor": processors}
