"""Planted models get the right diagnosis, estimates bound what is measured, and the page says it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_order import case_of

import decal
from decal.eval import diagnosis, exact, order
from decal.eval.diagnosis import diagnose
from decal.eval.frontier import ORACLES, Evaluation, TaskResult
from decal.eval.grid import Setting
from decal.eval.task import Answers, Question, Task
from decal.samplers.trie import TokenTrie
from decal.samplers.valid_set import ValidSet

VOCABULARY = 64
TEXTS = {
    "temperature": ("temperature(0.5)", "temperature(1)", "temperature(2)"),
    "min_p": ("min_p(0.05)", "min_p(0.2)", "min_p(0.5)"),
    "top_k": ("top_k(1)", "top_k(3) | temperature(3)", "top_k(10) | temperature(3)"),
}
SETTINGS = [Setting(family, decal.parse(text)) for family, texts in TEXTS.items() for text in texts]


def planted(kind: str, depth: int, seed: int) -> tuple[TokenTrie, torch.Tensor]:
    """Sequences of ``depth`` tokens out of 8, of which a third are valid, and a model of that kind."""
    rng = np.random.default_rng(seed)
    answers = sorted({tuple(int(t) for t in rng.integers(1, 9, depth)) for _ in range(max(4, 8**depth // 3))})
    trie = tiny.trie_of(answers, (0,))
    logits = torch.full((len(trie), VOCABULARY), -40.0)
    for node in range(len(trie)):
        steps = {token: trie.count[child] for token, child in trie.children[node].items()}
        if trie.answer[node] >= 0:
            steps[0] = 1
        tokens = rng.permutation(list(steps))
        for rank, token in enumerate(tokens):
            logits[node, token] = math.log(steps[int(token)]) if kind == "calibrated" else -1.5 * rank
        if kind == "shuffled":
            # As many invalid tokens in between, which no cutoff can tell apart.
            top = np.concatenate([tokens, rng.choice(np.arange(20, VOCABULARY), 2 * len(tokens), replace=False)])
            logits[node] = -40.0
            logits[node, torch.from_numpy(rng.permutation(top))] = torch.linspace(0, -1, len(top))
    return trie, logits


def result_of(trie: TokenTrie, logits: torch.Tensor) -> TaskResult:
    """What an evaluation makes of it, but for the model."""
    evaluation = object.__new__(Evaluation)
    evaluation.settings = SETTINGS
    evaluation.chains = [s.chain for s in SETTINGS]
    evaluation.groups = exact.group(evaluation.chains)
    evaluation.scales = [2.0, 1.0, 0.5, 0.0]
    evaluation.weights = None
    names = [str(i) for i in range(trie.size)]
    question = Question(Task(name="t", label="x", answers=Answers(list=names)), ValidSet.from_list(names))
    outcome, bound = evaluation._outcome(question, [], trie, tiny.blocks(logits), lambda amount: None)
    labels = evaluation._labels(question)
    return TaskResult(
        question, ["p"], len(trie), [f for f, _ in labels], [s for _, s in labels],
        outcome.validity[:, None], outcome.diversity[:, None], outcome.slack[:, None], bound[None],
    )  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "verdict"), [("calibrated", "Neither"), ("peaked", "Shape"), ("shuffled", "Order")])
def test_three_planted_models(kind, verdict, depth, seed):
    trie, logits = planted(kind, depth, seed)
    found = diagnose(trie, order.prefixes(trie, tiny.blocks(logits)))
    gaps = diagnosis.gaps(result_of(trie, logits), 0.8, np.asarray([found.given_valid]))
    assert diagnosis.headline(gaps).startswith(verdict)
    parts = found.divergence
    if kind == "calibrated":
        assert found.given_valid == pytest.approx(1)
        assert parts.total == pytest.approx(0, abs=1e-9)
        assert gaps.reached[1] == pytest.approx(1, abs=1e-9)
        assert [gaps.order.value, gaps.shape.value] == pytest.approx([0, 0], abs=0.02)
    if kind == "peaked":
        # Negative where letting go of a valid token evens out the rest.
        assert gaps.order.value <= 1e-9
        assert found.mean("average_precision") == pytest.approx(1)
        assert parts.order == pytest.approx(0, abs=1e-12)
        assert parts.shape > 0.1
        # Order is right, so the size oracle reaches what the mask does.
        assert gaps.size == pytest.approx(gaps.mask)
    if kind == "shuffled":
        assert gaps.order.value > 0.2
        assert found.mean("average_precision") < 0.95
        assert parts.order > 10 * parts.shape


@pytest.mark.parametrize("seed", range(30))
def test_the_mask_at_temperature_1_is_the_oracles(seed):
    trie, logits = case_of(seed)
    found = diagnose(trie, order.prefixes(trie, tiny.blocks(logits)))
    p = torch.softmax(logits, -1).numpy()
    mass = np.zeros(len(trie))
    mass[0] = 1
    law = []
    for node in range(len(trie)):
        valid = [*trie.children[node], *(trie.ends if trie.answer[node] >= 0 else ())]
        for token, child in trie.children[node].items():
            mass[child] = mass[node] * p[node, token] / p[node, valid].sum()
        if trie.answer[node] >= 0:
            law.append(mass[node] * p[node, 0] / p[node, valid].sum())
    law = np.asarray(law)
    assert law.sum() == pytest.approx(1)
    assert found.given_valid == pytest.approx(np.exp(-(law * np.log(law)).sum()) / trie.size)


@pytest.mark.parametrize("seed", range(60))
def test_hardness_holds_for_the_law_it_is_estimated_under(seed):
    """For one-step answers both laws are the same, so no cutoff may exceed what the theorem says."""
    rng = np.random.default_rng(seed)
    answers = [(int(t),) for t in rng.choice(np.arange(1, 200), int(rng.integers(2, 120)), replace=False)]
    trie = tiny.trie_of(sorted(answers), (0,))
    logits = torch.from_numpy(rng.standard_normal((len(trie), 300)) * 2)
    logits[1:, 0] = 50.0  # who has answered ends
    found = order.prefixes(trie, tiny.blocks(logits))
    hardness = diagnose(trie, found).hardness
    root = found[0]
    for precision, recall in zip(root.precision, root.recall(), strict=True):
        assert recall <= hardness.bound(precision) + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_answers_that_have_ended_stay_right(seed):
    """Many of these answers begin others. Were those that have ended forgotten, a third of the cutoffs would exceed it."""
    trie, logits = case_of(seed)
    found = diagnose(trie, order.prefixes(trie, tiny.blocks(logits)))
    for sequence in found.sequences:
        assert sequence.steps.recall <= found.hardness.bound(max(sequence.steps.precision, 1e-300)) + 1e-9


def test_one_inversion_is_no_fault_of_order():
    """The size oracle drops a valid end that stands behind one invalid token; the best cutoff doesn't, and nor do samplers."""
    trie = tiny.trie_of([(t,) for t in range(1, 11)], (0,))
    logits = torch.full((len(trie), VOCABULARY), -40.0)
    logits[0, 1:11] = 0.0
    logits[1:, 0] = 5.0
    logits[1:4, 30] = 5.05
    found = diagnose(trie, order.prefixes(trie, tiny.blocks(logits)))
    gaps = diagnosis.gaps(result_of(trie, logits), 0.8, np.asarray([found.given_valid]))
    assert gaps.size < 0.5 < gaps.cut
    assert gaps.order.value < 0.05
    assert diagnosis.headline(gaps).startswith("Neither")


