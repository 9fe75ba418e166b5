"""Fitting: planted weights come back, tasks left out have no part, and controlled risk is controlled."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import tiny
import torch
from test_cli import Run, model, run  # noqa: F401 (fixtures)

from decal import DecalError, calibrated
from decal.eval import calibrate as c
from decal.eval import grid
from decal.eval.tune import Results

TRUE = {"offset": 1.5, "gap": 0.8, "entropy": -0.6, "peak": 0.3, "spread": 0.0}


def planted(rng: np.random.Generator, count: int = 4000) -> c.Sample:
    x = np.stack(
        [-rng.exponential(3, count), rng.uniform(0, 4, count), -rng.uniform(0, 3, count), rng.uniform(1, 4, count)], -1
    )
    odds = TRUE["offset"] + x @ [TRUE[name] for name in c.WEIGHTS]
    return sample(x, rng.random(count) < 1 / (1 + np.exp(-odds)))


def sample(features: np.ndarray, valid: np.ndarray) -> c.Sample:
    """Of which only these matter."""
    return c.Sample(features, valid, np.full(len(valid), 1 / len(valid)), np.zeros((1, 1), bool), [], np.zeros(1), np.zeros(1))


def test_planted_weights_are_found() -> None:
    rng = np.random.default_rng(0)
    found = c.fit([planted(rng) for _ in range(20)])
    for name, true in TRUE.items():
        assert found[name] == pytest.approx(true, abs=0.12), name
    fewer = c.fit([planted(rng) for _ in range(5)], ("gap", "entropy"))
    assert fewer["peak"] == fewer["spread"] == 0


def test_every_prompt_counts_alike() -> None:
    rng = np.random.default_rng(1)
    one, two = planted(rng, 3000), planted(rng, 3000)
    twice = sample(*(np.concatenate([v, v]) for v in (two.features, two.valid)))
    a, b = c.fit([one, two]), c.fit([one, twice])
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=2e-3)


def test_what_can_not_be_fitted_is_refused() -> None:
    rng = np.random.default_rng(2)
    one = planted(rng)
    with pytest.raises(DecalError, match="valid and some that aren't"):
        c.fit([sample(one.features, np.ones(4000, bool))])
    with pytest.raises(DecalError, match="nothing to cut at"):
        c.fit([sample(-one.features, one.valid)], ("gap",))


def test_log_loss_by_hand() -> None:
    one = planted(np.random.default_rng(3), 200)
    odds = TRUE["offset"] + one.features @ [TRUE[name] for name in c.WEIGHTS]
    p = 1 / (1 + np.exp(-odds))
    by_hand = -np.mean([math.log(q if good else 1 - q) for q, good in zip(p, one.valid, strict=True)])
    assert c.log_loss(TRUE, one) == pytest.approx(by_hand)


def test_tokens_of_a_trie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tokens are valid, and the features of each, against plain numpy."""
    monkeypatch.setattr(c, "HEAD", 100)
    rng = np.random.default_rng(4)
    trie = tiny.trie_of(tiny.random_answers(rng, range(2, 12), 3, 15), [0, 1])
    logits = tiny.random_rows(rng, trie, 100, 4.0)
    found = c.Sample.of(trie, tiny.blocks(logits))
    expected, heads, aboves = [], [], []
    rows = [n for n in range(len(trie)) if trie.children[n] or trie.answer[n] >= 0]
    for node in rows:
        z = logits[node].double().numpy()
        p = tiny.softmax(z)
        good = {*trie.children[node], *(trie.ends if trie.answer[node] >= 0 else ())}
        chosen = [t for t in sorted({*np.argsort(-z)[: c.HEAD].tolist(), *good}) if z[t] > z.max() - c.REACH]
        shape = (-(p * np.log(p)).sum(), np.log(p.max()), z.std())
        heads.append([t in good for t in np.argsort(-z)[: c.HEAD]])
        aboves.append(sorted(p[p > p[t]].sum() for t in good))
        expected += [(z[t] - z.max(), *shape, t in good, 1 / len(chosen) / len(rows)) for t in chosen]
    table = np.asarray(expected)
    np.testing.assert_allclose(found.features, table[:, :4], atol=1e-9)
    np.testing.assert_array_equal(found.valid, table[:, 4] == 1)
    np.testing.assert_allclose(found.weight, table[:, 5])
    np.testing.assert_array_equal(found.head, heads)
    for got, right in zip(found.above, aboves, strict=True):
        np.testing.assert_allclose(sorted(got), right, atol=1e-12)
    np.testing.assert_allclose(found.peak, [tiny.softmax(logits[n].double().numpy()).max() for n in rows])


