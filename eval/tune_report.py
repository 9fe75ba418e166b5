"""What tuning leaves behind: the chain to use, in words, in JSON, as a figure and on a page."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decal.eval.paths import write_files
from decal.eval.tune import ENOUGH, FEWEST, Advice, Held, Results, Tuning, spread
from decal.samplers.chain import parse

PAGE = "tuning.html"
PLAIN = "temperature(1.0)"
"""The chain to compare with."""


@dataclass(frozen=True)
class TuneRun:
    """A finished search.

    Attributes:
        about: model, seed, budget, versions, times; JSON-able.
        results: every setting on every prompt.
        tuning: what was found.
    """

    about: dict[str, Any]
    results: Results
    tuning: Tuning

    @property
    def ranked(self) -> list[tuple[str, Advice]]:
        """Samplers that reach the floor, first those that also do where they had no part; then by their diversity there."""
        found = [(f, a) for f, a in self.tuning.families.items() if a is not None]

        def order(pair: tuple[str, Advice]) -> tuple[bool, float, str]:
            held, advice = pair[1].prompts, pair[1]
            if not np.isfinite(held.validity).all():
                return len(held.validity) > 1, -advice.diversity, pair[0]
            return bool(held.validity.mean() < self.tuning.floor), -float(held.diversity.mean()), pair[0]

        return sorted(found, key=order)

    @property
    def missed(self) -> list[str]:
        """Samplers that don't reach the floor."""
        return [family for family, advice in self.tuning.families.items() if advice is None]


def write(run: TuneRun, folder: Path) -> list[Path]:
    """Write tuning.json, settings.parquet, tuning.png and tuning.html; each file atomically.

    Raises:
        DecalError: the folder can't be written, or the disk is full.
    """
    files: dict[str, Callable[[], bytes]] = {
        "tuning.json": lambda: json.dumps(summary(run), indent=1, allow_nan=False).encode(),
        "settings.parquet": lambda: _parquet(run.results),
        "tuning.png": lambda: _figure(run),
        PAGE: lambda: _page(run).encode(),
    }
    return write_files(folder, files)


def cost(chain: str, prompts: int) -> str:
    """What a token costs, in passes of the model."""
    needs = parse(chain).needs
    if "prompts" not in needs:
        return "no forward pass more than plain sampling"
    return f"{prompts} rows of the model a token, where plain sampling takes 1"


def sentences(run: TuneRun) -> list[str]:
    """What was found, for people."""
    tuning, prompts = run.tuning, run.results.validity.shape[2]
    if tuning.best is None:
        most = float(run.results.mean[0].max())
        return [f"No setting reaches a mean validity of {tuning.floor:g}: the most valid one has {most:.3f}. Nothing to use."]
    best = tuning.best
    said = [f"Use {best.chain}", _usage(best.chain)]
    said.append(f"Where it was chosen: validity {best.validity:.3f}, diversity {best.diversity:.3f}.{_plain(run)}")
    for over, held in (("prompts", best.prompts), ("tasks", best.tasks)):
        if len(held.validity) >= 2:
            part = "left out, though what is chosen reads them all" if held.entangled else "that had no part in choosing it"
            said.append(f"On {over} {part}: {_both(held)}.")
    said.append(f"It costs {cost(best.chain, prompts)}.")
    said.append(_promise(run))
    return said


def _usage(chain: str) -> str:
    """How to use a chain in Python."""
    parsed = parse(chain)
    said = f"In Python: {parsed.usage}."
    if "prompts" in parsed.needs:
        said += " The prompts of a task are in tuning.json."
    if "ends" in parsed.needs:
        said += " The tokens are those at which an answer of the task ends."
    return said


def _plain(run: TuneRun) -> str:
    """What plain sampling gives, to compare with."""
    if PLAIN not in run.results.setting:
        return ""
    validity, diversity = (float(v[run.results.setting.index(PLAIN)]) for v in run.results.mean)
    return f" Plain sampling, {PLAIN}: validity {validity:.3f}, diversity {diversity:.3f}."


