"""Chains inside ``generate`` of transformers, on tiny models with random weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import decal
from decal import Chain, DecalError, parse

VOCABULARY = 64
CHAINS = [
    "temperature(1.4) | min_p(0.05)",
    "top_p(0.8)",
    "temperature(0.7) | top_k(20) | top_p(0.9) | min_p(0.02)",
    "min_p(0.02) | flatten(0.7)",
    "typical(0.6)",
    "top_n_sigma(1.0) | temperature(3)",
    "temperature(1)",
]


def finish(model: PreTrainedModel) -> PreTrainedModel:
    """Ready to generate: never stopping early, with the head scaled so that probabilities are neither flat nor one."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7)) * 0.6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def llama(seed: int = 0, hidden: int = 32, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return finish(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=hidden,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=0,
                **config,
            )
        )
    )


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return finish(T5ForConditionalGeneration(config))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(1234)
    with warnings.catch_warnings():
        # What the libraries deprecate in each other is not what these tests are about.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


PROMPT = torch.tensor([[1, 17, 42, 5]])


def generate(model: PreTrainedModel, chain: Chain, ids: Tensor = PROMPT, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": 8, "output_scores": True, "output_logits": True, "return_dict_in_generate": True} | kwargs
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **chain.generate_kwargs(**kwargs))


def check_scores(out: Any, chain: Chain, *, tolerance: float = 1e-5) -> None:
    """Each step's processed scores are the chain's of its raw logits, and each token drawn is one it keeps."""
    assert len(out.scores) == len(out.logits) > 0
    new = out.sequences[:, -len(out.scores) :]
    for step, (scores, raw) in enumerate(zip(out.scores, out.logits, strict=True)):
        wanted = chain(raw.float())
        assert torch.equal(scores.isfinite(), wanted.isfinite())
        torch.testing.assert_close(scores.float(), wanted, rtol=tolerance, atol=tolerance)
        assert wanted.gather(1, new[:, step, None]).isfinite().all(), "a dropped token was drawn"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


# ---- the chain, and only the chain


@pytest.mark.parametrize("text", CHAINS)
def test_scores_are_the_chain_s(model: LlamaForCausalLM, text: str) -> None:
    out = generate(model, parse(text), PROMPT.repeat(16, 1))
    check_scores(out, parse(text))
    if text != "temperature(1)":
        assert any(not torch.equal(s, z.float()) for s, z in zip(out.scores, out.logits, strict=True)), "the chain did nothing"
    assert len(out.sequences.unique(dim=0)) > 1, "nothing was sampled"


SETTINGS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.2,
    "top_h": 0.3,
    "typical_p": 0.4,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "num_beams": 2,
}


@pytest.mark.parametrize("name", ["all", *(n for n in SETTINGS if n != "do_sample")])
def test_the_model_s_own_settings_are_neutralised(name: str) -> None:
    model = llama()
    config = model.generation_config
    config.do_sample = True
    carried = {n: v for n, v in SETTINGS.items() if name in (n, "all") and hasattr(config, n)}
    if not carried and name != "all":
        pytest.skip(f"this transformers has no {name}")
    for key, value in carried.items():
        setattr(config, key, value)
    chain = parse("temperature(1.4) | min_p(0.02)")
    out = generate(model, chain, PROMPT.repeat(8, 1), max_new_tokens=6)
    check_scores(out, chain)
    assert len(out.sequences) == 8
    for key, value in carried.items():
        assert getattr(model.generation_config, key) == value, "the model's config was written to"


def test_the_settings_of_that_test_do_something() -> None:
    """Without the chain they change the scores, so neutralising them was not empty."""
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"):
        model = llama()
        model.generation_config.do_sample = True
        model.generation_config.top_k = 0
        setattr(model.generation_config, name, SETTINGS[name])
        out = model.generate(PROMPT, max_new_tokens=4, output_scores=True, output_logits=True, return_dict_in_generate=True)
        assert any(not torch.equal(s, z) for s, z in zip(out.scores, out.logits, strict=True)), name


@pytest.mark.parametrize(
    ("name", "value"),
    [("sequence_bias", [[[5], 10.0]]), ("exponential_decay_length_penalty", (0, 1.5)), ("guidance_scale", 1.5)],
)
def test_biases_and_guidance_of_the_model_are_neutralised(name: str, value: Any) -> None:
    """What else ``generate`` would apply beside the chain, from the model's own settings."""
    model = llama()
    model.generation_config.eos_token_id = 3  # the length penalty acts on it
    setattr(model.generation_config, name, value)
    check_scores(generate(model, parse("min_p(0.01)"), PROMPT.repeat(8, 1), max_new_tokens=4), parse("min_p(0.01)"))


