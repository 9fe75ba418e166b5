"""What `decal diagnose` leaves behind: a table for the terminal, and a folder of files people can open."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval import order, ribbon, shape
from decal.eval.diagnosis import AS_MANY, Diagnosis, Gaps, diagnose, estimate, gaps, headline
from decal.eval.exact import Rows
from decal.eval.frontier import FLOORS, Evaluation, TaskResult
from decal.eval.order import RECALLS
from decal.eval.paths import write_files
from decal.eval.ranking import Estimate
from decal.eval.ribbon import KINDS, TEMPERATURES, Ribbon
from decal.eval.task import Question
from decal.samplers.errors import DecalError
from decal.samplers.trie import TokenTrie

FORMAT = 1
COLOURS = {"frequent": "#2a7f3f", "rare": "#8fcf9b", "invalid": "#c9c9c9"}
PARTS = {"order": "#c0392b", "tail": "#e8b04a", "shape": "#2c6fb0"}


@dataclass
class TaskDiagnosis:
    """Everything found out about a task.

    Attributes:
        result: settings and oracles.
        prompts: the diagnosis of each prompt.
        ribbons: of the first prompt.
    """

    result: TaskResult
    prompts: list[Diagnosis]
    ribbons: list[Ribbon]

    @property
    def name(self) -> str:
        """Of the task."""
        return self.result.question.task.name

    def gaps(self, floor: float) -> Gaps:
        """At a validity floor."""
        return gaps(self.result, floor, np.asarray([d.given_valid for d in self.prompts]))

    def mean(self, name: str) -> Estimate:
        """Of a number of `decal.eval.order.Level`, over the steps of an answer and then over prompts."""
        most = math.inf if name in ("inversions", "steps") else 1.0
        return estimate([d.mean(name) for d in self.prompts], most=most)

    def divergence(self, part: str) -> Estimate:
        """A part of KL(uniform on V || p), in nats, over prompts."""
        return estimate([getattr(d.divergence, part) for d in self.prompts], most=math.inf)

    @property
    def plain(self) -> int | None:
        """Number of the setting that leaves the model alone, if the grid has it."""
        at_one = ("temperature(1.0)", "temperature(1)")
        return next((m for m in self.result.members("temperature") if self.result.setting[m] in at_one), None)

    @property
    def widest(self) -> Ribbon:
        """The ribbon with most valid tokens."""
        return max(self.ribbons, key=lambda one: one.valid)

    def depths(self) -> list[int]:
        """Depths that every prompt has."""
        return sorted(set.intersection(*({one.depth for one in d.levels} for d in self.prompts)))

    def at_depth(self, kind: str, name: str, depth: int) -> float:
        """Mean over prompts of a number of `Diagnosis.levels`, ``unit_levels`` or ``choices`` at a depth."""
        return float(np.mean([getattr(one, name) for d in self.prompts for one in getattr(d, kind) if one.depth == depth]))


def run_task(evaluation: Evaluation, question: Question, swept: int | None = None) -> TaskDiagnosis:
    """Evaluate a task and diagnose every prompt; see `decal.eval.diagnosis.diagnose`.

    Raises:
        DecalError: the task doesn't fit the model, or its answers have several token sequences.
    """
    if not question.policy.one_path_each:
        raise DecalError(f"{question.task.name}: a diagnosis needs tokenisation canonical and case exact")
    found: list[Diagnosis] = []
    ribbons: list[Ribbon] = []

    def visit(text: str, trie: TokenTrie, rows: Rows) -> None:
        prefixes = order.prefixes(trie, rows)
        if not found:
            ribbons.extend(ribbon.ribbons(trie, rows, prefixes, evaluation.builder.vocabulary))
        found.append(diagnose(trie, prefixes, swept))

    result = evaluation.run(question, visit)
    return TaskDiagnosis(result, found, ribbons)


@dataclass
class DiagnosisRun:
    """A finished run.

    Attributes:
        about: model, grid, versions, seed, times; JSON-able.
        tasks: the results.
        floor: the validity floor of the headlines.
    """

    about: dict[str, Any]
    tasks: Sequence[TaskDiagnosis]
    floor: float = 0.8

    @property
    def floors(self) -> list[float]:
        """Validity floors of the tables, ascending."""
        return sorted({*FLOORS, self.floor})


def write(run: DiagnosisRun, folder: Path) -> list[Path]:
    """Write diagnosis.json, depths.parquet, a figure for each task and diagnosis.html; each file atomically.

    Raises:
        DecalError: the folder can't be written, or the disk is full.
    """
    files: dict[str, Callable[[], bytes]] = {
        "diagnosis.json": lambda: json.dumps(summary(run), indent=1, allow_nan=False).encode(),
        "depths.parquet": lambda: _parquet(run),
    }
    for task in run.tasks:
        files[f"diagnosis-{task.name}.png"] = partial(figure, run, task)
    files["diagnosis.html"] = lambda: _page(run).encode()
    return write_files(folder, files)


# ---- numbers


def summary(run: DiagnosisRun) -> dict[str, Any]:
    """The run as JSON."""
    return {"format": FORMAT, **run.about, "floors": run.floors, "tasks": [_task(task, run) for task in run.tasks]}


def _task(task: TaskDiagnosis, run: DiagnosisRun) -> dict[str, Any]:
    declared = task.result.question.task
    numbers = ("average_precision", "recall_at_08", "r_precision", "inversions", "auroc", "area", "steps")
    return {
        "name": declared.name,
        "family": declared.family,
        "form": declared.form,
        "answers": task.result.question.valid.size,
        "prompts": len(task.prompts),
        "headline": headline(task.gaps(run.floor)),
        "gaps": [_plain(asdict(task.gaps(floor))) for floor in run.floors],
        "as_it_is": _plain(_as_it_is(task)),
        "order": {name: _plain(asdict(task.mean(name))) for name in numbers},
        "divergence": {part: _plain(asdict(task.divergence(part))) for part in (*PARTS, "total")},
        "given_valid": _plain(asdict(estimate([d.given_valid for d in task.prompts]))),
        "depths": [
            {
                "depth": depth,
                **{name: _plain(task.at_depth("levels", name, depth)) for name in (*numbers, "reach")},
                **{name: _plain(task.at_depth("choices", name, depth)) for name in ("entropy", "ideal", "uniform")},
            }
            for depth in task.depths()
        ],
        "sequences": _sequences(task),
        "logit_fit": _plain(asdict(task.widest.fit)),
    }


def _as_it_is(task: TaskDiagnosis) -> dict[str, Any]:
    """Validity and diversity at temperature 1, if the grid has that."""
    result, plain = task.result, task.plain
    if plain is None:
        return {}
    return {
        "validity": asdict(estimate(result.validity[plain])),
        "diversity": asdict(estimate(np.nan_to_num(result.diversity[plain]))),
    }


def _sequences(task: TaskDiagnosis) -> list[dict[str, Any]]:
    """Mean over prompts of each cutoff's precision and recall, step by step."""
    found = []
    for number, sequence in enumerate(task.prompts[0].sequences):
        same = [d.sequences[number].steps for d in task.prompts]
        bounds = [d.hardness.bound(max(s.precision, 1e-300)) for d, s in zip(task.prompts, same, strict=True) if d.hardness]
        found.append(
            {
                "cutoff": sequence.name,
                "alpha": np.mean([_padded(s.alpha, same) for s in same], 0).tolist(),
                "beta": np.mean([_padded(s.beta, same) for s in same], 0).tolist(),
                "precision": float(np.mean([s.precision for s in same])),
                "recall": float(np.mean([s.recall for s in same])),
                "recall_by_theorem_4_2": float(np.mean(bounds)),
            }
        )
    return found


