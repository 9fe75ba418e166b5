"""What a run leaves behind: a table for the terminal, and a folder of files people can open."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval import oracle
from decal.eval.frontier import FLOORS, ORACLES, TaskResult
from decal.eval.grid import is_oracle
from decal.eval.paths import write_files
from decal.eval.ranking import Estimate, Place, Ranking, rank

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b",
    "#e377c2", "#17becf", "#bcbd22", "#f7b6d2", "#393b79", "#31a354",
)  # fmt: skip
SHOWN = 8
"""How many samplers a figure shows in colour, beside the plain ones and the best of a task."""
REST = "#c9c9c9"
ORACLE_STYLE = {ORACLES[0]: ("dot", "#555555"), ORACLES[1]: ("dash", "#000000"), ORACLES[2]: ("dashdot", "#888888")}
MATPLOTLIB_DASH = {"dot": ":", "dash": "--", "dashdot": "-."}
PLAIN = ("temperature", "greedy")
OTHERS = "other samplers"
BOUND = "bound on rank cutoffs"
FEW_CELLS = 24
"""Families times tasks up to which the terminal shows every task's table."""


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

    @cached_property
    def rankings(self) -> list[Ranking]:
        """One at each floor, that of the headlines first."""
        return [rank(self.tasks, floor) for floor in sorted(self.floors, key=lambda floor: (floor != self.floor, floor))]

    @cached_property
    def colours(self) -> dict[str, str]:
        """A colour for each family of samplers, the same on every task and, as far as they go, no two the same.

        First come the best `SHOWN` overall, then the best of each task.
        """
        ranked = [p.family for p in self.rankings[0].places if p.family not in PLAIN]
        winners = [family for family in map(self.winner, self.tasks) if family in ranked]
        order = dict.fromkeys([*ranked[:SHOWN], *winners, *ranked])
        return dict.fromkeys(PLAIN, "#000000") | {f: COLOURS[i % len(COLOURS)] for i, f in enumerate(order) if f}

    def ordered(self, task: TaskResult) -> list[str]:
        """Families of a task, the best of the ranking first, oracles last."""
        ranked = [p.family for p in self.rankings[0].places]
        families = task.families()
        others = (f for f in families if is_oracle(f) and f not in ORACLES)
        return [f for f in (*ranked, *ORACLES, *others) if f in families]

    def winner(self, task: TaskResult) -> str | None:
        """The family that is best on a task at the floor of the headlines; None if none reaches it."""
        reached = [(b.diversity, f) for f in task.families() if not is_oracle(f) and (b := task.best(f, self.floor))]
        return max(reached, key=lambda pair: pair[0])[1] if reached else None

    def shown(self, task: TaskResult) -> set[str]:
        """What figures of a task show in colour: oracles, plain samplers, the best overall and the best here."""
        ranked = [p.family for p in self.rankings[0].places if p.family not in PLAIN]
        return {*ORACLES, *PLAIN, *ranked[:SHOWN], self.winner(task) or "temperature"}


def write(run: Run, folder: Path) -> list[Path]:
    """Write results.json, settings.parquet, figures and report.html; each file atomically.

    Raises:
        DecalError: the folder can't be written, or the disk is full.
    """
    files: dict[str, Callable[[], bytes]] = {
        "results.json": lambda: json.dumps(summary(run), indent=1, allow_nan=False).encode(),
        "settings.parquet": lambda: _parquet(run),
        "ranking.png": lambda: _ranking_figure(run),
        "frontiers.png": lambda: _figure(run, run.tasks),
    }
    for task in run.tasks:
        files[f"frontier-{task.question.task.name}.png"] = partial(_figure, run, [task])
    files["report.html"] = lambda: _page(run).encode()
    return write_files(folder, files)


def overall(ranking: Ranking) -> str:
    """What a ranking says, in a sentence or two."""
    many = len(ranking.prompts)
    where = f"averaged over {many} tasks" if many > 1 else "on one task"
    best, plain = ranking.places[0], ranking.find("temperature")
    if not best.reached:
        return f"No setting reaches validity {ranking.floor:g} on any task."
    parts = [f"At validity ≥ {ranking.floor:g}, {where}, "]
    parts.append(f"plain temperature reaches diversity {plain.score.value:.2f}, " if plain else "")
    parts.append(f"the best sampler {best.score.value:.2f} ({best.family}")
    parts.append(f", {_signed(best.gain)} against temperature)" if best.gain else ")")
    parts.append(f", no rank cutoff can exceed {ranking.bound:.2f}" if ranking.bound is not None else "")
    parts.append("; 1.00 is possible.")
    if ranking.contenders > 1:
        parts.append(f" {ranking.contenders} samplers may be the best: their rank's interval contains 1.")
    if one := ranking.advice:
        on = f" on {one.reached} of {many} tasks" if many > 1 else ""
        parts.append(f" A setting to use: {one.setting}, which is that valid{on} and reaches diversity {one.score:.2f}.")
    return "".join(parts)