# ---- batches, beams, repeats


def test_left_padding_changes_nothing(model: LlamaForCausalLM) -> None:
    chain = parse("temperature(1.2) | top_p(0.9) | flatten(0.3)")
    short, long = PROMPT, torch.tensor([[1, 9, 8, 7, 6, 5, 4]])
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    batch = generate(model, chain, padded, attention_mask=mask, max_new_tokens=1)
    check_scores(batch, chain)
    for row, ids in enumerate((short, long)):
        alone = generate(model, chain, ids, max_new_tokens=1)
        assert torch.equal(batch.scores[0][row].isfinite(), alone.scores[0][0].isfinite())
        torch.testing.assert_close(batch.scores[0][row], alone.scores[0][0], rtol=1e-3, atol=1e-3)
    check_scores(generate(model, chain, padded, attention_mask=mask), chain)


@pytest.mark.parametrize("text", ["temperature(1.4) | min_p(0.05)", "top_k(5) | flatten(0.5)"])
def test_beam_sampling(model: LlamaForCausalLM, text: str) -> None:
    chain = parse(text)
    out = generate(model, chain, PROMPT.repeat(2, 1), num_beams=3, num_return_sequences=2)
    assert out.sequences.shape == (4, PROMPT.shape[1] + 8)
    for scores, raw in zip(out.scores, out.logits, strict=True):
        assert scores.shape == (6, VOCABULARY)
        wanted = chain(raw.float()).log_softmax(-1)
        assert torch.equal(scores.isfinite(), wanted.isfinite())
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    # Replayed from its start, every sequence is made of tokens that the chain keeps.
    with torch.no_grad():
        raw = model(out.sequences).logits[:, PROMPT.shape[1] - 1 : -1].float()
    for step in range(8):
        token = out.sequences[:, PROMPT.shape[1] + step, None]
        assert chain(raw[:, step]).gather(1, token).isfinite().all()


def test_parameters_per_request_follow_their_requests(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, 17, 42, 5], [1, 3, 3, 30]])
    chain = decal.temperature(torch.tensor([[0.5], [2.0]])) | decal.top_k(torch.tensor([[3], [11]]))
    repeated = decal.temperature(torch.tensor([[0.5]] * 4 + [[2.0]] * 4)) | decal.top_k(torch.tensor([[3]] * 4 + [[11]] * 4))
    out = generate(model, chain, ids, num_return_sequences=4)
    check_scores(out, repeated)
    assert [int(n) for n in out.scores[0].isfinite().sum(-1)] == [3] * 4 + [11] * 4
    check_scores(generate(model, chain, ids), chain)
    beams = generate(model, chain, ids, num_beams=4)
    assert all([int(n) for n in s.isfinite().sum(-1)] == [3] * 4 + [11] * 4 for s in beams.scores)


def test_parameters_for_another_number_of_requests_are_refused(model: LlamaForCausalLM) -> None:
    chain = decal.min_p(torch.tensor([[0.1], [0.2]]))
    with pytest.raises(DecalError, match="the chain has parameters for 2 rows, the logits have 3"):
        generate(model, chain, PROMPT.repeat(3, 1))


def test_assisted_decoding(model: LlamaForCausalLM) -> None:
    chain = parse("temperature(1.2) | min_p(0.05)")
    for seed in range(3):
        torch.manual_seed(seed)
        out = generate(model, chain, assistant_model=llama(seed=5, hidden=16), max_new_tokens=12)
        new = out.sequences[:, PROMPT.shape[1] :]
        assert new.shape[1] == 12
        with torch.no_grad():
            raw = model(out.sequences).logits[:, PROMPT.shape[1] - 1 : -1].float()
        for step in range(12):
            wanted = chain(raw[:, step])
            assert wanted.gather(1, new[:, step, None]).isfinite().all()
            torch.testing.assert_close(out.scores[step], wanted, rtol=1e-4, atol=1e-4)


def test_greedy_is_temperature_zero(model: LlamaForCausalLM) -> None:
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    out = generate(model, decal.temperature(0), ids, max_new_tokens=16)
    assert torch.equal(out.sequences, greedy)


