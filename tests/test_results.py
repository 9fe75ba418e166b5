"""Results on disk: computed once, for exactly what they are of, and whole after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import decal
from decal.eval import results
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.eval.models import LoadedModel
from decal.eval.task import Answers, Question, Task
from decal.samplers.valid_set import ValidSet

NAMES = ["ab", "abc", "b", "ba", "cab", "ccc"]


def question(draws: int = 2) -> Question:
    task = Task(name="t", label="x:", answers=Answers(list=NAMES), shots=2, draws=draws)
    return Question(task, ValidSet.from_list(NAMES))


def evaluation(*texts: str) -> Evaluation:
    tokenizer = tiny.byte_level()
    model = LoadedModel(tiny.llama(len(tokenizer)), tokenizer, "tiny", "fingerprint")
    return Evaluation(model, [Setting("f", decal.parse(text)) for text in texts])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECAL_CACHE", str(tmp_path / "cache"))


def test_a_second_run_evaluates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluation("min_p(0.1)", "temperature(2)").run(question())
    monkeypatch.setattr(Evaluation, "_outcome", lambda *args: pytest.fail("evaluated again"))
    again = evaluation("min_p(0.1)", "temperature(2)").run(question())
    for name in ("validity", "diversity", "slack", "bounds"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_oracles_at_other_scales_are_evaluated_anew() -> None:
    first = evaluation("min_p(0.1)").run(question())
    setting, more = evaluation("min_p(0.1)").settings, (2.0, 1.0, 0.0)
    again = Evaluation(evaluation().model, setting, scales=more).run(question())
    assert first.setting[-3:-1] == ["the valid tokens, temperature 1", "the valid tokens, uniform"]
    assert again.setting[-4:-1] == [f"the valid tokens, {shape}" for shape in ("temperature 0.5", "temperature 1", "uniform")]
    np.testing.assert_allclose(first.validity[-3:], again.validity[-3:])
    assert not np.allclose(again.diversity[-4], again.diversity[-3])


def test_whatever_differs_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {results.key([decal.parse(text)], rows="r") for text in ("min_p(0.1)", "min_p(0.2)", "top_p(0.1)")}
    names |= {results.key([decal.parse("min_p(0.1)")], rows="s"), results.key([], rows="r")}
    monkeypatch.setattr(results, "_own_code", lambda: ["other"])
    names.add(results.key([decal.parse("min_p(0.1)")], rows="r"))
    assert len(names) == 6


def test_a_rule_of_somebody_elses_code_is_told_by_that_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = results.key([decal.parse("min_p(0.1)")])
    monkeypatch.setattr(results, "_code", lambda file: "changed")
    assert results.key([decal.parse("min_p(0.1)")]) != before


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    made = []

    def compute() -> dict[str, np.ndarray]:
        made.append(1)
        return {"a": np.arange(3.0)}

    for _ in range(2):
        np.testing.assert_array_equal(results.load_or_compute("name", compute)["a"], np.arange(3.0))
    assert len(made) == 1
    (tmp_path / "cache" / "results" / "name.safetensors").write_bytes(b"half")
    np.testing.assert_array_equal(results.load_or_compute("name", compute)["a"], np.arange(3.0))
    assert len(made) == 2


def test_the_oldest_results_go_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "MOST", 3)
    for number in range(5):
        results.load_or_compute(str(number), lambda: {"a": np.zeros(1)})
        os.utime(tmp_path / "cache" / "results" / f"{number}.safetensors", (number, number))
    assert sorted(file.stem for file in (tmp_path / "cache" / "results").iterdir()) == ["2", "3", "4"]


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
import test_results
from decal.eval.frontier import Evaluation
whole = Evaluation._outcome
def told(*args):
    print("evaluating", flush=True)
    return whole(*args)
Evaluation._outcome = told
test_results.evaluation("min_p(0.1)", "temperature(2)").run(test_results.question(4))
print("done", flush=True)
"""


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as first:
        assert first.stdout is not None
        for _ in range(3):
            assert first.stdout.readline() == "evaluating\n"
        # Two prompts are finished; the third may be.
        first.send_signal(signal.SIGKILL)
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert again.stdout.splitlines()[-1] == "done"
    assert again.stdout.count("evaluating") <= 2
    last = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert last.stdout.splitlines() == ["done"]
