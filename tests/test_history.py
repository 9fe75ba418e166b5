"""What chains remember inside ``generate``: the tokens so far, where the prompt ended, what was drawn, and coins.

Everything is compared with a replay: a loop in plain Python that runs the model on the whole text and tells the chain of each
token. Models compute in double precision, so that a token at the edge of a cut is on the same side in both.
"""

from __future__ import annotations

import random
import re
import string
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import formulas
import pytest
import torch
from test_generate import PROMPT, VOCABULARY, generate, llama, t5
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.generation import BaseStreamer

import decal
from decal import Chain, DecalError, History, parse
from decal.samplers.context import Weights

FEEDBACK = [
    "temperature(1.3) | mirostat(2.0, 0.5)",
    "mirostat(2.0, 0.5, version='1')",
    "min_p(0.02) | adaptive_p(0.3, 0.8)",
]
OTHERS = [
    "xtc(0.05, 0.5, 3)",
    "dry(0.8, 1.75, 1)",
    "repetition_penalty(1.3) | presence_penalty(0.7) | frequency_penalty(0.4)",
    "no_repeat_ngram(2) | temperature(1.5)",
    "min_p(0.05) | adapt(3.0, 0.6)",
    "xtc(0.05, 0.5) | presence_penalty(1.5) | temperature(1.2) | mirostat(3.0, 0.3) | min_p(0.01)",
]
CHAINS = FEEDBACK + OTHERS
PAD = 0
SHORT, LONG = [1, 17, 42, 5], [1, 9, 8, 7, 9, 8, 4]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(1234)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama().double()


def padded(*texts: list[int]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[PAD] * (longest - len(text)) + text for text in texts])
    return ids, (ids != PAD).long()


@torch.no_grad()
def raw_logits(model: PreTrainedModel, text: list[int]) -> Tensor:
    """(L, V)"""
    return model(torch.tensor([text])).logits[0].float()


def replay(model: PreTrainedModel, chain: Chain, text: list[int], prompt: int, request: int = 0) -> Tensor:
    """(T + 1, V) what the chain makes of the model's logits behind the prompt and behind each later token of ``text``."""
    logits, state, scores = raw_logits(model, text), chain.init(1), []
    for length in range(prompt, len(text) + 1):
        history = History.of([text[:length]], prompt=prompt, request=[request])
        processed, seen = chain.apply(logits[None, length - 1], state, history=history)
        scores.append(processed[0])
        if length < len(text):
            state = chain.observe(state, seen, torch.tensor([text[length]]))
    return torch.stack(scores)


def close(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got.isfinite(), wanted.isfinite())
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-5, atol=1e-5)


