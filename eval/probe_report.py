"""What a probe leaves behind: numbers, a table of tokens, a figure, and a page with a ribbon of tokens for each prefix."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decal.eval.paths import write_files
from decal.eval.probe import Node, Swept, Tree

PAGE = "report.html"
KINDS = {True: "valid", False: "invalid", None: "unknown"}
SHOWN = 3
"""Completions of a token that the page shows."""


def write(tree: Tree, folder: Path) -> list[Path]:
    """Write tree.json, tokens.parquet, precision_recall.png and report.html; each file atomically.

    Raises:
        DecalError: the folder can't be written, or the disk is full.
    """
    files: dict[str, Callable[[], bytes]] = {
        "tree.json": lambda: json.dumps(summary(tree), indent=1, allow_nan=False).encode(),
        "tokens.parquet": lambda: _parquet(tree),
        "precision_recall.png": lambda: _figure(tree),
        PAGE: lambda: _page(tree).encode(),
    }
    return write_files(folder, files)


def summary(tree: Tree) -> dict[str, Any]:
    """The probe as JSON, with every completion."""
    return {
        **tree.about,
        "prompt": tree.prompt,
        "judge": tree.judge,
        "plan": asdict(tree.plan),
        "counts": tree.counts(),
        "nodes": [node.summary() | {"tokens": [asdict(token) for token in node.tokens]} for node in tree.nodes],
    }


def _parquet(tree: Tree) -> bytes:
    import pandas as pd

    rows = [
        {
            "node": node.number,
            "depth": len(node.prefix),
            "prefix": node.text,
            "token": token.token,
            "text": token.text,
            "rank": token.rank,
            "logit": token.logit,
            "probability": token.probability,
            "valid": token.valid,
            "ends": token.ends,
            "completions": len(token.completions),
            "valid_completions": sum(c.judgement.valid is True for c in token.completions),
            "unknown_completions": sum(c.judgement.valid is None for c in token.completions),
        }
        for node in tree.nodes
        for token in node.tokens
    ]
    buffer = io.BytesIO()
    pd.DataFrame(rows).astype({"valid": "boolean"}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _name(node: Node) -> str:
    return repr(node.text) if node.prefix else "start"


def _figure(tree: Tree) -> bytes:
    """Precision over recall of every cutoff that ends behind a valid step, a line for each prefix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for node in tree.nodes:
        order = node.order
        if order is not None:
            # A dollar sign would begin a formula.
            label = f"{_name(node)[:40]}, AP {order.average_precision('unit'):.2f}".replace("$", r"\$")
            axis.plot(order.recall("unit"), order.precision, ".-", markersize=4, linewidth=1.2, label=label)
    axis.axhline(0.8, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, 1.02), ylim=(0, 1.03), xlabel="recall of the swept valid steps", ylabel="precision")
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="lower left")
    axis.set_title("Cutoffs of the ranking", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _page(tree: Tree) -> str:
    from jinja2 import Environment

    template = (Path(__file__).parent / "probe.html.jinja").read_text(encoding="utf-8")
    page: str = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            tree=tree,
            counts=tree.counts(),
            figure=base64.b64encode(_figure(tree)).decode(),
            nodes=[
                node.summary() | {"name": _name(node), "tokens": [_cell(token) for token in node.tokens]} for node in tree.nodes
            ],
        )
    )
    return page


def _cell(token: Swept) -> dict[str, str]:
    lines = [f"rank {token.rank}, probability {token.probability:.3g}, {KINDS[token.valid]}"]
    for completion in token.completions[:SHOWN]:
        mark = {True: "✓", False: "✗", None: "?"}[completion.judgement.valid]
        why = f" ({completion.judgement.reason})" if completion.judgement.reason else ""
        lines.append(f"{mark} {completion.text!r}{'' if completion.ended else ' …'}{why}")
    if len(token.completions) > SHOWN:
        lines.append(f"and {len(token.completions) - SHOWN} more")
    return {"kind": KINDS[token.valid], "text": token.text.replace("\n", "⏎").replace(" ", "␣"), "title": "\n".join(lines)}


def print_table(tree: Tree, console: Any) -> None:
    """Print a line for each prefix."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("after", "swept", "steps", "valid", "average precision", "recall at precision 0.8", "entropy of valid"):
        table.add_column(heading, justify="left" if heading == "after" else "right")
    for node in tree.nodes:
        told = node.summary()
        numbers = [told[name] for name in ("average_precision", "recall_at_precision_08", "entropy_of_valid")]
        counts = [str(told[name]) for name in ("swept", "steps", "valid")]
        table.add_row(Text(_name(node)), *counts, *("–" if number is None else f"{number:.3f}" for number in numbers))
    console.print(table)
    judged = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in tree.counts().items() if number)
    console.print(f"\n{judged}", highlight=False)
    if advice := hint(tree):
        console.print(advice, highlight=False, markup=False)


def hint(tree: Tree) -> str:
    """What may have gone wrong, if nothing is valid; else nothing."""
    completions = [c for node in tree.nodes for token in node.tokens for c in token.completions]
    if not completions or any(c.judgement.valid for c in completions):
        return ""
    if tree.counts()["cut_off"] == len(completions):
        return "Every completion was cut off: raise --max-new-tokens, or say with --stop where a completion ends."
    first = completions[0]
    why = f" ({first.judgement.reason})" if first.judgement.reason else ""
    return f"Nothing is valid. The judge is given what the model writes behind the prompt, such as {first.text[:80]!r}{why}."
