"""What `decal score` leaves behind: a table for the terminal, and a folder of files people can open."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decal.eval.metrics import Metric
from decal.eval.paths import write_files
from decal.eval.score import Comparison, Group, Results, Score

HEADLINES = (
    "validity", "diversity_corrected", "coverage", "distinct_at_m", "distinct_k", "hill_1_corrected", "distance", "self_bleu",
)  # fmt: skip
"""Metrics of the terminal's table and of the figure."""
COLUMNS = 3
"""Panels of the figure side by side."""
LONGEST = 40
"""Characters of a group's label that a figure shows."""


def write(results: Results, about: dict[str, Any], folder: Path) -> list[Path]:
    """Write scores.json, scores.parquet and score.html; each file atomically.

    Args:
        about: file, versions, seed, embedder; JSON-able.

    Raises:
        DecalError: the folder can't be written, or the disk is full.
    """
    files: dict[str, Callable[[], bytes]] = {
        "scores.json": lambda: json.dumps(summary(results, about), indent=1, allow_nan=False).encode(),
        "scores.parquet": lambda: _parquet(results),
        "score.html": lambda: _page(results, about).encode(),
    }
    return write_files(folder, files)


def summary(results: Results, about: dict[str, Any]) -> dict[str, Any]:
    """Everything but the numbers of single prompts, JSON-able."""
    return {
        **about,
        "validity": results.validity or None,
        "answers": results.answers,
        "over": results.over,
        "k": results.k,
        "m": results.m,
        "notes": list(results.notes),
        "metrics": {metric.name: asdict(metric) for metric in results.reported},
        "groups": [
            {
                "model": group.model,
                "setting": group.setting,
                "prompts": len(group.cells),
                "outputs": sum(cell.total for cell in group.cells.values()),
                "measured_per_prompt": [min(group.sizes), max(group.sizes)],
                "scores": {name: asdict(score) for name, score in group.scores.items()},
            }
            for group in results.groups
        ],
        "comparisons": [
            {
                "group": comparison.group,
                "baseline": comparison.baseline,
                "prompts": comparison.prompts,
                "thinned": comparison.thinned,
                "differences": {name: asdict(score) for name, score in comparison.differences.items()},
            }
            for comparison in results.comparisons
        ],
    }


def _parquet(results: Results) -> bytes:
    """A row for every prompt of every group."""
    import pandas as pd

    frames = []
    for group in results.groups:
        cells = {
            "model": group.model,
            "setting": group.setting,
            "prompt": list(group.cells),
            "outputs": [cell.total for cell in group.cells.values()],
            "measured": group.sizes,
        }
        frames.append(pd.DataFrame(cells | dict(group.values)))
    buffer = io.BytesIO()
    pd.concat(frames, ignore_index=True).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _number(value: float) -> str:
    """Three decimals of small numbers, fewer of large ones."""
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def _value(score: Score, many: int, signed: bool = False) -> str:
    """A score as text; with the number of prompts it is for, if that is not all of them."""
    if score.value is None:
        return f"infinite on {score.infinite}" if score.infinite else "undefined"
    sign = "+" if signed and score.value >= 0 else ""
    return sign + _number(score.value) + (f" ({score.prompts} of {many} prompts)" if score.prompts < many else "")


def _ends(score: Score) -> str:
    """The interval of a score as text; nothing if there is none."""
    return "" if score.low is None or score.high is None else f"[{_number(score.low)}, {_number(score.high)}]"


def _headlines(results: Results) -> list[Metric]:
    """Metrics of `HEADLINES` that some group has a number for."""
    found = {metric.name: metric for metric in results.reported}
    return [found[n] for n in HEADLINES if n in found and any(g.scores[n].value is not None for g in results.groups)]


def _label(metric: Metric, results: Results) -> str:
    """The heading of a metric, with its k or m."""
    return {"distinct_at_m": f"distinct at m = {results.m}", "distinct_k": f"distinct_k, k = {results.k}"}.get(
        metric.name, metric.label
    )


def _measured(group: Group) -> str:
    """How many prompts and outputs a group has, as text."""
    few, most = min(group.sizes), max(group.sizes)
    return f"{len(group.cells)} × {few}" + (f"–{most}" if most > few else "")


def _figure(results: Results) -> bytes:
    """The headline metrics of all groups with their intervals, a panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown, groups = _headlines(results), results.groups
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.6 * columns + 1.6, rows * (0.26 * len(groups) + 1.1) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, metric in zip(axes, shown, strict=False):
        for y, group in enumerate(groups):
            score = group.scores[metric.name]
            if score.value is None:
                continue
            axis.plot(score.value, y, "o", color="#1f77b4", markersize=5, zorder=3)
            if score.low is not None:
                axis.plot([score.low, score.high], [y, y], "-", color="#1f77b4", linewidth=1.6, alpha=0.7)
        axis.set_title(_label(metric, results), fontsize=10)
        axis.set_yticks(range(len(groups)), [_short(group.label) for group in groups], fontsize=8)
        axis.set_ylim(len(groups) - 0.4, -0.6)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.25)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _short(label: str) -> str:
    """A label as matplotlib shows it: not too long, and no dollar sign begins a formula."""
    return (label if len(label) <= LONGEST else label[: LONGEST - 1] + "…").replace("$", r"\$")


def _page(results: Results, about: dict[str, Any]) -> str:
    from jinja2 import Environment

    template = (Path(__file__).parent / "score.html.jinja").read_text(encoding="utf-8")
    page: str = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            about=about,
            results=results,
            figure=base64.b64encode(_figure(results)).decode(),
            headlines=[_label(metric, results) for metric in _headlines(results)],
            groups=[{"label": group.label, "measured": _measured(group)} for group in results.groups],
            metrics=[
                {
                    "label": _label(metric, results),
                    "meaning": metric.meaning,
                    "bias": metric.bias,
                    "cells": [_cell(g.scores[metric.name], len(g.cells)) for g in results.groups],
                    "intervals": list(dict.fromkeys(g.scores[metric.name].interval for g in results.groups)),
                    "differences": [_difference(c, metric.name) for c in results.comparisons],
                }
                for metric in results.reported
            ],
        )
    )
    return page


def _cell(score: Score, many: int) -> dict[str, str]:
    return {"value": _value(score, many), "ends": _ends(score)}


def _difference(comparison: Comparison, name: str) -> dict[str, Any]:
    score = comparison.differences[name]
    apart = score.low is not None and score.high is not None and (score.low > 0 or score.high < 0)
    return {"value": _value(score, comparison.prompts, signed=True), "ends": _ends(score), "apart": apart}


def print_table(results: Results, console: Any) -> None:
    """Print the headline metrics of every group, and the notes."""
    from rich.table import Table
    from rich.text import Text

    shown = _headlines(results)
    table = Table(padding=(0, 1))
    table.add_column("group", overflow="fold")
    table.add_column("prompts × outputs", justify="right")
    for metric in shown:
        table.add_column(_label(metric, results), justify="right")
    for group in results.groups:
        cells = []
        for metric in shown:
            score = group.scores[metric.name]
            cells.append(Text.assemble(_value(score, len(group.cells)), ("\n" + _ends(score), "dim")))
        table.add_row(Text(group.label), _measured(group), *cells)
    console.print(table)
    for note in results.notes:
        console.print(note, highlight=False, markup=False, style="dim")