class Force(LogitsProcessor):
    """Leaves nothing but given tokens to draw, after having noted the scores before."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.scores = tokens, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores)
        token = self.tokens[:, len(self.scores) - 1, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def forced(model: PreTrainedModel, chain: Chain, ids: Tensor, tokens: Tensor, **kwargs: Any) -> Tensor:
    """(B, T, V) the scores the chain gives when those tokens (B, T) are drawn whatever it says."""
    settings = chain.generate_kwargs(max_new_tokens=tokens.shape[1], **{"pad_token_id": PAD, **kwargs})
    force = Force(tokens)
    settings["logits_processor"].append(force)
    out = model.generate(ids, **settings)
    assert torch.equal(out[:, -tokens.shape[1] :], tokens)
    return torch.stack(force.scores, 1)


def some_tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    # From a few, so that there are repetitions to penalise.
    return torch.randint(3, 9, (rows, count), generator=torch.Generator().manual_seed(seed))


def test_long_repetitions_count_in_full() -> None:
    """Periods broken in places, past the length up to which repetitions are followed token by token."""
    rng, lowest = random.Random(4), 0.0
    for _ in range(60):
        period = [rng.randrange(6) for _ in range(rng.randrange(1, 30))]
        texts = [(period * 90)[: rng.randrange(60, 90)] for _ in range(3)]
        for text in texts:
            for _ in range(rng.randrange(3)):
                text[rng.randrange(len(text))] = rng.randrange(6)
        window, breakers, n = rng.choice([0, 50]), rng.choice([(), (5,)]), rng.choice([3, 20, 40])
        z = torch.randn(3, 9, dtype=torch.float64)
        history = History.of(texts)
        got = decal.dry(0.8, 1.1, 2, window=window, breakers=breakers)(z, history=history)
        banned = decal.no_repeat_ngram(n)(z, history=history)
        for row, text in enumerate(texts):
            wanted = formulas.dry(z[row].numpy(), 0.8, 1.1, 2, window, breakers, text, len(text)).log_q
            close(got[row].log_softmax(-1), torch.from_numpy(wanted))
            wanted = formulas.no_repeat_ngram(z[row].numpy(), n, text, len(text)).log_q
            close(banned[row].log_softmax(-1), torch.from_numpy(wanted))
        lowest = min(lowest, float((got - z).min()))
    assert lowest < -0.8 * 1.1**40  # some are long


# ---- both ways through generate, and the replay


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
@pytest.mark.parametrize("text", CHAINS)
def test_scores_equal_a_replay_and_so_do_draws(model: LlamaForCausalLM, text: str, direct: bool) -> None:
    chain = parse(text)
    torch.manual_seed(5)
    out = generate(model, chain, PROMPT.repeat(3, 1), direct=direct, requests=[4, 0, 9], max_new_tokens=12)
    for row, request in enumerate([4, 0, 9]):
        wanted = replay(model, chain, out.sequences[row, :-1].tolist(), PROMPT.shape[1], request)
        close(torch.stack(out.scores, 1)[row], wanted)
    # The draws are what torch makes of such scores, one multinomial a step.
    torch.manual_seed(5)
    drawn = [torch.multinomial(scores.softmax(-1), 1) for scores in out.scores]
    assert torch.equal(torch.cat(drawn, 1), out.sequences[:, PROMPT.shape[1] :])
    plain = [chain.apply(raw, chain.init(3), history=History.of(PROMPT.repeat(3, 1)))[0] for raw in out.logits]
    assert any(not torch.equal(a, b) for a, b in zip(plain, out.scores, strict=True)), "nothing was remembered"


@pytest.mark.parametrize("text", CHAINS)
def test_both_ways_draw_the_same_tokens(model: LlamaForCausalLM, text: str) -> None:
    ids, mask = padded(SHORT, LONG, LONG[:5])
    both = []
    for direct in (False, True):
        torch.manual_seed(11)
        both.append(generate(model, parse(text), ids, attention_mask=mask, pad_token_id=PAD, direct=direct, max_new_tokens=20))
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(both[0].scores, both[1].scores, strict=True))


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
@pytest.mark.parametrize("text", CHAINS)
def test_left_padding_and_neighbours_change_nothing(model: LlamaForCausalLM, text: str, direct: bool) -> None:
    chain, tokens = parse(text), some_tokens(2, 8)
    ids, mask = padded(SHORT, LONG)
    batch = forced(model, chain, ids, tokens, attention_mask=mask, direct=direct, requests=[0, 1])
    for row, prompt in enumerate((SHORT, LONG)):
        alone = forced(model, chain, torch.tensor([prompt]), tokens[row, None], direct=direct, requests=[row])
        close(batch[row], alone[0])
        close(batch[row], replay(model, chain, prompt + tokens[row, :-1].tolist(), len(prompt), row))


def test_the_direct_way_knows_padding_by_the_mask(model: LlamaForCausalLM) -> None:
    chain, tokens = parse("xtc(0.05, 0.5) | presence_penalty(0.5, scope='all')"), some_tokens(2, 8)
    ids, mask = padded(SHORT, LONG)
    got = forced(model, chain, ids, tokens, attention_mask=mask, direct=True, pad_token_id=None)
    assert torch.equal(got, forced(model, chain, ids, tokens, attention_mask=mask, direct=True))
    untold = forced(model, chain, ids, tokens, attention_mask=mask, pad_token_id=None)
    assert not torch.equal(got[0], untold[0])
    assert torch.equal(got[1], untold[1])


# ---- beams, several sequences, assistants


@pytest.mark.parametrize("text", [*CHAINS[:4], CHAINS[-1]])
def test_each_beam_remembers_its_own_text(model: LlamaForCausalLM, text: str) -> None:
    chain, steps = parse(text), 8
    ids, mask = padded(SHORT, LONG)
    calls = []

    class Note(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            calls.append((input_ids.clone(), scores.clone()))
            return scores

    settings = chain.generate_kwargs(
        num_beams=3, num_return_sequences=2, max_new_tokens=steps, pad_token_id=PAD, requests=[7, 2]
    )
    settings["logits_processor"].append(Note())
    model.generate(ids, attention_mask=mask, **settings)
    assert len(calls) == steps
    parents = [[earlier[0].tolist().index(row) for row in later[0][:, :-1].tolist()] for earlier, later in pairwise(calls)]
    assert any(p != sorted(p) or len(set(p)) < 6 for p in parents[1:]), "no beam ever moved"
    for input_ids, scores in calls:
        for row, beam in enumerate(input_ids.tolist()):
            prompt = (SHORT, LONG)[row // 3]
            beam = beam[len(LONG) - len(prompt) :]
            # Beam search gives its processors log-probabilities, which differ from logits by a constant.
            logits = replay_normalised(model, chain, beam, len(prompt), (7, 2)[row // 3])
            close(scores[row], logits)


def replay_normalised(model: PreTrainedModel, chain: Chain, text: list[int], prompt: int, request: int) -> Tensor:
    logits, state = raw_logits(model, text).log_softmax(-1), chain.init(1)
    for length in range(prompt, len(text) + 1):
        history = History.of([text[:length]], prompt=prompt, request=[request])
        processed, seen = chain.apply(logits[None, length - 1], state, history=history)
        if length < len(text):
            state = chain.observe(state, seen, torch.tensor([text[length]]))
    return processed[0]


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
@pytest.mark.parametrize("text", CHAINS)
def test_several_sequences_of_a_request(model: LlamaForCausalLM, text: str, direct: bool) -> None:
    chain = parse(text)
    ids, mask = padded(SHORT, LONG)
    out = generate(
        model, chain, ids, attention_mask=mask, pad_token_id=PAD, num_return_sequences=3, requests=[5, 1], direct=direct
    )
    for row, sequence in enumerate(out.sequences[:, :-1].tolist()):
        prompt, request = ((SHORT, 5), (LONG, 1))[row // 3]
        sequence = sequence[len(LONG) - len(prompt) :]
        wanted = replay(model, chain, sequence, len(prompt), request + (row % 3 << 32))
        close(torch.stack(out.scores, 1)[row], wanted)


@pytest.mark.parametrize("draft", ["model", "lookup"])
@pytest.mark.parametrize("text", CHAINS)
def test_assisted_decoding(model: LlamaForCausalLM, text: str, draft: str) -> None:
    chain = parse(text)
    # A draft by nearly the same model is now accepted and now rejected.
    assistant = llama().double()
    with torch.no_grad():
        assistant.get_output_embeddings().weight.add_(torch.randn(VOCABULARY, 32, dtype=torch.float64) * 0.15)
    kwargs = {"assistant_model": assistant} if draft == "model" else {"prompt_lookup_num_tokens": 3, "eos_token_id": 99}
    prompt = [1, 9, 8, 7, 9, 8]
    for seed in range(2):
        torch.manual_seed(seed)
        out = generate(model, chain, torch.tensor([prompt]), max_new_tokens=20, **kwargs)
        assert out.sequences.shape[1] == len(prompt) + 20
        close(torch.cat(out.scores), replay(model, chain, out.sequences[0, :-1].tolist(), len(prompt)))


# ---- texts taken up again, and what isn't known


@pytest.mark.parametrize("text", CHAINS)
def test_a_text_taken_up_again(model: LlamaForCausalLM, text: str) -> None:
    chain = parse(text)
    settings = chain.generate_kwargs(max_new_tokens=6, output_scores=True, return_dict_in_generate=True)
    first = model.generate(PROMPT, **settings)
    whole = torch.ones_like(first.sequences)  # the padding token may have been drawn
    again = model.generate(first.sequences, attention_mask=whole, **settings)
    wanted = replay(model, chain, again.sequences[0, :-1].tolist(), PROMPT.shape[1])
    close(torch.cat(first.scores + again.scores), wanted)
    # Another processor takes all of it for a prompt.
    new = forced(model, chain, first.sequences, again.sequences[:, -6:], attention_mask=whole)[0]
    close(new, replay(model, chain, again.sequences[0, :-1].tolist(), PROMPT.shape[1] + 6))


def test_rows_that_begin_and_rows_that_go_on_share_a_call() -> None:
    chain = parse("presence_penalty(1) | adaptive_p(0.3, 0.8) | xtc(0.01, 0.5)")
    generator = torch.Generator().manual_seed(0)
    texts = [[1, 5, 5, 8, 3, 9], [1, 7, 2], [4, 4, 4, 4]]
    logits = {tuple(t[:n]): torch.randn(20, generator=generator) * 3 for t in texts for n in range(1, 7)}

    def alone(text: list[int], prompt: int) -> Tensor:
        state = chain.init(1)
        for n in range(prompt, len(text) + 1):
            history = History.of([text[:n]], prompt=prompt, request=[0])
            scores, seen = chain.apply(logits[tuple(text[:n])][None], state, history=history)
            state = chain.observe(state, seen, torch.tensor(text[n : n + 1] or [0]))
        return scores[0]

    def call(processor: Any, *rows: list[int]) -> Tensor:
        return processor(padded(*rows)[0], torch.stack([logits[tuple(row)] for row in rows]))

    # All rows have the same request number, so that only memory tells them apart.
    processor = chain.processor(pad_token_id=PAD, requests=[0])
    processor.rows = lambda n, rows=processor.rows: rows(n)._replace(request=torch.zeros(n, 1, dtype=torch.long))
    close(call(processor, texts[0][:3])[0], alone(texts[0][:3], 3))
    got = call(processor, texts[1], texts[0][:4])
    close(got[0], alone(texts[1], 3))
    close(got[1], alone(texts[0][:4], 3))
    got = call(processor, texts[0][:5], texts[2], texts[0][:4])  # a text that goes on, a new one, a step taken twice
    for row, (text, prompt) in enumerate([(texts[0][:5], 3), (texts[2], 4), (texts[0][:4], 3)]):
        close(got[row], alone(text, prompt))
    close(call(processor, texts[0])[0], alone(texts[0], 3))


def test_texts_that_differ_in_more_than_tokens_are_kept_apart() -> None:
    """As where an encoder read different inputs: the same tokens, other logits."""
    chain = parse("mirostat(2, 0.5)")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 20, generator=generator) * 3 for _ in range(2))
    start = torch.tensor([[1, 2], [1, 2], [1, 2], [1, 2]])
    drawn = first.topk(2).indices[:, 1]
    drawn[:] = drawn[0]
    state = chain.init(4)
    _, seen = chain.apply(first, state)
    wanted, _ = chain.apply(second, chain.observe(state, seen, drawn))
    processor = chain.processor()
    processor(start, first)
    close(processor(torch.cat([start, drawn[:, None]], 1), second), wanted)


def test_rows_that_move_stay_with_their_request() -> None:
    """Without being told of beams, the processor finds a text that moved among those of its request."""
    chain, generator = parse("adaptive_p(0.3, 0.5)"), torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 20, generator=generator) * 3 for _ in range(2))
    processor, state = chain.processor(requests=[3, 4]), chain.init(4)
    processor(torch.tensor([[1, 2], [1, 5], [1, 2], [1, 6]]), first)
    _, seen = chain.apply(first, state)
    moved = [0, 0, 2, 3]
    seen = seen._replace(rows={number: z_BV[moved] for number, z_BV in seen.rows.items()})
    wanted, _ = chain.apply(second, chain.observe(state, seen, torch.full((4,), 7)))
    close(processor(torch.tensor([[1, 2, 7], [1, 2, 7], [1, 2, 7], [1, 6, 7]]), second), wanted)


def test_a_prompt_may_end_with_a_token_that_has_no_logit() -> None:
    """As a placeholder for an image."""
    chain, scores = parse("adaptive_p(0.3, 0.5)"), torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    processor = chain.processor()
    processor(torch.tensor([[1], [2]]), scores)
    got = processor(torch.tensor([[1, 3], [9, 99]]), scores)
    close(got[1], chain(scores[1:], state=chain.init(1))[0])


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
@pytest.mark.parametrize("text", [*FEEDBACK, OTHERS[0], OTHERS[2]])
def test_encoder_decoder(text: str, direct: bool) -> None:
    """The tokens so far are the decoder's, and texts with the same ones depend on what the encoder read."""
    chain, model = parse(text), t5().double()
    encoded = torch.tensor([[1, 17, 42, 5], [9, 3, 3, 30], [8, 8, 2, 7]])
    tokens = some_tokens(1, 6).repeat(3, 1)
    got = forced(model, chain, encoded, tokens, direct=direct)
    for row in range(3):
        decoder = [model.config.decoder_start_token_id, *tokens[row, :-1].tolist()]
        with torch.no_grad():
            logits = model(input_ids=encoded[row, None], decoder_input_ids=torch.tensor([decoder])).logits[0].float()
        state = chain.init(1)
        for n in range(6):
            # The start token is the padding token, so that the text begins empty.
            history = History.of(torch.tensor([decoder[: n + 1]]), pad=PAD, prompt=0, request=[row])
            scores, seen = chain.apply(logits[None, n], state, history=history)
            state = chain.observe(state, seen, tokens[row, n, None])
            close(got[row, n], scores[0])
    if not direct:
        # Again by the same processor, with other inputs of the encoder.
        settings = chain.generate_kwargs(pad_token_id=PAD, max_new_tokens=6)
        settings["logits_processor"].append(None)
        both = []
        for inputs in (encoded.flip(0), encoded):
            settings["logits_processor"][-1] = force = Force(tokens)
            model.generate(inputs, **settings)
            both.append(torch.stack(force.scores, 1))
        assert torch.equal(both[1], got)