def _padded(values: np.ndarray, same: Sequence[Any]) -> np.ndarray:
    """With zeros where nothing was left to go wrong."""
    return np.pad(values, (0, max(len(s.alpha) for s in same) - len(values)))


def _plain(value: Any) -> Any:
    """As JSON can hold it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _parquet(run: DiagnosisRun) -> bytes:
    import pandas as pd

    lines = []
    for task in run.tasks:
        for number, d in enumerate(task.prompts):
            for counts, unit, choice in zip(d.levels, d.unit_levels, d.choices, strict=True):
                for weighting, one in (("counts", counts), ("unit", unit)):
                    order = {k: v for k, v in asdict(one).items() if k != "curve"} | {"area": one.area}
                    parts = {f"kl_{part}": getattr(choice.divergence, part) for part in PARTS}
                    inner = {"entropy": choice.entropy, "ideal_entropy": choice.ideal, "uniform_entropy": choice.uniform}
                    lines.append({"task": task.name, "prompt": number, "weighting": weighting, **order, **inner, **parts})
    buffer = io.BytesIO()
    pd.DataFrame(lines).to_parquet(buffer, index=False)
    return buffer.getvalue()


# ---- pictures


def figure(run: DiagnosisRun, task: TaskDiagnosis) -> bytes:
    """Six pictures of a task as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13.5, 8.2), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(2, 3)
    _draw_order(axes[0, 0], task)
    _draw_compounding(axes[0, 1], task)
    _draw_sequences(axes[0, 2], task)
    _draw_divergence(axes[1, 0], task)
    _draw_geometry(axes[1, 1], task)
    _draw_logits(axes[1, 2], task)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.title.set_size(10)
    size = task.result.question.valid.size
    picture.suptitle(f"{task.name} (|V| = {size}), {run.about['model']['name']}", fontsize=12)
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_order(axis: Any, task: TaskDiagnosis) -> None:
    depths = task.depths()
    for depth, colour in zip(depths, _shades(len(depths)), strict=True):
        curve = np.mean([one.curve for d in task.prompts for one in d.levels if one.depth == depth], 0)
        precision = task.at_depth("levels", "average_precision", depth)
        axis.plot(RECALLS, curve, color=colour, label=f"step {depth + 1}: AP {precision:.2f}")
    axis.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="local recall", ylabel="local precision", title="Order: best cutoffs by step")
    axis.legend(fontsize=7, loc="lower left", ncols=1 + len(depths) // 9)


FOLLOWED = {"local recall 1": "#1f77b4", "local recall 0.9": "#17becf", "local precision 1": "#d62728", AS_MANY: "#000000"}
"""Cutoffs whose errors are shown step by step."""


def _draw_compounding(axis: Any, task: TaskDiagnosis) -> None:
    for sequence in _sequences(task):
        colour = FOLLOWED.get(sequence["cutoff"])
        if colour:
            steps = np.arange(len(sequence["alpha"]) + 1)
            precision, recall = (np.cumprod([1, *sequence[name]]) for name in ("alpha", "beta"))
            axis.plot(steps, precision, "-o", color=colour, markersize=3, label=f"precision, {sequence['cutoff']}")
            axis.plot(steps, recall, "--o", color=colour, markersize=3, mfc="none", label=f"recall, {sequence['cutoff']}")
    axis.set(title="Compounding: products over steps", xlabel="steps done", ylim=(0, 1.05))
    if axis.lines:
        axis.legend(fontsize=6.5, loc="lower left")


def _draw_sequences(axis: Any, task: TaskDiagnosis) -> None:
    found = _sequences(task)
    for kind, colour in (("local recall", "#1f77b4"), ("local precision", "#d62728")):
        some = [s for s in found if s["cutoff"].startswith(kind)]
        x, y = [s["precision"] for s in some], [s["recall"] for s in some]
        axis.plot(x, y, "-o", color=colour, markersize=4, label=f"cutoffs at a given {kind}")
    for s in found[-1:]:
        axis.plot(s["precision"], s["recall"], "kD", markersize=6, label=s["cutoff"])
    hard = [d.hardness for d in task.prompts if d.hardness]
    if hard:
        precision = np.linspace(0.02, 1, 50)
        bound = [np.mean([h.bound(p) for h in hard]) for p in precision]
        axis.plot(precision, bound, color="#8d8dff", label="Theorem 4.2, hardness estimated")
    axis.set(xlim=(0, 1.02), ylim=(0, 1.03), xlabel="sequence precision", ylabel="sequence recall", title="Whole answers")
    axis.legend(fontsize=7, loc="lower left")


def _draw_divergence(axis: Any, task: TaskDiagnosis) -> None:
    depths = task.depths()
    place, below = [d + 1 for d in depths], np.zeros(len(depths))
    for part, colour in PARTS.items():
        at = [
            np.mean([getattr(c.divergence, part) for d in task.prompts for c in d.choices if c.depth == one]) for one in depths
        ]
        height = np.nan_to_num(np.asarray(at), posinf=0.0)
        axis.bar(place, height, 0.7, bottom=below, color=colour, label=f"{part} {sum(at):.2f}")
        below += height
    axis.set(xlabel="step", ylabel="nats", title="KL(uniform on valid answers || model), by step")
    axis.set_xticks(place)
    axis.legend(fontsize=8)


def _draw_geometry(axis: Any, task: TaskDiagnosis) -> None:
    result = task.result
    steps = [d for d in task.depths() if task.at_depth("levels", "reach", d) > 0.5]
    valid = [math.exp(task.at_depth("choices", "uniform", d)) for d in steps]
    validity, diversity = shape.geometric_curve(valid)
    axis.plot(validity, diversity, color="#2c6fb0", label="geometric model")
    x = np.linspace(0.01, 0.999, 200)
    axis.plot(x, shape.geometric_bound(valid, x), ":", color="#2c6fb0", label="bound F.4 for it")
    members = result.members("temperature")
    axis.plot(
        result.mean_validity[members], result.mean_diversity[members], "-", color="#000000", label="the model, by temperature"
    )
    at_one = task.plain
    if at_one is not None:
        axis.plot(result.mean_validity[at_one], result.mean_diversity[at_one], "ko", label="at temperature 1")
    title = "Shape: the geometric model of Theorem 5.2"
    axis.set(xlim=(0, 1.02), ylim=(0, 1.03), xlabel="validity", ylabel="diversity", title=title)
    axis.legend(fontsize=7, loc="lower left")


def _draw_logits(axis: Any, task: TaskDiagnosis) -> None:
    ribbon = task.widest
    ranks = np.asarray(ribbon.ranks, dtype=float)
    fit, step = ribbon.fit, task.ribbons.index(ribbon) + 1
    axis.semilogx(ranks, ribbon.sorted_logits, color="#999999", linewidth=3, label=f"sorted logits, step {step}, first prompt")
    axis.semilogx(ranks, fit(ranks), color="#c0392b", linewidth=1, label=f"line to rank {fit.split}, then logarithm")
    axis.axvline(ribbon.valid, color="#2a7f3f", linewidth=0.8, linestyle=":", label=f"{ribbon.valid} valid tokens")
    title = f"Logits: R² {fit.r2:.4f}, mean squared error {fit.mse:.3f}"
    axis.set(xlabel="rank", ylabel="logit less the largest", title=title)
    axis.legend(fontsize=7, loc="lower left")


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](v) for v in np.linspace(0, 0.9, max(count, 1))][:count]


