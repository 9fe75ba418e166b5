"""Chains in transformers as it serves: continuous batching, generation configs, generate functions in folders, pipelines."""

from __future__ import annotations

import gc
import inspect
import json
import random
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from replay import CHAINS, REAL_CHAINS, law
from tiny import byte_level, llama
from torch import Tensor
from transformers import ContinuousBatchingConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import decal
from decal import DecalError, History, parse
from decal.serving import transformers as served
from decal.serving.request import Request

TOKENIZER = byte_level(["red green light blue " * 3], merges=20)
V = len(TOKENIZER)
SMALL: dict[str, Any] = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16}
"""Prompts are taken in by pieces, while others generate."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        # What the libraries deprecate in each other is not what these tests are about.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect() -> Iterator[None]:
    """A manager that stops collects garbage, twice, which takes a second with all that tests import."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model() -> Any:
    made = llama(V, dtype=torch.float32)
    made.generation_config.eos_token_id = None
    # A model of the hub, with settings of its own.
    made.generation_config.update(temperature=0.2, top_k=3, top_p=0.5, repetition_penalty=1.4, do_sample=True)
    return made


def rows_of(model: Any) -> Any:
    """The model's row behind a text, worked out once."""
    known: dict[tuple[int, ...], Tensor] = {}

    def row(text: Sequence[int]) -> Tensor:
        key = tuple(text)
        if key not in known:
            with torch.no_grad():
                known[key] = model(torch.tensor([key])).logits[:, -1].float()
        return known[key]

    return row


def some_prompts(rng: random.Random, count: int, longest: int = 40) -> list[list[int]]:
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def drawn(request: Request, prompt: Sequence[int], length: int, rows: Any) -> list[int]:
    """What the chain writes with its seed, alone, told of each token as soon as it is drawn."""
    chain, text = request.chain, list(prompt)
    state = chain.init(1) if "state" in chain.needs else None
    for _ in range(length):
        history = History.of([text], prompt=len(prompt), request=[request.seed])
        token, seen = chain.draw(rows(text), [request.seed], [len(text)], state, history=history)
        text.append(int(token))
        if state is not None:
            state = chain.observe(state, seen, token)
    return text[len(prompt) :]


# ---- continuous batching


@pytest.mark.parametrize("seed", range(4))
def test_seeded_requests_of_a_batch_are_what_each_is_alone(model: Any, seed: int):
    rng = random.Random(seed)
    prompts = some_prompts(rng, 12)
    chains = [rng.choice(CHAINS) for _ in prompts]
    seeds = [rng.randrange(2**40) for _ in prompts]
    config = ContinuousBatchingConfig(**SMALL)
    outputs = served.generate_batch(model, prompts, chains, seeds=seeds, max_new_tokens=10, continuous_batching_config=config)
    rows = rows_of(model)
    for prompt, chain, number, output in zip(prompts, chains, seeds, outputs, strict=True):
        assert output.prompt_ids == prompt
        assert output.generated_tokens == drawn(Request(parse(chain), number), prompt, 10, rows), chain


def test_the_same_tokens_as_generate_s(model: Any):
    chain, prompts = parse("dry(0.8) | repetition_penalty(1.2) | mirostat(3.0)"), some_prompts(random.Random(0), 5)
    outputs = served.generate_batch(
        model, prompts, chain, seeds=range(5), max_new_tokens=8, continuous_batching_config=ContinuousBatchingConfig(**SMALL)
    )
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ids = torch.tensor([prompt])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), **chain.generate_kwargs(seeds=[number], max_new_tokens=8, pad_token_id=V)
        )
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("text", [chain for chain in CHAINS if "xtc" not in chain])
def test_tokens_are_drawn_from_the_chain_s_law_at_every_step(model: Any, text: str):
    live = served.Live(model, TOKENIZER, "continuous", ContinuousBatchingConfig(**SMALL))
    prompts = some_prompts(random.Random(1), 6)
    rows, request = rows_of(model), Request(parse(text))
    for prompt, (tokens, laws) in zip(prompts, live.write(prompts, {"decal": text}, 6, True), strict=True):
        assert len(tokens) == len(laws) == 6
        for step, token in enumerate(tokens):
            wanted = law(request, prompt, tokens[:step], 0, rows).log_softmax(-1)[0]
            assert torch.equal(laws[step].isfinite(), wanted.isfinite())
            torch.testing.assert_close(laws[step].exp(), wanted.exp(), rtol=1e-3, atol=1e-5)
            assert wanted[token].isfinite()


