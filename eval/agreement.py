"""How far a judge agrees with people: Krippendorff's alpha, and the judge as a classifier of what they say.

Intervals come from resampling the labelled completions. Completions of one prompt resemble each other, so with few prompts they
are too narrow.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from decal.eval.frontier import LEVEL
from decal.eval.ranking import Estimate
from decal.samplers.errors import DecalError

RESAMPLES = 5000
PEOPLE = "people"
"""What stands for all raters together where they are compared with one another."""


class Item(NamedTuple):
    """What is judged."""

    prompt: str
    completion: str


Verdicts = Mapping[str, Mapping[Item, bool | None]]
"""By rater or judge, what each says of the items; None for no verdict."""


def load(path: Path, who: str) -> Verdicts:
    """The verdicts in a file of one JSON object a line: ``prompt``, ``completion``, ``valid`` (true, false or null), and under
    ``who`` the name of the one who says so; a line without a name is by the rater "".

    Raises:
        DecalError: the file can't be read, a line is something else, or one rater speaks twice of an item.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DecalError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    found: dict[str, dict[Item, bool | None]] = defaultdict(dict)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, item, valid = _record(line, who, f"{path}:{number}")
        if item in found[name]:
            raise DecalError(f"{path}:{number}: {who} {name!r} has already spoken of this completion")
        found[name][item] = valid
    if not found:
        raise DecalError(f"{path} has no lines")
    return dict(found)


def _record(line: str, who: str, where: str) -> tuple[str, Item, bool | None]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DecalError(f"{where}: not JSON") from None
    if not isinstance(record, dict):
        raise DecalError(f"{where}: must be an object")
    texts = [record.get("prompt"), record.get("completion"), record.get(who, "")]
    for name, text in zip(("prompt", "completion", who), texts, strict=True):
        if not isinstance(text, str):
            raise DecalError(f"{where}: {name} must be a text, got {text!r}")
    if "valid" not in record or not isinstance(record["valid"], (bool, type(None))):
        raise DecalError(f"{where}: valid must be true, false or null, got {record.get('valid')!r}")
    return texts[2], Item(texts[0], texts[1]), record["valid"]


@dataclass(frozen=True)
class Agreement:
    """A judge beside people. Numbers without a meaning, such as precision where the judge calls nothing valid, are NaN.

    Attributes:
        judge: its identity.
        items: completions with a label and a verdict; the numbers are over these.
        silent: labelled completions of which the judge gives no verdict.
        missing: labelled completions that the judge was not given.
        tied: completions of which as many people say yes as no; they count for alpha only.
        table: ``table[label][verdict]``, how many completions; 0 is invalid, 1 valid. The label is what most people say.
        alpha: Krippendorff's, of all people and the judge, each alike; 1 is agreement, 0 chance.
        accuracy, precision, recall, f1: of the judge, where valid is positive.
    """

    judge: str
    items: int
    silent: int
    missing: int
    tied: int
    table: tuple[tuple[int, int], tuple[int, int]]
    alpha: Estimate
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate


def agreement(labels: Verdicts, judged: Verdicts, seed: int = 0) -> list[Agreement]:
    """One for each judge that has a verdict on something labelled.

    Raises:
        DecalError: there is no such judge.
    """
    votes = _votes(labels)
    found = [one for judge, verdicts in judged.items() if (one := _agreement(judge, verdicts, votes, seed)) is not None]
    if not found:
        raise DecalError("no labelled completion has a verdict; labels must have the prompt and completion of what was judged")
    return found


def between_people(labels: Verdicts, seed: int = 0) -> Estimate | None:
    """Krippendorff's alpha of the raters among themselves, which no judge can be expected to exceed; None for one rater."""
    counts = np.asarray([vote for vote in _votes(labels).values() if sum(vote) > 1])
    if not len(counts):
        return None
    kinds, many = np.unique(counts, axis=0, return_counts=True)
    return _estimate(alpha(kinds, many), [alpha(kinds, one) for one in _resamples(many, seed)])


def _votes(labels: Verdicts) -> dict[Item, tuple[int, int]]:
    """How many people say of an item that it is invalid, and valid."""
    votes: dict[Item, list[int]] = {}
    for verdicts in labels.values():
        for item, valid in verdicts.items():
            if valid is not None:
                votes.setdefault(item, [0, 0])[int(valid)] += 1
    return {item: (no, yes) for item, (no, yes) in votes.items()}


