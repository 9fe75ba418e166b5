"""Choosing a chain by drafts: against precision matrices, on planted prompts, and from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from scipy import optimize, stats
from test_cli import Run, model, run  # noqa: F401 (fixtures)

import decal
from decal import DecalError
from decal.eval import tune_prompt
from decal.eval.judge import Judge, Judgement
from decal.eval.models import LoadedModel
from decal.samplers.drafts import Profile, Search


def planted(rng: np.random.Generator, chains: int = 12, prompts: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(S, P) validity and diversity: prompts differ in difficulty, chains in how much validity they give for diversity."""
    hot = np.linspace(-2, 2, chains)[:, None]
    hard, flat = rng.normal(0, 2, prompts), rng.normal(0, 0.7, prompts)
    validity = 1.5 - hot - hard + 0.2 * rng.normal(size=(chains, prompts))
    diversity = hot * (1 + 0.1 * flat) + flat + 0.1 * rng.normal(size=(chains, prompts))
    return 1 / (1 + np.exp(-validity)), 1 / (1 + np.exp(-diversity))


def profile(validity: np.ndarray, diversity: np.ndarray) -> Profile:
    names = tuple(f"temperature({0.5 + i})" for i in range(len(validity)))
    return Profile(names, *(tuple(tuple(row) for row in table.tolist()) for table in (validity, diversity)))


def logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 0.005, 0.995)
    return np.log(p / (1 - p))


@pytest.mark.parametrize("seed", range(8))
def test_what_drafts_say_against_a_general_optimiser(seed: int) -> None:
    """The posterior of all log odds at once, by scipy and precision matrices, and what follows from it."""
    rng = np.random.default_rng(seed)
    validity, diversity = planted(rng, int(rng.integers(2, 12)), int(rng.integers(8, 60)))
    floor, size = float(rng.uniform(0.1, 0.95)), len(validity)
    search = Search(profile(validity, diversity), floor)
    valid, count = np.zeros(2 * size), np.zeros(2 * size)
    x = np.concatenate([logit(validity), logit(diversity)])
    prior, covariance = x.mean(1), np.cov(x) + 0.1 * np.eye(2 * size)
    covariance[:size, :size] += 1
    precision = np.linalg.inv(covariance)

    def lost(z: np.ndarray) -> float:
        missed = valid * np.logaddexp(0, -z) + (count - valid) * np.logaddexp(0, z)
        return float(missed.sum() + (z - prior) @ precision @ (z - prior) / 2)

    def slope(z: np.ndarray) -> np.ndarray:
        return count / (1 + np.exp(-z)) - valid + precision @ (z - prior)

    for _ in range(8):
        mean = optimize.minimize(lost, prior, jac=slope, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).x
        share = 1 / (1 + np.exp(-mean))
        deviation = np.sqrt(np.diag(np.linalg.inv(precision + np.diag(count * share * (1 - share)))))[:size]
        needed = math.log(floor / (1 - floor))
        chance = stats.norm.cdf((mean[:size] - needed) / deviation)
        payoff = chance * share[size:]
        hoped = stats.norm.cdf((mean[:size] - needed) / deviation + (count.sum() > 0)) * share[size:]
        best = search.best()
        at = search.chains.index(best.chain)
        assert payoff[at] == pytest.approx(payoff.max(), rel=1e-4)
        assert best.chance == pytest.approx(chance[at], abs=1e-4)
        assert best.validity == pytest.approx(share[at], abs=1e-4)
        assert best.diversity == pytest.approx(share[size + at], abs=1e-4)
        asked = search.chains.index(search.ask())
        assert hoped[asked] == pytest.approx(hoped.max(), rel=1e-4)
        n = int(rng.choice([1, 3, 6, 200]))
        good = int(rng.choice([0, n, rng.integers(0, n + 1)]))
        if rng.random() < 0.5:
            asked = int(rng.integers(size))
            search.tell(good, n, search.chains[asked])
        else:
            search.tell(good, n)
        valid[asked] += good
        count[asked] += n
    assert search.drafts == count.sum()


