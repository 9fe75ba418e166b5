"""The page docs/calibration.md, from what ``run.py`` left for each model.

python benchmarks/calibration/report.py results/smollm2 results/gemma3-270m --shots results/smollm2-12 --out docs
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np
import pandas as pd
from run import BASELINES, FITS, MASK, READ, RISK, ROW_ONLY, group_of

from decal.eval import calibrate
from decal.eval.paths import atomic_write

FLOORS = (0.5, 0.8, 0.9)
SPLIT, PROMPTS, FULL = "min_p | split_temperature", "ensemble | min_p", "ensemble | min_p | split_temperature"
ADAPT = "ensemble | min_p | adapt"
BEST = "the best baseline"
AGAINST = (
    ("min_validity", BEST),
    (SPLIT, BEST),
    (SPLIT, "min_p"),
    ("min_p | flatten", "min_p"),
    ("min_p | target_entropy", "min_p"),
    ("min_p | contrast", "min_p"),
    ("ensemble | temperature", BEST),
    (PROMPTS, BEST),
    (ADAPT, PROMPTS),
    (FULL, PROMPTS),
    ("ensemble | min_p | flatten", PROMPTS),
    ("ensemble | min_p | contrast", PROMPTS),
    ("ensemble, least | min_p", PROMPTS),
)
"""Families that are compared one with another."""
LEAST_GAP = 0.02
WORSE = 0.02
RESAMPLES = 2000
SPLITS = 200
DRAFTS = 50
CHANCES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Runs:
    """What one model gave; S settings, T tasks, D prompts, L levels of risk.

    Attributes:
        mask: (T, D) diversity of the validity mask at its best.
        about: of each task the number of answers and of prefixes.
        left_out: tasks that were too large.
        risk: (L, T) mean validity over prompts by rule and number of the fit, of ever more careful chains; NaN where the fit
            saw the task.
    """

    name: str
    tasks: list[str]
    family: np.ndarray
    setting: np.ndarray
    validity: np.ndarray
    diversity: np.ndarray
    mask: np.ndarray
    about: dict[str, tuple[int, int]]
    left_out: list[str]
    risk: dict[tuple[str, int], np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Runs:
        """From the files of a folder."""
        files = sorted(folder.glob("*.parquet"))
        if not files or not (folder / "about.json").exists():
            raise click.ClickException(f"{folder} holds no results of run.py: about.json and a file for each task")
        tasks = [file.stem for file in files]
        every = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        kinds = every["family"].str.partition(" ")[0]
        risky, masks = kinds == "risk", every["family"] == MASK
        wide = every[~risky & ~masks].pivot_table(
            index=["family", "setting"], columns=["task", "prompt"], values=["validity", "diversity"], sort=False
        )
        gaps = wide.isna().any(axis=1)
        if gaps.any():
            lacking = wide.columns[wide[gaps].isna().any(axis=0)].get_level_values("task")[0]
            raise click.ClickException(
                f"{folder}: {lacking} lacks {wide.index[gaps][0][0]}: finish run.py, with the same families"
            )

        def table(value: str) -> np.ndarray:
            return np.stack([wide[value][name].sort_index(axis=1).to_numpy() for name in tasks], 1).astype(np.float64)

        best = every[masks].groupby(["task", "prompt"])["diversity"].max().unstack()
        sizes = every.groupby("task")[["answers", "prefixes"]].first()
        return cls(
            folder.name,
            tasks,
            wide.index.get_level_values("family").to_numpy(),
            wide.index.get_level_values("setting").to_numpy(),
            table("validity"),
            table("diversity"),
            best.loc[tasks].to_numpy(dtype=np.float64),
            {name: (int(sizes.loc[name, "answers"]), int(sizes.loc[name, "prefixes"])) for name in tasks},
            json.loads((folder / "about.json").read_text())["left_out"],
            {
                (rule, number): _levels(every[every["family"] == f"risk of {rule}, fit {number}"], tasks)
                for rule, number in itertools.product(RISK, range(FITS if risky.any() else 0))
            },
        )

    @cached_property
    def groups(self) -> list[list[int]]:
        """Tasks that are siblings."""
        names = [group_of(task) for task in self.tasks]
        return [[i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]

    def of(self, *families: str) -> np.ndarray:
        """Numbers of the settings of some families."""
        return np.flatnonzero(np.isin(self.family, families))

    def scores(self, floor: float) -> np.ndarray:
        """(S, T, D) diversity where the floor is reached, else 0."""
        return np.where(self.validity >= floor - 1e-9, self.diversity, 0.0)


@dataclass(frozen=True)
class Told:
    """A contender at a floor: its scores (T, D) with the setting of other tasks, and with the best setting on the prompt."""

    transferred: np.ndarray
    without_siblings: np.ndarray
    best: np.ndarray

    @classmethod
    def of(cls, runs: Runs, floor: float, settings: np.ndarray) -> Told:
        """Of a contender with these settings."""
        scores = runs.scores(floor)[settings]
        tasks = np.arange(len(runs.tasks))
        alone, apart = (calibrate.left_out(scores.mean(-1), groups) for groups in (None, runs.groups))
        return cls(scores[alone, tasks], scores[apart, tasks], scores.max(0))


def median(values: np.ndarray, kept: np.ndarray, seed: int = 0) -> str:
    """Median over cases (T, D), with a bootstrap interval over tasks."""
    if not kept.any():
        return "–"
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(RESAMPLES, len(values)))
    found = [np.median(values[d][kept[d]]) for d in drawn if kept[d].any()]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{np.median(values[kept]):.2f} [{low:.2f}, {high:.2f}]"


def mean(values: np.ndarray, seed: int = 0) -> str:
    """Mean over tasks, with a bootstrap interval over tasks."""
    rng = np.random.default_rng(seed)
    own = values.mean(-1)
    found = own[rng.integers(len(own), size=(RESAMPLES, len(own)))].mean(-1)
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{own.mean():.3f} [{low:.2f}, {high:.2f}]"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def contenders(runs: Runs) -> dict[str, np.ndarray]:
    """By name, the settings of everything that is compared."""
    found = {f"row only: {family}": runs.of(family) for family in ROW_ONLY}
    found |= {f"{'full' if family == FULL else 'reads prompts'}: {family}": runs.of(family) for family in READ}
    found |= {"reads prompts: any of these": runs.of(*READ), "baselines and all of these": np.arange(len(runs.family))}
    return {name: settings for name, settings in found.items() if len(settings)}


def floor_table(runs: Runs, floor: float, *, siblings: bool = True) -> str:
    """Everything at a floor, where settings come from all other tasks, or from those that are no siblings."""

    def transferred(told: Told) -> np.ndarray:
        return told.transferred if siblings else told.without_siblings

    base = Told.of(runs, floor, runs.of(*BASELINES))
    ours = transferred(base)
    able = runs.scores(floor).max(0) > 0
    open_, both = (runs.mask - scores >= LEAST_GAP for scores in (ours, base.best))
    zeros = [f"{(scores == 0).mean():.0%}" for scores in (ours, base.best)]
    rows = [["best baseline", "1", mean(ours), "", zeros[0], "", "", "", mean(base.best), zeros[1], ""]]
    for name, settings in contenders(runs).items():
        one = Told.of(runs, floor, settings)
        own = transferred(one)
        closed = (own - ours) / np.where(open_, runs.mask - ours, 1.0)
        tuned = (one.best - base.best) / np.where(both, runs.mask - base.best, 1.0)
        rows.append(
            [
                name,
                str(max(map(rows_of, set(runs.family[settings])))),
                mean(own),
                mean(own - ours),
                f"{(own == 0).mean():.0%}",
                median(closed, open_),
                median(closed, open_ & able),
                f"{(own < (1 - WORSE) * ours).mean():.0%}",
                mean(one.best),
                f"{(one.best == 0).mean():.0%}",
                median(tuned, both),
            ]
        )
    headings = [
        "",
        "rows a token",
        "score, settings from other tasks",
        "gain",
        "of these 0",
        "gap closed, median",
        "where the floor can be reached",
        "more than 2 % worse",
        "score, best on the prompt",
        "of these 0",
        "gap closed, both best on the prompt",
    ]
    kept = slice(None) if siblings else slice(8)  # the best on a prompt is the same
    said = f"The mask is less than {LEAST_GAP:g} above the best baseline on {(~open_).sum()} of {open_.size} prompts"
    said += f", and above its best on {(~both).sum()}; these have no gap to close." if siblings else "."
    return f"{table(headings[kept], [row[kept] for row in rows])}\n\n{said}"


def headline(every: Sequence[Runs]) -> str:
    """The targets, and what they are of, for each model and floor."""
    rows = []
    for runs, floor in itertools.product(every, FLOORS):
        base, split, full, any_ = (Told.of(runs, floor, runs.of(*own)) for own in (BASELINES, (SPLIT,), (FULL,), READ))
        open_, both = (runs.mask - scores >= LEAST_GAP for scores in (base.transferred, base.best))
        row = [f"{runs.name}, {floor:g}", f"{base.transferred.mean():.3f}"]
        for one in (split, full):
            closed = (one.transferred - base.transferred) / np.where(open_, runs.mask - base.transferred, 1.0)
            row += [mean(one.transferred - base.transferred), median(closed, open_)]
            worse = one.transferred < (1 - WORSE) * base.transferred
            row += [f"{worse.mean():.0%} ({worse[(one.transferred > 0) | (base.transferred > 0)].mean():.0%})"]
        row += [f"{(full.without_siblings < (1 - WORSE) * base.without_siblings).mean():.0%}"]
        row += [
            mean(any_.transferred - base.transferred),
            mean(full.without_siblings - base.without_siblings),
            mean(full.best - base.best),
        ]
        row += [median((full.best - base.best) / np.where(both, runs.mask - base.best, 1.0), both)]
        rows.append(row)
    three = ("gain", "gap closed, median", "more than 2 % worse")
    headings = [
        "model, floor",
        "best baseline",
        *(f"{name}: {what}" for name in ("row only", "full") for what in three),
        "full: worse, without siblings",
        "any that reads prompts: gain",
        "full: gain without siblings",
        "full: gain, both best on the prompt",
        "gap closed",
    ]
    return table(headings, rows)


def against_table(runs: Runs) -> str:
    """What one family gains over another."""

    def told(family: str, floor: float) -> Told:
        return Told.of(runs, floor, runs.of(*(BASELINES if family == BEST else (family,))))

    rows = []
    for ours, theirs in AGAINST:
        pairs = [(told(ours, floor), told(theirs, floor)) for floor in FLOORS]
        gains = [(a.transferred - b.transferred, a.best - b.best) for a, b in pairs]
        rows.append([f"{ours}, over {theirs}", *(mean(gain) for how in zip(*gains, strict=True) for gain in how)])
    how = ("settings from other tasks", "best on the prompt")
    return table(["", *(f"{floor:g}, {which}" for which in how for floor in FLOORS)], rows)


def rows_of(family: str) -> int:
    """Rows of the model that a chain reads for a token."""
    return 1 + 2 * family.startswith("ensemble") + family.endswith("contrast")


def shown(runs: Runs) -> dict[str, tuple[str, ...]]:
    """By name, the families that are shown task by task: those that were run."""
    found = {"baseline": BASELINES, **{family: (family,) for family in (SPLIT, PROMPTS, ADAPT, FULL)}}
    return {name: families for name, families in found.items() if len(runs.of(*families))}


def task_table(runs: Runs, floor: float) -> str:
    """A line for each task."""
    told = {name: Told.of(runs, floor, runs.of(*families)) for name, families in shown(runs).items()}
    rows = []
    for t, task in enumerate(runs.tasks):
        cells = [scores[t].mean() for one in told.values() for scores in (one.transferred, one.best)]
        rows.append([task, str(runs.about[task][0]), *(f"{cell:.2f}" for cell in cells), f"{runs.mask[t].mean():.2f}"])
    two = [f"{name}, {how}" for name in told for how in ("from other tasks", "best here")]
    return table(["task", "answers", *two, "mask"], rows)


def _levels(found: pd.DataFrame, tasks: list[str]) -> np.ndarray:
    """(L, T) mean validity over prompts, in the order of the file."""
    means = found.groupby(["setting", "task"], sort=False)["validity"].mean().unstack()
    return means.reindex(index=found["setting"].unique(), columns=tasks).to_numpy(dtype=np.float64)


def risk_table(runs: Runs, seed: int = 0) -> str:
    """Realised invalidity of new tasks, where risk was controlled on others, and the estimate fitted on others still."""
    rng = np.random.default_rng(seed)
    rows = []
    for rule, epsilon in itertools.product(RISK, EPSILONS):
        given, every = [], []
        for split in range(SPLITS):
            validity = runs.risk[rule, split % FITS]
            loss = 1 - validity[:, ~np.isnan(validity).any(0)].T
            some = rng.permutation(len(loss))
            half = len(loss) // 2
            level = calibrate.conformal(loss[some[:half]], epsilon)
            every.append(0.0 if level is None else loss[some[half:], level].mean())
            given += [every[-1]] if level is not None else []
        got, whole = np.asarray(given), np.asarray(every)
        among = f"{got.mean():.3f}" if len(got) else "–"
        error = 2 * whole.std() / np.sqrt(SPLITS)
        cells = [f"{SPLITS - len(got)}", f"{whole.mean():.3f} ± {error:.3f}", among, f"{(whole > epsilon).mean():.0%}"]
        rows.append([rule, f"{epsilon:g}", *cells])
    headings = [
        "",
        "epsilon",
        f"refused, of {SPLITS}",
        "mean invalidity on new tasks, a refusal counting 0",
        "where it wasn't refused",
        "splits with more than epsilon there",
    ]
    return table(headings, rows)


def shots_table(few: Runs, many: Runs) -> str:
    """Baselines on prompts with more exemplars."""
    tasks = [t for t in few.tasks if t in many.tasks]
    if tasks != few.tasks or tasks != many.tasks:
        raise click.ClickException(f"{few.name} and {many.name} have other tasks")
    both = tuple(f for f in BASELINES if f in set(many.family))
    rows = []
    for floor in FLOORS:
        told = [
            Told.of(runs, floor, runs.of(*own)) for runs, own in ((few, both), (many, both), (few, (PROMPTS,)), (few, (FULL,)))
        ]
        for how in ("transferred", "best"):
            base, long, *reading = (getattr(one, how) for one in told)
            gains = [mean(one - long) for one in (base, *reading)]
            rows.append(
                [
                    f"{floor:g}, {'settings from other tasks' if how == 'transferred' else 'best on the prompt'}",
                    mean(long),
                    *gains,
                ]
            )
    headings = [
        "floor",
        "baselines, 12 exemplars",
        "baselines with 4, over that",
        f"{PROMPTS}, three prompts of 4, over that",
        f"{FULL}, likewise",
    ]
    said = f"On {len(tasks)} tasks with {few.name}, baselines {', '.join(both)}; smaller sets give all of their answers."
    return f"{said}\n\n{table(headings, rows)}"


def drafts_section(runs: Runs, file: Path) -> str:
    """What drafts.py found for a model: scores by the number of drafts, and how often chances come true."""
    found = json.loads(file.read_text())
    if found["model"] != runs.name or found["tasks"] != runs.tasks:
        raise click.ClickException(f"{file} is of {found['model']} on {len(found['tasks'])} tasks, not of {runs.name}")
    budgets = found["budgets"]
    at = budgets.index(DRAFTS)
    rows, chances = [], []
    for family, floors in found["families"].items():
        said, came = (
            np.concatenate([np.ravel(np.asarray(one[name])[..., at]) for one in floors.values()]) for name in ("chance", "came")
        )
        bins = np.digitize(said, CHANCES[1:-1])
        shares = [
            f"{came[bins == i].mean():.2f} ({(bins == i).mean():.0%})" if (bins == i).any() else "–"
            for i in range(len(CHANCES) - 1)
        ]
        chances.append([family, *shares])
    for floor in FLOORS:
        base = Told.of(runs, floor, runs.of(*BASELINES)).transferred
        able = runs.scores(floor).max(0) > 0
        open_ = runs.mask - base >= LEAST_GAP
        scores = {family: np.asarray(floors[f"{floor:g}"]["score"]) for family, floors in found["families"].items()}
        same = max((scores[family][..., at] for family in scores if family in BASELINES), key=np.mean)
        for family, score in scores.items():
            own = score[..., at]
            closed = (own - base[..., None]) / np.where(open_, runs.mask - base, 1.0)[..., None]
            flat = closed.reshape(len(base), -1)
            every, can = (np.repeat(kept, own.shape[-1], -1) for kept in (open_, open_ & able))
            rows.append(
                [
                    f"{floor:g}",
                    family,
                    *(f"{score[..., i].mean():.3f}" for i in range(len(budgets))),
                    mean((own - base[..., None]).mean(-1)),
                    mean((own - score[..., 0]).mean(-1)),
                    "–" if family in BASELINES else mean((own - same).mean(-1)),
                    median(flat, every),
                    median(flat, can),
                    f"{(own < (1 - WORSE) * base[..., None]).mean():.0%}",
                ]
            )
    headings = [
        "floor",
        "chains",
        *(f"{budget} drafts" for budget in budgets),
        f"gain of {DRAFTS} over the best baseline from other tasks",
        f"of {DRAFTS} over 0",
        "over the best baseline with as many drafts",
        "gap closed, median",
        "where the floor can be reached",
        "more than 2 % worse",
    ]
    between = [f"said {low:g} to {high:g}" for low, high in itertools.pairwise(CHANCES)]
    said = (
        f"How often the floor is reached, by the chance that the search gives it after {DRAFTS} drafts, all floors together; in"
        " brackets how often it says so."
    )
    return "\n\n".join([table(headings, rows), said, table(["chains", *between], chances)])


def signals_table(files: Sequence[Path]) -> str:
    """What signals.py found: average precisions, and what each gains over the log-probability."""
    found = [json.loads(file.read_text()) for file in files]
    parts = []
    for part, said in (("prefixes", "At prefixes of answers"), ("first tokens", "At first tokens")):
        rows = []
        for signal in found[0][part]:
            row = [signal]
            for one in found:
                own, plain = (np.array(list(one[part][name].values()))[:, None] for name in (signal, "log-probability"))
                row += [mean(own), "–" if signal == "log-probability" else mean(own - plain)]
            rows.append(row)
        sizes = " and ".join(f"{len(one[part]['log-probability'])} tasks with {one['model']}" for one in found)
        headings = [said, *(heading for one in found for heading in (one["model"], "gain over the first line"))]
        parts.append(f"{table(headings, rows)}\n\n{sizes}.")
    return "\n\n".join(parts)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--shots", type=click.Path(path_type=Path, exists=True), help="Baselines on prompts with more exemplars.")
@click.option("--examples", type=click.Path(path_type=Path, exists=True), help="What examples.py printed.")
@click.option("--ends", type=click.Path(path_type=Path, exists=True), help="What ends.py printed.")
@click.option("--signals", multiple=True, type=click.Path(path_type=Path, exists=True), help="What signals.py wrote.")
@click.option("--drafts", multiple=True, type=click.Path(path_type=Path, exists=True), help="What drafts.py wrote, by model.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
def main(
    folders: tuple[Path, ...],
    shots: Path | None,
    examples: Path | None,
    ends: Path | None,
    signals: tuple[Path, ...],
    drafts: tuple[Path, ...],
    out: Path,
) -> None:
    """Write calibration.md."""
    if drafts and len(drafts) != len(folders):
        raise click.ClickException(f"give --drafts for each of {len(folders)} folders, in their order, got {len(drafts)}")
    intro = (Path(__file__).parent / "page.md").read_text()
    every = [Runs.read(folder) for folder in folders]
    made = {
        "HEADLINE": headline(every),
        "EXAMPLES": examples and examples.read_text().rstrip(),
        "ENDS": ends and ends.read_text().rstrip(),
        "SIGNALS": signals and signals_table(signals),
    }
    for name, text in made.items():
        intro = intro.replace(f"@{name}@", text or "Not made.")
    parts = []
    for number, runs in enumerate(every):
        sizes = sum(prefixes for _, prefixes in runs.about.values())
        left = f" Left out, as too large: {', '.join(runs.left_out)}." if runs.left_out else ""
        said = f"{len(runs.tasks)} tasks, {runs.validity.shape[2]} prompts each, {sizes} prefixes.{left}"
        parts.append(f"## {runs.name}\n\n{said}")
        for floor in FLOORS:
            parts.append(f"### Validity at least {floor:g}\n\n{floor_table(runs, floor)}")
            parts.append(f"With siblings of the task left out too:\n\n{floor_table(runs, floor, siblings=False)}")
        parts.append(f"### One family against another, at each floor\n\n{against_table(runs)}")
        parts.append(f"### By task, at validity 0.8\n\n{task_table(runs, 0.8)}")
        if drafts:
            parts.append(f"### With judged drafts of the prompt\n\n{drafts_section(runs, drafts[number])}")
        if runs.risk:
            parts.append(f"### Controlled risk\n\n{risk_table(runs)}")
    if shots is not None:
        parts.append(f"## More exemplars instead of more prompts\n\n{shots_table(every[0], Runs.read(shots))}")
    atomic_write(out / "calibration.md", intro.rstrip() + "\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
