"""Cuts at an estimated validity: the budget against its formula along texts, through the evaluator too, and the files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from formulas import estimated_validity, min_validity, risk_budget

import decal
from decal import DecalError, calibrated
from decal.eval import exact
from decal.samplers.drafts import Profile

WEIGHTS = {"offset": 1.1, "gap": 0.7, "entropy": -0.3, "peak": 0.2, "spread": 0.1}
BUDGETS = [(0.3, 1.0), (0.6, 0.5), (0.95, 0.4), (0.0, 0.5)]


def kept(logits: torch.Tensor) -> np.ndarray:
    return np.isfinite(logits.numpy())


@pytest.mark.parametrize(("risk", "share"), BUDGETS)
def test_the_budget_follows_what_was_drawn(risk: float, share: float) -> None:
    rng = np.random.default_rng([int(100 * risk), int(100 * share)])
    chain = decal.risk_budget(risk, share, **WEIGHTS)
    rows, size, steps = 6, 50, 12
    state, drawn = chain.init(rows), [[] for _ in range(rows)]
    sizes = set()
    for _ in range(steps):
        z = rng.normal(size=(rows, size)) * rng.choice([0.5, 2.0, 6.0], size=(rows, 1))
        z[0] = np.round(z[0])
        scores, seen = chain.apply(torch.from_numpy(z), state)
        tokens = []
        for row in range(rows):
            answer = risk_budget(z[row], risk=risk, share=share, drawn=drawn[row], **WEIGHTS)
            right = np.isfinite(answer.log_q)
            assert ((kept(scores[row]) == right) | answer.close).all()
            sizes.add(int(right.sum()))
            tokens.append(int(rng.choice(np.flatnonzero(right))))
            drawn[row].append(float(estimated_validity(z[row], **WEIGHTS)[tokens[-1]]))
        state = chain.observe(state, seen, torch.tensor(tokens))
    assert max(sizes) > 3 or risk < 0.5
    assert 1 in sizes


def test_the_estimated_validity_of_a_text_stays_within_the_budget_unless_even_the_best_token_overdraws() -> None:
    rng = np.random.default_rng(5)
    chain = decal.risk_budget(0.7, 1.0, **WEIGHTS | {"offset": 4.0})
    state = chain.init(40)
    log_valid, greedy = np.zeros(40), np.zeros(40, dtype=bool)
    for _ in range(6):
        z = rng.normal(size=(40, 30)) * 3
        scores, seen = chain.apply(torch.from_numpy(z), state)
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        odds = np.stack([estimated_validity(row, **WEIGHTS | {"offset": 4.0}) for row in z])[np.arange(40), tokens]
        greedy |= kept(scores).sum(-1) == 1
        log_valid -= np.log1p(np.exp(-odds))
        state = chain.observe(state, seen, tokens)
    assert (np.exp(log_valid)[~greedy] >= 0.3 - 1e-9).all()
    assert (~greedy).sum() > 5


@pytest.mark.parametrize("text", ["risk_budget({}, 0.6, {})", "min_p(0.001) | risk_budget({}, 0.6, {})"])
def test_the_evaluator_spends_the_budget_along_every_answer(text: str) -> None:
    """Answer probabilities against products along each path, by the formula."""
    rng = np.random.default_rng(11)
    answers = tiny.random_answers(rng, range(2, 12), 4, 25)
    trie = tiny.trie_of(answers, [0, 1])
    logits = tiny.random_rows(rng, trie, 20, 3.0)
    given = ", ".join(map(str, WEIGHTS.values()))
    risks = (0.2, 0.6, 0.9, 0.99)
    chains = [decal.parse(text.format(risk, given)) for risk in risks]
    found = exact.evaluate(trie, tiny.blocks(logits, 5), chains)
    for number, risk in enumerate(risks):
        expected = np.zeros(len(answers))
        for i, answer in enumerate(answers):
            p, node, drawn = 1.0, 0, []
            for token in (*answer, None):
                z = logits[node].double().numpy()
                if text.startswith("min_p"):
                    z = np.where(z >= z.max() + np.log(0.001), z, -np.inf)
                law = np.exp(risk_budget(z, risk=risk, share=0.6, drawn=drawn, **WEIGHTS).log_q)
                p *= law[[0, 1]].sum() if token is None else law[token]
                if token is None or p == 0:
                    break
                drawn.append(float(estimated_validity(z, **WEIGHTS)[token]))
                node = trie.children[node][token]
            expected[i] = p
        np.testing.assert_allclose(found.answers[number], expected, rtol=0, atol=1e-9)
    assert len({round(float(v), 6) for v in found.validity}) > 2


def test_with_no_weight_but_the_gap_it_is_min_p() -> None:
    z = torch.randn(30, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    chain = decal.min_validity(0.5, offset=1.0, gap=0.5, entropy=0.0)
    assert torch.equal(chain(z), decal.min_p(float(np.exp(-2.0)))(z))


def test_a_table_needs_a_value_for_each_bin_and_says_so_at_once() -> None:
    for text in ("conformal_nucleus((0.5, 0.9))", "calibrated_top_k((3, 2, 1, 1))", "conformal_nucleus((), ())"):
        name = text.split("(")[0]
        with pytest.raises(DecalError, match=rf"^{name}: . edges make . bins, got . values of [pk]$"):
            decal.parse(text)
    with pytest.raises(DecalError, match=r"edges must be a tuple of ascending numbers in \[0, 1000\] such as \(1, 3\)"):
        decal.conformal_nucleus((0.5, 0.6, 0.7), (3.0, 1.0))
    for bad in ((0.5, 10**400, 0.5), (0.5, float("nan"), 0.5), (0.5, True, 0.5), 0.5, "0.5"):
        with pytest.raises(DecalError, match=r"^conformal_nucleus: p must be a tuple of numbers in \[0, 1\]"):
            decal.conformal_nucleus(bad)


def content(**changes: Any) -> dict[str, Any]:
    model, tokenizer = tiny.llama(257), tiny.byte_level()
    made = calibrated.Calibration(
        about={"model": "tiny", "fingerprint": calibrated.fingerprint(model, tokenizer)},
        validity=WEIGHTS,
        advised={"0.8": calibrated.Advised("min_p(0.1) | temperature(1.4)", 0.5, 0.9, 0.85, 0.6)},
        risk={"min_validity": {"0.1": None, "0.3": "min_validity(0.6, 1.0, 0.5, -0.1)"}, "risk_budget": {}},
        report={},
        profiles={"row": Profile(("min_p(0.1)", "min_p(0.2)"), ((0.5,) * 8, (0.7,) * 8), ((0.4,) * 8, (0.3,) * 8))},
    )
    from dataclasses import asdict

    return {"format": 2, **asdict(made), **changes}


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(content(**changes)))
    return file


def test_a_file_gives_chains(tmp_path: Path) -> None:
    found = calibrated.load(written(tmp_path))
    assert repr(found) == "<calibration of tiny on 0 tasks; chains for validity 0.8>"
    assert str(found.chain(0.8)) == str(decal.parse("min_p(0.1) | temperature(1.4)"))
    assert str(found.controlled(0.3)) == str(decal.min_validity(0.6, 1.0, 0.5, -0.1))
    z = np.random.default_rng(2).normal(size=40) * 3
    answer = min_validity(z, 0.4, **WEIGHTS)
    assert (kept(found.min_validity(0.4)(torch.from_numpy(z)[None]))[0] == np.isfinite(answer.log_q)).all()
    with pytest.raises(DecalError, match=r"no floor 0\.5; it has 0\.8"):
        found.chain(0.5)
    with pytest.raises(DecalError, match=r"can't promise an invalidity of at most 0\.1, but 0\.3"):
        found.controlled(0.1)
    with pytest.raises(DecalError, match=r"can't promise an invalidity of at most 0\.1, but 0\.3"):
        found.controlled("0.1")  # as the file spells it
    with pytest.raises(DecalError, match=r"no epsilon 0\.2"):
        found.controlled(0.2)
    with pytest.raises(DecalError, match=r"no epsilon 0\.3; it has none"):
        found.controlled(0.3, "risk_budget")
    with pytest.raises(DecalError, match="no rule min_p; it has min_validity, risk_budget"):
        found.controlled(0.3, "min_p")
    search = found.search(0.6)
    assert [str(chain) for chain in search.chains] == [str(decal.min_p(0.1)), str(decal.min_p(0.2))]
    assert str(search.best().chain) == str(decal.min_p(0.2))
    with pytest.raises(
        DecalError, match="no profile 'prompts' to search in; decal calibrate with --read-prompts, on at least 8 prompts"
    ):
        found.search(0.6, prompts=True)


def test_a_file_of_another_model_warns_or_refuses(tmp_path: Path) -> None:
    file = written(tmp_path)
    model, tokenizer = tiny.llama(257), tiny.byte_level()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrated.load(file, model, tokenizer)
        calibrated.load(file, model, tokenizer, mismatch="refuse")
    other = tiny.llama(257, seed=1)
    with pytest.warns(UserWarning, match="fitted for tiny, not for this model"):
        calibrated.load(file, other, tokenizer)
    with pytest.raises(DecalError, match="fitted for tiny, not for this model"):
        calibrated.load(file, other, tokenizer, mismatch="refuse")
    trained = tiny.byte_level(["weekdays and months"] * 5, merges=3)
    with pytest.raises(DecalError, match="not for this tokenizer"):
        calibrated.load(file, model, trained, mismatch="refuse")
    with pytest.raises(DecalError, match="'warn' or 'refuse'"):
        calibrated.load(file, model, tokenizer, mismatch="ignore")
    with pytest.raises(DecalError, match="a model and its tokenizer"):
        calibrated.load(file, model)
    with pytest.raises(DecalError, match="in this order, got"):
        calibrated.load(file, tokenizer, model)


def test_a_fingerprint_is_that_of_the_weights_in_any_type() -> None:
    tokenizer, model = tiny.byte_level(), tiny.llama(257).bfloat16()
    here = calibrated.fingerprint(model, tokenizer)
    assert calibrated.fingerprint(model.float(), tokenizer) == here
    assert calibrated.fingerprint(torch.compile(model, backend="eager"), tokenizer) == here
    with pytest.raises(DecalError, match="meta device"):
        calibrated.fingerprint(tiny.llama(257).to("meta"), tokenizer)
    rolled = tiny.llama(257).bfloat16()
    with torch.no_grad():
        rolled.model.embed_tokens.weight[:, 1:] = rolled.model.embed_tokens.weight[:, 1:].roll(3, 0)
    assert calibrated.fingerprint(rolled, tokenizer) != here
    last = list(model.state_dict().values())[-1]
    with torch.no_grad():
        last.view(-1)[0] += 1
    assert calibrated.fingerprint(model, tokenizer)["model"] != here["model"]
    assert calibrated.fingerprint(model, tokenizer)["tokenizer"] == here["tokenizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "no calibration of format 2, as decal calibrate writes them; its format is 1"),
        ({"validity": {"offset": 1}}, None),
        ({"validity": {"offset": "x"}}, "no calibration: ValueError"),
        ({"validity": {"gap": -1}}, "gap must be"),
        ({"advised": {"0.8": {"chain": "min_p(0.1)"}}}, "no calibration: TypeError"),
        ({"advised": {"0.8": {"chain": "min_pp(0.1)", "score": 0, "reached": 0, "validity": 0, "diversity": 0}}}, "min_pp"),
        ({"risk": {"min_validity": {"0.1": "rm -rf"}}}, "c.json: "),
        ({"validity": {"gap": 10**400}}, "no calibration: OverflowError"),
        (
            {"advised": {"0.8": {"chain": "min_p(0.1)", "score": "x", "reached": 0, "validity": 0, "diversity": 0}}},
            "ValueError",
        ),
        ({"risk": 7}, "no calibration: AttributeError"),
        ({"about": {"model": "m"}}, "no calibration: KeyError 'fingerprint'"),
        ({"report": None}, "no calibration: TypeError"),
        ({"profiles": {"row": {"chains": ["min_p(0.1)"], "validity": [[2] * 8], "diversity": [[1] * 8]}}}, r"are in \[0, 1\]"),
        ({"profiles": {"row": {"chains": ["min_pp(0.1)"], "validity": [[1] * 8], "diversity": [[1] * 8]}}}, "min_pp"),
        ({"profiles": {"row": {"chains": ["min_p(0.1)"], "validity": [["x"] * 8], "diversity": [[1] * 8]}}}, "ValueError"),
        ({"profiles": {"row": {"chains": ["min_p(0.1)"]}}}, "no calibration: TypeError"),
    ],
)
def test_what_is_no_calibration_is_refused_in_one_line(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    file = written(tmp_path, **changes)
    if message is None:
        calibrated.load(file)  # what is missing has a default
        return
    with pytest.raises(DecalError, match=message) as error:
        calibrated.load(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DecalError, match="can't read the calibration"):
        calibrated.load(tmp_path / "none.json")
    for text in ("", "[1]", "{", "\x80", "[" * 100_000):
        (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DecalError, match="no calibration"):
            calibrated.load(tmp_path / "c.json")
