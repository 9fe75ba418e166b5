"""Several runs of `decal diagnose` side by side: models compared on the tasks they have in common."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval.diagnosis_report import FORMAT, PARTS
from decal.eval.frontier import LEVEL
from decal.eval.paths import write_files
from decal.eval.ranking import Estimate
from decal.samplers.errors import DecalError

FEWEST = 3
"""Tasks from which on means over tasks have an interval."""

Number = Callable[[Mapping[str, Any], int], "float | None"]


def _estimate(*path: str) -> Number:
    def read(task: Mapping[str, Any], floor: int) -> float | None:
        value: Any = task
        for key in path:
            value = (value or {}).get(key)
        return None if value is None else value["value"]

    return read


def _reached(gaps: Mapping[str, Any]) -> float:
    return max(gaps["size"], gaps["cut"]) - min(gap["value"] for gap in gaps["cutoff"].values())


NUMBERS: dict[str, Number] = {
    "validity": _estimate("as_it_is", "validity"),
    "diversity": _estimate("as_it_is", "diversity"),
    "average precision": _estimate("order", "average_precision"),
    "recall at precision .8": _estimate("order", "recall_at_08"),
    "KL": _estimate("divergence", "total"),
    **{f"KL: {part}": _estimate("divergence", part) for part in PARTS},
    "order gap": lambda task, floor: task["gaps"][floor]["order"]["value"],
    "shape gap": lambda task, floor: task["gaps"][floor]["shape"]["value"],
    "best sampler": lambda task, floor: _reached(task["gaps"][floor]),
}
"""What is compared, by its heading: validity and diversity at temperature 1, order, shape, and diversities at the floor."""


@dataclass(frozen=True)
class Line:
    """A number of every model on the tasks all have; differences are to the first model.

    Attributes:
        values: (M, T).
        means, differences: (M,) over tasks; the first difference is None.
    """

    name: str
    values: np.ndarray
    means: list[Estimate]
    differences: list[Estimate | None]


@dataclass(frozen=True)
class Comparison:
    """Of M models on T tasks.

    Attributes:
        runs: what the runs say of themselves, without their tasks.
        tasks: names of the common tasks.
        left_out: tasks that only some runs have, or in another form, with another number of prompts or of answers.
        floor: validity floor of the gaps.
        lines: one for each of `NUMBERS` that every run has.
        headlines: (M, T) what limits each model on each task, by its run.
    """

    runs: list[dict[str, Any]]
    tasks: list[str]
    left_out: list[str]
    floor: float
    lines: list[Line]
    headlines: list[list[str]]

    @property
    def models(self) -> list[str]:
        """Their names, told apart by number where they are the same."""
        names = [run["model"]["name"] for run in self.runs]
        return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def read(folder: Path) -> dict[str, Any]:
    """What `decal diagnose` wrote to a folder, or to a file. Raises DecalError if it isn't that."""
    file = folder / "diagnosis.json" if folder.is_dir() else folder
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DecalError(f"can't read {file}: {getattr(error, 'strerror', None) or error}; run decal diagnose first") from None
    except ValueError as error:
        raise DecalError(f"{file} is not JSON: {error}") from None
    if not isinstance(run, dict) or not {"format", "model", "tasks", "floors"} <= run.keys():
        raise DecalError(f"{file} is not what decal diagnose writes")
    if run["format"] != FORMAT:
        raise DecalError(f"{file} is of format {run['format']}, this version of decal reads {FORMAT}; run decal diagnose again")
    return run


def compare(runs: Sequence[dict[str, Any]], floor: float = 0.8, seed: int = 0) -> Comparison:
    """Compare runs, of which the first is the one that others are compared to.

    Raises:
        DecalError: fewer than two runs, no common task, runs of another grid or seed, or the floor isn't one of theirs.
    """
    if len(runs) < 2:
        raise DecalError(f"a comparison needs at least two runs, got {len(runs)}")
    for run in runs:
        if floor not in run["floors"]:
            has = ", ".join(f"{f:g}" for f in run["floors"])
            raise DecalError(f"the run of {run['model']['name']} has no validity floor {floor:g}, only {has}")
    for name in ("grid", "seed", "swept"):
        if len(given := {run.get(name) for run in runs}) > 1:
            raise DecalError(f"runs to compare need the same {name}, got {' and '.join(map(str, given))}")
    by_name = [{task["name"]: task for task in run["tasks"]} for run in runs]
    every = list(dict.fromkeys(name for tasks in by_name for name in tasks))
    tasks = [name for name in every if len({_put(tasks.get(name)) for tasks in by_name}) == 1]
    if not tasks:
        raise DecalError("the runs have no task in common that was put in the same form, with as many prompts")
    lines = []
    for name, number in NUMBERS.items():
        values = [
            [number(own[task], run["floors"].index(floor)) for task in tasks] for run, own in zip(runs, by_name, strict=True)
        ]
        if all(v is not None for row in values for v in row):
            lines.append(_line(name, np.asarray(values, dtype=float), seed))
    abouts = [{key: value for key, value in run.items() if key != "tasks"} for run in runs]
    headlines = [[own[task]["headline"] for task in tasks] for own in by_name]
    return Comparison(abouts, tasks, [name for name in every if name not in tasks], floor, lines, headlines)