def _agreement(
    judge: str, verdicts: Mapping[Item, bool | None], votes: Mapping[Item, tuple[int, int]], seed: int
) -> Agreement | None:
    given = [(*vote, verdicts[item]) for item, vote in votes.items() if item in verdicts]
    rows = np.asarray([(no, yes, said) for no, yes, said in given if said is not None], dtype=np.int64)
    if not len(rows):
        return None
    # Items of one kind are alike, so a resample is how many there are of each.
    kinds, many = np.unique(rows, axis=0, return_counts=True)
    values = _numbers(kinds, many)
    drawn = [_numbers(kinds, one) for one in _resamples(many, seed)]
    estimates = {name: _estimate(value, [one[name] for one in drawn]) for name, value in values.items()}
    table = _table(kinds, many)
    return Agreement(
        judge=judge,
        items=len(rows),
        silent=len(given) - len(rows),
        missing=len(votes) - len(given),
        tied=len(rows) - int(table.sum()),
        table=((int(table[0, 0]), int(table[0, 1])), (int(table[1, 0]), int(table[1, 1]))),
        **estimates,
    )


def _resamples(many: np.ndarray, seed: int) -> np.ndarray:
    """(R, kinds) how many items of each kind are drawn, with replacement; none if there is only one item."""
    total = int(many.sum())
    return np.random.default_rng(seed).multinomial(total, many / total, size=RESAMPLES if total > 1 else 0)


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    defined = [one for one in drawn if not math.isnan(one)]
    if not defined or math.isnan(value):
        return Estimate(value)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _table(kinds: np.ndarray, many: np.ndarray) -> np.ndarray:
    """(2, 2) how many items with each label, a majority, got each verdict."""
    table = np.zeros((2, 2), dtype=np.int64)
    label = np.sign(kinds[:, 1] - kinds[:, 0])
    known = label != 0
    np.add.at(table, ((label[known] > 0).astype(int), kinds[known, 2]), many[known])
    return table


def _numbers(kinds: np.ndarray, many: np.ndarray) -> dict[str, float]:
    (true_no, false_yes), (false_no, true_yes) = _table(kinds, many).tolist()
    said = np.eye(2, dtype=np.int64)[kinds[:, 2]]
    return {
        "alpha": alpha(kinds[:, :2] + said, many),
        "accuracy": _ratio(true_no + true_yes, true_no + true_yes + false_no + false_yes),
        "precision": _ratio(true_yes, true_yes + false_yes),
        "recall": _ratio(true_yes, true_yes + false_no),
        "f1": _ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def alpha(counts: Any, many: Any = None) -> float:
    """Krippendorff's alpha of nominal data (Content Analysis, 2004, chapter 11); NaN where all say the same of everything.

    Args:
        counts: (U, C) how many raters put each unit into each category; units with fewer than two ratings count for nothing.
        many: (U,) how many units there are of each; 1 by default.
    """
    table = np.asarray(counts, dtype=np.float64)
    times = np.ones(len(table)) if many is None else np.asarray(many, dtype=np.float64)
    ratings = table.sum(-1)
    table, times, ratings = (part[ratings > 1] for part in (table, times, ratings))
    category = times @ table
    total = category.sum()
    # Numbers of disagreeing pairs: within units, each pair weighted by 1 / (ratings - 1), and of any two ratings.
    within = (times * (ratings**2 - (table**2).sum(-1)) / (ratings - 1)).sum()
    any_two = total**2 - (category**2).sum()
    return float(1 - (total - 1) * within / any_two) if any_two else float("nan")


def shown(estimate: Estimate) -> str:
    """A number and its interval as text."""
    if math.isnan(estimate.value):
        return "–"
    interval = "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.3f}{interval}"


def lines(found: Agreement) -> list[tuple[str, str]]:
    """What there is to say of a judge, as (name, text)."""
    (true_no, false_yes), (false_no, true_yes) = found.table
    return [
        ("completions", f"{found.items} labelled and judged, {found.silent} without a verdict, {found.missing} not judged"),
        ("ties among labels", str(found.tied)),
        ("valid, judged valid / invalid", f"{true_yes} / {false_no}"),
        ("invalid, judged valid / invalid", f"{false_yes} / {true_no}"),
        ("Krippendorff's alpha", shown(found.alpha)),
        ("accuracy", shown(found.accuracy)),
        ("precision", shown(found.precision)),
        ("recall", shown(found.recall)),
        ("F1", shown(found.f1)),
    ]
