"""What ``model.generate`` samples under a chain agrees with what the evaluator says it must."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache

import decal
from decal.eval import models, task
from decal.eval.exact import Outcome, Situation, evaluate
from decal.eval.frontier import Evaluation
from decal.eval.rows import load_or_compute
from decal.samplers.trie import TokenTrie

pytestmark = [pytest.mark.slow, pytest.mark.model]

CHAINS = (
    "temperature(1.3) | min_p(0.05)",
    "top_p(0.9) | temperature(1.2)",
    "temperature(1.5) | mirostat(3.0)",
    "repetition_penalty(1.3) | xtc(0.05) | min_p(0.02)",
)
BATCH = 500
SAMPLES = int(os.environ.get("DECAL_SAMPLES", 20_000)) // BATCH * BATCH
CONFIDENCE = 0.999


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    """This model is large enough for several threads, unlike those of other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    return models.load("smollm2", progress=False)


@pytest.fixture(scope="module")
def asked(loaded: models.LoadedModel) -> tuple[list[int], TokenTrie, Outcome]:
    """Prompt, trie and exact results of the chains on the first draw of the few-shot weekdays."""
    question = task.load("weekdays")
    assert question.task.form == "few_shot"
    _, prompt = next(iter(question.prompts(loaded.tokenizer, seed=0)))
    trie, grow = Evaluation(loaded, []).builder.build(question.valid, question.policy)
    trie, rows = load_or_compute(loaded.model, loaded.fingerprint, prompt, trie, question.policy, grow, cache=False)
    return prompt, trie, evaluate(trie, rows, [decal.parse(chain) for chain in CHAINS], Situation(prompt))


def generations(model: Any, prompt: list[int], trie: TokenTrie, chain: decal.Chain) -> Counter[int]:
    """How often each answer, or -1 for anything else, comes out of ``generate``."""
    prompt_cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt[:-1]]), past_key_values=prompt_cache, use_cache=True)
    settings = {
        "max_new_tokens": max(trie.depth) + 1,
        "eos_token_id": list(trie.ends),
        "pad_token_id": trie.ends[0],
        "return_dict_in_generate": False,
    }
    ids = torch.tensor([prompt] * BATCH)
    found: Counter[int] = Counter()
    for start in range(0, SAMPLES, BATCH):
        own = chain.generate_kwargs(requests=range(start, start + BATCH), **settings)  # coins of their own
        cache = copy.deepcopy(prompt_cache)
        cache.batch_repeat_interleave(BATCH)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **own)
        found.update(answer_of(tokens, trie) for tokens in out[:, len(prompt) :].tolist())
    return found


def answer_of(tokens: list[int], trie: TokenTrie) -> int:
    node = 0
    for token in tokens:
        if token in trie.ends:
            return trie.answer[node]
        if token not in trie.children[node]:
            return -1
        node = trie.children[node][token]
    return -1


@pytest.mark.parametrize("number", range(len(CHAINS)), ids=CHAINS)
def test_sampled_generations_agree_with_the_exact_evaluation(
    number: int, loaded: models.LoadedModel, asked: tuple[list[int], TokenTrie, Outcome]
) -> None:
    prompt, trie, exact = asked
    torch.manual_seed(number)
    found = generations(loaded.model, prompt, trie, decal.parse(CHAINS[number]))
    assert sum(found.values()) == SAMPLES
    counts = np.array([found[answer] for answer in range(trie.size)])
    valid = int(counts.sum())
    print(f"{CHAINS[number]}: sampled validity {valid / SAMPLES:.4f}, exact {exact.validity[number]:.4f}")

    interval = stats.binomtest(valid, SAMPLES).proportion_ci(CONFIDENCE, "wilson")
    assert interval.low <= exact.validity[number] <= interval.high

    expected = SAMPLES * np.append(exact.answers[number], 1 - exact.validity[number])
    observed = np.append(counts, SAMPLES - valid)
    assert not observed[expected < 1e-9].any(), "something was sampled that has no probability"
    rare = expected < 5
    if rare.any():  # the approximation needs some observations in every cell
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        observed, expected = observed[expected > 1e-9], expected[expected > 1e-9]
    p_value = stats.chisquare(observed, expected).pvalue
    print(f"  chi-square of {len(observed)} frequencies: p = {p_value:.3f}")
    assert p_value > 1 - CONFIDENCE

    # Plug-in entropy with Miller and Madow's correction, and its standard error by the delta method.
    share = counts[counts > 0] / valid
    surprise = -np.log(share)
    entropy = (share * surprise).sum() + (len(share) - 1) / (2 * valid)
    error = np.sqrt((share * surprise**2).sum() - (share * surprise).sum() ** 2) / np.sqrt(valid)
    off = abs(entropy - np.log(exact.diversity[number] * trie.size))
    print(f"  diversity {np.exp(entropy) / trie.size:.4f}, exact {exact.diversity[number]:.4f}")
    assert off <= stats.norm.ppf((1 + CONFIDENCE) / 2) * error