def test_embedded_prompts(model: LlamaForCausalLM) -> None:
    """Without token ids of the prompt the text begins empty."""
    chain, embedded = parse("presence_penalty(1) | mirostat(2, 0.5)"), torch.cat([PROMPT, PROMPT.flip(1)])
    for direct in (False, True):
        settings = chain.generate_kwargs(max_new_tokens=6, output_scores=True, return_dict_in_generate=True, pad_token_id=PAD)
        if direct:
            settings = chain.generate_kwargs(
                max_new_tokens=6, output_scores=True, return_dict_in_generate=True, pad_token_id=PAD, direct=True
            )
        out = model.generate(inputs_embeds=model.get_input_embeddings()(embedded), **settings)
        for row in range(2):
            drawn = out.sequences[row].tolist()
            logits, state = raw_logits(model, embedded[row].tolist() + drawn), chain.init(1)
            for n in range(6):
                history = History.of([drawn[:n]], prompt=0)
                scores, seen = chain.apply(logits[None, 3 + n], state, history=history)
                close(out.scores[n][row], scores[0])
                state = chain.observe(state, seen, torch.tensor([drawn[n]]))


@pytest.mark.parametrize(("text", "most"), [("mirostat(3)", 256), ("presence_penalty(0.1)", 4096)])
def test_memory_stays_bounded(text: str, most: int) -> None:
    processor, rows = parse(text).processor(), 64
    ids = torch.arange(rows)[:, None]
    scores = torch.randn(rows, 8)
    for step in range(100):
        processor(ids, scores)
        ids = torch.cat([ids, torch.full((rows, 1), step % 8)], 1)
        memory = processor.memory
        assert len(memory) <= most
        assert len(memory._places) <= 2 * most
    assert len(memory) == most
    wide = torch.cat([ids] * 100)
    for _ in range(6):
        processor(wide, torch.randn(len(wide), 8))
    assert len(memory) == 4 * len(wide)