def _put(task: Mapping[str, Any] | None) -> Any:
    """How a task was put, as far as that must be the same."""
    return None if task is None else (task["form"], task["prompts"], task["answers"])


def _line(name: str, values: np.ndarray, seed: int) -> Line:
    means = [_mean(row, seed) for row in values]
    return Line(name, values, means, [None, *(_mean(row - values[0], seed) for row in values[1:])])


def _mean(values: np.ndarray, seed: int) -> Estimate:
    """With a bootstrap interval over tasks, if there are enough."""
    from scipy import stats

    if len(values) < FEWEST or np.ptp(values) == 0:
        return Estimate(float(values.mean()))
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((values,), np.mean, confidence_level=LEVEL, method="percentile", rng=rng).confidence_interval
    return Estimate(float(values.mean()), float(found.low), float(found.high))


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, comparison.png and comparison.html, each atomically. Raises DecalError if that can't be."""
    files: dict[str, Callable[[], bytes]] = {
        "comparison.json": lambda: json.dumps(summary(found), indent=1, allow_nan=False).encode(),
        "comparison.png": lambda: figure(found),
        "comparison.html": lambda: _page(found).encode(),
    }
    return write_files(folder, files)


def summary(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "runs": found.runs,
        "tasks": found.tasks,
        "left_out": found.left_out,
        "floor": found.floor,
        "numbers": {
            line.name: {
                model: {
                    "tasks": row.tolist(),
                    "mean": [mean.value, mean.low, mean.high],
                    "difference": None if other is None else [other.value, other.low, other.high],
                }
                for model, row, mean, other in zip(found.models, line.values, line.means, line.differences, strict=True)
            }
            for line in found.lines
        },
    }


def figure(found: Comparison) -> bytes:
    """A small picture for each number: every task a line of points, one for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(found.lines) // columns)
    height = (0.8 + 0.22 * len(found.tasks) + 0.5) * rows + 0.7
    picture = Figure(figsize=(13.5, height), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(rows, columns, squeeze=False, sharey=True)
    colours = ("#000000", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf")
    place = np.arange(len(found.tasks))
    for axis, line in zip(axes.flat, found.lines, strict=False):
        axis.hlines(place, line.values.min(0), line.values.max(0), color="#cccccc", linewidth=1)
        for number, (model, row) in enumerate(zip(found.models, line.values, strict=True)):
            colour = colours[number % len(colours)]
            axis.plot(row, place, "o", color=colour, markersize=5, label=model)
            axis.axvline(row.mean(), color=colour, linewidth=0.8, linestyle=":")
        axis.set_title(line.name, fontsize=10)
        axis.grid(axis="x", alpha=0.25)
        axis.set_yticks(place, found.tasks, fontsize=8)
        if line.values.max() <= 1 and line.values.min() >= 0:
            axis.set_xlim(-0.03, 1.03)
    axes[0, 0].invert_yaxis()
    for axis in list(axes.flat)[len(found.lines) :]:
        axis.remove()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _page(found: Comparison) -> str:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("decal.eval", "."), autoescape=True, trim_blocks=True)
    page: str = environment.get_template("comparison.html.jinja").render(
        found=found,
        models=found.models,
        lines=[(line.name, list(zip(line.means, line.differences, strict=True))) for line in found.lines],
        figure=base64.b64encode(figure(found)).decode(),
        cell=cell,
        fewest=FEWEST,
    )
    return page


def cell(value: Estimate | None, sign: str = "") -> str:
    """An estimate as text."""
    if value is None:
        return ""
    form = sign + ".3f"
    ends = "" if value.low is None else f" [{format(value.low, form)}, {format(value.high, form)}]"
    return format(value.value, form) + ends


def print_table(found: Comparison, console: Any) -> None:
    """Means over tasks, and differences to the first model."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"mean over {len(found.tasks)} tasks")
    for number, model in enumerate(found.models):
        table.add_column(model, justify="right")
        if number:
            table.add_column("difference", justify="right")
    for line in found.lines:
        cells = [cell(line.means[0])]
        for mean, other in zip(line.means[1:], line.differences[1:], strict=True):
            cells += [f"{mean.value:.3f}", cell(other, "+")]
        table.add_row(line.name, *cells)
    console.print(table)
    if found.left_out:
        console.print(
            f"\nLeft out, as not all runs have them alike: {', '.join(found.left_out)}.", highlight=False, style="dim"
        )
