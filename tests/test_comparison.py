"""Runs side by side: the numbers are those of the runs, differences are paired, and what doesn't fit is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from decal import DecalError
from decal.eval import comparison
from decal.eval.commands import cli


def run_of(model: str, values: dict[str, float], **changes: Any) -> dict[str, Any]:
    """What `decal diagnose` would have written, every number of a task made from one."""

    def number(v: float) -> dict[str, Any]:
        return {"value": v, "low": None, "high": None}

    tasks = [
        {
            "name": name,
            "form": "few_shot",
            "prompts": 5,
            "answers": 7,
            "headline": f"{name} is limited",
            "as_it_is": {"validity": number(v), "diversity": number(v / 2)},
            "order": {"average_precision": number(v), "recall_at_08": number(v)},
            "divergence": {part: number(3 * v) for part in ("order", "tail", "shape", "total")},
            "gaps": [
                {
                    "size": v,
                    "cut": v / 2,
                    "order": number(v - f),
                    "shape": number(v),
                    "cutoff": {"min_p": number(v / 4), "top_p": number(v)},
                }
                for f in (0.5, 0.8)
            ],
        }
        for name, v in values.items()
    ]
    about = {"decal": "0", "created": "now", "grid": "quick", "seed": 0, "model": {"name": model, "note": ""}}
    return {"format": comparison.FORMAT, **about, "floors": [0.5, 0.8], "tasks": tasks} | changes


A = {"a": 0.9, "b": 0.5, "c": 0.7, "d": 0.2}
B = {"a": 0.8, "b": 0.6, "c": 0.4, "d": 0.1, "e": 0.3}


def test_means_and_paired_differences():
    found = comparison.compare([run_of("one", A), run_of("two", B)])
    assert found.tasks == ["a", "b", "c", "d"]
    assert found.left_out == ["e"]
    lines = {line.name: line for line in found.lines}
    a, b = np.asarray(list(A.values())), np.asarray(list(B.values())[:4])
    assert lines["validity"].means[0].value == pytest.approx(a.mean())
    assert lines["KL: shape"].means[1].value == pytest.approx(3 * b.mean())
    assert lines["order gap"].means[0].value == pytest.approx((a - 0.8).mean())
    assert lines["best sampler"].means[0].value == pytest.approx((a - a / 4).mean())
    difference = lines["validity"].differences[1]
    assert difference.value == pytest.approx((b - a).mean())
    # By hand: means of all resamples of the paired differences.
    every = np.asarray(np.meshgrid(*[b - a] * 4)).reshape(4, -1).mean(0)
    assert difference.low == pytest.approx(np.percentile(every, 2.5), abs=0.02)
    assert difference.high == pytest.approx(np.percentile(every, 97.5), abs=0.02)


def test_models_of_the_same_name_are_told_apart():
    assert comparison.compare([run_of("m", A), run_of("m", B)]).models == ["m (1)", "m (2)"]


def test_a_task_put_otherwise_is_left_out():
    other = run_of("two", A)
    other["tasks"][0]["form"] = "chat"
    assert comparison.compare([run_of("one", A), other]).left_out == ["a"]


def test_what_a_run_does_not_have_is_left_out_of_all():
    other = run_of("two", A)
    other["tasks"][1]["as_it_is"] = {}
    names = {line.name for line in comparison.compare([run_of("one", A), other]).lines}
    assert "validity" not in names
    assert "KL" in names


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run_of("one", A)], "at least two runs, got 1"),
        ([run_of("one", A), run_of("two", {"x": 0.1})], "no task in common"),
        ([run_of("one", A), run_of("two", A, floors=[0.5])], "two has no validity floor 0.8, only 0.5"),
        ([run_of("one", A), run_of("two", A, grid="all")], "need the same grid"),
        ([run_of("one", A), run_of("two", A, seed=1)], "need the same seed"),
    ],
)
def test_runs_that_do_not_go_together(runs, message):
    with pytest.raises(DecalError, match=message):
        comparison.compare(runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not what decal diagnose writes"),
        ('{"tasks": []}', "is not what decal diagnose writes"),
        (json.dumps(run_of("m", A, format=99)), "of format 99, this version of decal reads"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, message: str):
    (tmp_path / "diagnosis.json").write_text(text)
    with pytest.raises(DecalError, match=message):
        comparison.read(tmp_path)


def test_the_command(tmp_path: Path):
    for name, values in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diagnosis.json").write_text(json.dumps(run_of(f"<{name}>", values)))
    arguments = ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert told["numbers"]["validity"]["<two>"]["tasks"] == [0.8, 0.6, 0.4, 0.1]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "&lt;one&gt;" in page
    assert "<one>" not in page
    assert "a is limited" in page
    with pytest.raises(DecalError, match="run decal diagnose first"):
        CliRunner().invoke(cli, ["report", str(tmp_path / "none"), str(tmp_path / "two")], catch_exceptions=False)