def test_what_a_processor_kept_long_ago_begins_afresh() -> None:
    chain = parse("mirostat(2, 0.5)")
    processor, scores = chain.processor(), torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) * 3
    drawn = int(scores.argmax())
    first = processor(torch.tensor([[1]]), scores)
    assert not torch.equal(processor(torch.tensor([[1, drawn]]), scores), first)
    second = processor(torch.tensor([[1, drawn]]), scores)
    for times, wanted in ((200, second), (200, second), (300, first)):  # forgotten once it wasn't called for so long
        for n in range(times):
            processor(torch.tensor([[2, 3, n]]), scores)
        assert torch.equal(processor(torch.tensor([[1, drawn]]), scores), wanted)
        processor(torch.tensor([[1]]), scores)


# ---- parameters per row


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
def test_parameters_per_request(model: LlamaForCausalLM, direct: bool) -> None:
    taus, penalties = [1.0, 4.0], [0.0, 2.0]
    chain = decal.presence_penalty(torch.tensor([[p] for p in penalties])) | decal.mirostat(
        torch.tensor([[t] for t in taus]), 0.5
    )
    ids, tokens = PROMPT.repeat(2, 1), some_tokens(6, 8)
    for copies in (1, 3):
        mine = tokens[: 2 * copies]
        got = forced(model, chain, ids, mine, direct=direct, num_return_sequences=copies)
        for row in range(2 * copies):
            alone = decal.presence_penalty(penalties[row // copies]) | decal.mirostat(taus[row // copies], 0.5)
            close(got[row], replay(model, alone, [*SHORT, *mine[row, :-1].tolist()], len(SHORT)))


def test_the_same_text_under_other_parameters_is_another(model: LlamaForCausalLM) -> None:
    chain = decal.mirostat(torch.tensor([[1.0], [4.0]]), 0.5)
    processor, scores = chain.processor(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * 2
    scores[1] = scores[0]
    ids = torch.tensor([[1, 2], [1, 2]])
    state = chain.init(2)
    _, seen = chain.apply(scores, state)
    drawn = scores.argmax(-1)
    processor(ids, scores)
    got = processor(torch.cat([ids, drawn[:, None]], 1), scores)
    assert torch.equal(got, chain(scores, state=chain.observe(state, seen, drawn)))
    assert not torch.equal(got[0], got[1])


def test_parameters_for_other_rows_are_refused() -> None:
    chain = decal.mirostat(torch.tensor([[1.0], [4.0]]))
    with pytest.raises(DecalError, match="the chain has parameters for 2 rows, the logits have 3"):
        chain.processor()(torch.ones(3, 2, dtype=torch.long), torch.randn(3, 8))


# ---- coins


COIN = "xtc(0.05, 0.5, {seed})"


def cuts(model: PreTrainedModel, prompts: list[list[int]], requests: list[int] | None, seed: int = 0, **kwargs: Any) -> Tensor:
    """(B, 24) whether XTC dropped the mode, at the positions after each prompt."""
    ids, mask = padded(*prompts)
    tokens = some_tokens(1, 24).repeat(len(prompts), 1)
    scores = forced(model, parse(COIN.format(seed=seed)), ids, tokens, attention_mask=mask, requests=requests, **kwargs)
    # A dropped token is in the scores at -inf; with the same tokens drawn, texts differ in coins alone.
    return scores.isneginf().any(-1)


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
def test_a_coin_is_its_request_s_alone(model: LlamaForCausalLM, direct: bool) -> None:
    alone = cuts(model, [SHORT], [3], direct=direct)[0]
    assert 0 < alone.sum() < 24
    for prompts, requests, row in [
        ([LONG, SHORT], [0, 3], 1),
        ([SHORT, LONG, LONG], [3, 4, 5], 0),
        ([LONG, LONG, SHORT, LONG], [9, 8, 3, 7], 2),
    ]:
        assert torch.equal(cuts(model, prompts, requests, direct=direct)[row], alone)
    assert torch.equal(cuts(model, [SHORT, LONG, SHORT, SHORT], None, direct=direct)[3], alone), (
        "places are the default numbers"
    )
    copies = cuts(model, [SHORT] * 3, [3, 3, 4], direct=direct)
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], copies[2])
    assert not torch.equal(cuts(model, [SHORT], [3], seed=1, direct=direct)[0], alone)
    coins = (
        replay(model, parse(COIN.format(seed=0)), [*SHORT, *some_tokens(1, 23)[0].tolist()], len(SHORT), 3).isneginf().any(-1)
    )
    assert torch.equal(alone, coins[:24])


def test_a_coin_depends_on_the_position() -> None:
    processor = parse("xtc(0.05, 0.5)").processor(pad_token_id=PAD)
    scores = torch.zeros(1, 4) + torch.tensor([3.0, 2.0, 1.0, 0.0])
    happened = [bool(processor(torch.ones(1, n, dtype=torch.long), scores).isneginf().any()) for n in range(1, 200)]
    assert 70 < sum(happened) < 130
    with_padding = [bool(processor(torch.tensor([[PAD] * 5 + [1] * n]), scores).isneginf().any()) for n in range(1, 200)]
    assert happened == with_padding


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
def test_coins_leave_torch_s_generator_alone(model: LlamaForCausalLM, direct: bool) -> None:
    chain = parse("xtc(0.05, 0.5)")
    for draws in (True, False):
        states = []
        for each in (chain, parse("temperature(0)")):
            torch.manual_seed(0)
            generate(model, each, max_new_tokens=6, do_sample=draws, direct=direct)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state()), "greedy decoding drew something"


