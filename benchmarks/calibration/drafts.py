"""Search for a chain by judged drafts of a prompt, simulated: drafts are drawn at the exact validity that ``run.py`` found.

What chains give on other tasks, without siblings, is the profile. Drafts are the only thing here that is drawn.

python benchmarks/calibration/drafts.py results/smollm2 --out results/drafts-smollm2.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from report import FLOORS, Runs

from decal.eval.paths import atomic_write
from decal.samplers.drafts import Chosen, Profile, Search

FAMILIES = (
    "temperature",
    "top_n_sigma",
    "min_p",
    "min_p | split_temperature",
    "ensemble | min_p",
    "ensemble | min_p | adapt",
    "ensemble | min_p | split_temperature",
)
BUDGETS = (0, 10, 20, 50, 100, 200)
EACH = 5
TIMES = 4


def profile(runs: Runs, settings: np.ndarray, task: int) -> Profile:
    """What settings give on tasks that are no siblings of a task."""
    siblings = next(group for group in runs.groups if task in group)
    others = [t for t in range(len(runs.tasks)) if t not in siblings]
    validity, diversity = (
        tuple(map(tuple, given[settings][:, others].reshape(len(settings), -1).clip(0, 1).tolist()))
        for given in (runs.validity, runs.diversity)
    )
    return Profile(tuple(map(str, runs.setting[settings])), validity, diversity)


def searched(prior: Profile, floor: float, validity: np.ndarray, rng: np.random.Generator) -> list[tuple[int, Chosen]]:
    """The setting chosen after each of `BUDGETS`, and what is said of it, on a prompt of this ``validity`` (S,)."""
    search = Search(prior, floor)
    found = []
    for budget in BUDGETS:
        while search.drafts < budget:
            asked = search.ask()
            search.tell(int(rng.binomial(EACH, min(1.0, validity[search.chains.index(asked)]))), EACH, asked)
        best = search.best()
        found.append((search.chains.index(best.chain), best))
    return found


def measured(runs: Runs, family: str, floor: float) -> dict[str, Any]:
    """Scores (T, D, TIMES, budgets); likewise chances, and whether they came true."""
    own = runs.of(family)
    scores, validity = runs.scores(floor)[own], runs.validity[own]
    table = np.zeros((3, *validity.shape[1:], TIMES, len(BUDGETS)))
    for task in range(validity.shape[1]):
        prior = profile(runs, own, task)
        for prompt in range(validity.shape[2]):
            for time in range(TIMES):
                rng = np.random.default_rng([task, prompt, time])
                for at, (chosen, said) in enumerate(searched(prior, floor, validity[:, task, prompt], rng)):
                    true = validity[chosen, task, prompt]
                    numbers = scores[chosen, task, prompt], said.chance, true >= floor - 1e-9
                    table[:, task, prompt, time, at] = numbers
    return {name: values.round(4).tolist() for name, values in zip(("score", "chance", "came"), table, strict=True)}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(folder: Path, out: Path) -> None:
    """Write what each family gives at each floor and number of drafts."""
    runs = Runs.read(folder)
    found = {}
    for family in FAMILIES:
        if len(runs.of(family)):
            found[family] = {f"{floor:g}": measured(runs, family, floor) for floor in FLOORS}
            print(family, flush=True)
    atomic_write(out, json.dumps({"model": runs.name, "tasks": runs.tasks, "budgets": BUDGETS, "families": found}))


if __name__ == "__main__":
    main()