# ---- page and table


def _page(run: DiagnosisRun) -> str:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("decal.eval", "."), autoescape=True, trim_blocks=True)
    tasks = [_task_on_page(run, task) for task in run.tasks]
    page: str = environment.get_template("diagnosis.html.jinja").render(
        about=run.about,
        floor=run.floor,
        floors=run.floors,
        tasks=tasks,
        colours=COLOURS,
        kinds=KINDS,
        temperatures=TEMPERATURES,
        parts=list(PARTS),
        number=lambda value, digits: "" if value is None else f"{value:.{digits}f}",
    )
    return page


def _task_on_page(run: DiagnosisRun, task: TaskDiagnosis) -> dict[str, Any]:
    return {
        "summary": _task(task, run),
        "gaps": [_gap_cells(task.gaps(floor)) for floor in run.floors],
        "divergence": {part: _cell(task.divergence(part)) for part in (*PARTS, "total")},
        "order": {name: _cell(task.mean(name)) for name in ("average_precision", "recall_at_08", "r_precision", "auroc")},
        "inversions": _cell(task.mean("inversions"), ".1f"),
        "figure": base64.b64encode(figure(run, task)).decode(),
        "ribbons": [_ribbon_data(r) for r in task.ribbons],
    }


def _ribbon_data(ribbon: Ribbon) -> dict[str, Any]:
    data = asdict(ribbon)
    for name in ("ranks", "sorted_logits", "fit"):
        del data[name]
    return data


