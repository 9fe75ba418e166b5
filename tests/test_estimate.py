"""Estimates by sampling answers: right on average, with intervals that cover, and bounded work on sets of a million."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import decal
from decal import DecalError
from decal.eval import estimate, exact
from decal.eval.estimate import Drawing, Draws
from decal.eval.forward import prefix_logits
from decal.eval.task import Answers, Question, Task
from decal.samplers.trie import Policy
from decal.samplers.valid_set import ValidSet

CHAINS = [decal.parse(text) for text in ("temperature(1)", "temperature(2.5)", "top_k(250)", "min_p(0.01) | temperature(2)")]
POLICY = Policy(leading_space=True, ends=("\n",))


def setup(valid: ValidSet, merges: int = 0, seed: int = 0, prompt: str = "Digits:") -> Any:
    texts = [" " + text for _, text in zip(range(300), valid, strict=False)]
    tokenizer = tiny.byte_level(texts, merges)
    model = tiny.llama(len(tokenizer), seed=seed, dtype=torch.float32, spread=0.3)
    return tiny.builder(tokenizer), model, tokenizer(prompt)["input_ids"]


def draw(setting: Any, valid: ValidSet, samples: int, seed: int) -> tuple[Draws, list[tuple[list[int], torch.Tensor]]]:
    builder, model, prompt = setting
    drawing = Drawing(builder, valid, POLICY, samples // 2, samples - samples // 2, seed)
    blocks: list[tuple[list[int], torch.Tensor]] = []
    prefix_logits(model, prompt, drawing.trie, lambda nodes, logits: blocks.append((list(nodes), logits)), drawing.grow)
    return drawing.draws(), blocks


def exactly(setting: Any, valid: ValidSet) -> exact.Outcome:
    builder, model, prompt = setting
    trie, _ = builder.build(valid, POLICY)
    blocks: list[tuple[list[int], torch.Tensor]] = []
    prefix_logits(model, prompt, trie, lambda nodes, logits: blocks.append((list(nodes), logits)))
    return exact.evaluate(trie, blocks, CHAINS)


def estimated(setting: Any, valid: ValidSet, samples: int, seed: int) -> estimate.Estimated:
    draws, blocks = draw(setting, valid, samples, seed)
    flow = exact.flows(draws.trie, blocks, exact.group(CHAINS), len(CHAINS))
    return estimate.weigh(draws, exact.outcome(draws.trie, flow).answers, seed)


WORDS = ValidSet.from_list(["ab", "abc", "b", "ba", "bab", "c", "cab", "cabab", "é", "éa"])


@pytest.mark.parametrize(("valid", "merges"), [(ValidSet.digits(2), 0), (WORDS, 0), (WORDS, 12)])
def test_estimates_are_right_on_average_and_intervals_cover(valid: ValidSet, merges: int) -> None:
    """Thirty runs of 200 draws; with some merges answers have several spellings, of which one counts."""
    setting = setup(valid, merges)
    truth = exactly(setting, valid)
    runs = [estimated(setting, valid, 200, seed) for seed in range(30)]
    validity = np.stack([run.validity for run in runs])
    error = (validity.mean(0) - truth.validity) / (validity.std(0, ddof=1) / np.sqrt(len(runs)))
    assert (np.abs(error) < 4).all()
    diversity = np.stack([run.diversity for run in runs])
    np.testing.assert_allclose(diversity.mean(0), truth.diversity, rtol=0.06)
    low, high = np.quantile(np.stack([run.resampled for run in runs]), [0.025, 0.975], axis=2)
    covered = ((low[:, 0] <= truth.validity) & (truth.validity <= high[:, 0])).mean()
    assert covered > 0.85
    covered = ((low[:, 1] <= truth.diversity) & (truth.diversity <= high[:, 1])).mean()
    assert covered > 0.8


def test_what_is_drawn_has_the_probabilities_it_is_said_to_have() -> None:
    draws, blocks = draw(setup(WORDS, 12), WORDS, 20_000, 3)
    rows = {node: row for nodes, logits in blocks for node, row in zip(nodes, logits, strict=True)}
    assert set(rows) == set(range(len(draws.trie)))
    share = np.exp(draws.log_guided)
    others = draws.guided_others / (draws.guided.sum() + draws.guided_others)
    assert share.sum() + others == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(draws.guided / (draws.guided.sum() + draws.guided_others), share, atol=0.015)
    np.testing.assert_allclose(draws.uniform / draws.uniform.sum(), 0.1, atol=0.012)


def test_draws_do_not_depend_on_the_order_of_nodes() -> None:
    setting = setup(ValidSet.digits(3))
    builder, model, prompt = setting
    found = []
    for block in (1, 7, 256):
        drawing = Drawing(builder, ValidSet.digits(3), POLICY, 20, 20, 5)
        prefix_logits(model, prompt, drawing.trie, lambda nodes, logits: None, drawing.grow, block)
        draws = drawing.draws()
        paths = [tuple(draws.trie.path(node)) for node in drawing.answers]
        found.append(dict(zip(paths, zip(draws.uniform, draws.guided, strict=True), strict=True)))
    assert found[0] == found[1] == found[2]


def test_a_million_answers_cost_no_more_than_what_is_drawn() -> None:
    valid = ValidSet.digits(6)
    assert valid.size == 10**6
    tokenizer = tiny.byte_level()
    loaded = SimpleNamespace(model=tiny.llama(len(tokenizer), dtype=torch.float32, spread=0.3), tokenizer=tokenizer)
    evaluation = SimpleNamespace(model=loaded, builder=tiny.builder(tokenizer), seed=0, weights=None)
    question = Question(Task(name="d", label="Digits:", answers=Answers(digits={"n": 6}), draws=2, ends=["\n"]), valid)
    found = estimate.estimate(evaluation, question, CHAINS, 60)
    assert len(found) == 2
    assert all(one.nodes <= 60 * 13 for one in found)
    validity, diversity = estimate.over_prompts(found)
    assert all(v.low is None or v.low <= v.value <= v.high for v in validity)
    assert all(0 < d.value <= 1 for d in diversity)
    # Nothing has listed the answers.
    assert "answers" not in question.__dict__


def test_no_interval_from_few_draws() -> None:
    one = estimate.Estimated(
        np.asarray([0.5, 1.2]), np.asarray([0.1, 0.2]), np.full((2, 400, 2), 0.3), np.asarray([9.0, 500.0]), 3
    )
    (few, many), _ = estimate.over_prompts([one])
    assert few == estimate.Estimate(0.5)
    assert many == estimate.Estimate(1.0, 0.3, 0.3)
    told = estimate.summary([one], CHAINS[:2], SimpleNamespace(task=SimpleNamespace(name="t"), valid=WORDS), "m", 4, 0)
    assert json.loads(json.dumps(told, allow_nan=False))["chains"][0]["validity"]["low"] is None


def test_sharp_chains_are_drawn_too() -> None:
    """A law with two branches, one of which is many small answers until it is sharpened."""
    valid = ValidSet.from_regex("b|a[0-4]{5}")
    tokenizer = tiny.byte_level()
    setting = tiny.builder(tokenizer), None, []
    logits = {c: torch.full((len(tokenizer),), -30.0) for c in " ab0e"}
    index = {c: tokenizer(c)["input_ids"][0] for c in " ab01234\n"}
    drawing = Drawing(setting[0], valid, POLICY, 150, 150, 1)
    rows: list[tuple[list[int], torch.Tensor]] = []
    todo = [0]
    while todo:
        node = todo.pop(0)
        text = "".join(next(c for c, t in index.items() if t == token) for token in drawing.trie.path(node))
        row = logits["e"].clone()
        for c in {"": " ", " ": "ab"}.get(text, "\n" if text == " b" or len(text) == 7 else "01234"):
            row[index[c]] = -1.0 * int(c) if c.isdigit() else 0.0
        rows.append(([node], row[None]))
        drawing.grow(drawing.trie, node, row.double().softmax(-1))
        todo += drawing.trie.children[node].values()
    draws = drawing.draws()
    chains = [decal.parse("temperature(0.2)"), decal.parse("top_k(2)")]
    flow = exact.flows(draws.trie, rows, exact.group(chains), 2)
    found = estimate.weigh(draws, exact.outcome(draws.trie, flow).answers)
    np.testing.assert_allclose(found.validity, 1.0, atol=0.25)


def test_answers_by_number_are_those_of_iteration() -> None:
    for valid in (WORDS, ValidSet.digits(3, sum_le=5), ValidSet.from_regex("a{1,3}b?|c")):
        assert [valid.at(i) for i in range(valid.size)] == list(valid)
        with pytest.raises(DecalError, match=f"from 0 to {valid.size - 1}, got {valid.size}"):
            valid.at(valid.size)


def test_numbers_below_a_huge_size_are_uniform() -> None:
    rng = np.random.default_rng(0)
    size = 10**40
    drawn = np.asarray([n / size for n in estimate._below(rng, size, 4000)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert np.abs(np.quantile(drawn, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.03


@pytest.mark.parametrize("policy", [Policy(tokenisation="all"), Policy(case="any"), Policy(ends=())])
def test_other_policies_are_refused(policy: Policy) -> None:
    with pytest.raises(DecalError, match="an estimate needs canonical tokenisation"):
        Drawing(tiny.builder(tiny.byte_level()), WORDS, policy, 1, 1, 0)


def test_an_end_that_an_answer_contains_is_refused() -> None:
    with pytest.raises(DecalError, match="ends an answer, but an answer contains it"):
        Drawing(tiny.builder(tiny.byte_level()), ValidSet.from_list(["a\nb"]), POLICY, 1, 1, 0)