def _promise(run: TuneRun) -> str:
    tuning = run.tuning
    what = f"further {tuning.over}" + (" of these tasks" if tuning.over == "prompts" else " like these")
    promised = tuning.promised
    if promised is not None:
        held = promised.tasks if tuning.over == "tasks" else promised.prompts
        same = tuning.best is not None and promised.chain == tuning.best.chain
        which = "it" if same else f"the more careful {promised.chain} (diversity {promised.diversity:.3f})"
        sure = "can be promised at 95 %, if they differ about normally"
        return f"For {which}, a mean validity of at least {tuning.floor:g} on {what} {sure}: {_both(held)}."
    assert tuning.best is not None
    held = tuning.best.tasks if tuning.over == "tasks" else tuning.best.prompts
    if held.entangled:
        return (
            f"Nothing can be promised for {what}: what is chosen reads the other prompts of a task, so they are no independent "
            "trials. With several tasks, ask for --promise tasks."
        )
    if not np.isfinite(held.validity).all() and len(held.validity) > 1:
        return f"Nothing can be promised for {what}: without some of them no setting reaches {tuning.floor:g}."
    if held.promise is None:
        given = f"{len(held.validity)} given"
        return f"Nothing can be promised for {what}: it takes {ENOUGH} or more, with a choice without each; {given}."
    return (
        f"A mean validity of {tuning.floor:g} on {what} can't be promised: at 95 % the chain above has {held.promise:.3f}, and "
        "none of the more careful ones tried gets there. Give more of them, or ask for less."
    )


def _both(held: Held) -> str:
    return f"validity {_mean(held.validity, held.entangled)}, diversity {_mean(held.diversity, held.entangled)}"


def _mean(sample: np.ndarray, entangled: bool = False) -> str:
    known = sample[np.isfinite(sample)]
    if not len(known):
        return "unknown"
    low, high = (math.nan, math.nan) if entangled else spread(sample)
    missing = f", none reached it on {len(sample) - len(known)} of {len(sample)}" if len(known) < len(sample) else ""
    return f"{known.mean():.3f}" + (f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else "") + missing


def summary(run: TuneRun) -> dict[str, Any]:
    """The search as JSON."""
    return {
        **run.about,
        "floor": run.tuning.floor,
        "tasks": list(run.results.tasks),
        "prompts": dict(zip(run.results.tasks, map(list, run.results.prompts), strict=False)),
        "settings": len(run.results.setting),
        "promise_over": run.tuning.over,
        "says": sentences(run),
        "best": run.tuning.best and _advice(run.tuning.best),
        "promised": run.tuning.promised and _advice(run.tuning.promised),
        "families": {family: advice and _advice(advice) for family, advice in run.tuning.families.items()},
    }


def _advice(advice: Advice) -> dict[str, Any]:
    return {
        "family": advice.family,
        "chain": advice.chain,
        "target": advice.target,
        "validity": advice.validity,
        "diversity": advice.diversity,
        "held_out_prompts": _held(advice.prompts),
        "held_out_tasks": _held(advice.tasks),
    }


def _held(held: Held) -> dict[str, Any]:
    validity = [float(v) if math.isfinite(v) else None for v in held.validity]
    diversity = [float(v) if math.isfinite(v) else None for v in held.diversity]
    return {"validity": validity, "diversity": diversity, "independent": not held.entangled}


