"""docs/paper.md: the experiments of arXiv 2605.11128 on models that run here, and whether they come out the same.

    decal diagnose --model NAME --grid paper --draws 3 --task ... --out runs/NAME     # for every model and the tasks below
    python benchmarks/paper.py runs/smollm2 runs/gemma3-270m [--wide runs/W ...] [--quantised runs/A runs/B]

Reads what `decal diagnose` wrote, compares, and writes docs/paper.md and its pictures. ``--wide`` takes runs on many tasks,
``--quantised`` pairs of a run and the same with weights quantised once more, see ``--requantise``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TASKS = (
    "weekdays", "us_states", "digits2", "digits3", "digits2_sum_le", "digits3_sum_le", "digits2_sum_eq", "digits3_sum_eq",
)  # fmt: skip
FLOOR = 0.8
FILTERS = {"none": "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p"}
CLEAR = 0.05
"""A difference in diversity below this is none."""

Task = Mapping[str, Any]


class Run:
    """What `decal diagnose` says of a model."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.told = json.loads((folder / "diagnosis.json").read_text())
        self.name: str = self.told["model"]["name"]
        self.tasks: dict[str, Task] = {task["name"]: task for task in self.told["tasks"]}

    def gaps(self, task: str, floor: float = FLOOR) -> Mapping[str, Any]:
        return self.tasks[task]["gaps"][self.told["floors"].index(floor)]

    def diversity(self, task: str, family: str, floor: float = FLOOR) -> float:
        """Of the best setting of a filter that reaches the floor; 0 if none does."""
        gaps = self.gaps(task, floor)
        return max(0.0, max(gaps["size"], gaps["cut"]) - gaps["cutoff"][family]["value"])

    def best(self, task: str) -> float:
        """Of the best of the paper's filters."""
        return max(self.diversity(task, family) for family in FILTERS.values())

    def order(self, task: str, name: str) -> float:
        return self.tasks[task]["order"][name]["value"]


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [head, ["---"] + ["--:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


# ---- findings


def verdicts(holds: Mapping[str, bool]) -> str:
    """How often something holds, and where not."""
    false = [where for where, true in holds.items() if not true]
    text = f"**{len(holds) - len(false)} of {len(holds)}**"
    return text + (f"; not on {', '.join(false)}" if false else "")


def cutoffs_fall_short(runs: Sequence[Run]) -> dict[str, bool]:
    """No filter comes near keeping just the valid tokens."""
    return {f"{r.name} {t}": r.gaps(t)["mask"] - r.best(t) > CLEAR for r in runs for t in r.tasks}


def worse_with_depth(runs: Sequence[Run]) -> dict[str, bool]:
    pairs = [(f"digits2{s}", f"digits3{s}") for s in ("", "_sum_le", "_sum_eq")]
    return {
        f"{r.name} {deep} {name}": r.diversity(deep, family) < r.diversity(shallow, family)
        for r in runs
        for shallow, deep in pairs
        if shallow in r.tasks and deep in r.tasks
        for name, family in FILTERS.items()
        if r.diversity(shallow, family) or r.diversity(deep, family)  # 0 twice says nothing
    }


def worse_with_constraint(runs: Sequence[Run]) -> dict[str, bool]:
    return {
        f"{r.name} digits{n}_{how} {name}": r.diversity(f"digits{n}_{how}", family) <= r.diversity(f"digits{n}", family)
        for r in runs
        for n in (2, 3)
        for how in ("sum_le", "sum_eq")
        if f"digits{n}_{how}" in r.tasks
        for name, family in FILTERS.items()
    }


def order_and_gap(runs: Sequence[Run]) -> str:
    """How average precision goes with the order gap, over models and tasks."""
    from scipy import stats

    pairs = [(r.order(t, "average_precision"), r.gaps(t)["order"]["value"], r.gaps(t)["size"]) for r in runs for t in r.tasks]
    rho = stats.spearmanr([p for p, _, _ in pairs], [gap for _, gap, _ in pairs]).statistic
    ordered = [size for p, _, size in pairs if p > 0.99]
    broken = [size for p, _, size in pairs if p <= 0.99]
    text = f"rank correlation of average precision and order gap **{rho:.2f}** over {len(pairs)} cases; "
    return text + (
        f"the size oracle reaches {min(ordered):.2f} to {max(ordered):.2f} where average precision is above .99, "
        f"{min(broken):.2f} to {max(broken):.2f} elsewhere"
    )


def constraint_breaks_order(runs: Sequence[Run]) -> dict[str, bool]:
    return {
        f"{r.name} digits{n}_{how}": r.order(f"digits{n}_{how}", "average_precision")
        < r.order(f"digits{n}", "average_precision")
        for r in runs
        for n in (2, 3)
        for how in ("sum_le", "sum_eq")
        if f"digits{n}_{how}" in r.tasks
    }


def auroc_hides_it(runs: Sequence[Run]) -> tuple[float, float]:
    """The smallest AUROC of any task, and the smallest average precision."""
    lowest = [(r.order(t, "auroc"), r.order(t, "average_precision")) for r in runs for t in r.tasks]
    return min(a for a, _ in lowest), min(p for _, p in lowest)


# ---- tables


def best_table(run: Run) -> str:
    lines = []
    for t, task in run.tasks.items():
        gaps = run.gaps(t)
        cells = [number(run.diversity(t, family)) for family in FILTERS.values()]
        lines.append([t, task["answers"], *cells, number(gaps["size"]), number(gaps["cut"]), number(gaps["mask"])])
    return table(["task", "valid answers", *FILTERS, "size oracle", "best cutoffs", "validity mask"], lines)


def order_table(run: Run) -> str:
    lines = []
    for t, task in run.tasks.items():
        steps = [d for d in task["depths"] if d["steps"] > 1.5]
        area, recall = (" ".join(number(d[name]) for d in steps) for name in ("area", "recall_at_08"))
        lines.append([t, area, recall, f"{run.order(t, 'average_precision'):.3f}", f"{run.order(t, 'auroc'):.5f}"])
    return table(["task", "AUC by step", "recall at precision .8 by step", "average precision", "AUROC"], lines)


def shape_table(run: Run) -> str:
    lines = []
    for t, task in run.tasks.items():
        parts = [number(task["divergence"][part]["value"]) for part in ("total", "order", "tail", "shape")]
        as_it_is = [number(task["as_it_is"].get(name, {}).get("value")) for name in ("validity", "diversity")]
        fit = task["logit_fit"]
        lines.append([t, *as_it_is, *parts, number(task["given_valid"]["value"]), f"{fit['r2']:.3f}", fit["split"]])
    head = [
        "task",
        "validity",
        "diversity",
        "KL",
        "order",
        "tail",
        "shape",
        "diversity given valid",
        "R² of the fit",
        "break at rank",
    ]
    return table(head, lines)


def compounding_table(run: Run) -> str:
    lines = []
    for t, task in run.tasks.items():
        by_name = {s["cutoff"]: s for s in task["sequences"]}
        cells = []
        for name in ("local recall 1", "local recall 0.9", "as many as are valid"):
            s = by_name[name]
            cells.append(f"{s['precision']:.2f} / {s['recall']:.2f}")
        lines.append([t, *cells])
    return table(["task", "every valid token kept", "nine tenths kept", "as many as are valid"], lines)


def wide_section(runs: Sequence[Run]) -> str:
    if not runs:
        return "Not measured."
    limits = {r.name: [task["headline"].split()[0] for task in r.tasks.values()] for r in runs}
    limited = "; ".join(
        f"{name}: order limits {found.count('Order')}, shape {found.count('Shape')}, neither {found.count('Neither')}"
        for name, found in limits.items()
    )
    reached = "; ".join(f"{r.name}: {sum(r.best(t) > 0 for t in r.tasks)} of {len(r.tasks)}" for r in runs)
    said = [
        f"- No family of cutoffs recovers what the mask reaches: {verdicts(cutoffs_fall_short(runs))}.",
        f"- {order_and_gap(runs)}.",
        f"- What limits at validity ≥ {FLOOR:g}, by the headlines: {limited}.",
        f"- Tasks on which some filter is that valid at all: {reached}.",
    ]
    return "\n".join(said) + "\n\n" + sections(runs, wide_table)


def wide_table(run: Run) -> str:
    lines = []
    for t, task in run.tasks.items():
        gaps = run.gaps(t)
        parts = [number(task["divergence"][part]["value"]) for part in ("order", "tail", "shape")]
        reached = [number(run.best(t)), number(gaps["size"]), number(gaps["cut"]), number(gaps["mask"])]
        lines.append([t, task["answers"], f"{run.order(t, 'average_precision'):.3f}", *parts, *reached])
    head = ["task", "valid answers", "AP", "KL order", "tail", "shape", "best filter", "size oracle", "best cutoffs", "mask"]
    return table(head, lines)


def headline_list(run: Run) -> str:
    return "\n".join(f"- *{t}*: {task['headline']}" for t, task in run.tasks.items())


def quantised_table(pairs: Sequence[tuple[Run, Run]]) -> str:
    lines = []
    for before, after in pairs:
        for t in before.tasks:
            if t in after.tasks:
                row = [before.name, t]
                for name in ("average_precision", "recall_at_08"):
                    row.append(f"{before.order(t, name):.3f} → {after.order(t, name):.3f}")
                for part in ("order", "tail", "shape"):
                    values = (r.tasks[t]["divergence"][part]["value"] for r in (before, after))
                    row.append(" → ".join(number(v) for v in values))
                row.append(f"{before.best(t):.2f} → {after.best(t):.2f}")
                lines.append(row)
    return table(["model", "task", "AP", "recall at .8", "KL order", "KL tail", "KL shape", "best filter"], lines)


def quantised_summary(pairs: Sequence[tuple[Run, Run]]) -> str:
    both = [(before, after, t) for before, after in pairs for t in before.tasks if t in after.tasks]
    worse = sum(after.order(t, "average_precision") < before.order(t, "average_precision") for before, after, t in both)
    more = {
        part: sum(b.tasks[t]["divergence"][part]["value"] < a.tasks[t]["divergence"][part]["value"] for b, a, t in both)
        for part in ("order", "tail", "shape")
    }
    lower = sum(a.best(t) < b.best(t) for b, a, t in both)
    parts = ", ".join(f"{part} in {count}" for part, count in more.items())
    return (
        f"Of {len(both)} cases average precision falls in {worse}, parts of the KL rise: {parts}; the best filter reaches less "
        f"in {lower}. So quantisation makes order, tail and shape look worse than the models are, and the findings above are "
        "about these quantised models."
    )


PAGE = (HERE / "paper.template.md").read_text()


def write(runs: Sequence[Run], wide: Sequence[Run], pairs: Sequence[tuple[Run, Run]], out: Path) -> None:
    from decal.eval import comparison

    names = " and ".join(r.name for r in runs)
    auroc, ap = auroc_hides_it(runs)
    compared = comparison.compare([r.told for r in runs], FLOOR) if len(runs) > 1 else None
    quantised = (
        "No unquantised model can be had here, so the effect is shown the other way round: the same models with weights "
        "quantised once more, to 4 bits by another scheme (blocks of 32, symmetric, round to nearest). What that does to one "
        "should be of the size of what the first quantisation did.\n\n"
        + quantised_table(pairs)
        + "\n\n"
        + quantised_summary(pairs)
        if pairs
        else "Not measured."
    )
    page = PAGE.format(
        models=names,
        floor=f"{FLOOR:g}",
        clear=f"{CLEAR:g}",
        short=verdicts(cutoffs_fall_short(runs)),
        depth=verdicts(worse_with_depth(runs)),
        constraint=verdicts(worse_with_constraint(runs)),
        breaks=verdicts(constraint_breaks_order(runs)),
        size=order_and_gap(runs),
        auroc=auroc,
        ap=ap,
        first=runs[0].name,
        best=sections(runs, best_table),
        order=sections(runs, order_table),
        compounding=sections(runs, compounding_table),
        shape=sections(runs, shape_table),
        headlines=sections(runs, headline_list),
        wide=wide_section(wide),
        tasks=len(compared.tasks) if compared else 0,
        comparison=compared_table(compared) if compared else "One model only.",
        quantised=quantised,
    )
    (out / "paper.md").write_text(page)
    shutil.copy(runs[0].folder / "diagnosis-digits3_sum_le.png", out / f"paper-{runs[0].name}.png")


def sections(runs: Sequence[Run], make: Any) -> str:
    return "\n\n".join(f"{r.name}:\n\n{make(r)}" for r in runs)


def compared_table(found: Any) -> str:
    from decal.eval.comparison import cell

    head = ["", *found.models, f"{found.models[-1]} less {found.models[0]}"]
    lines = [[line.name, *(number(m.value) for m in line.means), cell(line.differences[-1], "+")] for line in found.lines]
    return table(head, lines) + "\n\n![Every number of both models on every task](paper-models.png)"


def requantise(name: str, folder: Path) -> None:
    """Save a built-in model with all its matrices quantised to 4 bits once more: blocks of 32, symmetric, round to nearest."""
    import torch

    from decal.eval import models

    loaded = models.load(name, accept_licence=True)
    with torch.no_grad():
        for module in loaded.model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                weight = module.weight
                blocks = weight.reshape(-1, 32)
                scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
                weight.copy_(((blocks / scale).round().clamp(-8, 7) * scale).reshape(weight.shape))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--wide", nargs="+", type=Path, default=[], help="runs on many tasks")
    parser.add_argument("--quantised", nargs="+", type=Path, default=[], help="a run, the same requantised, and so on")
    parser.add_argument("--requantise", nargs=2, metavar=("NAME", "FOLDER"), help="make such a model, for decal diagnose")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    if options.requantise:
        requantise(options.requantise[0], Path(options.requantise[1]))
        return
    pairs = list(zip(options.quantised[::2], options.quantised[1::2], strict=True))
    runs = [Run(folder) for folder in options.runs]
    write(runs, [Run(folder) for folder in options.wide], [(Run(a), Run(b)) for a, b in pairs], options.out)
    if len(runs) > 1:
        from decal.eval import comparison

        found = comparison.compare([r.told for r in runs], FLOOR)
        (options.out / "paper-models.png").write_bytes(comparison.figure(found))


if __name__ == "__main__":
    main()
