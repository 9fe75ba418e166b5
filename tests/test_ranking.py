"""The ranking of samplers: against an obvious implementation, its intervals against known means, and how it is shown."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from decal.eval import frontier_report as report
from decal.eval import oracle, ranking, task
from decal.eval.frontier import ORACLES, TaskResult

NAMES = tuple(f"rule_{i:02}" for i in range(35))
TASKS = ("weekdays", "months", "us_states", "integers", "digits2", "digits2_sum_le")


def result_of(
    families: dict[str, int], prompts: int, rng: np.random.Generator, name: str = "weekdays", missing: float = 0.05
) -> TaskResult:
    """Made-up results of so many settings of each family; some never give a valid answer."""
    family = [f for f, many in families.items() for _ in range(many)]
    setting = [f"{f}({i})" for f, many in families.items() for i in range(many)]
    validity = rng.uniform(0.3, 1, (len(family), 1)) + rng.uniform(-0.2, 0.0, (len(family), prompts))
    diversity = rng.uniform(0.1, 1, (len(family), 1)) * rng.uniform(0.7, 1, (len(family), prompts))
    diversity[rng.random(diversity.shape) < missing / prompts] = np.nan
    bounds = np.tile(1 - oracle.VALIDITIES**3 / 2, (prompts, 1))
    names = [f"prompt {i}" for i in range(prompts)]
    return TaskResult(task.load(name), names, 9, family, setting, validity, diversity, np.zeros_like(validity), bounds)


def constant(values: dict[str, float | None], prompts: int = 4) -> TaskResult:
    """One setting a family, with that diversity at validity 1; None: it doesn't reach any floor."""
    validity = np.array([[0.0 if v is None else 1.0] * prompts for v in values.values()])
    diversity = np.array([[np.nan if v is None else v] * prompts for v in values.values()])
    names, settings = ["p"] * prompts, [f"{f}()" for f in values]
    return TaskResult(task.load("weekdays"), names, 9, list(values), settings, validity, diversity, 0 * validity, None)


def run_of(tasks: Sequence[TaskResult], floor: float = 0.8) -> report.Run:
    about = {"decal": "0", "created": "now", "seconds": 1.0, "grid": "made up", "seed": 0}
    return report.Run({**about, "model": {"name": "no model", "fingerprint": "", "note": ""}}, tasks, floor)


def body_of(folder: Path) -> str:
    """The page without scripts and pictures."""
    page = (folder / "report.html").read_text()
    return html.unescape(re.sub(r"<script.*?</script>|<img.*?>", "", page, flags=re.DOTALL))


def chosen_slowly(result: TaskResult, family: str, floor: float, prompts: Sequence[int]) -> int | None:
    best = None
    for i, name in enumerate(result.family):
        mean = sum(result.diversity[i, p] for p in prompts) / len(prompts)
        valid = sum(result.validity[i, p] for p in prompts) / len(prompts)
        if name == family and valid >= floor and mean == mean and (best is None or mean > best[0]):
            best = mean, i
    return None if best is None else best[1]


