"""Chains in llama.cpp itself, on the default model's GGUF file, and chains as its own samplers."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against import fresh_rows, fresh_texts
from replay import REAL_CHAINS
from torch import Tensor

import decal
from decal import DecalError, History, parse
from decal.eval import models
from decal.kernels import dispatch
from decal.samplers.guided import Guide
from decal.samplers.vocabulary import token_bytes
from decal.serving import llama_cpp
from decal.serving.llama_cpp import Live, completion_kwargs, request_fields
from decal.serving.verify import verify

pytestmark = [pytest.mark.llama_cpp, pytest.mark.model]

ANSWERS = ["red", "green", "light green", "blue"]
PROMPTS = ["Once upon a time, in a small village by the sea, there", "Random colour: blue\nRandom colour: red\nRandom colour:"]


@pytest.fixture(scope="module")
def live() -> Any:
    engine = Live.start(
        os.environ.get("DECAL_GGUF") or str(models.gguf_file("smollm2")), n_ctx=512, n_threads=1, n_threads_batch=1
    )
    yield engine
    engine.close()


def write(engine: Live, prompt: list[int], chain: str, length: int = 6, **asked: Any) -> tuple[list[int], list[Tensor], Any]:
    """New tokens, the laws that llama.cpp drew them from, and decal's processor."""
    if "guided" in chain:
        asked |= {"answers": ANSWERS, "tokenizer": engine._llama}
    else:
        asked |= {"max_tokens": length}
    kwargs = completion_kwargs(chain, **asked)
    engine._llama.drawn, engine._llama.laws = [], []
    engine._llama.create_completion(list(prompt), **kwargs)
    return engine._llama.drawn, engine._llama.laws, kwargs["logits_processor"][-1]


def laws(engine: Live, processor: Any, prompt: list[int], output: list[int]) -> list[Tensor]:
    """What the chain makes, in plain torch, of the rows that llama.cpp's model gave; with a seed, 0 for what it draws."""
    request, group, found = processor.follower.request, processor.follower._group, []
    chain, state = request.chain, request.chain.init(1)
    number = 0 if group is None else group.members[0].number
    with dispatch.use("reference"):
        for size, token in enumerate(output):
            text = prompt + output[:size]
            row, history = engine._llama.seen[tuple(text)][None], History.of([text], prompt=len(prompt), request=[number])
            scores, seen = chain.apply(row, state, history=history)
            if request.seed is not None:
                drawn = chain.sample(row, request.seed, len(text), state=state, history=history)
                scores = torch.full_like(row, -torch.inf).scatter_(1, drawn[:, None], 0.0)
            found.append(scores[0])
            state = chain.observe(state, seen, torch.tensor([token]))
    return found


def check(engine: Live, processor: Any, prompt: list[int], drawn: list[int], found: list[Tensor]) -> None:
    assert len(drawn) == len(found) > 0
    for token, theirs, ours in zip(drawn, found, laws(engine, processor, prompt, drawn), strict=True):
        assert torch.equal(theirs.isneginf(), ours.isneginf())
        torch.testing.assert_close(theirs.float(), ours.double().log_softmax(-1).float(), rtol=1e-4, atol=1e-5)
        assert ours[token] > -torch.inf


@pytest.mark.parametrize("chain", REAL_CHAINS)
def test_llama_cpp_draws_from_what_the_chain_leaves(live: Live, chain: str) -> None:
    for prompt in map(live.tokenizer.encode, PROMPTS):
        drawn, found, processor = write(live, prompt, chain)
        check(live, processor, prompt, drawn, found)


@pytest.mark.parametrize("chain", REAL_CHAINS)
def test_with_a_seed_the_tokens_are_decal_s(live: Live, chain: str) -> None:
    for seed, prompt in enumerate(map(live.tokenizer.encode, PROMPTS)):
        drawn, found, processor = write(live, prompt, chain, seed=seed)
        assert drawn == [int(ours.argmax()) for ours in laws(live, processor, prompt, drawn)]
        assert all(int(theirs.isfinite().sum()) == 1 for theirs in found)
        assert write(live, prompt, chain, seed=seed)[0][:1] == drawn[:1]


