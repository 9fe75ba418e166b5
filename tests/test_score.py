"""Scores of sampled outputs: what is read, judged, averaged and compared, and the command from end to end."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from decal.eval import cli, score, task
from decal.eval.score import Known, Options
from decal.samplers.errors import DecalError


class Result(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]
Lines = Sequence[dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs ``decal score`` with the given arguments in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["decal", "score", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Result(code or 0, *capsys.readouterr())

    return call


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def scored(path: Path, lines: Lines, **options: Any) -> score.Results:
    return score.score(score.read(write(path / "o.jsonl", lines)), Options(**options))


def toy(prompts: int, n: dict[str, int], seed: int = 0, kinds: int = 30) -> list[dict[str, Any]]:
    """Outputs of settings that draw from one law for each prompt: integers, the first of them the most probable."""
    rng = np.random.default_rng(seed)
    lines = []
    for prompt in range(prompts):
        law = rng.dirichlet(np.full(kinds, 0.5))
        for setting, many in n.items():
            for i in rng.choice(kinds, size=many, p=law):
                lines.append({"prompt": f"p{prompt}", "setting": setting, "output": str(i + 1)})
    return lines


def by_letter(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors that are equal for texts with the same first letter, else orthogonal."""
    return np.eye(128)[[ord(text[0]) for text in texts]]


STATES = ["Ohio", "Texas", "Ohio", "Utah", "Springfield", "texas", " Ohio\n", "Iowa", "Iowa", "Ohio", "Maine", "Gotham"]


