"""Agreement of a judge with people, against textbook examples, another library, and resampling item by item."""

from __future__ import annotations

import json
import math
from pathlib import Path

import krippendorff
import numpy as np
import pytest

from decal.eval import agreement
from decal.eval.agreement import Item
from decal.samplers.errors import DecalError


def counts(ratings: list[list[int | None]], categories: int) -> list[list[int]]:
    """How many raters put each unit into each category; ``ratings`` are one list for each rater."""
    return [[sum(r == c for r in unit) for c in range(categories)] for unit in zip(*ratings, strict=True)]


def test_alpha_of_textbook_examples() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011: sections A and C."""
    meg = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    owen = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    # By hand: 4 of 10 units disagree, o_01 = 4; n_0 = 14, n_1 = 6, so alpha = 1 - 19 * 4 / (14 * 6).
    assert agreement.alpha(counts([meg, owen], 2)) == pytest.approx(1 - 19 * 4 / (14 * 6))
    assert agreement.alpha(counts([meg, owen], 2)) == pytest.approx(0.095, abs=5e-4)
    x = None
    four = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    ]
    assert agreement.alpha(counts(four, 6)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_the_librarys() -> None:
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(300):
        units, categories = rng.integers(1, 12), rng.integers(2, 5)
        table = rng.integers(0, 4, (units, categories)) * (rng.random((units, categories)) < 0.6)
        many = rng.integers(1, 4, units)
        whole = np.repeat(table, many, axis=0)
        pairable = whole[whole.sum(-1) > 1]
        mine = agreement.alpha(table, many)
        if len(pairable) == 0 or (pairable.sum(0) > 0).sum() < 2:
            assert math.isnan(mine)
            continue
        assert mine == pytest.approx(krippendorff.alpha(value_counts=whole, level_of_measurement="nominal"), abs=1e-12)
        compared += 1
    assert compared > 200


def test_alpha_of_agreement_and_of_chance() -> None:
    assert agreement.alpha([[3, 0], [0, 3], [0, 2]]) == 1
    assert math.isnan(agreement.alpha([[3, 0], [2, 0]]))
    assert math.isnan(agreement.alpha([[1, 0], [0, 1]]))
    rng = np.random.default_rng(1)
    said = rng.integers(0, 2, (40_000, 2))
    assert abs(agreement.alpha(np.stack([(said == c).sum(-1) for c in (0, 1)], -1))) < 0.02


def random_case(seed: int) -> tuple[dict[str, dict[Item, bool | None]], dict[Item, bool | None]]:
    """Labels of three raters with gaps, and a judge that is mostly right."""
    rng = np.random.default_rng(seed)
    items = [Item(f"prompt {i % 3}", f"completion {i}") for i in range(60)]
    truth = {item: bool(rng.random() < 0.4) for item in items}

    def voice(right: float, silent: float, absent: float) -> dict[Item, bool | None]:
        said = {item: None if rng.random() < silent else truth[item] ^ (rng.random() > right) for item in items}
        return {item: valid for item, valid in said.items() if rng.random() > absent}

    return {name: voice(0.9, 0.1, 0.3) for name in ("a", "b", "c")}, voice(0.8, 0.1, 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_item_by_item(seed: int) -> None:
    labels, judge = random_case(seed)
    (found,) = agreement.agreement(labels, {"j": judge})
    rows: list[tuple[list[bool], bool]] = []
    silent = missing = 0
    for item in {item: None for said in labels.values() for item in said}:
        votes = [said[item] for said in labels.values() if said.get(item) is not None]
        if not votes:
            continue
        if item not in judge:
            missing += 1
        elif judge[item] is None:
            silent += 1
        else:
            rows.append(([bool(v) for v in votes], bool(judge[item])))
    assert (found.items, found.silent, found.missing) == (len(rows), silent, missing)

    def numbers(rows: list[tuple[list[bool], bool]]) -> dict[str, float]:
        pairs = [(2 * sum(v) > len(v), said) for v, said in rows if 2 * sum(v) != len(v)]
        hits = sum(label and said for label, said in pairs)
        matrix = [[(said, *votes)[r] if r <= len(votes) else np.nan for votes, said in rows] for r in range(4)]
        return {
            "accuracy": np.mean([label == said for label, said in pairs]),
            "precision": hits / sum(said for _, said in pairs),
            "recall": hits / sum(label for label, _ in pairs),
            "f1": 2 * hits / (sum(said for _, said in pairs) + sum(label for label, _ in pairs)),
            "alpha": krippendorff.alpha(np.asarray(matrix, dtype=float), level_of_measurement="nominal"),
        }

    assert found.tied == sum(2 * sum(v) == len(v) for v, _ in rows)
    assert sum(map(sum, found.table)) == len(rows) - found.tied
    for name, value in numbers(rows).items():
        assert getattr(found, name).value == pytest.approx(value), name
    rng = np.random.default_rng(99)
    drawn = [numbers([rows[i] for i in rng.integers(0, len(rows), len(rows))]) for _ in range(300)]
    for name in drawn[0]:
        low, high = np.quantile([one[name] for one in drawn], [0.025, 0.975])
        estimate = getattr(found, name)
        # The ends of an interval from 300 resamples are known to about a tenth of its width.
        assert estimate.low == pytest.approx(low, abs=0.2 * (high - low)), name
        assert estimate.high == pytest.approx(high, abs=0.2 * (high - low)), name


def test_people_alone() -> None:
    labels, _ = random_case(3)
    items = sorted({item for said in labels.values() for item in said})
    matrix = [[np.nan if said.get(item) is None else float(bool(said[item])) for item in items] for said in labels.values()]
    among = agreement.between_people(labels)
    assert among is not None
    assert among.value == pytest.approx(krippendorff.alpha(np.asarray(matrix), level_of_measurement="nominal"))
    assert among.low is not None
    assert among.high is not None
    assert among.low < among.value < among.high
    assert agreement.between_people({"a": labels["a"]}) is None


def test_a_judge_that_is_always_right_and_one_that_says_no() -> None:
    labels = {"a": {Item("p", str(i)): i % 2 == 0 for i in range(8)}}
    right, never = agreement.agreement(labels, {"right": labels["a"], "never": dict.fromkeys(labels["a"], False)})
    assert [getattr(right, name).value for name in ("alpha", "accuracy", "precision", "recall", "f1")] == [1.0] * 5
    assert (right.accuracy.low, right.accuracy.high) == (1, 1)
    assert never.accuracy.value == 0.5
    assert never.recall.value == 0
    assert math.isnan(never.precision.value)
    assert never.precision.low is None
    assert dict(agreement.lines(never))["precision"] == "–"
    assert never.table == ((4, 0), (4, 0))


def write(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_files(tmp_path: Path) -> None:
    told = {"prompt": "p", "completion": "ü\n", "valid": True}
    file = write(tmp_path / "a.jsonl", told | {"rater": "x"}, "", told | {"rater": "y", "valid": None, "more": 1}, told)
    item = Item("p", "ü\n")
    assert agreement.load(file, "rater") == {"x": {item: True}, "y": {item: None}, "": {item: True}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"', ":2: not JSON"),
        ("[1]", ":2: must be an object"),
        ("[" * 100_000, ":2: not JSON"),
        ({"completion": "c", "valid": True}, ":2: prompt must be a text, got None"),
        ({"prompt": "p", "completion": 3, "valid": True}, ":2: completion must be a text, got 3"),
        ({"prompt": "p", "completion": "c", "valid": True, "rater": 1}, ":2: rater must be a text, got 1"),
        ({"prompt": "p", "completion": "c", "valid": "yes"}, ":2: valid must be true, false or null, got 'yes'"),
        ({"prompt": "p", "completion": "c", "valid": 1}, ":2: valid must be true, false or null, got 1"),
        ({"prompt": "p", "completion": "c"}, ":2: valid must be true, false or null, got None"),
        ({"prompt": "p", "completion": "first", "valid": False}, ":2: rater '' has already spoken"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_lines(line: object, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "first", "valid": True}, line)
    with pytest.raises(DecalError) as error:
        agreement.load(file, "rater")
    assert f"{file}{message}" in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DecalError, match="can't read"):
        agreement.load(tmp_path / "none.jsonl", "rater")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DecalError, match="can't read"):
        agreement.load(tmp_path / "bytes.jsonl", "rater")
    with pytest.raises(DecalError, match="has no lines"):
        agreement.load(write(tmp_path / "empty.jsonl", "", " "), "rater")
    labels, judged = {"a": {Item("p", "x"): True}}, {"j": {Item("p", "y"): True}}
    with pytest.raises(DecalError, match="no labelled completion has a verdict"):
        agreement.agreement(labels, judged)
    with pytest.raises(DecalError, match="no labelled completion has a verdict"):
        agreement.agreement(labels, {"j": {Item("p", "x"): None}})


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from decal.eval import cli

    labels, judge = random_case(0)
    one = [
        {"prompt": i.prompt, "completion": i.completion, "valid": v, "rater": r}
        for r, said in labels.items()
        for i, v in said.items()
    ]
    two = [{"prompt": i.prompt, "completion": i.completion, "valid": v, "judge": "[j]", "key": "k"} for i, v in judge.items()]
    files = write(tmp_path / "labels.jsonl", *one), write(tmp_path / "judged.jsonl", *two)
    monkeypatch.setattr(sys, "argv", ["decal", "agreement", *map(str, files)])
    cli.main()
    out = capsys.readouterr().out
    (found,) = agreement.agreement(labels, {"[j]": judge})
    assert out.startswith("[j]\n")
    for name, text in agreement.lines(found):
        assert name in out
        assert text in out
    assert "of the people alone" in out