def test_answers_from_the_model_s_own_vocabulary(live: Live) -> None:
    own, other = llama_cpp._guide(tuple(ANSWERS), live._llama), Guide.of(ANSWERS, live.tokenizer)
    assert (own.trie.token, own.trie.parent, own.trie.ends, own.stop) == (
        other.trie.token,
        other.trie.parent,
        other.trie.ends,
        other.stop,
    )
    (prompt, _) = map(live.tokenizer.encode, PROMPTS)
    found = {live.tokenizer.decode(write(live, prompt, "guided(1.0)", seed=seed)[0][:-1]) for seed in range(30)}
    assert found == set(ANSWERS)


def test_the_tokenizer_read_from_the_file_is_llama_cpp_s(live: Live) -> None:
    for text in PROMPTS:
        assert live.tokenizer.encode(text) == live._llama.tokenize(text.encode(), add_bos=False)
    assert token_bytes(live.tokenizer) == llama_cpp._pieces(live._llama)


def test_chat(live: Live) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    kwargs = completion_kwargs("min_p(0.1) | mirostat(2.0)", seed=5, chat=True, max_tokens=6)
    live._llama.drawn, live._llama.laws = [], None
    answer = live._llama.create_chat_completion(messages, **kwargs)
    (processor,) = kwargs["logits_processor"]
    assert processor.error is None
    drawn, text = live._llama.drawn, next(reversed(live._llama.seen))
    prompt = list(text[: len(text) - len(drawn) + 1])
    assert drawn == [int(ours.argmax()) for ours in laws(live, processor, prompt, drawn)]
    assert live.tokenizer.decode(drawn).startswith(answer["choices"][0]["message"]["content"])


def test_streams(live: Live) -> None:
    (prompt, _) = map(live.tokenizer.encode, PROMPTS)
    kwargs = completion_kwargs("min_p(0.1)", seed=1, max_tokens=6, stream=True)
    live._llama.drawn, live._llama.laws = [], None
    parts = [part["choices"][0]["text"] for part in live._llama.create_completion(list(prompt), **kwargs)]
    assert "".join(parts) == live.tokenizer.decode(live._llama.drawn)


def test_a_bias_is_applied_and_llama_cpp_s_own_would_drop_the_chain(live: Live) -> None:
    (prompt, _) = map(live.tokenizer.encode, PROMPTS)
    (token,) = live.tokenizer.encode(" zebra")[:1]
    drawn, _, _ = write(live, prompt, "top_k(1)", logit_bias={token: 100.0})
    assert drawn == [token] * 6
    kept = lambda: int(live._llama.laws[0].isfinite().sum())  # noqa: E731
    assert kept() == 1
    kwargs = completion_kwargs("top_k(1)", max_tokens=1)
    live._llama.drawn, live._llama.laws = [], []
    live._llama.create_completion(list(prompt), **kwargs, logit_bias={token: 0.0})
    assert kept() == live._llama.n_vocab(), "it no longer drops logits processors: say so, and take it"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_reaches_the_user(live: Live) -> None:
    (prompt, _) = map(live.tokenizer.encode, PROMPTS)
    with pytest.raises(DecalError, match="logit_bias has the token 999999"):
        live._llama.create_completion(list(prompt), **completion_kwargs("min_p(0.1)", logit_bias={999999: 1.0}))


def test_a_draft_model_is_refused_where_the_text_matters_and_logprobs_are_the_model_s(live: Live) -> None:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    drafts = LlamaPromptLookupDecoding(num_pred_tokens=3)
    llama = Llama(live._llama.model_path, n_ctx=128, n_threads=1, n_threads_batch=1, draft_model=drafts, verbose=False)
    text = "one two three four one two three four one two three"
    for chain, seed in (("top_k(1) | presence_penalty(0.0001)", None), ("top_k(1)", 3)):
        with pytest.raises(DecalError, match="draft_model"):
            llama.create_completion(text, **completion_kwargs(chain, seed=seed, max_tokens=9))
    # One that reads no text is right: it writes on what is repeated, token by token the most probable one.
    answer = llama.create_completion(text, **completion_kwargs("top_k(1)", max_tokens=4, logprobs=2))["choices"][0]
    assert answer["text"].startswith(" four")
    logprobs = answer["logprobs"]["token_logprobs"]
    assert min(logprobs) < -1e-3, "the chain's would be 0, as one token is left"
    llama.close()