def test_paused_requests_go_on_as_if_they_had_not_been(model: Any, monkeypatch: pytest.MonkeyPatch):
    paused: list[Any] = []
    honest = OffloadingManager.offload_requests

    def watched(self: Any) -> Any:
        paused.append(len(self.scheduler.active_requests))
        return honest(self)

    monkeypatch.setattr(OffloadingManager, "offload_requests", watched)
    prompts = some_prompts(random.Random(5), 6, longest=12)
    chains = ["repetition_penalty(1.3) | mirostat(2.0)", "risk_budget(0.8)", "dry(0.8) | xtc(0.1, 0.5)"] * 2
    # Six texts of up to 36 tokens do not fit into 72.
    config = ContinuousBatchingConfig(page_size=4, num_blocks=18, max_batch_tokens=16, allow_block_sharing=False)
    outputs = served.generate_batch(
        model, prompts, chains, seeds=range(6), max_new_tokens=24, continuous_batching_config=config
    )
    assert paused, "nothing was paused, so this shows nothing"
    rows = rows_of(model)
    for number, (prompt, chain, output) in enumerate(zip(prompts, chains, outputs, strict=True)):
        assert output.prompt_ids == prompt
        assert output.generated_tokens == drawn(Request(parse(chain), number), prompt, 24, rows)


def test_requests_come_one_by_one_with_chains_of_their_own_or_none(model: Any):
    rng, answers = random.Random(2), ["red", "green", "light green"]
    sent: dict[str, tuple[Request | None, list[int], int]] = {}
    found: dict[str, Any] = {}
    config = ContinuousBatchingConfig(**SMALL)
    with served.continuous_batching(model, TOKENIZER, continuous_batching_config=config) as manager:
        for number in range(14):
            prompt, length = some_prompts(rng, 1)[0], rng.randint(1, 9)
            asked: dict[str, Any] = {"decal": rng.choice(CHAINS), "decal_seed": number}
            if number % 5 == 3:
                asked, length = {"decal": "guided(1.0)", "decal_answers": answers, "decal_seed": number}, 30
            elif number % 5 == 4:
                asked = {}
            name = manager.add_request(prompt, max_new_tokens=length, **asked)
            sent[name] = Request.of(asked), prompt, length
            if number % 3 == 0:  # some are done before others come
                result = manager.get_result(timeout=30)
                found[result.request_id] = result
        while len(found) < len(sent):
            result = manager.get_result(timeout=30)
            assert result is not None
            found[result.request_id] = result
    rows = rows_of(model)
    for name, (request, prompt, length) in sent.items():
        assert found[name].error is None
        tokens = found[name].generated_tokens
        if request is None:
            assert len(tokens) == length
        elif request.answers:
            assert TOKENIZER.decode(tokens[:-1]) in answers
            assert tokens == drawn(request.given(TOKENIZER), prompt, len(tokens), rows)
            assert tokens[-1] == TOKENIZER.eos_token_id
        else:
            assert tokens == drawn(request, prompt, length, rows)


def test_the_model_s_own_settings_do_nothing_beside_a_chain(model: Any):
    """It would draw from three tokens, at temperature 0.2."""
    outputs = served.generate_batch(
        model,
        [[5, 6, 7]] * 60,
        "temperature(1)",
        max_new_tokens=1,
        continuous_batching_config=ContinuousBatchingConfig(**SMALL),
    )
    assert len({output.generated_tokens[0] for output in outputs}) > 6
    assert model.generation_config.top_k == 3
    assert model.config._attn_implementation == "sdpa"


def test_tokens_that_the_model_never_writes_are_gone_before_the_chain(model: Any):
    rows = rows_of(model)
    best = int(rows([5, 6, 7]).argmax())
    kept = parse("top_k(2)")(rows([5, 6, 7]).index_fill(1, torch.tensor([best]), -torch.inf))[0].isfinite().nonzero()[:, 0]
    outputs = served.generate_batch(
        model,
        [[5, 6, 7]] * 40,
        "top_k(2)",
        max_new_tokens=1,
        suppress_tokens=[best],
        continuous_batching_config=ContinuousBatchingConfig(**SMALL),
    )
    assert {output.generated_tokens[0] for output in outputs} == set(kept.tolist())