def test_sequences_of_a_request_toss_their_own_coins_and_beams_share_one() -> None:
    def happens(**kwargs: Any) -> list[tuple[bool, ...]]:
        processor = parse("xtc(0.05, 0.5)").processor(**kwargs)
        scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(6, 1)
        calls = [processor(torch.ones(6, n, dtype=torch.long), scores).isneginf().any(-1) for n in range(1, 60)]
        return [tuple(row) for row in torch.stack(calls, 1).tolist()]

    assert len(set(happens())) == 6
    assert len(set(happens(requests=[4, 7]))) == 6
    beams = happens(requests=[4, 7], beams=3)
    assert beams[:3] == beams[:1] * 3
    assert beams[3:] == beams[3:4] * 3
    assert beams[0] != beams[3]
    assert happens(beams=3)[3] == happens(requests=[0, 1], beams=3)[3]


@pytest.mark.parametrize("requests", [[0.5], [], [[1]], 3], ids=str)
def test_requests_that_are_no_numbers_are_refused(requests: Any) -> None:
    with pytest.raises(DecalError, match="requests must be a list of whole numbers, one per request"):
        parse("xtc(0.1)").processor(requests=requests)


def test_requests_for_other_rows_are_refused() -> None:
    with pytest.raises(DecalError, match="the processor has numbers of 2 requests, the scores have 3 rows"):
        parse("xtc(0.1)").processor(requests=[1, 2])(torch.ones(3, 1, dtype=torch.long), torch.zeros(3, 4))