def test_verify(live: Live) -> None:
    report = verify(live, ["temperature(1.5) | min_p(0.1)", "guided(1.0)"], PROMPTS, generations=6, length=3, draws=20)
    assert report.ok, str(report)
    assert report.findings[0].steps >= 12
    assert "act beside" in write_refused(live)


def write_refused(live: Live) -> str:
    with pytest.raises(DecalError) as refused:
        live._llama.create_completion("x", **completion_kwargs("min_p(0.1)", temperature=0.3))
    return str(refused.value)


# ---- chains as llama.cpp's own samplers


class Native:
    """llama.cpp's samplers as its server sets them up from a request's fields, without the draw."""

    def __init__(self, fields: dict[str, Any], vocab: Any, size: int):
        import llama_cpp as lib

        self.lib, f = lib, fields
        breakers = [text.encode() for text in f.get("dry_sequence_breakers", [])]
        make = {
            "penalties": lambda: lib.llama_sampler_init_penalties(
                size, f["repeat_last_n"], f["repeat_penalty"], f["frequency_penalty"], f["presence_penalty"]
            ),
            "dry": lambda: lib.llama_sampler_init_dry(
                vocab,
                f["dry_multiplier"],
                f["dry_base"],
                f["dry_allowed_length"],
                f["dry_penalty_last_n"],
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            ),
            "top_n_sigma": lambda: lib.llama_sampler_init_top_n_sigma(f["top_n_sigma"]),
            "top_k": lambda: lib.llama_sampler_init_top_k(f["top_k"]),
            "typ_p": lambda: lib.llama_sampler_init_typical(f["typical_p"], f["min_keep"]),
            "top_p": lambda: lib.llama_sampler_init_top_p(f["top_p"], f["min_keep"]),
            "min_p": lambda: lib.llama_sampler_init_min_p(f["min_p"], f["min_keep"]),
            "xtc": lambda: lib.llama_sampler_init_xtc(f["xtc_probability"], f["xtc_threshold"], f["min_keep"], 1),
            "temperature": lambda: lib.llama_sampler_init_temp_ext(
                f["temperature"], f["dynatemp_range"], f.get("dynatemp_exponent", 1.0)
            ),
            "adaptive_p": lambda: lib.llama_sampler_init_adaptive_p(f["adaptive_target"], f["adaptive_decay"], 1),
        }
        if f["mirostat"]:
            temperature = lib.llama_sampler_init_temp(f["temperature"])
            added = [temperature, lib.llama_sampler_init_mirostat_v2(1, f["mirostat_tau"], f["mirostat_eta"])]
        else:
            added = [make[name]() for name in f["samplers"]]
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in added:
            lib.llama_sampler_chain_add(self.chain, sampler)

    def __call__(self, row: Tensor, text: list[int]) -> Tensor:
        """(V,) logits that are left."""
        self.lib.llama_sampler_reset(self.chain)
        for token in text:
            self.lib.llama_sampler_accept(self.chain, token)
        kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        table = np.zeros(len(row), kind)
        table["id"], table["logit"] = np.arange(len(row)), row.numpy()
        start = table.ctypes.data_as(ctypes.POINTER(self.lib.llama_token_data))
        array = self.lib.llama_token_data_array(data=start, size=len(table), selected=-1, sorted=False)
        self.lib.llama_sampler_apply(self.chain, ctypes.byref(array))
        left = np.frombuffer(
            (ctypes.c_char * (array.size * kind.itemsize)).from_address(ctypes.addressof(array.data.contents)), kind
        )
        out = torch.full(row.shape, -torch.inf, dtype=torch.float64)
        out[torch.from_numpy(left["id"].astype(np.int64))] = torch.from_numpy(left["logit"].astype(np.float64))
        return out

    def __del__(self) -> None:
        self.lib.llama_sampler_free(self.chain)


def agree(chain: decal.Chain, native: Native, rows: Tensor, texts: Tensor) -> int:
    """How many rows the chain cuts; it keeps what the samplers keep but for a token at the cutoff, and laws agree."""
    ours = chain(rows.double(), history=History.of(texts, prompt=5), state=chain.init(len(rows)) if chain.init(1) else None)
    for own, row, text in zip(ours, rows, texts.tolist(), strict=True):
        theirs = native(row, text)
        assert int((own.isneginf() != theirs.isneginf()).sum()) <= 1
        torch.testing.assert_close(own.softmax(-1), theirs.softmax(-1), rtol=5e-3, atol=1e-5)
    return int((ours.isneginf().sum(-1) > 0).sum())