def test_chains_with_embeddings_or_answers(model: Any):
    chain = parse("top_w(2.8) | temperature(1.3)").for_model(model)
    follows = parse("guided(0.5)").for_answers(["red", "green"], TOKENIZER)
    prompts = some_prompts(random.Random(3), 4)
    config = ContinuousBatchingConfig(**SMALL)
    outputs = served.generate_batch(
        model, prompts, [chain, follows] * 2, seeds=range(4), max_new_tokens=9, continuous_batching_config=config
    )
    rows = rows_of(model)
    for number in (0, 2):
        assert outputs[number].generated_tokens == drawn(Request(chain, number), prompts[number], 9, rows)
    for number in (1, 3):
        assert TOKENIZER.decode(outputs[number].generated_tokens, skip_special_tokens=True) in ("red", "green")
    assert served.generate_batch(model, [], chain) == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"chains": ["min_p(0.1)"]}, "2 prompts and 1 chains"),
    ({"seeds": [1, 2, 3]}, "2 prompts and 3 seeds"),
    ({"seeds": [1, 0.5]}, "decal_seed must be a whole number"),
    ({"chains": "min_p(7)"}, "p must be in"),
    ({"chains": parse("min_p([0.1, 0.2])")}, "one value for each parameter, got a list of 2"),
    ({"chains": parse("guided(1)")}, "for_answers"),
    ({"chains": parse("top_w(1.0)")}, "for_model"),
    ({"chains": parse("ensemble(0.5)")}, "use model.generate"),
    ({"temperature": 0.7}, "temperature would act beside"),
    ({"logits_processor": []}, "logits_processor would act beside"),
    ({"do_sample": False}, "do_sample would act beside"),
    ({"max_length": 30}, "max_length would act beside"),
    ({"no_such_setting": 3}, "no_such_setting: no setting"),
    ({"min_new_tokens": 3}, r"would not follow min_new_tokens=3"),
    ({"stop_strings": ["x"]}, r"would not follow stop_strings=\['x'\]"),
    ({"bad_words_ids": [[3]]}, r"would not follow bad_words_ids"),
    ({"num_beams": 4}, r"would not follow num_beams=4"),
    ({"num_return_sequences": 2}, "Several texts of a prompt are several requests"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    ({"inputs": ["once", "upon"]}, "each a list of token ids"),
    ({"inputs": [1, 2]}, "each a list of token ids"),
    ({"inputs": {"input_ids": [[1]]}}, "each a list of token ids"),
    ({"seeds": 3}, "seeds are a list of whole numbers, one for each prompt, got 3"),
    ({"chains": "guided(1)"}, r"use chain.for_answers\(answers, tokenizer\)"),
    ({"inputs": [[1], []]}, r"a prompt is a list of at least one token id below 273, got \[\]"),
    ({"inputs": [[1], [273]]}, r"got \[273\]"),
    ({"continuous_batching_config": ContinuousBatchingConfig(use_cuda_graph=True)}, "use_cuda_graph"),
    ({"continuous_batching_config": ContinuousBatchingConfig(use_cuda_graph=(False, True))}, "use_cuda_graph"),
    ({"continuous_batching_config": ContinuousBatchingConfig(use_async_batching=True)}, "use_async_batching"),
    ({"continuous_batching_config": ContinuousBatchingConfig(default_compile_level=1)}, "default_compile_level"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_continuous_batching_can_t_do_is_refused(model: Any, given: dict[str, Any], message: str):
    assert V == 273
    with pytest.raises(DecalError, match=message):
        served.generate_batch(model, **{"inputs": [[1], [2, 3]], "chains": "min_p(0.1)"} | given)


def test_answers_that_do_not_fit_are_refused(model: Any):
    follows = parse("guided(1)").for_answers(["light green"], TOKENIZER)
    with pytest.raises(DecalError, match=r"the longest answer takes \d+ tokens, got max_new_tokens=2"):
        served.generate_batch(model, [[1]], follows, max_new_tokens=2)
    other = parse("guided(1)").for_answers(["red"], byte_level(["red green light blue, dark yellow"] * 3, merges=60))
    with pytest.raises(DecalError, match="another tokenizer's"):
        served.generate_batch(model, [[1]], other)
    with pytest.raises(DecalError, match=f"50 output embeddings, this one {V} tokens"):
        served.generate_batch(model, [[1]], parse("top_w(1.0)").for_model(llama(50)))


def test_a_manager_refuses_a_request_before_it_takes_it_in(model: Any):
    config = ContinuousBatchingConfig(**SMALL)
    with served.continuous_batching(model, continuous_batching_config=config) as manager:
        for asked, message in [
            ({"decal": "minp(0.1)"}, "did you mean min_p"),
            ({"decal": "min_p(0.1)", "temperature": 0.3}, "temperature: no key of decal's"),
            ({"decal_sed": 3}, "did you mean decal_seed"),
            ({"decal": "guided(1)", "decal_answers": ["red"]}, r"need the tokenizer: continuous_batching\(model, tokenizer\)"),
            ({"decal": parse("min_p(0.1)"), "decal_answers": ["red"]}, "follows answers"),
        ]:
            with pytest.raises(DecalError, match=message):
                manager.add_request([1, 2], max_new_tokens=3, **asked)
        name = manager.add_request([1, 2], max_new_tokens=3, decal="min_p(0.1)")
        assert manager.get_result(timeout=30).request_id == name


def test_the_words_of_an_engine_that_fails_reach_the_caller(model: Any):
    config = ContinuousBatchingConfig(page_size=4, num_blocks=4, max_batch_tokens=16)
    with pytest.raises(RuntimeError, match="continuous batching failed at prompt 0: No requests can be scheduled"):
        served.generate_batch(model, [[1] * 60], "min_p(0.1)", continuous_batching_config=config)


def test_a_transformers_without_processors_by_request_is_named(model: Any, monkeypatch: pytest.MonkeyPatch):
    served._classes.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers.generation.continuous_batching.continuous_api", None)
    try:
        with pytest.raises(DecalError, match=f"such as 5.23; {transformers.__version__} is installed"):
            served.generate_batch(model, [[1]], "min_p(0.1)")
    finally:
        served._classes.cache_clear()


class Nothing(LogitsProcessor):
    """Allows one token only."""

    supports_continuous_batching = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([3]), 0.0)


def test_paged_generate_drops_processors_which_is_why_it_is_refused(model: Any):
    ids = torch.tensor([[1, 2, 3]])
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": True, "repetition_penalty": 1.0}
    processors = LogitsProcessorList([Nothing()])
    assert model.generate(ids, logits_processor=processors, **kwargs)[0, 3:].tolist() == [3] * 8
    paged = {"cache_implementation": "paged", "continuous_batching_config": ContinuousBatchingConfig(**SMALL)}
    assert set(model.generate(ids, logits_processor=processors, **kwargs, **paged)[0, 0, 3:].tolist()) != {3}
    with pytest.raises(DecalError, match=r"drops all logits processors.*use generate_batch of its serving adapter"):
        parse("min_p(0.1)").generate_kwargs(cache_implementation="paged")
    assert parse("min_p(0.1)").generate_kwargs(cache_implementation="static")["cache_implementation"] == "static"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"custom_generate": "transformers-community/dola"}, "code that may call no logits processor"),
        ({"penalty_alpha": 0.6}, "penalty_alpha decides on tokens beside the chain"),
        ({"dola_layers": "high"}, "dola_layers decides on tokens beside the chain"),
    ],
)
def test_loops_that_do_without_the_chain_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(DecalError, match=message):
        parse("min_p(0.1)").generate_kwargs(**given)