def _parquet(results: Results) -> bytes:
    import pandas as pd

    settings, tasks, prompts = results.validity.shape
    s, t, d = (index.ravel() for index in np.indices((settings, tasks, prompts)))
    names = {"family": np.asarray(results.family)[s], "setting": np.asarray(results.setting)[s]}
    numbers = {"validity": results.validity.ravel(), "diversity": results.diversity.ravel()}
    buffer = io.BytesIO()
    pd.DataFrame({**names, "task": np.asarray(results.tasks)[t], "prompt": d, **numbers}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _figure(run: TuneRun) -> bytes:
    """Mean validity and diversity of every setting, what was chosen, and where it lands on prompts it wasn't chosen on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    validity, diversity = run.results.mean
    axis.plot(validity, diversity, ".", color="#c9c9c9", markersize=4, label=f"{len(validity)} settings")
    axis.axvline(run.tuning.floor, color="#555555", linewidth=0.8, linestyle=":")
    best, promised = run.tuning.best, run.tuning.promised
    shown = [(best, "#d62728", "to use")]
    if promised and best and promised.chain != best.chain:
        shown.append((promised, "#2ca02c", "promised"))
    for advice, colour, what in shown:
        if advice is None:
            continue
        axis.plot(advice.validity, advice.diversity, "o", color=colour, markersize=7, label=f"{what}, where chosen")
        known = np.isfinite(advice.prompts.validity)
        if known.all() and len(known) >= FEWEST and not advice.prompts.entangled:
            v, d = advice.prompts.validity, advice.prompts.diversity
            ends = [np.abs(np.asarray(spread(x)) - x.mean())[:, None] for x in (v, d)]
            label = f"{what}, on prompts left out"
            axis.errorbar(v.mean(), d.mean(), ends[1], ends[0], fmt="s", color=colour, markersize=5, capsize=3, label=label)
    axis.set(xlabel="mean validity", ylabel="mean diversity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axis.set_title(f"{run.about['model']['name']}: {', '.join(run.results.tasks)}"[:90], fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def rows(run: TuneRun) -> list[tuple[str, ...]]:
    """A line for each sampler: its best chain, where it was chosen, and on prompts and tasks without a part."""
    prompts = run.results.validity.shape[2]
    found: list[tuple[str, ...]] = []
    for family, a in run.ranked:
        held = [_mean(v, h.entangled) for h in (a.prompts, a.tasks) for v in (h.validity, h.diversity)]
        passes = str(prompts) if "prompts" in parse(a.chain).needs else "1"
        found.append((family, a.chain, f"{a.validity:.3f}", f"{a.diversity:.3f}", *held, passes))
    return found


HEADINGS = (
    "sampler",
    "its best chain",
    "validity where chosen",
    "diversity where chosen",
    "validity, prompts left out",
    "diversity, prompts left out",
    "validity, tasks left out",
    "diversity, tasks left out",
    "rows of the model a token",
)


def _page(run: TuneRun) -> str:
    from jinja2 import Environment

    template = (Path(__file__).parent / "tune.html.jinja").read_text(encoding="utf-8")
    page: str = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            run=run,
            says=sentences(run),
            headings=HEADINGS,
            rows=rows(run),
            figure=base64.b64encode(_figure(run)).decode(),
        )
    )
    return page


SHOWN = 12


def print_table(run: TuneRun, console: Any) -> None:
    """Print what was found, and the best samplers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("sampler", "its best chain", "validity", "diversity"):
        table.add_column(heading)
    one = run.results.validity.shape[2] == 1
    for family, chain, *numbers in rows(run)[:SHOWN]:
        table.add_row(Text(family), Text(chain), *(numbers[:2] if one else numbers[2:4]))
    if run.ranked:
        where = (
            "where chosen, there is one prompt only" if one else "on prompts left out, chosen without them within each sampler"
        )
        console.print(f"Validity and diversity {where}:", highlight=False)
        console.print(table)
        left, missed = len(run.ranked) - SHOWN, len(run.missed)
        more = [f"{left} more samplers on the page"] if left > 0 else []
        more += [f"{missed} of all samplers can't reach {run.tuning.floor:g}"] if missed else []
        console.print("; ".join(more) + ("." if more else ""), highlight=False)
        console.print()
    for sentence in sentences(run):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
