"""The command: a run from end to end on a tiny model, and what bad input is told."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import decal
from decal.eval import cli, models, task
from decal.eval.frontier import ORACLES

GRID = "temperature({0.5, 1, 2}) | min_p({0.02, 0.2})\ntop_p({0.5, 0.9, 0.99}) | temperature(1.5)\ntypical({0.3, 0.8})\n"


class Result(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs ``decal`` with the given arguments in this process."""
    monkeypatch.setenv("DECAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DECAL_OFFLINE", "1")

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["decal", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Result(code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has seen a few weekdays, so that some of what it says is valid."""
    folder = tmp_path_factory.mktemp("model")
    label = task.load("weekdays").task.label
    days = task.load("weekdays").answers
    tokenizer = tiny.byte_level([f"{label} {day}\n" for day in days] * 3, merges=60)
    network = tiny.llama(len(tokenizer), dtype=torch.float32, spread=0.1).requires_grad_(True).train()
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(60):
            texts = ["".join(f"{label} {days[i]}\n" for i in rng.integers(0, 7, 5)) for _ in range(4)]
            rows = [tokenizer(text)["input_ids"] for text in texts]
            ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
            loss = network(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.txt"
    path.write_text(GRID)
    return path


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A task file of ours: beginnings of days, without an end, one prompt."""
    path = tmp_path / "parts.yaml"
    path.write_text("name: parts\nform: completion\nprompt: 'Random day of the week:'\nends: []\nanswers: {list: [Sun, M, T]}")
    return path


class Links(html.parser.HTMLParser):
    """Everything a page would fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_frontier_from_end_to_end(run: Run, model: Path, grid: Path, parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    arguments = ["frontier", "--model", model, "--grid", grid, "--out", out, "--draws", 3, "--floor", 0.05]
    result = run(*arguments, "--task", "weekdays", "--task", parts)
    assert result.code == 0, result.err
    names = {
        "results.json",
        "settings.parquet",
        "ranking.png",
        "frontiers.png",
        "frontier-weekdays.png",
        "frontier-parts.png",
        "report.html",
    }
    assert {path.name for path in out.iterdir()} == names
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 5000
    assert f"the one to open is {out / 'report.html'}" in result.out

    summary = json.loads((out / "results.json").read_text())
    table = pd.read_parquet(out / "settings.parquet")
    assert summary["floors"] == [0.05, 0.5, 0.8, 0.9]
    assert summary["decal"] == decal.__version__
    assert summary["model"]["name"] == str(model)
    assert [(t["name"], t["answers"], t["prompts"]) for t in summary["tasks"]] == [("weekdays", 7, 3), ("parts", 3, 1)]
    compared = 0
    for told in summary["tasks"]:
        mine = table[table.task == told["name"]]
        assert sorted(mine.prompt.unique()) == list(range(told["prompts"]))
        assert not mine.duplicated(["family", "setting", "prompt"]).any()
        assert mine.validity.between(0, 1 + 1e-9).all()
        assert mine.diversity.dropna().between(1 / told["answers"] - 1e-9, 1 + 1e-9).all()
        means = mine.groupby(["family", "setting"], sort=False)[["validity", "diversity"]].mean()
        assert set(told["best"]) == set(mine.family)
        assert set(ORACLES) <= set(mine.family)
        for family, best in told["best"].items():
            rows = means.loc[family]
            assert told["settings_tried"][family] == len(rows)
            for floor, entry in zip(summary["floors"], best, strict=True):
                reached = rows[(rows.validity >= floor - 1e-9) & rows.diversity.notna()]
                if entry is None:
                    assert reached.empty
                    continue
                compared += 1
                assert entry["diversity"] == pytest.approx(reached.diversity.max(), abs=1e-12)
                assert entry["validity"] == pytest.approx(rows.loc[entry["setting"]].validity, abs=1e-12)
                assert entry["diversity"] == pytest.approx(rows.loc[entry["setting"]].diversity, abs=1e-12)
                if told["prompts"] > 1:
                    assert 0 <= entry["low"] <= entry["diversity"] <= entry["high"] + 1e-12 <= 1 + 1e-12
                else:
                    assert entry["low"] is None
        for floor, bound in zip(summary["floors"], told["bound_on_rank_cutoffs"], strict=True):
            cutoffs = means.loc[["temperature", "top_p", "min_p", *ORACLES[:2]]]
            reached = cutoffs[(cutoffs.validity >= floor) & cutoffs.diversity.notna()]
            assert reached.empty or reached.diversity.max() <= bound + 1e-9
        perfect = told["best"][ORACLES[3]][-1]
        assert perfect["validity"] == pytest.approx(1)
        assert perfect["diversity"] == pytest.approx(1)
        assert told["best"][ORACLES[2]][-1]["validity"] == pytest.approx(1)
    assert compared > 30
    assert summary["tasks"][0]["best"]["top_p"][0] is not None, "the model says nothing valid"

    page = (out / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert [link.split(",")[0] for link in links.found] == ["#ranking", "#weekdays", "#parts", "data:image/png;base64"]
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page)
    assert not re.search(r"<(link|iframe|object|embed)\b", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    for told in summary["tasks"]:
        for line in told["headlines"]:
            assert line in "".join(links.text)
    ranked = summary["rankings"][0]
    assert ranked["floor"] == 0.05
    assert {p["family"] for p in ranked["places"]} == {"greedy", "temperature", "min_p", "top_p", "typical"}
    for place in ranked["places"]:
        best = [told["best"][place["family"]][0] for told in summary["tasks"]]
        assert place["score"]["value"] == pytest.approx(np.mean([b["diversity"] if b else 0 for b in best]))
    assert ranked["headline"] in "".join(links.text)
    assert ranked["headline"] in " ".join(result.out.split())
    for told, heading in zip(summary["tasks"], ("weekdays: 7 answers", "parts: 3 answers"), strict=True):
        assert heading in result.out
        assert told["headlines"][0] in " ".join(result.out.split())

    again = run(*arguments, "--task", "weekdays", "--task", parts, "--no-cache")
    assert again.code == 0
    pd.testing.assert_frame_equal(pd.read_parquet(out / "settings.parquet"), table)
    other_seed = run(*arguments, "--task", "weekdays", "--seed", 1)
    assert other_seed.code == 0
    fresh = pd.read_parquet(out / "settings.parquet")
    assert not np.allclose(fresh.validity, table[table.task == "weekdays"].validity)


def test_settings_are_those_of_the_chains(run: Run, model: Path, parts: Path, tmp_path: Path) -> None:
    """One number of the table, by hand: greedy and a plain temperature on the task without ends."""
    grid = tmp_path / "grid.txt"
    grid.write_text("top_k(2)\n")
    assert run("frontier", "--model", model, "--grid", grid, "--task", parts, "--out", tmp_path / "out").code == 0
    table = pd.read_parquet(tmp_path / "out" / "settings.parquet").set_index("setting")
    loaded = models.load(str(model), progress=False)
    encode = lambda text: loaded.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt = encode("Random day of the week:")
    for setting, steps in {"temperature(1.4)": [("temperature", 1.4)], "top_k(2)": [("top_k", 2)]}.items():
        mass = []
        for answer in ("Sun", "M", "T"):
            tokens, p = encode(f" {answer}"), 1.0
            for i, token in enumerate(tokens):
                with torch.inference_mode():
                    row = loaded.model(input_ids=torch.tensor([[*prompt, *tokens[:i]]])).logits[0, -1]
                p *= tiny.sample_law(row.double().numpy(), steps)[token]
            mass.append(p)
        assert table.loc[setting].validity == pytest.approx(sum(mass), rel=1e-4, abs=1e-12)
        if sum(mass):
            entropy = -sum(p / sum(mass) * math.log(p / sum(mass)) for p in mass if p)
            assert table.loc[setting].diversity == pytest.approx(math.exp(entropy) / 3, rel=1e-3)


def test_a_grid_in_which_nothing_reaches_the_floor(run: Run, model: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.txt"
    grid.write_text("temperature(50)\n")
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nform: completion\nprompt: 'Say:'\nanswers: {list: [qqqqq, xyzzy]}")
    result = run("frontier", "--model", model, "--grid", grid, "--task", own, "--out", tmp_path / "out", "--floor", 1)
    assert result.code == 0, result.err
    assert "No setting reaches validity 1." in result.out
    assert "not reached" in result.out


def test_explain(run: Run) -> None:
    result = run("explain", "temperature(1.4) | min_p(0.1)")
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == "temperature(1.4) | min_p(0.1)"
    assert any("pass 1" in line for line in lines)
    assert any("backend:" in line for line in lines)


def test_models(run: Run) -> None:
    result = run("models")
    assert result.code == 0
    assert result.err == ""
    for name, model in models.BUILTIN.items():
        (line,) = [line for line in result.out.splitlines() if line.split()[:1] == [name]]
        assert model.licence in line
        assert line.split()[-1] == "no", "the cache is empty"


def test_tasks(run: Run) -> None:
    result = run("tasks")
    assert result.code == 0
    sizes = {line.split()[0]: line.split()[1] for line in result.out.splitlines() if line.split()[:1] and line[:1] != "-"}
    for name in task.builtin_names():
        assert sizes[name] == str(task.load(name).valid.size)


def test_version_and_help(run: Run) -> None:
    assert run("--version") == Result(0, f"decal, version {decal.__version__}\n", "")
    for arguments in (["--help"], ["frontier", "--help"], []):
        result = run(*arguments)
        assert result.code == 0
        assert "Usage: " in result.out


def assert_refused(result: Result, message: str) -> None:
    """One line that says it, code 2, nothing else."""
    assert result.code == 2, result
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("decal: ")
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "temperatur(1)"], "unknown rule 'temperatur'; did you mean temperature?"),
        (["explain", "min_p(q=1)"], "min_p has no parameter 'q'"),
        (["explain", "min_p(2)"], "min_p: p must be in [0, 1]"),
        (["explain", "temperature(-1)"], "temperature: t must be in [0, inf)"),
        (["explain", "temperature(nan)"], "got nan"),
        (["explain", "top_k(2.5)"], "top_k: k must be an integer"),
        (["explain", "min_p(0.1"], "a chain is written rule(value) | rule(value)"),
        (["explain", ""], "a chain is written rule(value) | rule(value)"),
        (["explain"], "Missing argument 'CHAIN'"),
        (["explane"], "No such command 'explane'"),
        (["frontier", "--flor", "1"], "No such option"),
        (["frontier", "--floor", "high"], "'high' is not a valid float"),
        (["frontier", "extra"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_refused_in_one_line(arguments: list[str], message: str, run: Run) -> None:
    assert_refused(run(*arguments), message)


def test_progress_is_lines_where_nobody_sees_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from decal.eval.commands import _progress

    with _progress(1) as (report_to, task_done):
        for what, done in (("t 1/2: reading", 0), ("t 1/2: reading", 5), ("t 2/2: reading", 0)):
            report_to(what, done, 9)
        task_done()
    lines = [line for line in capsys.readouterr().err.splitlines() if "reading" in line]
    assert [line.split(" ", 1)[1] for line in lines] == ["t 1/2: reading", "t 2/2: reading"]


BAD_TASKS = {
    "typo": ("name: t\nlable: x\nanswers: {list: [a]}\n", "task.yaml:2: unknown key 'lable'"),
    "no YAML": ("name: [t\n", "task.yaml:2: not YAML"),
    "empty": ("", "task.yaml:1: a task file holds keys and values"),
    "infinite": ("name: t\nlabel: x\nanswers: {regex: 'a+'}\n", "task.yaml:3: answers: the valid set is infinite"),
    "too many": ("name: t\nlabel: x\nanswers: {digits: {n: 6}}\n", "1000000 answers"),
    "an end in an answer": (
        'name: t\nlabel: x\nanswers: {list: ["a\\nb", c, d, e]}\n',
        "ends an answer, but an answer contains it",
    ),
    "no end": ("name: t\nlabel: x\nends: []\nanswers: {list: [a, ab, c, d]}\n", "without an end"),
    "an unknown end": (
        "name: t\nlabel: x\nends: ['\u2603\u2603']\nanswers: {list: [a, b, c, d]}\n",
        "no token of this model ends",
    ),
    "shots": ("name: t\nlabel: x\nanswers: {list: [a, b]}\n", "4 exemplars can't be drawn from 2 answers"),
    "self": ("name: t\nlabel: &a [*a]\nanswers: {list: [a]}\n", "task.yaml:2"),
    "list as key": ("? [a, b]\n: 1\n", "task.yaml:1"),
}


def assert_left_alone(out: Path) -> None:
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("name", BAD_TASKS)
def test_bad_tasks_are_refused_before_anything_is_written(name: str, run: Run, model: Path, grid: Path, tmp_path: Path) -> None:
    text, message = BAD_TASKS[name]
    file, out = tmp_path / "task.yaml", tmp_path / "out"
    file.write_text(text, encoding="utf-8")
    # A good task before it, which must not be run either.
    assert_refused(
        run("frontier", "--model", model, "--grid", grid, "--out", out, "--task", "weekdays", "--task", file), message
    )
    assert_left_alone(out)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--floor", "2"], "--floor must be in (0, 1], got 2"),
        (["--floor", "0"], "--floor must be in (0, 1], got 0"),
        (["--floor", "nan"], "--floor must be in (0, 1], got nan"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--task", "weekday"], "unknown task 'weekday'; did you mean weekdays?"),
        (["--task", "weekdays", "--task", "weekdays"], "every task needs a name of its own"),
        (["--grid", "quik"], "unknown grid 'quik'"),
        (["--draws", "0"], "Invalid value for '--draws': 0 is not in the range 1<=x<=1000"),
        (["--form", "poem"], "Invalid value for '--form': 'poem' is not one of"),
        (["--form", "chat"], "form chat needs a chat template, which this model lacks; use few_shot"),
        (["--form", "prefix"], "form prefix needs a chat template"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
        (["--device", "toaster"], "device must be cpu, cuda"),
        (["--device", "cuda:99"], "'cuda:99' is not available"),
        (["--model", "smolm2"], "did you mean 'smollm2'?"),
        (["--model", "smollm2"], "not in the cache and DECAL_OFFLINE forbids"),
        (["--model", "/no/such/folder"], "no model '/no/such/folder'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_are_refused_before_anything_is_written(
    arguments: list[str], message: str, run: Run, model: Path, grid: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = {"--model": model, "--grid": grid, "--out": out, "--task": "weekdays"}
    rest = [word for option, value in given.items() if option not in arguments for word in (option, value)]
    assert_refused(run("frontier", *arguments, *rest), message)
    assert_left_alone(out)


def test_a_bad_line_of_a_grid(run: Run, model: Path, grid: Path, tmp_path: Path) -> None:
    grid.write_text(GRID + "min_p(7)\n")
    result = run("frontier", "--model", model, "--grid", grid, "--out", tmp_path / "out")
    assert_refused(result, f"{grid}:4: min_p: p must be in [0, 1]")
    assert_left_alone(tmp_path / "out")


def test_a_smaller_model(run: Run, model: Path, parts: Path, grid: Path, tmp_path: Path) -> None:
    """The model itself is one: at strength 1 nothing is left of what it prefers."""
    grid.write_text('temperature(2)\ncontrast(1, against="smaller")\n')
    asked = "frontier", "--model", model, "--task", parts, "--grid", grid, "--out", tmp_path / "out"
    result = run(*asked, "--smaller", model)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["smaller"]["fingerprint"] == found["model"]["fingerprint"]
    assert_refused(run(*asked), "some setting of the grid reads a smaller model; say which with --smaller")
    grid.write_text("temperature(2)\n")
    assert_refused(run(*asked, "--smaller", model), "no setting reads a smaller model; in a --grid file")


def test_a_tokenizer_that_can_not_write_the_answers(run: Run, model: Path, grid: Path, tmp_path: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out = tmp_path / "lower", tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    result = run("frontier", "--model", folder, "--grid", grid, "--out", out, "--task", "weekdays")
    assert_refused(result, "the tokenizer can't write ' Monday'; its tokens give ' monday'")
    assert_left_alone(out)


def test_a_file_where_the_folder_should_be(run: Run, model: Path, grid: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    arguments = ["frontier", "--model", model, "--grid", grid, "--task", "weekdays", "--out"]
    assert_refused(run(*arguments, file), f"--out must be a folder, {file} is a file")
    assert_refused(run(*arguments, file / "below"), f"cannot write in {file / 'below'}")
    assert file.read_text() == "precious"


def test_a_refused_request_leaves_earlier_results_alone(run: Run, model: Path, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("earlier")
    arguments = ["frontier", "--model", model, "--grid", grid, "--out", out, "--task", "weekdays", "--form", "chat"]
    assert_refused(run(*arguments), "needs a chat template")
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert (out / "results.json").read_text() == "earlier"


def test_a_run_that_fails_half_way_writes_nothing(
    run: Run, model: Path, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from decal.eval import frontier

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(frontier.oracle, "count_flow", fail)
    result = run("frontier", "--model", model, "--grid", grid, "--out", tmp_path / "out", "--task", "weekdays", "--draws", 1)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "decal: interrupted; what was computed is kept and used by the next run"
    assert_left_alone(tmp_path / "out")
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1


def test_the_installed_command() -> None:
    command = [sys.executable, "-c", "from decal.eval.cli import main; main()", "explain", "epsilom(0.9)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(Result(done.returncode, done.stdout, done.stderr), "unknown rule 'epsilom'; did you mean epsilon?")


# ---- verify


def test_verify_asks_an_engine(run: Run, model: Path, tmp_path: Path):
    out = tmp_path / "report.json"
    asked = ["verify", "--engine", "transformers", "--model", model, "--generations", 4, "--length", 2, "--draws", 20]
    done = run(*asked, "--chain", "temperature(1.5) | top_k(9)", "--chain", "mirostat(2.0)", "--prompt", "Day:", "--out", out)
    assert done.code == 0, done.err
    assert done.out.count("ok  ") == 2
    report = json.loads(out.read_text())
    assert report["ok"]
    assert [finding["steps"] > 0 and finding["seeded"] > 0 for finding in report["findings"]] == [True, True]


def test_verify_ends_with_1_where_an_engine_interferes(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch):
    from decal.samplers import generate

    monkeypatch.setitem(generate.NEUTRAL, "top_k", 3)  # left over
    asked = ["verify", "--engine", "transformers", "--model", model, "--generations", 9, "--draws", 0, "--prompt", "Day:"]
    done = run(*asked, "--chain", "temperature(2)")
    assert done.code == 1
    assert "a further cut beside the chain: top_k(3)" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm"], "the package vllm, which isn't installed here"),
        (["--engine", "mlx_lm"], "the package mlx_lm, which isn't installed here"),
        (["--engine", "transformers", "--url", "http://localhost:1"], "transformers is no server to connect to"),
        (["--engine", "vllm", "--url", "http://localhost:1"], "http://localhost:1/v1/models could not be asked"),
        (["--engine", "llama_cpp", "--url", "http://localhost:1"], "http://localhost:1/props could not be asked"),
        (["--engine", "vllm", "--url", "localhost:1"], "--url must begin with http://"),
        (["--engine", "llama_cpp", "--url", "http://localhost:1/v1"], "http://localhost:1/props could not be asked"),
        (["--engine", "transformers", "--set", "foo"], "--set takes name=value"),
        (["--engine", "transformers", "--set", "foo=3"], "transformers refuses"),
        (["--engine", "transformers", "--set", "batching=paged"], "batching must be generate or continuous, got 'paged'"),
        (["--engine", "transformers", "--out", "."], "--out must be a file"),
        (["--engine", "transformers", "--chain", "top_w(1)"], "reads the model's embeddings"),
        (["--engine", "transformers", "--chain", "guided(1)", "--answer", ""], "answer 1 must be a non-empty string"),
        (["--engine", "transformers", "--chain", "min_p(7)"], "p must be in"),
    ],
)
def test_verify_refuses_in_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    find = importlib.util.find_spec
    absent = ("vllm", "mlx_lm")  # though they may be here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    done = run("verify", "--chain", "min_p(0.1)", *([] if "--url" in arguments else ["--model", model]), *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().splitlines()[-1].startswith("decal: ")
    assert "Traceback" not in done.err
    assert "decal: decal:" not in done.err