# ---- generation configs


def random_native(rng: random.Random) -> str:
    """A chain of rules that transformers has, in its order."""
    steps = [
        f'repetition_penalty({rng.uniform(0.7, 2):.3f}, form="legacy")',
        f"no_repeat_ngram({rng.randint(1, 3)})",
        f"temperature({rng.uniform(0.2, 3):.3f})",
        f'top_h({rng.uniform(0.1, 0.9):.3f}, variant="cumulative")',
        f"top_k({rng.randint(1, 60)})",
        f"top_p({rng.uniform(0.1, 0.99):.3f})",
        f"min_p({rng.uniform(0.001, 0.5):.3f})",
        f"typical({rng.uniform(0.1, 0.95):.3f})",
        f"epsilon({rng.uniform(0.0005, 0.1):.4f})",
        f"eta({rng.uniform(0.0005, 0.1):.4f})",
    ]
    chosen = [step for step in steps if rng.random() < 0.35] or ["temperature(1.0)"]
    if rng.random() < 0.2:
        chosen.insert(rng.randrange(len(chosen) + 1), "flatten(0)")  # off
    return " | ".join(chosen)


@pytest.mark.parametrize("seed", range(60))
def test_a_config_s_own_warpers_keep_what_the_chain_keeps(model: Any, seed: int, tmp_path: Any):
    rng = random.Random(seed)
    chain = parse(random_native(rng))
    served.generation_config(chain).save_pretrained(tmp_path)
    # As any stack finds it.
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    back, report = decal.from_transformers(json.loads((tmp_path / "generation_config.json").read_text()))
    live = [str(step) for step in chain.steps if not step.is_off]
    assert [str(step) for step in back.steps if not step.is_off] == live
    assert all("tied" in line or "bans every token" in line or "not part of a chain" in line for line in report), report
    ids = torch.tensor([[rng.randrange(V) for _ in range(30)] for _ in range(8)])
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(seed)) * rng.choice([1, 3])
    prepared, _ = model._prepare_generation_config(config)
    prepared._eos_token_tensor = None
    warpers = model._get_logits_processor(prepared, input_ids_seq_length=ids.shape[1])
    theirs = warpers(ids, logits.clone())
    ours = chain(logits, history=History.of(ids, prompt=ids.shape[1]))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-4, atol=1e-6)