@pytest.mark.parametrize("easy", [True, False])
def test_many_drafts_overrule_what_other_prompts_say(easy: bool) -> None:
    """All valid where elsewhere hardly any was, or the other way round."""
    validity, diversity = planted(np.random.default_rng(11), 6, 20)
    elsewhere = validity * 0.05 if easy else 0.93 + validity * 0.06
    search = Search(profile(elsewhere, diversity), 0.8)
    for _ in range(40):
        search.tell(5 if easy else 0, 5)
    best = search.best()
    assert (best.chance > 0.9) == easy
    assert best.validity > 0.8 if easy else best.validity < 0.2
    search.tell(10**30, 10**30)
    assert 0 <= search.best().chance <= 1


def test_drafts_find_a_better_chain_and_the_chances_come_true() -> None:
    """On planted prompts that had no part in the profile: a score nearer to the best, and chances that are what they say."""
    rng = np.random.default_rng(3)
    known, fresh = planted(rng, prompts=80), planted(rng, prompts=300)
    floor, scores, said, came = 0.8, {0: [], 50: []}, [], []
    prior = profile(*known)
    for p in range(300):
        for budget, found in scores.items():
            search = Search(prior, floor)
            while search.drafts < budget:
                at = search.chains.index(search.ask())
                search.tell(int(rng.binomial(5, fresh[0][at, p])), 5)
            best = search.best()
            at = search.chains.index(best.chain)
            reached = fresh[0][at, p] >= floor
            found.append(fresh[1][at, p] if reached else 0.0)
            if budget:
                said.append(best.chance)
                came.append(reached)
    best_possible = np.where(fresh[0] >= floor, fresh[1], 0).max(0).mean()
    alone = np.mean(scores[0])
    assert np.mean(scores[50]) > alone + 0.5 * (best_possible - alone)
    sure, unsure = np.array(said) > 0.8, np.array(said) < 0.2
    assert sure.sum() > 50 and unsure.sum() > 30  # noqa: PT018
    assert np.mean(np.array(came)[sure]) > 0.8
    assert np.mean(np.array(came)[unsure]) < 0.2
    assert np.mean(came) == pytest.approx(np.mean(said), abs=0.08)


def test_the_same_answers_give_the_same_questions() -> None:
    prior = profile(*planted(np.random.default_rng(5)))
    asked = []
    for _ in range(2):
        search = Search(prior, 0.7)
        asked.append([])
        for step in range(8):
            asked[-1].append(str(search.ask()))
            search.tell(step % 3, 3)
    assert asked[0] == asked[1]
    assert len(set(asked[0])) > 1


def test_bad_profiles_and_bad_tales_are_refused() -> None:
    validity, diversity = planted(np.random.default_rng(6), 3, 10)
    good = profile(validity, diversity)
    with pytest.raises(DecalError, match="on the same prompts, got 3 and 2 rows"):
        replace(good, diversity=good.diversity[:2])
    with pytest.raises(DecalError, match=r"rows of \[9, 10\] numbers"):
        replace(good, diversity=(*good.diversity[:2], good.diversity[2][:9]))
    with pytest.raises(DecalError, match="at least 8 prompts, got 7"):
        profile(validity[:, :7], diversity[:, :7])
    for number in (1.1, -0.1, math.nan):
        with pytest.raises(DecalError, match=r"are in \[0, 1\]"):
            replace(good, validity=((number, *good.validity[0][1:]), *good.validity[1:]))
    with pytest.raises(DecalError, match="one is there twice"):
        replace(good, chains=(good.chains[0], *good.chains[:2]))
    with pytest.raises(DecalError, match="takes a Profile, got None"):
        Search(None, 0.5)  # type: ignore[arg-type]
    assert Search(good, np.float32(0.5)).floor == 0.5  # type: ignore[arg-type]
    for floor in (0.0, 1.0, 1.5, math.nan, "0.5", None, True):
        with pytest.raises(DecalError, match=r"must be a number in \(0, 1\)"):
            Search(good, floor)
    search = Search(good, 0.5)
    for valid, count in ((3, 2), (-1, 2), (0, 0), (1.0, 2), (1, math.nan)):
        with pytest.raises(DecalError, match=f"got {valid!r} of {count!r}"):
            search.tell(valid, count)
    with pytest.raises(DecalError, match=r"no chain top_k\(5\); it has 3"):
        search.tell(1, 2, decal.top_k(5))
    assert search.drafts == 0