def gaps_of(order_values, shape_value, best, size=0.9):
    other = diagnosis.Gaps(
        0.8, size, size, 1.0, diagnosis.estimate(order_values, -1), diagnosis.estimate([shape_value] * len(order_values)),
        diagnosis.estimate([0.0]), {"min_p": diagnosis.estimate([size - best], -1.0)}, {"min_p": "min_p(0.1)"} if best else {},
        {}, None, None,
    )  # fmt: skip
    return diagnosis.headline(other)


def test_headlines_say_no_more_than_is_known():
    assert gaps_of([0.3, 0.3, 0.3], 0.0, 0.5).endswith("The best sampler, min_p(0.1), reaches 0.50.")
    assert gaps_of([0.9, -0.1, 0.1], 0.0, 0.5).endswith("Prompts differ so much that this is not sure.")
    assert gaps_of([0.3] * 3, 0.0, 0.97).startswith("Neither order nor shape")
    assert gaps_of([0.0] * 3, 0.5, 0.96).startswith("Neither order nor shape")
    assert "order does too" not in gaps_of([0.1] * 3, 0.9, 0.1)
    assert "order does too" in gaps_of([0.4] * 3, 0.9, 0.1)
    assert gaps_of([1.0] * 3, 0.0, 0.0, size=0.0).endswith("No sampler is that valid.")


def test_held_out_settings_are_chosen_elsewhere():
    """Two samplers, one good on each prompt, and an even third: what is best on one prompt is scored on the other."""
    names = ["a", "b"]
    question = Question(Task(name="t", label="x", answers=Answers(list=names)), ValidSet.from_list(names))
    family = ["first", "second", "third", *ORACLES[:3]]
    diversity = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.55], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    validity = np.array([[0.9, 0.3], [0.5, 0.9], [0.9, 0.85], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    result = TaskResult(question, ["p", "q"], 3, family, family, validity, diversity, 0 * validity, None)
    gaps = diagnosis.gaps(result, 0.8, np.ones(2))
    assert gaps.reached[0] == "third"
    assert gaps.held_best.value == pytest.approx((0.2 + 0.1) / 2)  # second chosen for the first prompt, first for the second
    assert gaps.held_validity == pytest.approx((0.5 + 0.3) / 2)
    assert {f: e.value for f, e in gaps.held.items()} == pytest.approx({"first": 0.05, "second": 0.1, "third": 0.525})
    one = TaskResult(question, ["p"], 3, family, family, validity[:, :1], diversity[:, :1], 0 * validity[:, :1], None)
    assert diagnosis.gaps(one, 0.8, np.ones(1)).held_best is None


def test_answers_of_several_spellings_are_refused():
    trie = tiny.trie_of([(1,), (2,)], (0,))
    trie.insert((3,), 0, 0)
    with pytest.raises(decal.DecalError, match="one token sequence each"):
        diagnose(trie, [])


@pytest.mark.model
def test_the_command_writes_numbers_and_a_page(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from decal.eval.commands import cli

    (tmp_path / "grid").write_text("min_p({0.05, 0.3}) | temperature({1.0, 2.0})\n")
    arguments = [
        "diagnose",
        "--task",
        "weekdays",
        "--draws",
        "2",
        "--grid",
        str(tmp_path / "grid"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    (task,) = told["tasks"]
    assert task["headline"] in " ".join(done.output.split())
    parts = [task["divergence"][part]["value"] for part in ("order", "tail", "shape")]
    assert sum(parts) == pytest.approx(task["divergence"]["total"]["value"])
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    assert task["headline"].replace("'", "&#39;") in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    import pandas as pd

    depths = pd.read_parquet(tmp_path / "out" / "depths.parquet")
    assert set(depths.weighting) == {"counts", "unit"}
    assert sorted(depths.prompt.unique()) == [0, 1]