def test_greedy_decoding_is_a_last_temperature_of_0(model: Any, tmp_path: Any):
    config = served.generation_config('repetition_penalty(1.3, form="legacy") | temperature(0)')
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved == {"do_sample": False, "repetition_penalty": 1.3, "transformers_version": transformers.__version__}
    ids = torch.tensor([[5, 6, 7, 5]])
    config.max_new_tokens, config.eos_token_id = 12, -1
    kwargs = parse('repetition_penalty(1.3, form="legacy") | temperature(0)').generate_kwargs(max_new_tokens=12)
    mask = torch.ones_like(ids)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, generation_config=config), model.generate(ids, attention_mask=mask, **kwargs)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flatten(0.5) | top_k(3) | xtc(0.1, 0.5)", r"flatten\(0.5\): not in transformers; xtc.*: not in transformers"),
        ("top_k(3) | temperature(0.7)", r"top_k\(3\) before temperature\(0.7\): transformers applies temperature first"),
        ("min_p(0.1) | top_p(0.9)", "transformers applies top_p first"),
        ("min_p(0.1) | min_p(0.2)", r"min_p\(0.2\): transformers has one of them"),
        ("repetition_penalty(1.2)", "transformers has it with form=legacy"),
        ('repetition_penalty(1.2, 10, form="legacy")', "transformers has it with window=0"),
        ("top_h(0.4)", "transformers has it with variant=cumulative"),
        ("temperature(0) | top_k(3)", "decodes greedily, and cuts nothing"),
        ("epsilon(1)", "between 0 and 1"),
        ("min_p([0.1, 0.2])", "one value for all rows"),
    ],
)
def test_a_chain_that_is_no_config_is_refused_by_its_steps(text: str, message: str):
    with pytest.raises(DecalError, match=message):
        served.generation_config(text)