def test_the_tail_counts_as_it_is() -> None:
    """With the tail in bins the fit is that of all tokens; a sample of the head and what is valid alone would be biased."""
    rng = np.random.default_rng(12)
    trie = tiny.trie_of(tiny.random_answers(rng, range(2, 300), 2, 150), [0, 1])
    logits = tiny.random_rows(rng, trie, 2000, 2.0)
    for node in range(len(trie)):
        good = [*trie.children[node], *(trie.ends if trie.answer[node] >= 0 else ())]
        logits[node, good] += 2.0
    few = c.fit([c.Sample.of(trie, tiny.blocks(logits))], ("gap", "entropy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "HEAD", 2000)
        every = c.fit([c.Sample.of(trie, tiny.blocks(logits))], ("gap", "entropy"))
    assert few["gap"] == pytest.approx(every["gap"], rel=0.02)
    odds = [w["offset"] + w["gap"] * -4 + w["entropy"] * 6 for w in (few, every)]
    assert odds[0] == pytest.approx(odds[1], abs=0.05)


def test_what_a_row_rules_out_is_left_out() -> None:
    trie = tiny.trie_of([(2,), (3,)], [0])
    logits = torch.randn(len(trie), 50)
    logits[:, 20:] = -torch.inf
    found = c.Sample.of(trie, tiny.blocks(logits))
    assert np.isfinite(found.features).all()
    assert found.features[0, 3] == pytest.approx(float(logits[0, :20].double().std(correction=0)))


def test_a_set_of_features_that_can_not_be_fitted_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [[planted(np.random.default_rng(i), 300)] for i in range(6)]
    whole = c.fit

    def fit(some: list[c.Sample], features: tuple[str, ...]) -> dict[str, float]:
        if features == ("gap",):
            raise DecalError("no")
        return whole(some, features)

    monkeypatch.setattr(c, "fit", fit)
    assert "gap" not in c.choose_features(samples, c.folds(6))
    monkeypatch.setattr(c, "fit", lambda some, features: fit(some, ("gap",)))
    with pytest.raises(DecalError, match="nothing to cut at"):
        c.choose_features(samples, c.folds(6))


def rows_of(rng: np.random.Generator, count: int) -> c.Sample:
    """Rows of every entropy; the surer the model, the more often it is right."""
    entropy, peak = rng.uniform(0, 7, count), rng.uniform(0, 1, count)
    head = rng.random((count, c.HEAD)) < peak[:, None] * 0.9 ** np.arange(c.HEAD)
    above = [rng.beta(1, 3, rng.integers(1, 6)) for _ in range(count)]
    return c.Sample(np.zeros((1, 4)), np.zeros(1, bool), np.ones(1), head, above, entropy, peak)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_a_nucleus_misses_valid_tokens_as_often_as_asked_for_in_every_bin(alpha: float) -> None:
    rng = np.random.default_rng(7)
    p = c.nucleus([rows_of(rng, 1500) for _ in range(2)], alpha)
    fresh = rows_of(rng, 20000)
    bins = np.digitize(fresh.entropy, c.ENTROPIES)
    for i in range(len(p)):
        missed = np.mean([(above >= p[i]).mean() for above, b in zip(fresh.above, bins, strict=True) if b == i])
        assert missed == pytest.approx(alpha, abs=0.035)
    few = c.nucleus([rows_of(rng, 3)], 0.01)
    assert set(few) == {1.0}  # of so few rows none can promise that


def test_sizes_are_the_last_rank_that_is_right_often_enough() -> None:
    rng = np.random.default_rng(8)
    k = c.sizes([rows_of(rng, 40000)], 0.3)
    for i, (low, high) in enumerate(zip((0, *c.CONFIDENCES), (*c.CONFIDENCES, 1), strict=True)):
        mean = (low + high) / 2
        right = max(1, sum(mean * 0.9**r >= 0.3 for r in range(c.HEAD)))
        assert abs(k[i] - right) <= 1
    assert k[0] == 1
    assert list(k) == sorted(k)


def test_folds_leave_the_task_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = c.folds(11, 5, 3)
    assert sorted(np.bincount(fold).tolist()) == [2, 2, 2, 2, 3]
    assert len(set(c.folds(3, 5).tolist())) == 3
    samples = [[planted(np.random.default_rng(i), 50)] for i in range(11)]
    used = []
    monkeypatch.setattr(c, "fit", lambda some, features: used.append([id(s) for s in some]) or {"n": len(used) - 1})
    for task, weights in enumerate(c.by_folds(samples, fold, ("gap",))):
        assert id(samples[task][0]) not in used[weights["n"]]
        assert len(used[weights["n"]]) == 11 - (fold == fold[task]).sum()


def test_scores_and_choices_by_hand() -> None:
    rng = np.random.default_rng(5)
    validity, diversity = rng.random((20, 6, 3)), rng.random((20, 6, 3))
    results = Results(tuple("abcdef"), ("f",) * 20, tuple(map(str, range(20))), validity, diversity)
    scores = c.score(results, 0.5)
    for s in range(20):
        for t in range(6):
            own = [diversity[s, t, d] if validity[s, t, d] >= 0.5 else 0 for d in range(3)]
            assert scores[s, t] == pytest.approx(np.mean(own))
    alone, together = c.left_out(scores), c.left_out(scores, [[0, 3], [1], [2], [4], [5]])
    for t in range(6):
        assert alone[t] == np.argmax([scores[s, [u for u in range(6) if u != t]].mean() for s in range(20)])
    assert together[0] == together[3] == np.argmax([scores[s, [1, 2, 4, 5]].mean() for s in range(20)])
    advice = c.advise(results, 0.5)
    assert advice is not None
    assert advice.score == pytest.approx(np.mean([scores[alone[t], t] for t in range(6)]))
    assert advice.reached == pytest.approx(np.mean([validity[alone[t], t] >= 0.5 for t in range(6)]))
    nothing = Results(results.tasks, results.family, results.setting, validity * 0, diversity)
    assert c.advise(nothing, 0.5) is None


def test_a_profile_is_what_its_family_gave() -> None:
    rng = np.random.default_rng(9)
    validity, diversity = rng.random((6, 4, 3)) * 1.0000001, rng.random((6, 4, 3))
    row, read = "min_p | split_temperature", "ensemble | min_p | split_temperature"
    family = ("temperature", row, "min_p", row, read, "top_k")
    results = Results(tuple("abcd"), family, tuple(map(str, range(6))), validity, diversity)
    found = c.profiles(results)
    assert found["row"].chains == ("1", "3")
    assert found["prompts"].chains == ("4",)
    np.testing.assert_allclose(found["row"].validity, validity[[1, 3]].reshape(2, 12), atol=6e-5)
    np.testing.assert_allclose(found["prompts"].diversity, diversity[[4]].reshape(1, 12), atol=6e-5)
    few = Results(tuple("ab"), family, results.setting, validity[:, :2], diversity[:, :2])
    assert c.profiles(few) == {}


def test_conformal_by_hand() -> None:
    loss = np.array([[0.9, 0.5, 0.1], [0.7, 0.8, 0.2], [0.6, 0.1, 0.0]])
    # Made monotone: [.9 .5 .1], [.8 .8 .2], [.6 .1 0]; bounds (2.3 + 1) / 4, (1.4 + 1) / 4, (.3 + 1) / 4.
    assert c.conformal(loss, 0.9) == 0
    assert c.conformal(loss, 0.6) == 1
    assert c.conformal(loss, 0.59) == 2
    assert c.conformal(loss, 0.325) == 2
    assert c.conformal(loss, 0.32) is None


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
@pytest.mark.parametrize("monotone", [True, False])
def test_controlled_risk_is_controlled_over_200_splits(epsilon: float, monotone: bool) -> None:
    """The mean loss on tasks left out is at most epsilon, but for the chance of 200 splits (four standard errors)."""
    rng = np.random.default_rng(6)
    hard = rng.beta(0.5, 2, (400, 1))
    loss = np.clip(hard * np.linspace(2.5, 0.0, 25)[None] + (0 if monotone else rng.normal(0, 0.02, (400, 25))), 0, 1)
    realised = []
    for _ in range(200):
        some = rng.permutation(400)
        level = c.conformal(loss[some[:30]], epsilon)
        assert level is not None
        realised.append(loss[some[30:], level].mean())
    error = np.std(realised) / np.sqrt(200)
    assert np.mean(realised) <= epsilon + 4 * error
    assert np.mean(realised) > epsilon / 3  # it isn't safe by doing nothing


def test_weights_go_into_every_step_that_reads_them() -> None:
    settings = grid.drawn(4, rules=("min_p", "min_validity", "risk_budget"))
    for setting in settings:
        chain = c.with_weights(setting.chain, TRUE)
        for before, after in zip(setting.chain.steps, chain.steps, strict=True):
            reads = before.rule.name in ("min_validity", "risk_budget")
            assert {k: after.values[k] for k in before.values} == {**before.values, **(TRUE if reads else {})}


def test_calibrate_from_end_to_end(run: Run, model, tmp_path) -> None:  # noqa: F811
    out, files = tmp_path / "c.json", []
    days = "[Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday]"
    for name, shots in {"a": 2, "b": 3, "c": 4, "d": 5}.items():
        files += ["--task", tmp_path / f"{name}.yaml"]
        files[-1].write_text(f"name: {name}\nlabel: 'Random day of the week:'\nshots: {shots}\nanswers: {{list: {days}}}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run("calibrate", "--model", model, *files, "--budget", 4, "--out", out)
    assert result.code == 0, result.err
    content = json.loads(out.read_text())
    assert content["about"]["tasks"] == list("abcd")
    assert len(set(content["about"]["task_digests"].values())) == 4  # they differ in shots
    assert content["about"]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(content["report"]["risk_fitted_on"]) | set(content["report"]["risk_controlled_on"]) == set("abcd")
    assert not set(content["report"]["risk_fitted_on"]) & set(content["report"]["risk_controlled_on"])
    found = calibrated.load(out)
    z = torch.randn(2, 300)
    assert found.min_validity(0.3)(z).shape == z.shape
    assert set(found.risk) == {"min_validity", "risk_budget"}
    assert set(found.profiles) == {"row"}
    row = found.profiles["row"]
    assert (len(row.chains), len(row.validity[0])) == (4, 12)
    for one in found.advised.values():
        assert 0 <= one.score <= one.diversity <= 1
    assert "Log loss" in result.out
    assert f"written to {out}" in result.out
    again = run("calibrate", "--model", model, *files, "--budget", 4, "--out", tmp_path / "again.json")
    assert again.code == 0
    same = json.loads((tmp_path / "again.json").read_text())
    assert {k: v for k, v in same.items() if k != "about"} == {k: v for k, v in content.items() if k != "about"}


def test_bad_requests_to_calibrate(run: Run, model, tmp_path) -> None:  # noqa: F811
    few = run("calibrate", "--model", model, "--task", "weekdays", "--out", tmp_path / "c.json")
    assert "at least 4 tasks" in few.err
    folder = run("calibrate", "--model", model, "--out", tmp_path)
    assert "must be a file" in folder.err
    assert not (tmp_path / "c.json").exists()
