"""Evaluate baselines and methods on every task, exactly, as README.md in this folder says; ``report.py`` makes the page.

    python benchmarks/calibration/run.py --model smollm2 --out results/smollm2

One file for each task, and ``about.json`` beside them. A second run goes on where the first stopped, and adds the families
that a file lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd
from rich.progress import track

from decal.eval import calibrate, grid, models, task
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.eval.paths import atomic_write
from decal.eval.task import Question
from decal.samplers.chain import Chain
from decal.samplers.rule import find

HERE = Path(__file__).parent
BASELINES = ("temperature", "top_k", "top_p", "min_p", "top_n_sigma", "typical", "eta", "p_less", "min_k", "top_h")
ROW_ONLY = (
    "min_validity",
    "risk_budget",
    "conformal_nucleus",
    "calibrated_top_k",
    "min_validity | flatten",
    "min_p | flatten",
    "min_p | target_entropy",
    "min_p | adapt",
    "min_p | split_temperature",
)
READ = (
    "ensemble | temperature",
    "ensemble | min_p",
    "ensemble, least | min_p",
    "ensemble | top_p",
    "ensemble | top_k",
    "ensemble | top_n_sigma",
    "ensemble | min_p | flatten",
    "ensemble | min_p | adapt",
    "ensemble | min_p | split_temperature",
    "min_p | contrast",
    "ensemble | min_p | contrast",
)
RISK = ("min_validity", "risk_budget")
"""Rules whose risk is controlled."""
FEATURES = ("gap", "entropy")
"""What the validity estimate reads."""
CUTS, STRENGTHS = (0.005, 0.7), (0.1, 1.0)
"""Values of `min_p` and of `flatten` that settings are drawn from."""
MASK = f"{grid.ORACLE}validity mask"
SCALES = [1 / 0.6, 1 / 0.8, 1.0, 1 / 1.4, 1 / 2, 1 / 3, 0.0]
"""Of the logits, for oracles: the temperatures of the grid ``quick``, and uniform."""
CONTRASTS = (0.2, 0.4, 0.7)
FITS = 4
"""Halves of the tasks that the estimate is fitted on, to control its risk on other tasks."""
DRAWS = 3
Samples = dict[str, list[calibrate.Sample]]


def group_of(name: str) -> str:
    """Tasks that are siblings share a name."""
    groups: dict[str, list[str]] = json.loads((HERE / "groups.json").read_text())
    return next((group for group, members in groups.items() if name in members), name)


class Named(NamedTuple):
    """A setting, and what it is called on every task, as what is fitted differs."""

    family: str
    name: str
    chain: Chain


def settings(some: Sequence[calibrate.Sample], methods: bool) -> Iterator[Named]:
    """Baselines as in the grid ``quick``; with ``methods`` those too, as fitted on some samples: 66 settings of each."""
    quick = [s for s in grid.load("quick") if s.family in BASELINES or (methods and s.family in ROW_ONLY)]
    if not methods:
        yield from (Named(s.family, str(s.chain), s.chain) for s in quick)
        return
    weights = calibrate.fit(some, FEATURES)
    for family, chain in [*((s.family, s.chain) for s in (*quick, *reading())), *flattened()]:
        yield Named(family, str(chain), calibrate.with_weights(chain, weights))
    for number, s in enumerate(calibrate.tabled(some, grid.BUDGET, 0)):
        yield Named(s.family, f"setting {number % grid.BUDGET}", s.chain)


def reading() -> list[Setting]:
    """Settings that read the other prompts of a task."""
    found = [s for s in grid.drawn(grid.BUDGET, prompts=True, rules=grid.READ) if s.family.startswith("ensemble")]
    least = find("ensemble")(0.67, "least")
    mean = find("ensemble")(2 / 3)  # of three, each counting alike
    heat, flatten = find("temperature"), find("flatten")
    found += [Setting("ensemble | temperature", mean | heat(t)) for t in grid.FINE]
    for p, t in grid.points(CUTS, grid.RANGE, count=grid.BUDGET, seed=0):
        found.append(Setting("ensemble, least | min_p", least | find("min_p")(p) | heat(t)))
    for p, strength in grid.points(CUTS, STRENGTHS, count=grid.BUDGET, seed=0):
        found.append(Setting("ensemble | min_p | flatten", mean | find("min_p")(p) | flatten(strength)))
    for number, (p, t) in enumerate(grid.points(CUTS, grid.RANGE, count=grid.BUDGET, seed=0)):
        # Few strengths, as rows are written anew for each.
        against = find("min_p")(p) | find("contrast")(CONTRASTS[number % len(CONTRASTS)]) | heat(t)
        found += [Setting("min_p | contrast", against), Setting("ensemble | min_p | contrast", mean | against)]
    return found


def flattened() -> Iterator[tuple[str, Chain]]:
    """The calibrated cut, and flattening behind it."""
    for level, strength in grid.points((0.05, 0.7), STRENGTHS, count=grid.BUDGET, seed=0):
        yield "min_validity | flatten", find("min_validity")(level) | find("flatten")(strength)


def careful(samples: Samples) -> Iterator[tuple[list[str], list[Named]]]:
    """Halves of the tasks, and ever more careful chains of each of `RISK` as fitted on them."""
    for number in range(FITS):
        half = calibrate.folds(len(samples), 2, number)
        told = [name for name, fold in zip(samples, half, strict=True) if fold == 0]
        weights = calibrate.fit([one for name in told for one in samples[name]], FEATURES)
        values = {"min_validity": calibrate.LEVELS, "risk_budget": calibrate.RISKS}
        chains = [
            Named(f"risk of {rule}, fit {number}", f"{value:g}", find(rule)(value, **weights))
            for rule in RISK
            for value in values[rule]
        ]
        yield told, chains


def affordable(evaluation: Evaluation, question: Question, most: int) -> bool:
    """Whether a task has one spelling of each answer, and not too many prefixes."""
    if not question.policy.one_path_each or question.valid.size > most:
        return False
    return len(evaluation.builder.build(question.valid, question.policy)[0]) <= most


def without(samples: Samples, name: str) -> list[calibrate.Sample]:
    """Samples of the tasks that are no siblings of a task."""
    return [one for other, some in samples.items() if group_of(other) != group_of(name) for one in some]


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option("--most-prefixes", default=300, show_default=True)
@click.option("--shots", type=int, help="Exemplars in a prompt, for comparing with prompts that hold more; baselines only.")
@click.option("--families", help="Only these families, separated by commas.")
@click.option("--accept-licence", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(model: str, most_prefixes: int, shots: int | None, families: str | None, accept_licence: bool, out: Path) -> None:
    """Evaluate every setting on every task of a model."""
    loaded = models.load(model, accept_licence=accept_licence)
    plain = Evaluation(loaded, [Setting("temperature", find("temperature")(1.0))])
    questions, left = [], []
    for name in task.builtin_names():
        question = task.load(name, draws=DRAWS)
        if shots is not None:
            question = task.load(name, draws=DRAWS, shots=min(shots, question.valid.size))
        (questions if affordable(plain, question, most_prefixes) else left).append(question)
    questions.sort(key=lambda question: question.valid.size)
    samples: Samples = {}
    risk: list[tuple[list[str], list[Named]]] = []
    if shots is None:
        for question in track(questions, "Samples"):
            here: list[calibrate.Sample] = []
            plain.run(question, lambda _, trie, rows, here=here: here.append(calibrate.Sample.of(trie, rows)))
            samples[question.task.name] = here
        risk = list(careful(samples))
    about = {"left_out": [q.task.name for q in left], "fits": [told for told, _ in risk]}
    atomic_write(out / "about.json", json.dumps(about, indent=1))
    for question in track(questions, "Tasks"):
        name = question.task.name
        chosen = [*settings(without(samples, name), shots is None)]
        chosen += [one for told, chains in risk if name not in told for one in chains]
        chosen = [s for s in chosen if families is None or s.family in families.split(",")]
        file = out / f"{name}.parquet"
        known = pd.read_parquet(file) if file.exists() else pd.DataFrame({"family": []})
        missing = [s for s in chosen if s.family not in set(known["family"])]
        if missing:
            found = pd.concat([known, measured(loaded, question, missing)], ignore_index=True)
            atomic_write(file, found.drop_duplicates().to_parquet(index=False))


def measured(loaded: models.LoadedModel, question: Question, chosen: Sequence[Named]) -> pd.DataFrame:
    """A row for each setting and prompt, to six digits, and of the oracles for the validity mask."""
    job = Evaluation(loaded, [Setting(s.family, s.chain) for s in chosen], scales=SCALES)
    result = job.run(question)
    names = [s.name for s in chosen] + list(result.setting[len(chosen) :])
    prompts = result.validity.shape[1]
    found = pd.DataFrame(
        {
            "task": question.task.name,
            "answers": question.valid.size,
            "prefixes": result.nodes,
            "family": np.repeat(result.family, prompts),
            "setting": np.repeat(names, prompts),
            "prompt": np.tile(np.arange(prompts), len(names)),
            "validity": result.validity.ravel().round(6).astype(np.float32),
            "diversity": np.nan_to_num(result.diversity).ravel().round(6).astype(np.float32),
        }
    )
    return found[~found["family"].str.startswith(grid.ORACLE) | (found["family"] == MASK)]


if __name__ == "__main__":
    main()