def test_the_order_is_that_of_the_installed_transformers(model: Any):
    settings = {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "temperature": 0.7,
        "top_h": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.01,
    }
    assert list(settings) == [setting for setting, _, _ in served.NATIVE.values()]
    found = []
    config, _ = model._prepare_generation_config(None, do_sample=True, **settings)
    config._eos_token_tensor = None
    names = [type(one).__name__ for one in model._get_logits_processor(config, input_ids_seq_length=3)]
    for setting in settings:
        one, _ = model._prepare_generation_config(None, do_sample=True, **dict.fromkeys(settings))
        one.update(repetition_penalty=1.0, temperature=1.0, top_p=1.0, typical_p=1.0, top_k=0)
        one.update(**dict.fromkeys(("no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), 0), min_p=None, top_h=None)
        one.update(**{setting: settings[setting]})
        one._eos_token_tensor = None
        (own,) = model._get_logits_processor(one, input_ids_seq_length=3)
        found.append(type(own).__name__)
    assert names == found


# ---- generate functions in a folder


@pytest.fixture
def modules(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where transformers puts code of folders."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


@pytest.mark.parametrize(
    "text", ["min_p(0.02) | mirostat(2.0)", "adaptive_p(0.4)", "dry(0.8) | temperature(1.4)", "top_w(2.8)"]
)
def test_a_folder_generates_through_its_chain(model: Any, tmp_path: Any, modules: Any, text: str):
    folder = tmp_path / "hub"
    written = served.save_custom_generate(folder, text)
    assert written == folder / "custom_generate" / "generate.py"
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids = torch.tensor([[0, 0, *prompts[0]], prompts[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        pad_token_id=0,
        custom_generate=str(folder),
        trust_remote_code=True,
        seeds=[17, 4],
    )
    rows, chain = rows_of(model), parse(text)
    chain = chain.for_model(model) if "model" in chain.needs else chain
    for row, (prompt, seed) in enumerate(zip(prompts, (17, 4), strict=True)):
        assert out[row, 5:].tolist() == drawn(Request(chain, seed), prompt, 10, rows)
    torch.manual_seed(3)
    unseeded = {"custom_generate": str(folder), "trust_remote_code": True, "max_new_tokens": 10, "pad_token_id": 0}
    one = model.generate(ids, attention_mask=mask, **unseeded)
    torch.manual_seed(3)
    kwargs = chain.generate_kwargs(direct=True, max_new_tokens=10, pad_token_id=0)
    assert torch.equal(one, model.generate(ids, attention_mask=mask, **kwargs))


def test_a_folder_refuses_what_would_act_beside_its_chain(model: Any, tmp_path: Any, modules: Any):
    served.save_custom_generate(tmp_path, "mirostat(2.0)")
    ids = torch.tensor([[5, 6, 7]])
    for given, message in [
        ({"temperature": 0.5}, "temperature would act beside"),
        ({"generation_config": transformers.GenerationConfig()}, "generation_config would act beside"),
        ({"num_beams": 2}, "num_beams"),
    ]:
        with pytest.raises(DecalError, match=message):
            model.generate(ids, custom_generate=str(tmp_path), trust_remote_code=True, **given)


def test_a_folder_s_code_is_the_same_for_every_chain_but_for_its_json(tmp_path: Any):
    texts = []
    for number, chain in enumerate([parse("min_p(0.1)"), parse('dry(0.8) | mirostat(3.0, 0.2, "1")')]):
        written = served.save_custom_generate(tmp_path / str(number), chain)
        text = written.read_text()
        assert repr(chain.to_json()) in text
        texts.append(text.replace(repr(chain.to_json()), ""))
        found = runpy.run_path(str(written))
        assert decal.from_json(found["CHAIN"]) == chain
        assert list(inspect.signature(found["generate"]).parameters) == ["model", "seeds", "kwargs"]
        assert (written.parent / "requirements.txt").read_text().startswith("decal>=")
    assert texts[0] == texts[1]
    with pytest.raises(DecalError, match="reads answers, which a saved chain doesn't carry"):
        served.save_custom_generate(tmp_path, "guided(1)")
    told = decal.split_temperature(2.0, 0.5).for_ends([3])
    with pytest.raises(DecalError, match="reads ends, which a saved chain doesn't carry"):
        served.save_custom_generate(tmp_path, told)
    assert "[3, 4]" in served.save_custom_generate(tmp_path, decal.split_temperature(2.0, 0.5, (3, 4))).read_text()


# ---- pipelines


@pytest.fixture(scope="module")
def pipe(model: Any) -> Any:
    tokenizer = byte_level(["red green light blue " * 3], merges=20)
    tokenizer.padding_side = "left"
    assert len(tokenizer) == V
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


TEXTS = ["red", "light green", "blue light red green", "g"]


@pytest.mark.parametrize("text", ["min_p(0.05)", "dry(0.8) | repetition_penalty(1.4)", "mirostat(2.0)", "xtc(0.05, 0.5)"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_pipeline_writes_what_each_request_writes_alone(pipe: Any, text: str, direct: bool):
    tokenizer, rows, chain = pipe.tokenizer, rows_of(pipe.model), parse(text)
    seeds = [3, 2**40, 5, 6]
    common = {"max_new_tokens": 8, "pad_token_id": tokenizer.pad_token_id, "direct": direct}
    told: dict[str, Any] = {"return_tensors": True}
    batched = pipe(TEXTS, batch_size=4, **told, **chain.generate_kwargs(seeds=seeds, **common))
    single = [pipe(one, **told, **chain.generate_kwargs(seeds=[s], **common)) for one, s in zip(TEXTS, seeds, strict=True)]
    for one, seed, (together,), (alone,) in zip(TEXTS, seeds, batched, single, strict=True):
        prompt = tokenizer(one)["input_ids"]
        wanted = drawn(Request(chain, seed), prompt, 8, rows)
        assert together["generated_token_ids"][-8:] == alone["generated_token_ids"][-8:] == wanted


def test_seeds_for_more_requests_than_a_batch_has_are_an_error(pipe: Any):
    with pytest.raises(DecalError, match="numbers of 4 requests, the scores have 1 rows"):
        pipe(TEXTS, **parse("min_p(0.1)").generate_kwargs(seeds=[1, 2, 3, 4], max_new_tokens=2))


# ---- verification


@pytest.mark.parametrize("batching", ["generate", "continuous"])
def test_live_tells_rows_tokens_and_laws(model: Any, batching: str):
    config = ContinuousBatchingConfig(**SMALL) if batching == "continuous" else None
    live, rows = served.Live(model, TOKENIZER, batching, config), rows_of(model)
    prompts = some_prompts(random.Random(9), 5)
    texts = [prompts[0][:size] for size in (3, 1, 2)] + prompts
    torch.testing.assert_close(live.rows(texts), torch.cat([rows(text) for text in texts]), rtol=1e-4, atol=1e-4)
    asked = {"decal": "repetition_penalty(1.3) | min_p(0.1)"}
    for prompt, (tokens, laws) in zip(prompts, live.write(prompts, asked, 5, True), strict=True):
        wanted = [law(Request(parse(asked["decal"])), prompt, tokens[:step], 0, rows) for step in range(5)]
        torch.testing.assert_close(laws.exp(), torch.cat(wanted).softmax(-1), rtol=1e-3, atol=1e-5)
    written = live.write(prompts, {**asked, "decal_seed": 4}, 5, False)
    assert [one.laws for one in written] == [None] * 5
    for prompt, (tokens, _) in zip(prompts, written, strict=True):
        assert tokens == drawn(Request(parse(asked["decal"]), 4), prompt, 5, rows)
    guided = live.write(prompts, {"decal": "guided(1)", "decal_answers": ["red", "light green"]}, 2, False)
    assert all(len(one.tokens) <= 2 for one in guided)
    assert {TOKENIZER.decode(one.tokens, skip_special_tokens=True)[0] for one in guided} <= {"r", "l"}
    assert len(live.write(prompts, {}, 3, True)) == 5
    with pytest.raises(DecalError, match="did you mean min_p"):
        live.write(prompts, {"decal": "minp(0.1)"}, 5, False)
    live.close()


def test_live_says_what_a_model_s_config_bans(model: Any):
    live = served.Live(model, TOKENIZER)
    assert live.notes() == []
    model.generation_config.suppress_tokens = [3]
    try:
        assert live.notes() == ["the model's generation config has suppress_tokens=[3]"]
    finally:
        model.generation_config.suppress_tokens = None
    with pytest.raises(DecalError, match="batching must be generate or continuous"):
        served.Live(model, TOKENIZER, "paged")


@pytest.mark.model
@pytest.mark.parametrize("batching", ["generate", "continuous"])
def test_verify_finds_nothing_on_the_real_model(batching: str):
    from decal.eval import models
    from decal.serving import verify

    loaded = models.load("smollm2")
    live = served.Live(loaded.model, loaded.tokenizer, batching)
    report = verify.verify(live, REAL_CHAINS, verify.PROMPTS[:2], generations=2, length=3, draws=0)
    assert report.ok, str(report)
    assert [finding.chain for finding in report.findings if not finding.steps] == [
        str(parse(REAL_CHAINS[7]))
    ]  # its coins are its own
    assert all(finding.seeded for finding in report.findings)