# ---- chains that need nothing


def test_chains_of_logits_alone_keep_nothing() -> None:
    class Untouchable:
        """Stands for token ids nobody may look at."""

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the token ids were asked for {name}")

    processor = parse("temperature(1.4) | min_p(0.1) | presence_penalty(0)").processor()
    processor(Untouchable(), torch.randn(2, 8))
    assert len(processor.memory) == 0
    assert not processor.remembers


@pytest.mark.parametrize(
    ("text", "supported"),
    [
        ("min_p(0.1)", True),
        ("presence_penalty(0) | top_k(3)", True),
        ("min_p([0.1, 0.2])", False),
        *((t, False) for t in CHAINS),
    ],
)
def test_continuous_batching_is_for_chains_that_need_nothing(text: str, supported: bool) -> None:
    assert parse(text).processor().supports_continuous_batching is supported


# ---- the model's embeddings


@pytest.mark.parametrize("direct", [False, True], ids=["processor", "direct"])
@pytest.mark.parametrize("text", ["top_w()", "temperature(1.5) | basis_aware(0.05, rank=4)", "top_w() | mirostat(2.0, 0.5)"])
def test_rules_that_read_embeddings(model: LlamaForCausalLM, text: str, direct: bool) -> None:
    chain = parse(text).for_model(model)
    out = generate(model, chain, PROMPT.repeat(2, 1), direct=direct, max_new_tokens=4)
    assert any(scores.isneginf().any() for scores in out.scores)
    for row in range(2):
        close(torch.stack(out.scores, 1)[row], replay(model, chain, out.sequences[row, :-1].tolist(), PROMPT.shape[1]))


def test_embeddings_are_kept_with_parameters_per_request(model: LlamaForCausalLM) -> None:
    chain = decal.top_w(torch.tensor([[2.3], [4.0]])).for_model(model)
    out = generate(model, chain, PROMPT.repeat(2, 1), num_return_sequences=2, max_new_tokens=2)
    wanted = decal.top_w(torch.tensor([[2.3], [2.3], [4.0], [4.0]])).for_model(model)
    for scores, raw in zip(out.scores, out.logits, strict=True):
        close(scores, wanted(raw))


@pytest.mark.parametrize("text", ["top_w()", "min_p(0.1) | basis_aware(0.01)"])
def test_a_chain_without_its_model_is_refused(text: str) -> None:
    chain = parse(text)
    for ask in (chain.processor, chain.generate_kwargs, lambda: chain.generate_kwargs(direct=True)):
        with pytest.raises(DecalError, match=r"reads the model's embeddings: use chain\.for_model\(model\)$"):
            ask()
    assert parse("basis_aware(0)").generate_kwargs()["do_sample"]