def _gap_cells(found: Gaps) -> dict[str, Any]:
    family, diversity = found.reached
    reached = diversity > 0
    return {
        "floor": f"{found.floor:g}",
        "order": _cell(found.order, "+.2f"),
        "shape": _cell(found.shape),
        "rest": _cell(found.rest),
        "size": f"{found.size:.2f}" if found.size else "not reached",
        "cut": f"{found.cut:.2f}" if found.cut else "not reached",
        "mask": f"{found.mask:.2f}",
        "setting": found.setting.get(family, "none"),
        "reached": f"{diversity:.2f}" if reached else "not reached",
        "held": "" if found.held_validity is None or found.held_best is None else _cell(found.held_best),
        "held_validity": "" if found.held_validity is None else f"{found.held_validity:.2f}",
        "missed": found.held_validity is not None and found.held_validity < found.floor,
        "cutoff": _cell(found.cutoff[family], "+.2f") if reached else "",
    }


def _cell(value: Estimate, form: str = ".2f") -> str:
    if not math.isfinite(value.value):
        return "infinite"
    ends = "" if value.low is None or value.high is None else f" [{format(value.low, form)}, {format(value.high, form)}]"
    return format(value.value, form) + ends


def print_table(run: DiagnosisRun, console: Any) -> None:
    """A line for each task, and its headline."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headings = ("task", "AP", "recall at precision .8", "KL", *PARTS, "order gap", "shape gap", "best sampler")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in (headings[0], headings[-1]) else "right", no_wrap=True)
    for task in run.tasks:
        found = task.gaps(run.floor)
        family, diversity = found.reached
        parts = [f"{task.divergence(part).value:.2f}" for part in ("total", *PARTS)]
        ap, recall = task.mean("average_precision").value, task.mean("recall_at_08").value
        gap = f"{found.order.value:+.2f}", f"{found.shape.value:.2f}"
        best = f"{family} {diversity:.2f}" if diversity > 0 else "none is that valid"
        table.add_row(task.name, f"{ap:.2f}", f"{recall:.2f}", *parts, *gap, best)
    console.print(table)
    said = f"Gaps are in diversity, at validity ≥ {run.floor:g}; KL and its parts in nats, at temperature 1."
    console.print(f"\n{said}\n", style="dim", highlight=False)
    for task in run.tasks:
        console.print(f"[bold]{task.name}[/bold]: {headline(task.gaps(run.floor))}", highlight=False)
    console.print()