class Digits(Judge):
    """Valid is what begins with a digit, and of what is empty it says nothing; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @property
    def identity(self) -> str:
        return "digits"

    def __call__(self, prompt: str, completion: str) -> Judgement:
        assert prompt == "Say: "
        self.asked.append(completion)
        return Judgement(completion[:1].isdigit() if completion else None, reason="" if completion else "undecided: empty")


@pytest.fixture(scope="module")
def writer() -> LoadedModel:
    tokenizer = tiny.byte_level(["12 34 5+6 abc\n"] * 4, merges=6, template=tiny.TEMPLATE)
    return LoadedModel(tiny.llama(len(tokenizer), seed=1, spread=0.35), tokenizer, "tiny", "fingerprint")


@pytest.mark.parametrize("others", [(), ("Speak: ", "Tell: ")])
def test_a_prompt_is_tuned_and_nothing_is_done_twice(writer: LoadedModel, tmp_path: Path, others: tuple[str, ...]) -> None:
    validity, diversity = planted(np.random.default_rng(7), 6, 20)
    before = "ensemble(0.5) | " if others else ""
    prior = replace(profile(validity, diversity), chains=tuple(f"{before}temperature({0.1 + i / 2})" for i in range(6)))
    plan = tune_prompt.Plan(drafts=17, each=5, most=4)

    def tuned(plan: tune_prompt.Plan, folder: str, judge: Digits) -> tune_prompt.Tuned:
        return tune_prompt.tune(writer, judge, "Say: ", Search(prior, 0.6), plan, tmp_path / folder, others)

    judge = Digits()
    found = tuned(plan, "a", judge)
    assert sum(one.drafts for one in found.tried) == 17
    records = [json.loads(line) for line in (tmp_path / "a/drafts.jsonl").read_text().splitlines()]
    assert len(records) == len({(r["chain"], r["seed"]) for r in records}) == 17
    assert len(set(judge.asked)) == len(judge.asked)
    for one in found.tried:
        texts = [r["text"] for r in records if r["chain"] == one.chain]
        valid = [t for t in texts if t[:1].isdigit()]
        assert (one.drafts, one.valid, one.different) == (len(texts), len(valid), len({t.strip() for t in valid}))
        assert one.judged == sum(map(bool, texts))
    # The search is told just that, five by five, the last two.
    search = Search(prior, 0.6)
    for start in range(0, 17, 5):
        batch = records[start : start + 5]
        assert {r["chain"] for r in batch} == {str(search.ask())}
        if judged := [r["text"] for r in batch if r["text"]]:
            search.tell(sum(t[:1].isdigit() for t in judged), len(judged))
    assert search.best() == found.chosen
    again, more = Digits(), Digits()
    assert tuned(plan, "a", again) == found
    assert again.asked == []
    assert sum(one.drafts for one in tuned(replace(plan, drafts=20), "a", more).tried) == 20
    assert len(more.asked) <= 5  # of the batch that was cut short three are new, or another chain is asked
    fewer = tuned(replace(plan, drafts=10), "b", Digits())
    assert [r["text"] for r in records[:10]] == [
        json.loads(line)["text"] for line in (tmp_path / "b/drafts.jsonl").read_text().splitlines()
    ]
    assert sum(one.drafts for one in fewer.tried) == 10


def test_bad_requests_are_refused_before_anything_is_made(writer: LoadedModel, tmp_path: Path) -> None:
    for name, low in {"drafts": 1, "each": 1, "most": 1, "seed": 0}.items():
        for value in (low - 1, 2.5, math.nan, True, "5", None):
            with pytest.raises(DecalError, match=f"{name} must be a whole number of at least {low}, got"):
                tune_prompt.Plan(**{name: value})
    for stop in (("",), "abc", (5,), ["a"]):
        with pytest.raises(DecalError, match="stop is a tuple of texts"):
            tune_prompt.Plan(stop=stop)  # type: ignore[arg-type]
    with pytest.raises(DecalError, match="form must be completion or chat, got 'nonsense'"):
        tune_prompt.Plan(form="nonsense")  # type: ignore[arg-type]
    prior, plan = profile(*planted(np.random.default_rng(7), 6, 20)), tune_prompt.Plan(drafts=5, most=4)

    def tuned(judge: Judge | None = None, search: Search | None = None, others=(), prompt: str = "Say: ") -> None:
        search = search or Search(prior, 0.5)
        tune_prompt.tune(writer, judge or Digits(), prompt, search, plan, tmp_path / "out", others)

    for others in ("abc", ("Say: ",), ("a", "a")):
        with pytest.raises(DecalError, match="texts unlike the prompt and each other"):
            tuned(others=others)
    with pytest.raises(DecalError, match="the model has room for"):
        tuned(prompt="5 " * 3000)
    with pytest.raises(DecalError, match="at least one token"):
        tuned(prompt="")
    told = Search(prior, 0.5)
    told.tell(1, 2)
    with pytest.raises(DecalError, match="told of 2 drafts before"):
        tuned(search=told)
    assert not (tmp_path / "out").exists()

    class Silent(Digits):
        def __call__(self, prompt: str, completion: str) -> Judgement:
            return Judgement(None, reason="refused: no")

    with pytest.raises(DecalError, match="no verdict on any of 5 drafts; of the first it says: refused: no"):
        tuned(Silent())


def test_tune_prompt_from_end_to_end(run: Run, model, tmp_path) -> None:  # noqa: F811
    files = []
    days = "[Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday]"
    for name, shots in {"a": 2, "b": 3, "c": 4, "d": 5}.items():
        files += ["--task", tmp_path / f"{name}.yaml"]
        files[-1].write_text(f"name: {name}\nlabel: 'Random day:'\nshots: {shots}\nanswers: {{list: {days}}}\n")
    made = run("calibrate", "--model", model, *files, "--budget", 4, "--read-prompts", "--out", tmp_path / "c.json")
    assert made.code == 0, made.err
    asked = ("tune-prompt", "Random day:", "--model", model, "--calibration", tmp_path / "c.json", "--judge", "regex:.+day")
    out = tmp_path / "out"
    result = run(*asked, "--drafts", 7, "--max-new-tokens", 6, "--out", out)
    assert result.code == 0, result.err
    content = json.loads((out / "tuned.json").read_text())
    assert sum(one["drafts"] for one in content["tried"]) == 7
    assert {step.rule.name for step in decal.parse(content["chosen"]["chain"]).steps} == {"min_p", "split_temperature"}
    assert content["about"]["prompt"] == "Random day:"
    assert content["likely"] == (content["chosen"]["chance"] >= 0.5)
    assert content["chosen"]["chain"] in result.out
    assert ("No chain of this calibration is likely" in result.out) == (not content["likely"])
    assert content["about"]["calibration"].endswith("c.json")
    assert content["about"]["drafts"] == 7
    other = run("tune-prompt", "Other day:", *asked[2:], "--out", out)
    assert "has the results of another prompt, 'Random day:'" in other.err
    also = run(*asked, "--drafts", 3, "--max-new-tokens", 3, "--also", "Some day:", "--out", tmp_path / "two")
    assert also.code == 0, also.err
    assert json.loads((tmp_path / "two/tuned.json").read_text())["chosen"]["chain"].startswith("ensemble(")
    for arguments, message in (
        (("--min-validity", 1), "must be a number in (0, 1)"),
        (("--judge", "nonsense"), "no judge"),
        (("--calibration", tmp_path / "a.yaml"), "no calibration"),
    ):
        bad = run(*asked, *arguments, "--out", tmp_path / "bad")
        assert bad.code != 0
        assert message in bad.err
    assert not (tmp_path / "bad").exists()