def given(task: TaskResult, family: str) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Validity and diversity on every prompt of each setting of a family."""
    at = [i for i, name in enumerate(task.family) if name == family]
    return [(tuple(task.validity[i].round(9)), tuple(task.diversity[i].round(9))) for i in at]


def test_settings_that_give_the_same_are_told() -> None:
    rng = np.random.default_rng(3)
    task = result_of({"temperature": 3, "a": 6}, 4, rng)
    task.validity[4:7] = task.validity[3]
    task.diversity[4:7] = task.diversity[3]
    found = ranking.rank([task], 0.5, resamples=5).find("a")
    assert found is not None
    assert (found.settings, found.distinct) == (6, 3)


def test_scores_are_means_over_tasks_of_the_best_settings() -> None:
    rng = np.random.default_rng(1)
    families = {"temperature": 5, "greedy": 1, "a": 20, "b": 20, "c": 3, ORACLES[0]: 4}
    tasks = [result_of(families, d, rng, missing=0.3) for d in (6, 1, 3, 8)]
    for floor in (0.5, 0.75, 0.85):
        found = ranking.rank(tasks, floor, resamples=50)
        score = {}
        for family in families:
            place = found.find(family)
            assert place is not None
            best = [t.best(family, floor) for t in tasks]
            score[family] = np.mean([0 if b is None else b.diversity for b in best])
            assert place.score.value == pytest.approx(score[family], abs=1e-12)
            assert place.reached == sum(b is not None for b in best)
            assert place.settings == families[family]
            assert place.distinct == max(len({(*v, *map(str, d)) for v, d in given(t, family)}) for t in tasks)
            slow = [chosen_slowly(t, family, floor, range(len(t.prompts))) for t in tasks]
            assert [None if b is None else b.setting for b in best] == [
                None if i is None else t.setting[i] for t, i in zip(tasks, slow, strict=True)
            ]
        samplers = [f for f in families if f not in ORACLES]
        assert [p.family for p in found.places] == sorted(samplers, key=lambda f: -score[f])
        assert [p.family for p in found.oracles] == [ORACLES[0]]
        for place in found.places:
            assert place.rank is not None
            assert place.rank.value == 1 + sum(score[f] > score[place.family] + 1e-12 for f in samplers)
            if place.family == "temperature":
                assert place.gain is None
            else:
                assert place.gain is not None
                assert place.gain.value == pytest.approx(score[place.family] - score["temperature"], abs=1e-12)
        assert sum(p.best or 0 for p in found.places) == pytest.approx(1)
        assert found.bound == pytest.approx(np.mean([t.bound(floor) for t in tasks]))


def test_intervals_are_those_of_a_loop() -> None:
    """Draw tasks, then prompts, one by one; the same for all families."""
    rng = np.random.default_rng(2)
    families = {"temperature": 12, "a": 12, "b": 12}
    prompts = (5, 1, 9)
    tasks = [result_of(families, d, rng, missing=0) for d in prompts]
    found = ranking.rank(tasks, 0.5, resamples=20_000)
    picked = {f: [t.diversity[chosen_slowly(t, f, 0.5, range(len(t.prompts)))] for t in tasks] for f in families}
    slow = []
    for _ in range(6000):
        drawn = [(t, rng.integers(0, prompts[t], prompts[t])) for t in rng.integers(0, len(tasks), len(tasks))]
        slow.append([np.mean([picked[f][t][p].mean() for t, p in drawn]) for f in families])
    draws = np.array(slow)
    ranks = 1 + (draws[:, :, None] < draws[:, None, :]).sum(-1)
    for i, family in enumerate(families):
        place = found.find(family)
        assert place is not None
        assert (place.score.low, place.score.high) == pytest.approx(np.quantile(draws[:, i], [0.025, 0.975]), abs=0.01)
        assert place.best == pytest.approx((ranks[:, i] == 1).mean(), abs=0.03)
        if place.gain:
            paired = draws[:, i] - draws[:, 0]
            assert (place.gain.low, place.gain.high) == pytest.approx(np.quantile(paired, [0.025, 0.975]), abs=0.01)


def test_held_out_scores_are_of_settings_chosen_without_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    families = {"temperature": 6, "a": 15, "never": 1}
    result = result_of(families, 7, rng, missing=0.5)
    result.validity[result.members("never")] = 0.1
    order = np.random.default_rng(5).permutation(7).tolist()
    monkeypatch.setattr(ranking, "SPLITS", 1)
    score, validity = ranking.held_out(result, [result.members(f) for f in families], 0.6, np.random.default_rng(5))
    first, second = order[:3], order[3:]
    for i, family in enumerate(families):
        for here, there in ((first, second), (second, first)):
            chosen = chosen_slowly(result, family, 0.6, there)
            for prompt in here:
                if chosen is None:
                    assert score[i, prompt] == 0
                    assert np.isnan(validity[i, prompt])
                else:
                    assert score[i, prompt] == np.nan_to_num(result.diversity[chosen, prompt])
                    assert validity[i, prompt] == result.validity[chosen, prompt]


def test_held_out_scores_show_the_optimism_of_choosing() -> None:
    """Settings that are all alike but for noise: the best of many looks better than it is, on its own prompts only."""
    rng = np.random.default_rng(4)
    tasks = []
    for name in TASKS:
        many = {"temperature": 2, "tuned": 300}
        result = result_of(many, 10, rng, name, missing=0)
        result.validity[:] = 0.9
        result.diversity[:] = rng.uniform(0.2, 0.8, result.diversity.shape)
        tasks.append(result)
    place = ranking.rank(tasks, 0.8, resamples=200).find("tuned")
    assert place is not None
    assert place.held is not None
    assert place.score.value > 0.62
    assert place.held.score.value == pytest.approx(0.5, abs=0.05)
    assert place.held.validity == pytest.approx(0.9)
    assert place.held.lowest == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("tasks", "prompts", "least", "most"),
    [(30, 5, 0.90, 0.98), (6, 10, 0.83, 0.96), (3, 10, 0.65, 0.85), (1, 40, 0.90, 0.98)],
)
def test_how_often_intervals_contain_the_mean(tasks: int, prompts: int, least: float, most: float) -> None:
    """Normal tasks around a known mean, normal prompts around each; the report states how few tasks fall short."""
    rng = np.random.default_rng(6)
    spread = 1.0 if tasks > 1 else 0.0
    inside = 0
    for _ in range(250):
        values = rng.normal(0, spread, (tasks, 1)) + rng.normal(0, 0.5, (tasks, prompts))
        draws = ranking.weights([prompts] * tasks, 500, rng)
        low, high = np.quantile(np.sum([w @ v for w, v in zip(draws, values, strict=True)], 0), [0.025, 0.975])
        inside += low <= 0 <= high
    assert least <= inside / 250 <= most


def test_weights_are_means_of_means() -> None:
    draws = ranking.weights([3, 1, 5], 100, np.random.default_rng(0))
    assert [w.shape for w in draws] == [(100, 3), (100, 1), (100, 5)]
    np.testing.assert_allclose(sum(w.sum(-1) for w in draws), 1)
    assert np.isin(draws[1].round(9), (np.arange(4) / 3).round(9)).all()


def test_ties_share_the_better_rank() -> None:
    tasks = [constant({"temperature": 0.3, "a": 0.5, "b": 0.5, "c": 0.5, "never": None, "nor": None}) for _ in range(3)]
    found = ranking.rank(tasks, 0.8)
    assert {p.family: p.rank.value for p in found.places if p.rank} == {
        "a": 1, "b": 1, "c": 1, "temperature": 4, "never": 5, "nor": 5,
    }  # fmt: skip
    assert [p.best for p in found.places[:3]] == pytest.approx([1 / 3] * 3)
    assert found.contenders == 3
    never = found.find("never")
    assert never is not None
    assert (never.score, never.reached) == (ranking.Estimate(0.0, 0.0, 0.0), 0)
    assert never.held == ranking.Held(ranking.Estimate(0.0, 0.0, 0.0), None, None)
    assert found.bound is None


def test_a_floor_reached_on_some_tasks_only_counts_as_nothing_on_the_others() -> None:
    tasks = [constant({"temperature": 0.2, "a": 0.9}), constant({"temperature": 0.2, "a": None})]
    place = ranking.rank(tasks, 0.8).find("a")
    assert place is not None
    assert place.reached == 1
    assert place.score.value == pytest.approx(0.45)
    assert place.held is not None
    assert place.held.validity == 1


@pytest.mark.parametrize(
    ("prompts", "says", "interval", "held"),
    [
        ([1], "no intervals", False, False),
        ([5], "one task", True, True),
        ([1, 1], "each has one prompt", True, False),
        ([1, 4], "then prompts within each", True, True),
    ],
)
def test_what_there_is_to_resample(prompts: list[int], says: str, interval: bool, held: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    tasks = [result_of({"temperature": 4, "a": 9}, d, rng, name, missing=0) for d, name in zip(prompts, TASKS, strict=False)]
    run = run_of(tasks, 0.5)
    (found, *_) = run.rankings
    assert says in found.basis
    for place in found.places:
        assert (place.score.low is not None) == interval
        assert (place.best is not None) == interval
        assert (place.held is not None) == held
    report.write(run, tmp_path)
    text = body_of(tmp_path)
    assert found.basis in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    console = Console(file=io.StringIO(), width=160)
    report.print_table(run, console)
    assert "nan" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_oracle_that_some_task_lacks_is_no_reference() -> None:
    rng = np.random.default_rng(8)
    tasks = [
        result_of({"temperature": 3, ORACLES[0]: 2, ORACLES[1]: 2}, 3, rng),
        result_of({"temperature": 3, ORACLES[0]: 2}, 3, rng),
    ]
    assert [p.family for p in ranking.rank(tasks, 0.5).oracles] == [ORACLES[0]]


def test_the_same_run_gives_the_same_ranking() -> None:
    tasks = [result_of({"temperature": 3, "a": 5}, 4, np.random.default_rng(9)) for _ in range(2)]
    assert ranking.rank(tasks, 0.5) == ranking.rank(tasks, 0.5)
    assert ranking.rank(tasks, 0.5) != ranking.rank(tasks, 0.5, seed=1)


@pytest.fixture(scope="module")
def large() -> report.Run:
    rng = np.random.default_rng(10)
    families = {"greedy": 1, "temperature": 12, **dict.fromkeys(NAMES, 12), **dict.fromkeys(ORACLES, 3)}
    return run_of([result_of(families, 4, rng, name) for name in TASKS[:3]])


def test_the_page_names_every_family(large: report.Run, tmp_path: Path) -> None:
    files = report.write(large, tmp_path)
    assert tmp_path / "ranking.png" in files
    page, body = (tmp_path / "report.html").read_text(), body_of(tmp_path)
    tables = re.findall(r'<table class="ranking">.*?</table>', body, re.DOTALL)
    assert len(tables) == len(large.floors)
    for table, found in zip(tables, large.rankings, strict=True):
        cells = re.findall(r"<tr.*?<td.*?</td><td>(.*?)</td>", table, re.DOTALL)
        assert cells == [p.family for p in (*found.places, *found.oracles)] + ["bound on rank cutoffs"]
    assert large.rankings[0].floor == 0.8
    assert report.overall(large.rankings[0]) in body
    assert "greedy 1, which has nothing to set" in body
    assert 'src="data:image/png;base64,' in page
    # Every family is in every interactive figure, but few at first.
    visible = page.count('"visible":true')
    hidden = page.count('"visible":"legendonly"')
    assert 0 < visible < hidden
    summary = json.loads((tmp_path / "results.json").read_text())
    assert [r["floor"] for r in summary["rankings"]] == [0.8, 0.5, 0.9]
    first = summary["rankings"][0]["places"][0]
    assert first["family"] == large.rankings[0].places[0].family
    assert first["score"]["low"] <= first["score"]["value"] <= first["score"]["high"]


def test_figures_colour_the_best_and_the_best_of_a_task(large: report.Run) -> None:
    ranked = [p.family for p in large.rankings[0].places if p.family not in report.PLAIN]
    assert set(large.colours) == {*NAMES, *report.PLAIN}
    for result in large.tasks:
        shown = large.shown(result)
        assert {*ranked[: report.SHOWN], *report.PLAIN, *ORACLES} <= shown
        assert large.winner(result) in shown
        assert len(shown) <= report.SHOWN + len(report.PLAIN) + len(ORACLES) + 1
    coloured = [large.colours[f] for f in ranked[: report.SHOWN]]
    assert len(set(coloured)) == report.SHOWN


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_shows_the_ranking_and_a_line_a_task(width: int, large: report.Run) -> None:
    console = Console(file=io.StringIO(), width=width)
    report.print_table(large, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) <= width
    starts = [m[1] for line in lines if (m := re.match(r" *\d+ (\S+) ", line))]
    assert starts[: len(NAMES) + 2] == [p.family for p in large.rankings[0].places]
    for result in large.tasks:
        assert report.headline(result, 0.8) in " ".join(text.split())


@pytest.mark.parametrize("seed", range(5))
def test_the_setting_to_use_is_the_best_single_one_on_all_tasks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tasks = [result_of({"temperature": 5, "min_p": 7}, 3, rng) for _ in range(3)]
    for floor in (0.3, 0.6, 0.95):
        scores = {}
        for number, setting in enumerate(tasks[0].setting):
            values = [(t.validity[number].mean(), t.diversity[number].mean()) for t in tasks]
            scores[setting] = [d for v, d in values if v >= floor and np.isfinite(d)]
        best = max(sum(s) / 3 for s in scores.values())
        advice = ranking.advise(tasks, floor)
        if not best:
            assert advice is None
            continue
        assert advice is not None
        assert advice.score == pytest.approx(best)
        assert advice.score == pytest.approx(sum(scores[advice.setting]) / 3)
        assert advice.reached == len(scores[advice.setting])
        assert advice.setting in report.overall(ranking.rank(tasks, floor))