# ---- types and kinds of models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_types(dtype: torch.dtype) -> None:
    chain = parse("temperature(0.8) | top_p(0.9) | flatten(0.2)")
    out = generate(llama().to(dtype), chain, PROMPT.repeat(8, 1))
    check_scores(out, chain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_processor_keeps_half_precision(dtype: torch.dtype) -> None:
    chain = parse("temperature(1e-6) | min_p(0.1)")
    scores = (torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    got = chain.processor()(PROMPT, scores)
    assert got.dtype == dtype
    assert torch.equal(got, chain(scores))
    assert got.softmax(-1).isfinite().all()


@pytest.mark.parametrize("text", CHAINS[:4])
def test_encoder_decoder(text: str) -> None:
    out = generate(t5(), parse(text), PROMPT.repeat(8, 1))
    check_scores(out, parse(text))


def test_encoder_settings_are_neutralised() -> None:
    model = t5()
    model.generation_config.encoder_repetition_penalty = 1.7
    model.generation_config.encoder_no_repeat_ngram_size = 1
    chain = parse("min_p(0.02)")
    check_scores(generate(model, chain, PROMPT.repeat(8, 1)), chain)


def test_learned_positions() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    )
    chain = parse("temperature(1.4) | min_p(0.05)")
    check_scores(generate(finish(GPT2LMHeadModel(config)), chain, PROMPT.repeat(8, 1)), chain)


# ---- arguments


@pytest.mark.parametrize(
    "kwargs",
    [
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 0.7},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 2},
        {"generation_config": None},
        {"guidance_scale": 2.0},
        {"sequence_bias": [[[5], 10.0]]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_beside_the_chain_are_refused(kwargs: dict[str, Any]) -> None:
    name = next(iter(kwargs))
    message = rf"^generate_kwargs: {name} would act beside the chain min_p\(0\.1\); put it into the chain$"
    with pytest.raises(DecalError, match=message):
        decal.min_p(0.1).generate_kwargs(**kwargs)


def test_several_refused_arguments_are_all_named() -> None:
    with pytest.raises(DecalError, match=r"^generate_kwargs: temperature, top_k would act"):
        decal.min_p(0.1).generate_kwargs(top_k=5, max_new_tokens=3, temperature=1)


class Only(LogitsProcessor):
    """Allows a few tokens, as a grammar would."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.tokens] = scores[:, self.tokens]
        return allowed


@pytest.mark.parametrize("kind", [list, LogitsProcessorList])
def test_other_processors_run_before_the_chain(model: LlamaForCausalLM, kind: type) -> None:
    tokens, chain = [3, 5, 8, 13, 21, 34], parse("top_k(2)")
    given = kind([Only(tokens)])
    out = generate(model, chain, PROMPT.repeat(8, 1), logits_processor=given)
    assert len(given) == 1, "the caller's list was written to"
    for scores, raw in zip(out.scores, out.logits, strict=True):
        assert torch.equal(scores, chain(Only(tokens)(PROMPT, raw.float())))
    assert set(out.sequences[:, PROMPT.shape[1] :].flatten().tolist()) <= set(tokens)


def test_arguments_left_at_none_are_left_out(model: LlamaForCausalLM) -> None:
    out = generate(model, decal.min_p(0.1), logits_processor=None, num_beams=None)
    check_scores(out, decal.min_p(0.1))


def test_arguments_pass_through() -> None:
    chain = decal.min_p(0.1)
    kwargs = chain.generate_kwargs(max_new_tokens=3)
    assert kwargs["max_new_tokens"] == 3
    assert kwargs["do_sample"] is True
    assert [p.chain for p in kwargs["logits_processor"]] == [chain]
    assert kwargs["logits_processor"][0].supports_continuous_batching
    assert not decal.min_p(torch.tensor([[0.1]])).processor().supports_continuous_batching
    assert repr(chain.processor()) == "ChainProcessor(min_p(0.1))"


def test_the_processor_leaves_dead_rows_alone() -> None:
    scores = torch.randn(3, VOCABULARY)
    scores[1] = -torch.inf
    for text in CHAINS:
        got = parse(text).processor()(PROMPT, scores)
        assert torch.equal(got[1], scores[1])
        assert torch.equal(got[::2], parse(text)(scores[::2]))


# ---- frequencies


@pytest.mark.parametrize(
    "text", ["temperature(1.4) | min_p(0.02)", "temperature(3) | top_p(0.8) | flatten(0.3)", "temperature(3) | typical(0.7)"]
)
def test_frequencies_are_the_chain_s_probabilities(model: LlamaForCausalLM, text: str) -> None:
    chain, draws = parse(text), 20_000
    with torch.no_grad():
        p = chain(model(PROMPT).logits[:, -1].double()).softmax(-1)[0].numpy()
    torch.manual_seed(99)
    out = generate(model, chain, PROMPT.repeat(draws // 4, 1), max_new_tokens=1, num_return_sequences=4)
    counts = np.bincount(out.sequences[:, -1].numpy(), minlength=VOCABULARY)
    assert counts[p == 0].sum() == 0
    assert counts.sum() == draws
    common = p * draws >= 5
    assert common.sum() >= 4
    observed, expected = counts[common], p[common] * draws
    if p[~common].sum() * draws >= 5:
        observed, expected = np.append(observed, counts[~common].sum()), np.append(expected, p[~common].sum() * draws)
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


ENDS = (3, 40, 41)


def split(z: Tensor, t: float, end: float, ends: Sequence[int] = ENDS) -> Tensor:
    """Probabilities, with nothing of the product's."""
    p = z.double().softmax(-1)
    stops = torch.zeros(z.shape[-1], dtype=torch.bool)
    stops[list(ends)] = True
    ending = torch.sigmoid(torch.logit((p * stops).sum(-1, keepdim=True)) / end)
    inside = torch.where(stops, 0.0, p ** (1 / t))
    outside = torch.where(stops, p, 0.0)
    return outside / outside.sum(-1, keepdim=True) * ending + inside / inside.sum(-1, keepdim=True) * (1 - ending)


@pytest.mark.parametrize("told", ["for_ends", "eos_token_id", "ends"])
def test_texts_end_as_often_as_told(model: LlamaForCausalLM, told: str) -> None:
    chain, kwargs = decal.split_temperature(3.0, 0.7), {}
    if told == "for_ends":
        chain = copy.copy(chain.for_ends(reversed(ENDS)))
    elif told == "ends":
        chain = decal.split_temperature(3.0, 0.7, ENDS)
        assert chain.needs == frozenset()
    else:
        kwargs = {"eos_token_id": list(ENDS)}
    out = generate(model, chain, PROMPT.repeat(20, 1), min_new_tokens=None, **kwargs)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        torch.testing.assert_close(scores.double().softmax(-1), split(logits, 3.0, 0.7), atol=1e-6, rtol=1e-5)


def test_tokens_that_end_a_text_must_be_told(model: LlamaForCausalLM) -> None:
    chain = decal.min_p(0.1) | decal.split_temperature(2.0, 0.5)
    for use in (chain.generate_kwargs, chain.processor, lambda: chain(torch.zeros(1, 5))):
        with pytest.raises(DecalError, match=r"reads the tokens that end a text: use chain\.for_ends\(tokens\)"):
            use()
    for bad in ([], "23", 3, [-1], [1.5], ["a"], [True]):
        with pytest.raises(DecalError, match="for_ends"):
            chain.for_ends(bad)
    with pytest.raises(DecalError, match="no step of min_p"):
        decal.min_p(0.1).for_ends([2])
    off = decal.min_p(0.1) | decal.split_temperature(1.0, 1.0)
    assert off.missing == {}
    with pytest.raises(DecalError, match="for_ends"):
        chain.generate_kwargs(eos_token_id=-1)
    for eos in ("2", 2.5, [], [-2], ["a"]):
        with pytest.raises(DecalError, match="for_ends"):
            chain.generate_kwargs(eos_token_id=eos)
    for eos in (2, [2], torch.tensor(2), torch.tensor([2])):
        assert chain.generate_kwargs(eos_token_id=eos)["logits_processor"][0].chain.ends == (2,)
    with pytest.raises(DecalError, match="the text ends with token 99, the logits have 5 tokens"):
        chain.for_ends([2, 99])(torch.zeros(1, 5))
    assert (chain.for_ends(torch.tensor([2])) | decal.split_temperature(2.0).for_ends([2])).ends == (2,)
    assert chain.usage.endswith(".for_ends(tokens), then model.generate(..., **chain.generate_kwargs(eos_token_id=tokens))")
    with pytest.raises(DecalError, match="different tokens that end a text; use for_ends once"):
        chain.for_ends([2]) | decal.split_temperature(2.0).for_ends([3])