def test_the_command_from_end_to_end(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": f"p{p}", "model": "<m>", "setting": t, "output": str(rng.choice(STATES)), "else": 1}
        for p, t, _ in itertools.product(range(4), (0.5, 1), range(12))
    ]
    out = tmp_path / "deep" / "out"
    result = run(write(tmp_path / "o.jsonl", lines), "--task", "us_states", "--no-embed", "--k", 5, "--out", out)
    assert result.code == 0, result.err
    assert {path.name for path in out.iterdir()} == {"scores.json", "scores.parquet", "score.html"}
    summary = json.loads((out / "scores.json").read_text(), parse_constant=pytest.fail)
    table = pd.read_parquet(out / "scores.parquet")
    assert len(table) == 8
    assert summary["answers"] == 50
    assert summary["validity"] == "task us_states"
    assert [(g["model"], g["setting"], g["outputs"]) for g in summary["groups"]] == [("<m>", "0.5", 48), ("<m>", "1", 48)]

    frame = pd.DataFrame(lines)
    frame["answer"] = frame.output.str.strip()
    states = task.load("us_states").answers
    for group in summary["groups"]:
        mine = frame[frame.setting.astype(str).str.removesuffix(".0") == group["setting"]]
        cells = [cell for _, cell in mine.groupby("prompt")]
        got = {name: told["value"] for name, told in group["scores"].items()}
        assert got["validity"] == pytest.approx(np.mean([cell.answer.isin(states).mean() for cell in cells]))
        right = [cell.answer[cell.answer.isin(states)] for cell in cells]
        assert got["coverage"] == pytest.approx(np.mean([r.nunique() / 50 for r in right]))
        entropies = [stats.entropy(r.value_counts()) for r in right]
        assert got["diversity"] == pytest.approx(np.mean(np.exp(entropies)) / 50)
        assert got["distinct"] == pytest.approx(np.mean([cell.answer.nunique() for cell in cells]))
        fives = [[len(set(five)) for five in itertools.combinations(cell.answer, 5)] for cell in cells]
        assert got["distinct_k"] == pytest.approx(np.mean(fives))
        assert got["distinct_at_m"] == got["distinct"], "all prompts have 12 outputs"
        rows = table[table.setting == group["setting"]]
        for name, told in group["scores"].items():
            assert told["value"] is None or told["value"] == pytest.approx(rows[name].mean())
            if told["value"] is not None:
                assert told["low"] <= told["value"] <= told["high"]
                assert told["interval"] == "bootstrap over 4 prompts"
    (comparison,) = summary["comparisons"]
    assert (comparison["group"], comparison["baseline"], comparison["thinned"]) == ("<m> 1", "<m> 0.5", 0)
    gap = [g["scores"]["hill_1"]["value"] for g in summary["groups"]]
    assert comparison["differences"]["hill_1"]["value"] == pytest.approx(gap[1] - gap[0])

    page = (out / "score.html").read_text()
    assert "<m>" not in page, "escaped"
    assert re.findall(r'(?:src|href)="([^,"]*)', page) == ["data:image/png;base64"]
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\(", page)
    for metric in summary["metrics"].values():
        assert metric["bias"].replace("'", "&#39;") in page
    for note in summary["notes"]:
        assert note.replace("'", "&#39;") in page
        assert note in " ".join(result.out.split())
    assert "validity" in result.out
    assert f"the one to open is {out / 'score.html'}" in result.out

    again = run(tmp_path / "o.jsonl", "--task", "us_states", "--no-embed", "--k", 5, "--out", out)
    assert again.code == 0
    fresh = json.loads((out / "scores.json").read_text())
    assert {**fresh, "created": ""} == {**summary, "created": ""}


def test_the_default_embedder_knows_what_words_mean(run: Run, tmp_path: Path) -> None:
    embed, described = score.load_embedder()
    assert embed is not None
    assert described == "all-MiniLM-L6-v2"
    vectors = embed(["a small dog", "a little puppy", "the stock market fell"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    lines = [{"prompt": "p", "output": text} for text in ("a small dog", "a little puppy", "the stock market fell")]
    assert run(write(tmp_path / "o.jsonl", lines), "--out", tmp_path / "out").code == 0
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    expected = np.mean([1 - vectors[i] @ vectors[j] for i, j in ((0, 1), (0, 2), (1, 2))])
    assert told["embedder"] == "all-MiniLM-L6-v2"
    assert told["groups"][0]["scores"]["distance"]["value"] == pytest.approx(expected, abs=1e-4)


def test_missing_packages_are_named_and_nothing_else_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    gone = ("sacrebleu", "sentence_transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else find(name, *more))
    result = run(write(tmp_path / "o.jsonl", toy(2, {"a": 5})), "--out", tmp_path / "out")
    assert result.code == 0, result.err
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    for package in ("sacrebleu", "sentence-transformers"):
        (line,) = [note for note in told["notes"] if package in note]
        assert "pip install 'decal[score]'" in line
    assert {"self_bleu", "distance", "vendi"}.isdisjoint(told["metrics"])
    assert "hill_1_corrected" in told["metrics"]


def test_pairs_and_references_are_limited_and_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(score, "PAIRS", 6)
    monkeypatch.setattr(score, "REFERENCES", 4)
    seen: list[str] = []
    steps: list[tuple[str, int, int]] = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        seen.extend(texts)
        return by_letter(texts)

    words = [f"{letter}{i}" for i, letter in enumerate("abcabcabcabcabc")]
    lines = [{"prompt": "p", "output": word} for word in words]
    outputs = score.read(write(tmp_path / "o.jsonl", lines))
    options = Options(embed=embed)
    first = score.measure(outputs, options, score.sort(outputs, options), lambda *step: steps.append(step))
    assert len(seen) == 6
    assert steps == [("embedding", 6, 6), ("measuring", 1, 1)]
    letters = [text[0] for text in seen]
    apart = np.mean([a != b for a, b in itertools.combinations(letters, 2)])
    assert first.groups[0].scores["distance"].value == pytest.approx(apart)
    assert first.groups[0].scores["vendi"].value == pytest.approx(math.exp(stats.entropy([letters.count(c) for c in "abc"])))
    assert any("among 6 outputs of a prompt, drawn with seed 0" in note for note in first.notes)
    assert any("over 4 outputs of a prompt, drawn with seed 0" in note for note in first.notes)
    drawn = {tuple(seen)}
    for seed in range(5):
        seen.clear()
        score.score(outputs, Options(embed=embed, seed=seed))
        drawn.add(tuple(seen))
    assert len(drawn) > 2, "the seed decides which"
    assert first.groups[0].scores == score.score(outputs, options).groups[0].scores


def test_one_prompt_has_the_intervals_of_the_literature_or_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = [{"prompt": "p", "output": f"{rng.choice(list('aaabbcdefghij'))}", "valid": i < 30} for i in range(40)]
    result = scored(tmp_path, lines, embed=by_letter)
    (group,) = result.groups
    wilson = stats.binomtest(30, 40).proportion_ci(0.95, "wilson")
    assert (group.scores["validity"].low, group.scores["validity"].high) == pytest.approx((wilson.low, wilson.high))
    assert group.scores["validity"].interval == "Wilson's score interval; one prompt"
    for name in (
        "distinct",
        "distinct_at_m",
        "distinct_k",
        "chao1",
        "sample_coverage",
        "collision",
        "hill_2_corrected",
        "distance",
    ):
        told = group.scores[name]
        assert told.low is not None, name
        assert told.low <= told.value <= told.high, name
        assert told.interval.endswith("; one prompt")
    for name in ("hill_1", "hill_1_corrected", "hill_2", "vendi", "self_bleu", "ead_1", "compression"):
        assert group.scores[name].low is None, name
        assert group.scores[name].interval == "none"
    assert any("biases what counts answers" in note for note in result.notes)


def test_intervals_over_the_outputs_of_one_prompt_cover(tmp_path: Path) -> None:
    rng, letters = np.random.default_rng(2), "abcdefgh"
    law = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    truth = (law**2).sum()
    hits = {"collision": 0, "hill_2_corrected": 0, "distance": 0}
    for _ in range(150):
        lines = [{"prompt": "p", "output": str(x)} for x in rng.choice(list(letters), 60, p=law)]
        scores = scored(tmp_path, lines, embed=by_letter, resamples=300).groups[0].scores
        for name, true in (("collision", truth), ("hill_2_corrected", 1 / truth), ("distance", 1 - truth)):
            hits[name] += scores[name].low <= true <= scores[name].high
    assert all(0.87 < many / 150 < 0.99 for many in hits.values()), hits


def test_bootstrap_over_prompts_is_scipy_s() -> None:
    values = np.random.default_rng(3).gamma(2, size=25)
    told = score.averaged(values, 20_000, np.random.default_rng(0))
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert (told.low, told.high) == pytest.approx((other.low, other.high), rel=0.01)
    assert told.value == pytest.approx(values.mean())
    some = score.averaged(np.array([1.0, math.nan, 3.0]), 100, np.random.default_rng(0))
    assert (some.value, some.prompts) == (2, 2)
    assert score.averaged(np.array([1.0, math.inf]), 100, np.random.default_rng(0)) == score.Score(None, prompts=2, infinite=1)
    assert score.averaged(np.array([math.nan]), 100, np.random.default_rng(0)) == score.Score(None)


@pytest.mark.parametrize(("prompts", "share"), [(3, 0.74), (6, 0.85), (12, 0.90)])
def test_intervals_over_few_prompts_cover_what_the_note_says(prompts: int, share: float) -> None:
    rng = np.random.default_rng(4)
    told = [score.averaged(rng.normal(size=prompts), 400, rng) for _ in range(1500)]
    assert np.mean([t.low <= 0 <= t.high for t in told]) == pytest.approx(share, abs=0.025)


def test_comparisons_of_one_law_with_different_numbers_find_nothing(tmp_path: Path) -> None:
    """The tables differ by the number of outputs; the paired differences don't."""
    result = scored(tmp_path, toy(60, {"few": 20, "many": 80}), resamples=500)
    few, many = result.groups
    assert result.m == 20
    assert many.scores["distinct"].value > 1.2 * few.scores["distinct"].value
    assert many.scores["distinct_at_m"].value == pytest.approx(few.scores["distinct_at_m"].value, rel=0.03)
    (comparison,) = result.comparisons
    assert comparison.thinned == 60
    assert any("can't be compared between groups" in note and "m is 20" in note for note in result.notes)
    for name, told in comparison.differences.items():
        if told.value is not None and name not in ("ead_2", "ead_3"):
            spread = told.high - told.low
            assert abs(told.value) < 0.9 * spread, (name, told)
    told = {name for name, difference in comparison.differences.items() if difference.value is not None}
    assert told > {"distinct", "hill_1", "self_bleu"}


def test_comparisons_are_paired_and_on_common_prompts(tmp_path: Path) -> None:
    lines = [
        {"id": prompt, "setting": setting, "output": "x", "valid": i < right + extra}
        for prompt, right in enumerate((0, 2, 4, 6, 8))
        for setting, extra in (("a", 0), ("b", 1))
        for i in range(10)
    ]
    lines = [*lines, {"id": "only b", "setting": "b", "output": "y", "valid": True}]
    lines = [line for line in lines if line["setting"] == "a"] + [line for line in reversed(lines) if line["setting"] == "b"]
    result = scored(tmp_path, lines)
    told = result.comparisons[0].differences["validity"]
    assert (told.value, told.low, told.high) == pytest.approx((0.1, 0.1, 0.1)), "pairs differ by exactly a tenth"
    assert result.comparisons[0].prompts == 5
    assert any("different prompts" in note for note in result.notes)
    assert result.groups[0].scores["validity"].high > 0.5
    other = scored(tmp_path, lines, baseline="b")
    assert [c.group for c in other.comparisons] == ["a"]
    assert other.comparisons[0].differences["validity"].value == pytest.approx(-0.1)


def test_no_repeated_output_makes_hill_2_infinite_and_no_broken_json(run: Run, tmp_path: Path) -> None:
    lines = [{"prompt": "p", "output": text} for text in "abcdef"] + [{"prompt": "q", "output": "a"}] * 6
    assert run(write(tmp_path / "o.jsonl", lines), "--no-embed", "--out", tmp_path / "out").code == 0
    told = json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=pytest.fail)["groups"][0]["scores"]
    assert told["hill_2_corrected"] == {
        "value": None, "low": None, "high": None, "prompts": 2, "infinite": 1, "interval": "none"
    }  # fmt: skip
    assert told["collision"]["value"] == 0.5
    assert "infinite on 1" in (tmp_path / "out" / "score.html").read_text()


def test_over_valid_measures_valid_outputs_only(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "output": t, "valid": t in "ab"} for t in "aabbbxyzw"] + [
        {"prompt": "q", "output": "x", "valid": False}
    ]
    result = scored(tmp_path, lines, over="valid")
    scores = result.groups[0].scores
    assert scores["validity"].value == pytest.approx((5 / 9 + 0) / 2)
    assert (scores["distinct"].value, scores["distinct"].prompts) == (2, 1), "nothing valid to measure on q"
    assert result.m == 5
    assert scored(tmp_path, lines).groups[0].scores["distinct"].value == (6 + 1) / 2


def test_case_and_white_space(tmp_path: Path) -> None:
    states = task.load("us_states")
    lines = [{"prompt": "p", "output": text} for text in (" ohio", "OHIO", "Ohio\n", "Texas")]
    exact = scored(tmp_path, lines, known=Known(states)).groups[0].scores
    assert (exact["validity"].value, exact["distinct"].value, exact["coverage"].value) == (0.5, 4, 2 / 50)
    folded = scored(tmp_path, lines, known=Known(states, "any"), case="any").groups[0].scores
    assert (folded["validity"].value, folded["distinct"].value, folded["coverage"].value) == (1, 2, 2 / 50)
    assert folded["diversity"].value == pytest.approx(math.exp(stats.entropy([3, 1])) / 50)
    twins = tmp_path / "t.yaml"
    twins.write_text("name: t\nprompt: x\nlabel: x\nanswers: {list: [a, A]}")
    with pytest.raises(DecalError, match="differ by case only"):
        scored(tmp_path, lines, known=Known(task.load(str(twins)), "any"))


def test_an_answer_stands_for_its_output(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "output": f"I say {t}, because {i}.", "answer": t} for i, t in enumerate(("Ohio", "Ohio", "Iowa"))]
    scores = scored(tmp_path, lines, known=Known(task.load("us_states"))).groups[0].scores
    assert scores["validity"].value == 1
    assert scores["distinct"].value == 2
    assert scores["self_bleu"].value < 1, "texts are compared whole"


FUNCTIONS = """
def even(answer): return int(answer) % 2 == 0
def asked(answer, prompt): return answer in prompt
def near(a, b): return abs(int(a) - int(b)) <= 1
def vague(answer): return "yes"
def failing(answer): raise KeyError(answer)
def three(a, b, c): return True
constant = 3
"""


def test_functions_of_files_and_modules(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    lines = [{"prompt": "1 or 2", "output": text} for text in ("1", "2", "4", "7")]
    file = write(tmp_path / "o.jsonl", lines)

    def told(*arguments: str) -> dict[str, Any]:
        result = run(file, "--no-embed", "--out", tmp_path / "out", *arguments)
        assert result.code == 0, result.err
        found: dict[str, Any] = json.loads((tmp_path / "out" / "scores.json").read_text())["groups"][0]["scores"]
        return found

    assert told("--predicate", "mine.py:even")["validity"]["value"] == 0.5
    assert told("--predicate", "mine.py:asked")["validity"]["value"] == 0.5
    assert told("--same", "mine.py:near")["distinct"]["value"] == 3
    assert "validity" not in told()
    assert told("--predicate", "os.path:isabs")["validity"]["value"] == 0


BAD_LINES = {
    "no JSON": ('{"prompt": "a", "output": "b"}\n{"prompt": ', "o.jsonl:2: not JSON"),
    "no object": ("[1]", "o.jsonl:1: a line must be a JSON object, got list"),
    "no output": ('\n\n{"prompt": "a"}', "o.jsonl:3: output: Field required"),
    "no prompt": ('{"output": "a"}', "o.jsonl:1: prompt: give a prompt or an id"),
    "a number": ('{"prompt": "a", "output": 3}', "o.jsonl:1: output: Input should be a valid string, got '3'"),
    "valid in words": ('{"prompt": "a", "output": "b", "valid": "yes"}', "o.jsonl:1: valid: "),
    "valid once": (
        '{"prompt": "a", "output": "b", "valid": true}\n{"prompt": "a", "output": "b"}',
        "o.jsonl:2: valid: missing here, but given on line 1",
    ),
    "answer once": (
        '{"prompt": "a", "output": "b"}\n{"prompt": "a", "output": "b", "answer": "c"}',
        "o.jsonl:1: answer: missing",
    ),
    "surrogate": ('{"prompt": "a", "output": "\\ud83d"}', "o.jsonl:1: output: half of a character"),
    "empty": ("\n", "o.jsonl: no outputs"),
    "deep": ("[" * 200_000, "o.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_refused_with_their_place(name: str, run: Run, tmp_path: Path) -> None:
    text, message = BAD_LINES[name]
    (tmp_path / "o.jsonl").write_text(text)
    assert_refused(run("o.jsonl", "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "us_states", "--predicate", "mine.py:even"], "--task and --predicate both say what is valid"),
        (["--task", "nothing"], "unknown task 'nothing'"),
        (["--over", "valid"], "--over valid needs to know what is valid"),
        (["--predicate", "even"], "must be module:function or file.py:function, got 'even'"),
        (["--predicate", "nowhere_at_all:f"], "--predicate: can't import nowhere_at_all: ModuleNotFoundError"),
        (["--predicate", "none.py:f"], "--predicate: can't import none.py: FileNotFoundError"),
        (["--predicate", "mine.py:odd"], "mine.py has no function 'odd'"),
        (["--predicate", "mine.py:constant"], "mine.py has no function 'constant'"),
        (["--predicate", "mine.py:three"], "it needs 3 arguments"),
        (["--predicate", "mine.py:vague"], "o.jsonl:1: --predicate must return True or False, got 'yes' for '1'"),
        (["--predicate", "mine.py:failing"], "o.jsonl:1: --predicate fails on '1': KeyError"),
        (["--predicate", "keyword:iskeyword"], "wrap it in a function of your own"),
        (["--same", "mine.py:even"], "--same fails: TypeError"),
        (["--k", "0"], "--k and --common must be at least 1"),
        (["--common", "0"], "--k and --common must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--baseline", "b"], "--baseline: no group 'b'; there are 'outputs'"),
        (["--out", "mine.py"], "--out must be a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_are_refused_in_one_line(arguments: list[str], message: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    write(tmp_path / "o.jsonl", [{"prompt": "p", "output": "1"}, {"prompt": "p", "output": "2"}])
    assert_refused(run("o.jsonl", "--no-embed", *arguments), message)


def test_an_embedder_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "o.jsonl", [{"prompt": "p", "output": "1"}])
    (tmp_path / "empty").mkdir()
    assert_refused(run("o.jsonl", "--embedder", tmp_path / "empty"), "--embedder: can't load")
    assert_refused(run("none.jsonl"), "can't read the outputs none.jsonl")


def assert_refused(result: Result, message: str) -> None:
    """One line that says it, code 2, nothing else."""
    assert result.code == 2, result
    assert len(result.err.splitlines()) == 1, result.err
    assert message in result.err
    assert result.out == ""


def test_classes_are_told_apart_by_prompt_and_not_by_other_groups(tmp_path: Path) -> None:
    """A group scores the same whatever else is in the file, but for what is measured by the file's vocabulary or its m."""
    lines = toy(5, {"a": 12, "b": 12})
    both = scored(tmp_path, lines).groups[0].values
    alone = scored(tmp_path, [line for line in lines if line["setting"] == "a"]).groups[0].values
    for name, of in both.items():
        if not name.startswith("ead"):
            np.testing.assert_array_equal(of, alone[name], err_msg=name)