# ---- the direct way: everything else generate does


class Tokens(BaseStreamer):
    """Collects what is streamed."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


class AfterFour(StoppingCriteria):
    """Stops after four tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT.shape[1] + 4)


@pytest.mark.parametrize("text", ["mirostat(3.0, 0.5)", "top_k(5)"])
def test_direct_streams_and_stops(model: LlamaForCausalLM, text: str) -> None:
    streamer = Tokens()
    settings = parse(text).generate_kwargs(direct=True, max_new_tokens=9, streamer=streamer, stopping_criteria=[AfterFour()])
    out = model.generate(PROMPT, **settings)
    assert out.shape[1] == PROMPT.shape[1] + 4
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.parts), out[0])


@pytest.mark.parametrize("text", CHAINS)
def test_finished_sequences_are_padded(model: LlamaForCausalLM, text: str) -> None:
    """With an end token, which texts reach at different times; what follows it changes nothing before."""
    chain, both = parse(text), []
    for direct in (False, True):
        torch.manual_seed(2)
        out = generate(
            model,
            chain,
            PROMPT.repeat(6, 1),
            direct=direct,
            eos_token_id=[13, 21, 34, 55, 8],
            max_new_tokens=16,
            pad_token_id=PAD,
        )
        both.append(out.sequences)
        lengths = []
        for row, sequence in enumerate(out.sequences[:, PROMPT.shape[1] :].tolist()):
            end = next((n for n, token in enumerate(sequence) if token in (13, 21, 34, 55, 8)), len(sequence) - 1)
            assert set(sequence[end + 1 :]) <= {PAD}
            wanted = replay(model, chain, [*SHORT, *sequence[:end]], len(SHORT), row)
            close(torch.stack(out.scores, 1)[row, : end + 1], wanted)
            lengths.append(end)
        assert len(set(lengths)) > 1
    assert torch.equal(*both)


def test_direct_neutralises_the_model_s_settings() -> None:
    model = llama()
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.top_k = 3
    model.generation_config.temperature = 0.2
    model.generation_config.do_sample = True
    chain = parse("mirostat(4.0, 0.5)")
    out = generate(model, chain, direct=True)
    close(torch.cat(out.scores), replay(model, chain, out.sequences[0, :-1].tolist(), PROMPT.shape[1]))


def test_direct_settings_serve_several_generations(model: LlamaForCausalLM) -> None:
    chain = parse("presence_penalty(0.5) | mirostat(3.0, 0.5)")
    settings = chain.generate_kwargs(direct=True, max_new_tokens=6, output_scores=True, return_dict_in_generate=True)
    for ids in (PROMPT, PROMPT.flip(1), torch.tensor([LONG])):
        out = model.generate(ids, **settings)
        close(torch.cat(out.scores), replay(model, chain, out.sequences[0, :-1].tolist(), ids.shape[1]))
    assert len(settings["logits_processor"][0].memory) == 0


def test_direct_goes_with_other_processors(model: LlamaForCausalLM) -> None:
    """They run before the chain, and rules with feedback see what they left."""
    banned = [int(raw_logits(model, SHORT)[-1].argmax())]
    chain = parse("mirostat(3.0, 0.5)")
    both = []
    for direct in (False, True):
        torch.manual_seed(0)
        out = generate(model, chain, bad_words_ids=[banned], direct=direct, max_new_tokens=10)
        assert banned[0] not in out.sequences[0, PROMPT.shape[1] :].tolist()
        both.append(torch.cat(out.scores))
    assert torch.equal(*both)


def test_direct_stop_strings(model: LlamaForCausalLM) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_letters + string.digits + "-+"
    spelled = Tokenizer(models.BPE({character: n for n, character in enumerate(characters)}, []))
    spelled.pre_tokenizer, spelled.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelled)
    both = []
    for direct in (False, True):
        torch.manual_seed(3)
        settings = parse("mirostat(5.0, 0.5)").generate_kwargs(
            direct=direct, max_new_tokens=30, stop_strings=["g", "t", "D", "3", "7"], tokenizer=tokenizer
        )
        both.append(model.generate(PROMPT, **settings))
    assert torch.equal(*both)
    assert both[0].shape[1] < PROMPT.shape[1] + 30


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"custom_generate": "someone/loop"}, "custom_generate"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens, num_beams"),
    ],
)
def test_what_direct_can_t_go_with(kwargs: dict[str, Any], named: str) -> None:
    message = f"generate_kwargs: direct=True samples row by row and can't go with {named}; leave it out"
    with pytest.raises(DecalError, match=f"^{re.escape(message)}$"):
        parse("mirostat()").generate_kwargs(direct=True, **kwargs)


def test_direct_refuses_what_the_model_asks_for() -> None:
    model = llama()
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(DecalError, match=r"^direct=True samples row by row, but generate was asked for assisted generation$"):
        generate(model, parse("mirostat()"), direct=True)


