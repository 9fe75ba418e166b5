"""What a run leaves behind: a table for the terminal, and a folder of files people can open."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval import oracle
from decal.eval.frontier import FLOORS, ORACLES, TaskResult
from decal.eval.paths import atomic_write

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b",
    "#e377c2", "#17becf", "#bcbd22", "#f7b6d2", "#393b79", "#31a354",
)  # fmt: skip
ORACLE_STYLE = {ORACLES[0]: ("dot", "#555555"), ORACLES[1]: ("dash", "#000000"), ORACLES[2]: ("dashdot", "#888888")}
MATPLOTLIB_DASH = {"dot": ":", "dash": "--", "dashdot": "-."}
PLAIN = ("temperature", "greedy")
BOUND = "bound on rank cutoffs"


@dataclass
class Run:
    """A finished run.

    Attributes:
        about: model, grid, versions, seed, times; JSON-able.
        tasks: the results.
        floor: the validity floor of the headlines.
    """

    about: dict[str, Any]
    tasks: Sequence[TaskResult]
    floor: float = 0.8

    @property
    def floors(self) -> list[float]:
        """Validity floors of the tables, ascending."""
        return sorted({*FLOORS, self.floor})

    @property
    def colours(self) -> dict[str, str]:
        """A colour for each family of samplers, the same on every task."""
        families = [
            f for f in dict.fromkeys(f for t in self.tasks for f in t.families()) if f not in ORACLES and f not in PLAIN
        ]
        return {"temperature": "#000000", "greedy": "#000000"} | {f: COLOURS[i % len(COLOURS)] for i, f in enumerate(families)}


def write(run: Run, folder: Path) -> list[Path]:
    """Write results.json, settings.parquet, a figure for each task and one of all, and report.html; each file atomically.

    Raises:
        DecalError: the folder can't be written, or the disk is full.
    """
    files: dict[str, Callable[[], bytes]] = {
        "results.json": lambda: json.dumps(summary(run), indent=1, allow_nan=False).encode(),
        "settings.parquet": lambda: _parquet(run),
        "frontiers.png": lambda: _figure(run, run.tasks),
    }
    for task in run.tasks:
        files[f"frontier-{task.question.task.name}.png"] = partial(_figure, run, [task])
    files["report.html"] = lambda: _page(run).encode()
    for name, make in files.items():
        atomic_write(folder / name, make())
    return [folder / name for name in files]


def headline(task: TaskResult, floor: float) -> str:
    """What the frontier of a task says, in a sentence."""
    samplers = [f for f in task.families() if f not in ORACLES]
    reached = [(b.diversity, f) for f in samplers if (b := task.best(f, floor))]
    if not reached:
        return f"No setting reaches validity {floor:g}."
    plain = task.best("temperature", floor)
    bound = task.bound(floor)
    most, family = max(reached)
    parts = [f"At validity ≥ {floor:g} plain temperature reaches diversity {plain.diversity:.2f}" if plain else
             f"At validity ≥ {floor:g} no plain temperature is left"]  # fmt: skip
    parts.append(f"the best sampler {most:.2f} ({family})")
    if not math.isnan(bound):
        parts.append(f"no rank cutoff can exceed {bound:.2f}")
    return ", ".join(parts) + "; 1.00 is possible."


def summary(run: Run) -> dict[str, Any]:
    """The run as JSON: best settings at each floor, without the single settings."""
    return {**run.about, "floors": list(run.floors), "tasks": [_task_summary(t, run.floors) for t in run.tasks]}


def _task_summary(task: TaskResult, floors: Sequence[float]) -> dict[str, Any]:
    declared, policy = task.question.task, task.question.policy
    slack = task.slack.mean(-1)
    return {
        "name": declared.name,
        "form": declared.form,
        "answers": task.question.valid.size,
        "nodes": task.nodes,
        "prompts": len(task.prompts),
        "first_prompt": task.prompts[0],
        "policy": asdict(policy),
        "headlines": [headline(task, floor) for floor in floors],
        "best": {
            family: [
                None if b is None else {k: _number(v) for k, v in asdict(b).items()} for b in map_best(task, family, floors)
            ]
            for family in task.families()
        },
        "bound_on_rank_cutoffs": [_number(task.bound(floor)) for floor in floors],
        "settings_tried": {family: len(task.members(family)) for family in task.families()},
        "slack_at_temperature_1": {
            task.setting[i]: float(slack[i]) for i in task.members("temperature") if task.setting[i] == "temperature(1.0)"
        },
    }


def map_best(task: TaskResult, family: str, floors: Sequence[float]) -> list[Any]:
    """The best setting of a family at each floor."""
    return [task.best(family, floor) for floor in floors]


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _parquet(run: Run) -> bytes:
    import pandas as pd

    frames = []
    for task in run.tasks:
        settings, prompts = task.validity.shape
        frames.append(
            pd.DataFrame(
                {
                    "task": task.question.task.name,
                    "family": np.repeat(np.asarray(task.family, dtype=object), prompts),
                    "setting": np.repeat(np.asarray(task.setting, dtype=object), prompts),
                    "prompt": np.tile(np.arange(prompts), settings),
                    "validity": task.validity.ravel(),
                    "diversity": task.diversity.ravel(),
                    "slack": task.slack.ravel(),
                }
            )
        )
    buffer = io.BytesIO()
    pd.concat(frames, ignore_index=True).to_parquet(buffer, index=False)
    return buffer.getvalue()


def pareto(task: TaskResult, family: str) -> np.ndarray:
    """Numbers of the settings of a family that no other of it beats, by descending validity."""
    members = task.members(family)
    validity, diversity = task.mean_validity[members], task.mean_diversity[members]
    best, kept = -1.0, []
    for place in np.lexsort((-np.nan_to_num(diversity), -validity)):
        if diversity[place] > best:
            best = diversity[place]
            kept.append(members[place])
    return np.asarray(kept, dtype=np.int64)


def _figure(run: Run, tasks: Sequence[TaskResult]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    # Sizes in inches: the legend has a strip of its own below the axes.
    width, height, strip = 4.3 * columns + 0.4 + 2.0 * (columns == 1), 3.8 * lines + 2.2, 1.75
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(0.7 / width, strip / height, 1 - 0.2 / width, 1 - 0.8 / height, wspace=0.2, hspace=0.3)
    handles: dict[str, Any] = {}
    for axis, task in zip(axes.flat, tasks, strict=False):
        for family in task.families():
            points = pareto(task, family)
            x, y = task.mean_validity[points], task.mean_diversity[points]
            if family == ORACLES[3]:
                (handles[family],) = axis.plot(x, y, "*", color="#daa520", markersize=13, clip_on=False, zorder=5)
            elif family in ORACLE_STYLE:
                dash, colour = ORACLE_STYLE[family]
                mark = "D" if family == ORACLES[2] else None
                style = {"linewidth": 1.4, "marker": mark, "markersize": 4}
                (handles[family],) = axis.plot(x, y, MATPLOTLIB_DASH[dash], color=colour, **style)
            elif family == "greedy":
                (handles[family],) = axis.plot(x, y, "kx", clip_on=False)
            else:
                wide = 2.2 if family == "temperature" else 1.1
                (handles[family],) = axis.plot(x, y, "-", color=run.colours[family], linewidth=wide, marker=".", markersize=3)
        if task.bounds is not None:
            x = oracle.VALIDITIES[::4]
            (handles[BOUND],) = axis.plot(x, [task.bound(v) for v in x], color="#bbbbbb", linewidth=1)
        axis.set(xlim=(0, 1.01), ylim=(0, 1.03), title=f"{task.question.task.name}  (|V| = {task.question.valid.size})")
        axis.title.set_size(10)
        axis.grid(alpha=0.25)
        axis.set_xlabel("validity")
        axis.set_ylabel("diversity")
    for axis in list(axes.flat)[len(tasks) :]:
        axis.remove()
    figure.suptitle(f"Validity-diversity frontiers, {run.about['model']['name']}", fontsize=12)
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4 if columns > 1 else 3, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _interactive(run: Run, task: TaskResult) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    hover = "%{text}<br>validity %{x:.3f}, diversity %{y:.3f}<extra>%{fullData.name}</extra>"
    for family in task.families():
        front, members = pareto(task, family), task.members(family)
        knows = family in ORACLES
        dash, colour = ORACLE_STYLE.get(family, ("solid", run.colours.get(family, "#daa520")))
        single = family == ORACLES[3] or family == "greedy"
        figure.add_scatter(
            x=task.mean_validity[front].round(5),
            y=task.mean_diversity[front].round(5),
            text=[task.setting[i] for i in front],
            name=family,
            legendgroup=family,
            mode="markers" if single else "lines+markers",
            line={"color": colour, "dash": dash, "width": 3 if family == "temperature" else 1.6},
            marker={"size": 12 if single else 5, "symbol": "star" if knows and single else "x" if single else "circle"},
            hovertemplate=hover,
        )
        rest = np.setdiff1d(members, front)
        rest = rest[np.isfinite(task.mean_diversity[rest])]
        if not knows and len(rest):
            figure.add_scatter(
                x=task.mean_validity[rest].round(4),
                y=task.mean_diversity[rest].round(4),
                text=[task.setting[i] for i in rest],
                name=family,
                legendgroup=family,
                showlegend=False,
                mode="markers",
                marker={"size": 3, "color": colour, "opacity": 0.3},
                hovertemplate=hover,
            )
    if task.bounds is not None:
        x = oracle.VALIDITIES[::2]
        figure.add_scatter(
            x=x.round(5),
            y=[round(task.bound(v), 5) for v in x],
            name=BOUND,
            mode="lines",
            line={"color": "#bbbbbb", "width": 1.5},
            hovertemplate="no rank cutoff at validity %{x:.3f}<br>exceeds diversity %{y:.3f}<extra></extra>",
        )
    figure.update_layout(
        template="simple_white",
        height=560,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        xaxis={"title": "validity", "range": [0, 1.02], "showgrid": True},
        yaxis={"title": "diversity", "range": [0, 1.04], "showgrid": True},
        legend={"font": {"size": 11}},
    )
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return html


def _page(run: Run) -> str:
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    template = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    tasks = [
        {
            "name": t.question.task.name,
            "summary": _task_summary(t, run.floors),
            "figure": _interactive(run, t),
            "bounds": [t.bound(floor) for floor in run.floors] if t.bounds is not None else None,
            "families": [
                {
                    "name": f,
                    "tried": len(t.members(f)),
                    "oracle": f in ORACLES,
                    "best": map_best(t, f, run.floors),
                }
                for f in t.families()
            ],
        }
        for t in run.tasks
    ]
    page: str = (
        Environment(autoescape=True)
        .from_string(template)
        .render(about=run.about, floors=run.floors, tasks=tasks, plotly=get_plotlyjs())
    )
    return page


def print_table(run: Run, console: Any) -> None:
    """Print the best diversity of each family at each floor, with the setting that gives it."""
    from rich.table import Table

    for task in run.tasks:
        declared = task.question.task
        many = f"{len(task.prompts)} prompts, [95 % interval]" if len(task.prompts) > 1 else "one prompt"
        title = f"{declared.name}: {task.question.valid.size} answers, form {declared.form}, {many}"
        table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1))
        table.add_column("sampler")
        table.add_column("settings", justify="right")
        for floor in run.floors:
            table.add_column(f"best diversity at validity ≥ {floor:g}")
        for family in task.families():
            if family == ORACLES[0]:
                table.add_section()
            cells = [_cell(b) for b in map_best(task, family, run.floors)]
            table.add_row(family, str(len(task.members(family))), *cells)
        if task.bounds is not None:
            cells = [f"{b:.3f}" if b == b else "[dim]not reached[/dim]" for b in map(task.bound, run.floors)]
            table.add_row(BOUND, "", *cells)
        console.print(table)
        console.print(headline(task, run.floor) + "\n", highlight=False)


def _cell(best: Any) -> str:
    if best is None:
        return "[dim]not reached[/dim]"
    spread = "" if math.isnan(best.low) else f" \\[{best.low:.3f}, {best.high:.3f}]"
    return f"{best.diversity:.3f}{spread}\n[dim]{best.setting.replace('[', chr(92) + '[')}[/dim]"
