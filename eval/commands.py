"""What the command ``decal`` can do. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import decal
from decal.samplers.errors import DecalError

WIDTH_OF_A_PIPE = 160
FORMS = ("few_shot", "chat", "prefix", "completion")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_A_PIPE)


@click.group()
@click.version_option(decal.__version__, prog_name="decal")
def cli() -> None:
    """Measure what decoding strategies do to a model's validity and diversity."""


@cli.command()
@click.option("--model", default="smollm2", show_default=True, help="A built-in name, hub id, local folder or GGUF file.")
@click.option("--task", "tasks", multiple=True, help="A built-in task or a YAML file; may be repeated.")
@click.option(
    "--grid", "grid_name", default="quick", show_default=True, help="quick, all, paper, or a file with one chain a line."
)
@click.option("--floor", default=0.8, show_default=True, help="Validity floor of the headlines, in (0, 1].")
@click.option(
    "--out", default="decal-frontier", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option("--form", type=click.Choice(FORMS), help="How to put every task.")
@click.option("--draws", type=click.IntRange(1, 1000), help="Few-shot prompts to average over.")
@click.option("--seed", default=0, show_default=True, help="Decides the exemplars of few-shot prompts.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, or auto.")
@click.option("--dtype", default=None, help="float32 (default), bfloat16 or float16.")
@click.option("--cache/--no-cache", default=True, show_default=True, help="Keep logits on disk for the next run.")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of a built-in model that asks for it.")
def frontier(
    model: str,
    tasks: tuple[str, ...],
    grid_name: str,
    floor: float,
    out: Path,
    form: str | None,
    draws: int | None,
    seed: int,
    device: str,
    dtype: str | None,
    cache: bool,
    accept_licence: bool,
) -> None:
    """Draw the exact validity-diversity frontier of a model.

    Every setting of the grid is evaluated on every task, exactly and without sampling, beside four oracles. Prints a table and
    writes results.json, settings.parquet, figures and report.html.
    """
    start = time.monotonic()
    from decal.eval import grid, models, report, task
    from decal.eval.frontier import Evaluation
    from decal.eval.trie import check_size

    # Everything that can be wrong with the request is found before the model is loaded.
    if not 0 < floor <= 1:
        raise DecalError(f"--floor must be in (0, 1], got {floor:g}")
    if seed < 0:
        raise DecalError(f"--seed must be at least 0, got {seed}")
    settings = grid.load(grid_name)
    questions = [task.load(name, form=form, draws=draws) for name in tasks or task.DEFAULT_TASKS]
    for question in questions:
        check_size(question.valid)
    names = [q.task.name for q in questions]
    if len(set(names)) < len(names):
        raise DecalError(f"every task needs a name of its own, got {', '.join(names)}")
    _check_writable(out)

    console = _console()
    loaded = models.load(model, device=device, dtype=dtype, accept_licence=accept_licence)
    evaluation = Evaluation(loaded, settings, seed=seed, cache=cache)
    for question in questions:
        evaluation.check(question)
    with _progress(len(questions)) as (report_to, task_done):
        evaluation.report = report_to
        results = []
        for question in questions:
            results.append(evaluation.run(question))
            task_done()
    about = {
        "decal": decal.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "note": loaded.note},
        "grid": grid_name,
        "seed": seed,
    }
    run = report.Run(about, results, floor)
    files = report.write(run, out)
    console.print(f"{loaded.name}, grid {grid_name}, seed {seed}\n", highlight=False)
    report.print_table(run, console)
    console.print(f"{len(files)} files in {out}, the one to open is {out / 'report.html'}", highlight=False, soft_wrap=True)