def test_generation_config_of_transformers_is_as_assumed() -> None:
    """The mode names that `sample` accepts."""
    assert GenerationConfig(do_sample=True).get_generation_mode().value == "sample"
    assert GenerationConfig(do_sample=False).get_generation_mode().value == "greedy_search"


# ---- bad input to a chain by hand


@pytest.mark.parametrize("rows", [0, -1, True, "a", 1.0])
def test_init_takes_a_number_of_rows(rows: Any) -> None:
    with pytest.raises(DecalError, match=f"^init takes a number of rows, at least 1, got {rows!r}$"):
        decal.mirostat().init(rows)


@pytest.mark.parametrize(
    "tokens", [[1, 2], torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3]), torch.tensor([1, 50]), torch.tensor([-1, 2])]
)
def test_observe_takes_a_token_a_row(tokens: Any) -> None:
    chain = decal.mirostat()
    state = chain.init(2)
    _, seen = chain.apply(torch.randn(2, 50), state)
    with pytest.raises(
        DecalError, match=r"^observe: tokens must be 2 token ids in \[0, 50\), as a tensor of shape \(2,\), got "
    ):
        chain.observe(state, seen, tokens)
    column = chain.observe(state, seen, torch.tensor([[1], [2]]))
    assert torch.equal(column[0]["mu"], chain.observe(state, seen, torch.tensor([1, 2]))[0]["mu"])


def test_a_state_for_other_rows_is_refused() -> None:
    with pytest.raises(DecalError, match=r"^the state is of 2 rows, the logits have 3$"):
        decal.mirostat().apply(torch.randn(3, 50), decal.mirostat().init(2))


def test_a_history_must_be_one() -> None:
    with pytest.raises(DecalError, match=r"^history must be a History, such as decal.History.of\(input_ids\), got Tensor$"):
        decal.dry()(torch.randn(1, 50), history=torch.tensor([[1, 2]]))
    for bad in ([1, 2], "ab", ["ab"]):
        with pytest.raises(DecalError, match=r"^a history holds a list of token ids for each row"):
            decal.History.of(bad)


def test_a_model_must_be_one() -> None:
    with pytest.raises(DecalError, match=r"^for_model takes a transformers model, got str$"):
        decal.top_w().for_model("smollm2")
    weights = Weights(torch.randn(9, 3), torch.randn(9, 3))
    with pytest.raises(DecalError, match=r"^the model has 9 output embeddings, the logits 5 tokens$"):
        decal.Chain(decal.top_w().steps, weights)(torch.randn(1, 5))


def test_init_is_for_the_rows_of_the_parameters() -> None:
    chain = decal.mirostat(torch.tensor([[2.0], [3.0]]))
    with pytest.raises(DecalError, match=r"^the chain has parameters for 2 rows, init is asked for 3$"):
        chain.init(3)


def test_a_step_that_stands_twice_remembers_twice() -> None:
    step = decal.mirostat(3)
    once, apart = step | decal.temperature(0.8) | step, parse("mirostat(3) | temperature(0.8) | mirostat(3)")
    assert once == apart
    z, states = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 3, []
    for chain in (once, apart):
        state = chain.init(4)
        for _ in range(3):
            scores, seen = chain.apply(z, state)
            state = chain.observe(state, seen, scores.argmax(-1))
        states.append(state)
    for one, other in zip(*states, strict=True):
        assert one is other is None or torch.equal(one["mu"], other["mu"])
    assert not torch.equal(states[0][0]["mu"], states[0][2]["mu"])


def test_a_dead_row_is_not_remembered() -> None:
    chain = decal.mirostat(3)
    state = chain.init(2)
    z = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    z[1] = -torch.inf
    _, seen = chain.apply(z, state, check=False)
    after = chain.observe(state, seen, torch.tensor([0, 0]))
    assert after[0]["mu"][0] != state[0]["mu"][0]
    assert after[0]["mu"][1] == state[0]["mu"][1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": torch.tensor([1, 2, 3])}, "the prompt's length is one number, or one for each of 2 rows"),
        ({"prompt": -3}, "the prompt's length is one number"),
        ({"prompt": 0.5}, "the prompt's length is one number"),
        ({"request": [0.2, 0.5]}, "a history of 2 rows needs as many whole request numbers"),
        ({"request": [1]}, "a history of 2 rows needs as many whole request numbers"),
    ],
)
def test_what_a_history_is_told(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DecalError, match=f"^{message}"):
        History.of([[1, 2], [3]], **kwargs)
    with pytest.raises(DecalError, match=r"^a history holds whole numbers"):
        History.of([[1.7, 2]])


def test_chains_for_two_models_do_not_mix() -> None:
    one, other = (Weights(torch.eye(5), torch.eye(5)) for _ in range(2))
    first, second = Chain(decal.top_w().steps, one), Chain(decal.min_p().steps, other)
    assert (first | decal.min_p(0.1)).weights is one
    with pytest.raises(DecalError, match=r"are for different models; use for_model once, on the whole chain$"):
        first | second