@pytest.mark.parametrize("seed", range(25))
def test_fields_are_the_chain_in_llama_cpp_s_samplers(live: Live, seed: int) -> None:
    """Random chains in random orders."""
    rng, size = random.Random(seed), 1000
    window = rng.randrange(5, 50)
    steps = [
        [
            decal.repetition_penalty(rng.uniform(1, 1.5), window=window, form="legacy"),
            decal.presence_penalty(rng.uniform(0, 1), window=window, scope="all"),
        ],
        [decal.top_k(rng.randrange(5, 500))],
        [decal.top_p(rng.uniform(0.5, 0.99))],
        [decal.min_p(rng.uniform(0.001, 0.2))],
        [rng.choice([decal.top_n_sigma(rng.uniform(0.8, 2)), decal.typical(rng.uniform(0.5, 0.95))])],
        [decal.xtc(rng.uniform(0.05, 0.3), 1.0)],
        [decal.temperature(rng.uniform(0.5, 2))],
        [decal.dry(rng.uniform(0.2, 2), 1.75, rng.randrange(1, 4), window=rng.randrange(10, 40))],
    ]
    groups = rng.sample(steps, rng.randrange(1, len(steps) + 1))
    if seed % 5 == 0:
        groups.append([decal.adaptive_p(rng.uniform(0.2, 0.8))])
    chain = decal.Chain(tuple(step for group in groups for one in group for step in one.steps))
    fields = request_fields(chain).fields
    rows, texts = fresh_rows(seed, count=10, size=size)[1::2].float(), fresh_texts(seed, count=5, size=size)
    agree(chain, Native(fields, live._llama._model.vocab, size), rows.clamp(min=-30), texts)


@pytest.mark.parametrize(
    "chain",
    [
        "temperature(1.5) | min_p(0.1)",
        "min_p(0.1) | temperature(1.5)",
        "min_p(0.1) | temperature(2.0) | min_p(0.1)",
        "top_n_sigma(1.0) | min_p(0.02) | dynamic_temperature(1.0, 0.5)",
        "temperature(0.7) | mirostat(3.0)",
        "dry(0.8, 1.75, 2, 60)",
    ],
)
def test_orders_and_what_must_not_be_mixed_up(live: Live, chain: str) -> None:
    size = 1000
    made = parse(chain)
    native = Native(request_fields(made).fields, live._llama._model.vocab, size)
    rows, texts = fresh_rows(7, count=20, size=size)[::2].float(), fresh_texts(7, count=10, size=size, length=60)
    cut = agree(made, native, rows, texts)
    assert cut > 3 or "dry" in chain
    if made.steps[0].rule is not made.steps[-1].rule:  # the other way round it is another chain
        with pytest.raises(AssertionError):
            agree(decal.Chain(made.steps[::-1]), native, rows, texts)


def test_a_server_s_empty_breaker_breaks_nothing(live: Live) -> None:
    """A repetition reaches over line breaks and colons, llama.cpp's own breakers."""
    text = live.tokenizer.encode("a: b\n c: d\n a: b\n c: d\n a: b\n c:")
    chain = decal.dry(0.8, 1.75, 2, window=100)
    fields = request_fields(chain).fields
    size = live._llama.n_vocab()
    rows = torch.zeros(1, size)
    agree(chain, Native(fields, live._llama._model.vocab, size), rows, torch.tensor([text]))
    broken = Native({**fields, "dry_sequence_breakers": ["\n", ":"]}, live._llama._model.vocab, size)
    with pytest.raises(AssertionError):
        agree(chain, broken, rows, torch.tensor([text]))
    tokens = decal.tokens_with(live.tokenizer, "\n", ":")
    chain = decal.dry(0.8, 1.75, 1, window=100, breakers=tokens)
    fields = request_fields(chain, tokenizer=live.tokenizer).fields
    agree(chain, Native(fields, live._llama._model.vocab, size), rows, torch.tensor([text]))


def test_the_example_runs(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "llama_cpp_generate.py"))
    example["main"](live._llama.model_path)
    assert len(capsys.readouterr().out.splitlines()) >= 4