def _ends(estimate: Estimate, form: str) -> str:
    """An interval as text, with a space before it; nothing if there is none."""
    return "" if estimate.low is None else f" [{format(estimate.low, form)}, {format(estimate.high, form)}]"


def _scored(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f}{_ends(estimate, '.2f')}"


def _signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:+.3f}{_ends(estimate, '.2f')}"


def _place(place: Place, tasks: int) -> dict[str, str]:
    """A line of a ranking over so many tasks as text."""
    held = place.held
    return {
        "rank": "" if place.rank is None else f"{place.rank.value:.0f}",
        "ranks": "" if place.rank is None or place.rank.low is None else f"{place.rank.low:.0f}–{place.rank.high:.0f}",
        "family": place.family,
        "score": _scored(place.score),
        "gain": _signed(place.gain),
        "best": "" if place.best is None else f"{place.best:.2f}",
        "held": "" if held is None else _scored(held.score),
        "held_value": "" if held is None else f"{held.score.value:.3f}",
        "validity": "" if held is None or held.validity is None else f"{held.validity:.2f} (≥ {held.lowest:.2f})",
        "reached": f"{place.reached}/{tasks}",
        "settings": str(place.settings) + (f" ({place.distinct})" if place.distinct < place.settings else ""),
    }


def budgets(ranking: Ranking) -> str:
    """How many settings each sampler had, in a sentence."""
    others = {
        "greedy": "has nothing to set",
        "temperature": "has a grid of its own",
    }
    unusual = [f"{f} {n}, which {others[f]}" if f in others else f"{f} {n}" for f, n in ranking.unusual_settings.items()]
    same = f"Every sampler had {ranking.usual_settings} settings" + (f", except {'; '.join(unusual)}" if unusual else "")
    return f"{same}; in brackets how many of them differed in what they gave, where that is fewer."


def headline(task: TaskResult, floor: float) -> str:
    """What the frontier of a task says, in a sentence."""
    samplers = [f for f in task.families() if not is_oracle(f)]
    reached = [(b.diversity, b.setting) for f in samplers if (b := task.best(f, floor))]
    if not reached:
        return f"No setting reaches validity {floor:g}."
    plain = task.best("temperature", floor)
    bound = task.bound(floor)
    most, setting = max(reached)
    parts = [f"At validity ≥ {floor:g} plain temperature reaches diversity {plain.diversity:.2f}" if plain else
             f"At validity ≥ {floor:g} no plain temperature is left"]  # fmt: skip
    parts.append(f"the best sampler {most:.2f} ({setting})")
    if not math.isnan(bound):
        parts.append(f"no rank cutoff can exceed {bound:.2f}")
    return ", ".join(parts) + "; 1.00 is possible."


def summary(run: Run) -> dict[str, Any]:
    """The run as JSON: best settings at each floor, without the single settings."""
    return {
        **run.about,
        "floors": list(run.floors),
        "rankings": [_ranking_summary(r) for r in run.rankings],
        "tasks": [_task_summary(t, run.floors) for t in run.tasks],
    }


