"""A chain inside ``model.generate`` of transformers: the arguments for it, and a decoding loop without a memory of texts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from decal.samplers.chain import Chain, Seen, State
from decal.samplers.errors import DecalError
from decal.samplers.guided import Guide
from decal.samplers.processor import ChainProcessor, leading, padding

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

ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Arguments of ``generate`` that ask for assisted decoding."""

OTHER_LOOPS = ("penalty_alpha", "dola_layers")
"""Arguments of ``generate`` that ask for decoding of another kind, which looks at more than the processed scores."""


def generate_kwargs(
    chain: Chain, kwargs: dict[str, Any], requests: Any = None, direct: bool = False, seeds: Any = None
) -> dict[str, Any]:
    """See `Chain.generate_kwargs`."""
    beside = sorted((set(kwargs) & set(NEUTRAL)) | ({"generation_config"} & set(kwargs)))
    if beside:
        raise DecalError(f"generate_kwargs: {', '.join(beside)} would act beside the chain {chain}; put it into the chain")
    _refuse_deaf(chain, kwargs, direct)
    if "ends" in chain.missing and kwargs.get("eos_token_id") is not None:
        eos = kwargs["eos_token_id"]
        tokens = eos.reshape(-1).tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, (list, tuple)) else [eos]
        chain = chain if tokens == [-1] else chain.for_ends(tokens)  # generate takes -1 for none
    beams = kwargs["num_beams"] = kwargs.get("num_beams") or 1
    if seeds is not None and beams > 1:
        raise DecalError(
            "generate_kwargs: seeds draw one token for each row, and beams want the scores of all; leave one of them out"
        )
    processor = chain.processor(kwargs.get("pad_token_id"), requests, beams, seeds)
    processors = [*(kwargs.pop("logits_processor", None) or []), processor]
    known = GenerationConfig()
    neutral = {name: value for name, value in NEUTRAL.items() if hasattr(known, name)}
    # A beam's score adds up log-probabilities, which a chain's output is only up to a constant of its row.
    normalised = {"renormalize_logits": True} if beams > 1 else {}
    if chain.guide is not None and "answers" in chain.needs:
        kwargs = _following(chain.guide, kwargs)
    if direct:
        kwargs = _direct(kwargs)
    return {"do_sample": True, **neutral, **normalised, **kwargs, "logits_processor": processors}


def _refuse_deaf(chain: Chain, kwargs: dict[str, Any], direct: bool) -> None:
    """Raise DecalError where ``generate`` would drop the processor, or hand it to code that need not call it."""
    if kwargs.get("cache_implementation") == "paged":
        raise DecalError(
            "generate_kwargs: with cache_implementation='paged' generate turns to continuous batching, which drops all logits"
            f" processors without a word, and the chain {chain} with them; use generate_batch of its"
            " serving adapter (docs/serving.md)"
        )
    if isinstance(kwargs.get("custom_generate"), str) and not direct:
        raise DecalError(
            f"generate_kwargs: custom_generate={kwargs['custom_generate']!r} is code that may call no logits processor; write"
            " the chain into it (save_custom_generate, docs/serving.md), or pass its function"
        )
    other = [name for name in OTHER_LOOPS if kwargs.get(name)]
    if other:
        raise DecalError(f"generate_kwargs: {', '.join(other)} decides on tokens beside the chain {chain}; leave it out")


def _following(guide: Guide, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` with which answers are written to their end, and nothing behind them."""
    given = kwargs.get("max_new_tokens")
    if isinstance(given, int) and given < guide.longest:
        raise DecalError(f"generate_kwargs: the longest answer takes {guide.longest} tokens, got max_new_tokens={given}")
    for name in ("max_length", "max_time", "stop_strings", "min_new_tokens", "min_length"):
        if kwargs.get(name):
            raise DecalError(f"generate_kwargs: {name} would end an answer in the middle, or go on behind it; leave it out")
    return ({"eos_token_id": list(guide.stop)} if guide.stop else {}) | {"max_new_tokens": guide.longest} | kwargs


def _direct(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` for `sample`."""
    unfit = [name for name in (*ASSISTANTS, "custom_generate") if kwargs.get(name)]
    if kwargs["num_beams"] > 1:
        unfit.append("num_beams")
    if unfit:
        raise DecalError(f"generate_kwargs: direct=True samples row by row and can't go with {', '.join(unfit)}; leave it out")
    if kwargs.get("stop_strings") and kwargs.get("tokenizer"):
        # generate loses the tokenizer on the way to a loop that isn't its own.
        criterion = StopStringCriteria(kwargs["tokenizer"], kwargs["stop_strings"])
        kwargs = {name: value for name, value in kwargs.items() if name not in ("stop_strings", "tokenizer")}
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), criterion]
    # The streamer is lost too, once it has been given the prompt.
    return {**kwargs, "custom_generate": partial(sample, streamer=kwargs.get("streamer"))}


def sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Any:
    """The decoding loop of transformers, in which chains are told of each token as soon as it is drawn.

    For ``generate(custom_generate=sample)``. It is their ``_sample``, whose rows stay where they are, with every
    `ChainProcessor` replaced by one for this generation and a stopping criterion that never stops but passes the tokens on.
    """
    mode = generation_config.get_generation_mode().value
    if mode not in ("sample", "greedy_search"):
        raise DecalError(f"direct=True samples row by row, but generate was asked for {mode.replace('_', ' ')}")
    mask = None if model.config.is_encoder_decoder else kwargs.get("attention_mask")
    processors = LogitsProcessorList(
        Generation(p, mask) if isinstance(p, ChainProcessor) and (p.remembers or p.seeds is not None) else p
        for p in logits_processor
    )
    watchers = [Watch(p) for p in processors if isinstance(p, Generation)]
    criteria = StoppingCriteriaList([*watchers, *stopping_criteria])
    return model._sample(
        input_ids, logits_processor=processors, stopping_criteria=criteria, generation_config=generation_config, **kwargs
    )


class Generation(LogitsProcessor):
    """A chain within one generation of rows that stay where they are.

    What is padding is taken from the processor's pad token, or from the attention mask if it has none.
    """

    def __init__(self, processor: ChainProcessor, mask: Tensor | None):
        self._processor, self._mask = processor, mask
        self._padding: Tensor | None = None
        self._prompt: Tensor | None = None
        self._state: State = ()
        self._seen: Seen | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self._processor.rows(len(scores))
        if self._padding is None or self._prompt is None:
            self._padding = self._leading(input_ids)
            self._prompt = input_ids.shape[1] - self._padding
            self._state = rows.chain.init(len(scores), device=scores.device)
        length = input_ids.shape[1] - self._padding
        scores, self._seen = self._processor.apply(rows, input_ids, scores, length, self._prompt, self._state)
        return scores

    def observe(self, tokens: Tensor) -> None:
        """Tell the chain which tokens (B,) were drawn."""
        assert self._seen is not None
        chain = self._processor.rows(len(tokens)).chain
        self._state, self._seen = chain.observe(self._state, self._seen, tokens), None

    def _leading(self, input_ids: Tensor) -> Tensor:
        """(B, 1) how many tokens of padding stand at the left."""
        pad, mask = self._processor.pad_token_id, self._mask
        if pad is None and mask is not None and mask.shape == input_ids.shape:
            return leading(mask.to(input_ids.device) > 0)
        return padding(input_ids, pad)


class Watch(StoppingCriteria):
    """Passes drawn tokens on to a chain, and never stops."""

    def __init__(self, generation: Generation):
        self._generation = generation

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._generation.observe(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