class _progress:
    """Two bars on the terminal's error stream: tasks, and the work at hand."""

    def __init__(self, tasks: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self.overall = self.bars.add_task("tasks", total=tasks)
        self.detail = self.bars.add_task("", total=None)

    def __enter__(self) -> tuple[Callable[[str, int, int], None], Callable[[], None]]:
        self.bars.start()

        def report(what: str, done: int, total: int) -> None:
            self.bars.update(self.detail, description=what, completed=done, total=total)

        return report, lambda: self.bars.advance(self.overall)

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()


def _check_writable(folder: Path) -> None:
    from decal.eval.paths import disk_errors, scratch_dir

    with disk_errors(folder):
        there = folder.exists()
    if there and not folder.is_dir():
        raise DecalError(f"--out must be a folder, {folder} is a file")
    with scratch_dir(folder):
        pass
    if not there:
        folder.rmdir()  # until there is something to put into it


@cli.command()
@click.argument("chain")
def explain(chain: str) -> None:
    """Say what a chain does: steps, passes over the vocabulary, backend, and why.

    CHAIN is written like "temperature(1.4) | min_p(0.1)".
    """
    decal.parse(chain).explain()


@cli.command(name="models")
def models_() -> None:
    """List the built-in models."""
    from decal.eval import models

    table = Table(box=None, padding=(0, 2))
    for heading in ("name", "what it is", "licence", "download", "cached"):
        table.add_column(heading)
    for name, model in models.BUILTIN.items():
        size = f"{model.download_size / 1e6:.0f} MB"
        table.add_row(name, model.description, model.licence, size, "yes" if models.is_cached(name) else "no")
    console = _console()
    console.print(table)
    console.print("\n--model also takes a hub id, a local folder or a GGUF file.")


@cli.command(name="tasks")
def tasks_() -> None:
    """List the built-in tasks."""
    from decal.eval import task

    table = Table(box=None, padding=(0, 2))
    for heading in ("name", "answers", "default", "few-shot label"):
        table.add_column(heading)
    for name in task.builtin_names():
        question = task.load(name)
        default = "yes" if name in task.DEFAULT_TASKS else ""
        table.add_row(name, str(question.valid.size), default, question.task.label)
    console = _console()
    console.print(table)
    console.print("\n--task also takes a YAML file of the same form; see the README.")


@cli.command(name="rules")
@click.option("--page", type=click.Path(path_type=Path), help="Write the page of all rules and its pictures to this folder.")
@click.option("--check", type=click.Path(path_type=Path), help="Say whether the page in this folder is what would be written.")
def rules_(page: Path | None, check: Path | None) -> None:
    """List the rules, those of installed plugins too, or write their page."""
    if page and check:
        raise DecalError("--page writes and --check only looks; give one of them")
    if not page and not check:
        _list_rules()
        return
    from decal.eval import catalogue

    console = _console()
    if check:
        if outdated := catalogue.stale(check):
            raise DecalError(f"stale in {check}: {', '.join(outdated)}; run decal rules --page {check}")
        console.print(f"{check / catalogue.PAGE} and its pictures are fresh", highlight=False, soft_wrap=True)
    elif page:
        if page.exists() and not page.is_dir():
            raise DecalError(f"--page must be a folder, {page} is a file")
        files = catalogue.write(page)
        console.print(f"{page / catalogue.PAGE} and {len(files) - 1} pictures", highlight=False, soft_wrap=True)


def _list_rules() -> None:
    from rich.markup import escape

    from decal.eval import catalogue
    from decal.samplers.rule import RULES

    table = Table(box=None, padding=(0, 2))
    for heading in ("rule", "kind", "keeps, or does", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "paper")
    for rule in (rule for some in catalogue.groups(RULES.values()).values() for rule in some):
        cells = catalogue.signature(rule), rule.kind, rule.summary.replace("``", ""), rule.paper
        table.add_row(*map(escape, cells))
    console = _console()
    console.print(table)
    console.print("\nhelp(decal.min_p) in Python says everything about one; decal check RULE tests it.", highlight=False)


@cli.command(name="check")
@click.argument("rule")
def check_(rule: str) -> None:
    """Check that a rule keeps the laws every rule must, your own too.

    RULE is its name; a rule of your own is found if an installed package registers it under the entry point decal.rules.
    """
    from decal.samplers import testing
    from decal.samplers.rule import find

    found = find(rule)
    try:
        passed = testing.check(found)
    except AssertionError as error:
        raise DecalError(" ".join(str(error).split()) or f"{rule} fails a check") from error
    console = _console()
    for name in passed:
        console.print(f"passed  {name}", highlight=False, markup=False)
    console.print(f"{found.name} passes all {len(passed)} checks", highlight=False, markup=False)