def _ranking_summary(ranking: Ranking) -> dict[str, Any]:
    return {"headline": overall(ranking), "intervals": ranking.basis, "budget": budgets(ranking), **asdict(ranking)}


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
        shown = run.shown(task)
        # Worst first, so that the best lie on top.
        for family in reversed(run.ordered(task)):
            points = pareto(task, family)
            x, y = task.mean_validity[points], task.mean_diversity[points]
            if family == ORACLES[3]:
                (handles[family],) = axis.plot(x, y, "*", color="#daa520", markersize=13, clip_on=False, zorder=5)
            elif family in ORACLE_STYLE:
                dash, colour = ORACLE_STYLE[family]
                mark = "D" if family == ORACLES[2] else None
                style = {"linewidth": 1.4, "marker": mark, "markersize": 4}
                (handles[family],) = axis.plot(x, y, MATPLOTLIB_DASH[dash], color=colour, **style)
            elif is_oracle(family):
                (handles[family],) = axis.plot(x, y, "-^", color="#daa520", markersize=4, linewidth=1)
            elif family == "greedy":
                (handles[family],) = axis.plot(x, y, "kx", clip_on=False)
            elif family in shown:
                wide = 2.2 if family == "temperature" else 1.3
                style = {"linewidth": wide, "marker": ".", "markersize": 3, "zorder": 3}
                (handles[family],) = axis.plot(x, y, "-", color=run.colours[family], **style)
            else:
                (handles[OTHERS],) = axis.plot(x, y, "-", color=REST, linewidth=0.6, zorder=1)
        if task.bounds is not None:
            x = oracle.VALIDITIES[::4]
            (handles[BOUND],) = axis.plot(x, [task.bound(v) for v in x], color="#8d8dff", linewidth=1, zorder=2)
        axis.set(xlim=(0, 1.01), ylim=(0, 1.03), title=f"{task.question.task.name}  (|V| = {task.question.valid.size})")
        axis.title.set_size(10)
        axis.grid(alpha=0.25)
        axis.set_xlabel("validity")
        axis.set_ylabel("diversity")
    for axis in list(axes.flat)[len(tasks) :]:
        axis.remove()
    figure.suptitle(f"Validity-diversity frontiers, {run.about['model']['name']}", fontsize=12)
    told = sorted(name for name in handles if is_oracle(name) and name not in ORACLES)
    order = [name for name in (*run.colours, OTHERS, *ORACLES, *told, BOUND) if name in handles]
    figure.legend([handles[f] for f in order], order, loc="lower center", ncols=4 if columns > 1 else 3, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _ranking_figure(run: Run) -> bytes:
    """Scores and intervals of all samplers at the floor of the headlines, best first; oracles below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranking = run.rankings[0]
    lines = [*ranking.places, *ranking.oracles]
    height = 0.22 * len(lines) + 1.9
    figure = Figure(figsize=(9, height))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    figure.subplots_adjust(2.4 / 9, 1.0 / height, 1 - 0.2 / 9, 1 - 0.55 / height)
    # Oracles stand apart by a line.
    at = [i + (i >= len(ranking.places)) * 0.6 for i in range(len(lines))]
    for y, place in zip(at, lines, strict=True):
        colour = "#888888" if place.rank is None else "#000000" if place.family == "temperature" else "#1f77b4"
        score = place.score
        if score.low is not None and score.high is not None:
            axis.plot([score.low, score.high], [y, y], "-", color=colour, linewidth=1.6, alpha=0.7)
        (dot,) = axis.plot(score.value, y, "o", color=colour, markersize=5, zorder=3)
        if place.held:
            (ring,) = axis.plot(place.held.score.value, y, "o", mfc="none", mec=colour, markersize=8, zorder=2)
    handles = {"diversity, and its interval" if lines[0].score.low is not None else "diversity": dot}
    if lines[0].held:
        handles["on held-out prompts"] = ring
    if plain := ranking.find("temperature"):
        handles["plain temperature"] = axis.axvline(plain.score.value, color="#000000", linewidth=0.8, linestyle=":", zorder=1)
    if ranking.bound is not None:
        handles[BOUND] = axis.axvline(ranking.bound, color="#8d8dff", linewidth=1.2, zorder=1)
    axis.set_yticks(at, [p.family for p in lines], fontsize=8)
    axis.set(xlim=(-0.01, 1.01), ylim=(at[-1] + 0.7, -0.7))
    many = len(ranking.prompts)
    axis.set_xlabel(f"diversity at validity ≥ {ranking.floor:g}, " + (f"mean over {many} tasks" if many > 1 else "one task"))
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    figure.suptitle(f"Samplers at matched validity, {run.about['model']['name']}", fontsize=12)
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _interactive(run: Run, task: TaskResult) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    hover = "%{text}<br>validity %{x:.3f}, diversity %{y:.3f}<extra>%{fullData.name}</extra>"
    shown = run.shown(task)
    # The legend lists what is visible first.
    for family in sorted(run.ordered(task), key=lambda family: family not in shown):
        visible = True if family in shown else "legendonly"
        front, members = pareto(task, family), task.members(family)
        knows = is_oracle(family)
        dash, colour = ORACLE_STYLE.get(family, ("solid", run.colours.get(family, "#daa520")))
        single = family == ORACLES[3] or family == "greedy"
        figure.add_scatter(
            x=task.mean_validity[front].round(5),
            y=task.mean_diversity[front].round(5),
            text=[task.setting[i] for i in front],
            name=family,
            legendgroup=family,
            visible=visible,
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
                visible=visible,
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
            legendrank=1,
            mode="lines",
            line={"color": "#8d8dff", "width": 1.5},
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

    template = (Path(__file__).parent / "frontier.html.jinja").read_text(encoding="utf-8")
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
                    "oracle": is_oracle(f),
                    "best": map_best(t, f, run.floors),
                }
                for f in run.ordered(t)
            ],
        }
        for t in run.tasks
    ]
    page: str = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            about=run.about,
            floors=run.floors,
            rankings=[
                {
                    "floor": f"{r.floor:g}",
                    "headline": overall(r),
                    "budget": budgets(r),
                    "basis": r.basis,
                    "tasks": len(r.prompts),
                    "drawn": any(p.best is not None for p in r.places),
                    "held": any(p.held for p in r.places),
                    "held_tasks": sum(d > 1 for d in r.prompts),
                    "places": [_place(p, len(r.prompts)) for p in r.places],
                    "oracles": [_place(p, len(r.prompts)) for p in r.oracles],
                    "bound": None if r.bound is None else f"{r.bound:.3f}",
                }
                for r in run.rankings
            ],
            ranking_figure=base64.b64encode(_ranking_figure(run)).decode(),
            tasks=tasks,
            plotly=get_plotlyjs(),
        )
    )
    return page


def print_table(run: Run, console: Any) -> None:
    """Print the ranking at the floor of the headlines and a line for each task; if that is short, all best settings too."""
    families = len(run.rankings[0].places)
    _print_ranking(run.rankings[0], console)
    for task in run.tasks:
        declared = task.question.task
        many = f"{len(task.prompts)} prompts" if len(task.prompts) > 1 else "one prompt"
        console.print(f"[bold]{declared.name}: {task.question.valid.size} answers, {many}[/bold]", highlight=False)
        if families * len(run.tasks) <= FEW_CELLS:
            _print_task(run, task, console)
        console.print(headline(task, run.floor) + "\n", highlight=False)


def _print_ranking(ranking: Ranking, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(overall(ranking) + "\n", highlight=False, markup=False)
    headings = {"rank": "", "family": "sampler", "score": "diversity", "gain": "over temperature", "held_value": "held-out"}
    if console.width >= 110:
        headings |= {"validity": "held-out validity", "best": "P(best)", "ranks": "ranks", "settings": "settings"}
    headings["reached"] = "tasks"
    lines = [_place(place, len(ranking.prompts)) for place in (*ranking.places, *ranking.oracles)]
    headings = {key: heading for key, heading in headings.items() if any(line[key] for line in lines)}
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for key, heading in headings.items():
        table.add_column(heading, justify="left" if key == "family" else "right", no_wrap=key != "family")
    for i, line in enumerate(lines):
        if i == len(ranking.places):
            table.add_row()
        table.add_row(*(Text(line[key]) for key in headings), style="" if line["rank"] else "dim")
    if ranking.bound is not None:
        bound = {"family": BOUND, "score": f"{ranking.bound:.3f}"}
        table.add_row(*(bound.get(key, "") for key in headings), style="dim")
    console.print(table)
    console.print(f"\n{ranking.basis} {budgets(ranking)}\n", highlight=False, markup=False, style="dim")


def _print_task(run: Run, task: TaskResult, console: Any) -> None:
    """The best diversity of each family at each floor, with the setting that gives it."""
    from rich.table import Table

    table = Table(padding=(0, 1))
    table.add_column("sampler")
    table.add_column("settings", justify="right")
    for floor in run.floors:
        table.add_column(f"best diversity at validity ≥ {floor:g}")
    for family in run.ordered(task):
        if family == ORACLES[0]:
            table.add_section()
        cells = [_cell(b) for b in map_best(task, family, run.floors)]
        table.add_row(family, str(len(task.members(family))), *cells)
    if task.bounds is not None:
        cells = [f"{b:.3f}" if b == b else "[dim]not reached[/dim]" for b in map(task.bound, run.floors)]
        table.add_row(BOUND, "", *cells)
    console.print(table)
    console.print("Intervals here are Student's, over prompts.", style="dim", highlight=False)


def _cell(best: Any) -> str:
    if best is None:
        return "[dim]not reached[/dim]"
    spread = "" if math.isnan(best.low) else f" \\[{best.low:.3f}, {best.high:.3f}]"
    return f"{best.diversity:.3f}{spread}\n[dim]{best.setting.replace('[', chr(92) + '[')}[/dim]"
