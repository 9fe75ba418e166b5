"""What the command ``decal`` can do. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.table import Table

import decal
from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    from decal.eval.frontier import Evaluation, TaskResult
    from decal.eval.judge import Judge
    from decal.eval.models import LoadedModel
    from decal.eval.task import Question

WIDTH_OF_A_PIPE = 160
FORMS = ("few_shot", "chat", "prefix", "completion")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_A_PIPE)


@click.group()
@click.version_option(decal.__version__, prog_name="decal")
def cli() -> None:
    """Measure what decoding strategies do to a model's validity and diversity."""


def _options(*options: Any) -> Callable[[Any], Any]:
    """Several options, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_puts_tasks = _options(
    click.option("--model", default="smollm2", show_default=True, help="A built-in name, hub id, local folder or GGUF file."),
    click.option("--task", "tasks", multiple=True, help="A built-in task or a YAML file; may be repeated."),
    click.option("--form", type=click.Choice(FORMS), help="How to put every task; by default as the task says."),
    click.option("--draws", type=click.IntRange(1, 1000), help="Few-shot prompts to average over."),
    click.option("--seed", default=0, show_default=True, help="Decides the exemplars of few-shot prompts."),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, or auto."),
    click.option("--dtype", default=None, help="float32 (default), bfloat16 or float16."),
    click.option("--cache/--no-cache", default=True, show_default=True, help="Keep logits on disk for the next run."),
    click.option("--accept-licence", is_flag=True, help="Accept the licence of a built-in model that asks for it."),
)
"""The options of commands that put tasks to a model."""

_tries_a_grid = _options(
    click.option(
        "--grid",
        "grid_name",
        default="quick",
        show_default=True,
        help="The settings to try: quick (every rule), all (slow rules too), paper (arXiv 2605.11128), or a file.",
    ),
    click.option("--floor", default=0.8, show_default=True, help="Validity in (0, 1] at which samplers are compared."),
    click.option("--smaller", help='A smaller model with the same tokens, for contrast(against="smaller").'),
)


@dataclass(frozen=True)
class _Asked:
    """What `_asks` was given, checked; see `_ask`."""

    evaluation: Evaluation
    questions: Sequence[Question]
    about: dict[str, Any]
    floor: float
    start: float

    def done(self) -> dict[str, Any]:
        """``about``, with how long it took."""
        return self.about | {"seconds": round(time.monotonic() - self.start, 1)}


def _ask(
    out: Path,
    model: str,
    tasks: Sequence[str],
    form: str | None,
    draws: int | None,
    seed: int,
    device: str,
    dtype: str | None,
    cache: bool,
    accept_licence: bool,
    *,
    floor: float,
    grid_name: str | None = None,
    drawn: Mapping[str, Any] | None = None,
    floor_name: str = "--floor",
    smaller: str | None = None,
) -> _Asked:
    """Check a request and load the model. The settings are those of a grid, or as many ``drawn`` as `grid.drawn` is told."""
    start = time.monotonic()
    from decal.eval import grid, models, task
    from decal.eval.frontier import Evaluation
    from decal.samplers.trie import check_size
    from decal.samplers.views import kinds

    # Everything that can be wrong with the request is found before the model is loaded.
    if not 0 < floor <= 1:
        raise DecalError(f"{floor_name} must be in (0, 1], got {floor:g}")
    if seed < 0:
        raise DecalError(f"--seed must be at least 0, got {seed}")
    settings = grid.load(grid_name) if grid_name else grid.drawn(seed=seed, **(drawn or {}))
    if any("smaller" in kinds(setting.chain) for setting in settings) != (smaller is not None):
        raise DecalError(
            'no setting reads a smaller model; in a --grid file contrast(0.5, against="smaller") does'
            if smaller is not None
            else "some setting of the grid reads a smaller model; say which with --smaller"
        )
    questions = [task.load(name, form=form, draws=draws) for name in tasks or task.DEFAULT_TASKS]
    for question in questions:
        check_size(question.valid)
    names = [q.task.name for q in questions]
    if len(set(names)) < len(names):
        raise DecalError(f"every task needs a name of its own, got {', '.join(names)}")
    _check_writable(out)

    other = None
    if smaller is not None:  # first, as it is loaded faster
        other = models.load(smaller, device=device, dtype=dtype, accept_licence=accept_licence)
    loaded = models.load(model, device=device, dtype=dtype, accept_licence=accept_licence)
    evaluation = Evaluation(loaded, settings, seed=seed, cache=cache, smaller=other)
    for question in questions:
        evaluation.check(question)
    about = {
        "decal": decal.__version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "note": loaded.note},
        **({"smaller": {"name": other.name, "fingerprint": other.fingerprint}} if other else {}),
        **(
            {"grid": grid_name}
            if grid_name
            else {"budget": drawn["budget"], "reads_prompts": drawn["prompts"]}
            if drawn
            else {}
        ),
        "seed": seed,
    }
    return _Asked(evaluation, questions, about, floor, start)


def _run_tasks(job: _Asked) -> list[TaskResult]:
    """Evaluate every task, with progress."""
    results = []
    with _progress(len(job.questions)) as (report_to, task_done):
        job.evaluation.report = report_to
        for question in job.questions:
            results.append(job.evaluation.run(question))
            task_done()
    return results


@cli.command()
@_puts_tasks
@_tries_a_grid
@click.option(
    "--out", default="decal-frontier", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
def frontier(out: Path, **asked: Any) -> None:
    """Draw the exact validity-diversity frontier of a model.

    Every setting of the grid is evaluated on every task, exactly and without sampling, beside four oracles. Prints a table and
    writes results.json, settings.parquet, figures and report.html.
    """
    from decal.eval import frontier_report as pages

    job = _ask(out, **asked)
    results = _run_tasks(job)
    run = pages.Run(job.done(), results, job.floor)
    files = pages.write(run, out)
    console = _console()
    console.print(f"{job.evaluation.model.name}, grid {run.about['grid']}, seed {run.about['seed']}\n", highlight=False)
    pages.print_table(run, console)
    console.print(f"{len(files)} files in {out}, the one to open is {out / 'report.html'}", highlight=False, soft_wrap=True)


@cli.command()
@_puts_tasks
@_tries_a_grid
@click.option(
    "--out", default="decal-diagnosis", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option("--swept", type=click.IntRange(1), help="Look at so many tokens of a ranking for order, instead of all.")
def diagnose(out: Path, swept: int | None, **asked: Any) -> None:
    """Say which fault limits a model on a task, order or shape.

    Measures the order and shape of the model's next-token distributions at every prefix of every valid answer, exactly, how
    their errors compound over steps, and how far samplers stay from what is possible, and through what. Prints a table and
    writes diagnosis.json, depths.parquet, figures and diagnosis.html.
    """
    from decal.eval import diagnosis_report as pages

    job = _ask(out, **asked)
    with _progress(len(job.questions)) as (report_to, task_done):
        job.evaluation.report = report_to
        found = []
        for question in job.questions:
            found.append(pages.run_task(job.evaluation, question, swept))
            task_done()
    run = pages.DiagnosisRun(job.done() | {"swept": swept}, found, job.floor)
    files = pages.write(run, out)
    console = _console()
    console.print(f"{job.evaluation.model.name}, grid {run.about['grid']}, seed {run.about['seed']}\n", highlight=False)
    pages.print_table(run, console)
    console.print(f"{len(files)} files in {out}, the one to open is {out / 'diagnosis.html'}", highlight=False, soft_wrap=True)


@cli.command()
@_puts_tasks
@click.option("--min-validity", "floor", default=0.8, show_default=True, help="Mean validity in (0, 1] that a chain must have.")
@click.option("--budget", default=64, show_default=True, type=click.IntRange(4, 4096), help="Settings of every sampler.")
@click.option("--read-prompts", is_flag=True, help="Try rules on what all prompts of a task say together, too.")
@click.option(
    "--promise",
    "over",
    type=click.Choice(("prompts", "tasks")),
    default="prompts",
    show_default=True,
    help="What a promise is about: further prompts of these tasks, or further tasks like these.",
)
@click.option(
    "--out", default="decal-tuning", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
def tune(out: Path, budget: int, read_prompts: bool, over: str, **asked: Any) -> None:
    """Find the chain to use for your tasks at a validity.

    Every sampler gets the same number of settings; the most diverse one with the validity asked for is printed, with what it
    does on prompts that had no part in choosing it, and whether that can be promised. Writes tuning.json, settings.parquet,
    tuning.png and tuning.html.
    """
    from decal.eval import tune as tuning
    from decal.eval import tune_report as pages

    if not asked["tasks"]:
        raise DecalError(
            "tune needs the tasks to tune for: --task, a YAML file or a built-in one (decal tasks), may be repeated"
        )
    drawn = {"budget": budget, "prompts": read_prompts}
    job = _ask(out, **asked, drawn=drawn, floor_name="--min-validity")
    tuning.same_number_of_prompts(job.questions, job.evaluation.model.tokenizer, job.evaluation.seed)
    results = tuning.Results.of(_run_tasks(job))
    run = pages.TuneRun(job.done(), results, tuning.tune(results, job.floor, over))
    files = pages.write(run, out)
    console = _console()
    console.print(
        f"{job.evaluation.model.name}, {budget} settings of every sampler, seed {run.about['seed']}\n", highlight=False
    )
    pages.print_table(run, console)
    console.print(f"\n{len(files)} files in {out}, the one to open is {out / pages.PAGE}", highlight=False, soft_wrap=True)


@cli.command()
@_puts_tasks
@click.option("--budget", default=32, show_default=True, type=click.IntRange(4, 4096), help="Settings of every sampler.")
@click.option("--read-prompts", is_flag=True, help="Try rules on what all prompts of a task say together, too.")
@click.option(
    "--out", default="calibration.json", show_default=True, type=click.Path(path_type=Path), help="The file to write."
)
def calibrate(out: Path, budget: int, read_prompts: bool, tasks: tuple[str, ...], draws: int | None, **asked: Any) -> None:
    """Fit calibrated rules to a model, on tasks whose valid answers are known.

    By default on all built-in tasks of few prefixes, three prompts each. Fits the estimate of validity, chooses a chain for
    validity .5, .8 and .9, and levels at which invalidity is controlled, and says how each does on tasks left out. Writes one
    JSON file for decal.calibrated.load.
    """
    from decal.eval import calibrate as calibration
    from decal.eval import task
    from decal.eval import tune as tuning
    from decal.eval.paths import atomic_write

    if out.is_dir():
        raise DecalError(f"--out must be a file, {out} is a folder")
    drawn = {"budget": budget, "prompts": read_prompts, "rules": calibration.RULES}
    names = tasks or [name for name in task.builtin_names() if calibration.affordable(task.load(name))]
    job = _ask(out.absolute().parent, tasks=names, draws=draws or 3, floor=0.8, drawn=drawn, **asked)
    loaded, build = job.evaluation.model, job.evaluation.builder.build
    small = [q for q in job.questions if len(build(q.valid, q.policy)[0]) <= calibration.MOST_PREFIXES]
    questions = job.questions if tasks else small
    tuning.same_number_of_prompts(questions, loaded.tokenizer, job.evaluation.seed)
    with _progress(2 * len(questions) + len(questions) // 2) as (report_to, task_done):
        cache, seed = job.evaluation.cache, job.evaluation.seed
        fitting = calibration.Fitting(loaded, budget, read_prompts, seed, cache, report_to)
        digests = {q.task.name: q.digest for q in questions}
        about = {"model": loaded.name, "tasks": list(digests), "task_digests": digests, "note": loaded.note}
        found = calibration.calibrate(fitting, questions, job.about | about, task_done)
    atomic_write(out, calibration.written(found))
    calibration.print_report(found, _console())
    _console().print(f"\nwritten to {out}", highlight=False, soft_wrap=True)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--floor", default=0.8, show_default=True, help="Validity floor of the gaps; one that the runs have.")
@click.option(
    "--out", default="decal-report", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
def report(runs: tuple[Path, ...], floor: float, out: Path) -> None:
    """Compare models: base with instruct, small with large.

    RUNS are folders that decal diagnose has written, of the same grid, seed and form, the one to compare with first. Prints a
    table and writes comparison.json, comparison.png and comparison.html.
    """
    from decal.eval import comparison

    if len({folder.resolve() for folder in runs}) < len(runs):
        raise DecalError(f"every run can be given once, got {', '.join(map(str, runs))}")
    found = comparison.compare([comparison.read(folder) for folder in runs], floor)
    _check_writable(out)
    files = comparison.write(found, out)
    console = _console()
    comparison.print_table(found, console)
    page = out / "comparison.html"
    console.print(f"\n{len(files)} files in {out}, the one to open is {page}", highlight=False, soft_wrap=True)


@cli.command()
@click.option("--model", default="smollm2", show_default=True, help="A built-in name, hub id, local folder or GGUF file.")
@click.option("--task", "name", required=True, help="A built-in task or a YAML file, of any size.")
@click.option("--chain", "chains", multiple=True, help='Such as "temperature(1.4) | min_p(0.1)"; may be repeated.')
@click.option("--samples", default=1000, show_default=True, type=click.IntRange(2), help="Answers drawn on each prompt.")
@click.option("--form", type=click.Choice(FORMS), help="How to put the task; by default as it says.")
@click.option("--draws", type=click.IntRange(1, 1000), help="Few-shot prompts to average over.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides exemplars and draws.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, or auto.")
@click.option("--dtype", default=None, help="float32 (default), bfloat16 or float16.")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of a built-in model that asks for it.")
@click.option("--out", type=click.Path(path_type=Path), help="A JSON file for the estimates.")
def estimate(
    model: str,
    name: str,
    chains: tuple[str, ...],
    samples: int,
    form: str | None,
    draws: int | None,
    seed: int,
    device: str,
    dtype: str | None,
    accept_licence: bool,
    out: Path | None,
) -> None:
    """Estimate validity and diversity on a very large valid set.

    Answers are drawn, half from the uniform law on the valid set and half from the model confined to it; every chain's
    probability of each is exact, and weighted by how likely it was to be drawn. Intervals cover the drawing.
    """
    from decal.eval import estimate as estimates
    from decal.eval import models, task
    from decal.eval.frontier import Evaluation
    from decal.eval.grid import Setting
    from decal.eval.paths import atomic_write

    parsed = [decal.parse(text) for text in chains or ("temperature(1)", "top_p(0.9)", "min_p(0.1)")]
    estimates.check(parsed)
    question = task.load(name, form=form, draws=draws)
    loaded = models.load(model, device=device, dtype=dtype, accept_licence=accept_licence)
    evaluation = Evaluation(loaded, [Setting("chain", chain) for chain in parsed], seed=seed)
    with _progress(1) as (report_to, _):
        read = 0

        def tick(amount: int) -> None:
            nonlocal read
            read += amount
            report_to(f"{question.task.name}: reading prefixes", read, 0)

        found = estimates.estimate(evaluation, question, parsed, samples, tick)
    told = estimates.summary(found, parsed, question, loaded.name, samples, seed)
    if out is not None:
        atomic_write(out, json.dumps(told, indent=1, allow_nan=False))
    console = _console()
    estimates.print_table(told, console)


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

        said = None

        def report(what: str, done: int, total: int) -> None:
            nonlocal said
            self.bars.update(self.detail, description=what, completed=done, total=total)
            if what != said and not self.bars.console.is_terminal:
                # Where nobody sees a bar, a line for each thing that begins.
                print(f"{datetime.now():%H:%M:%S} {what}", file=sys.stderr, flush=True)
            said = what

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


ENGINES = ("vllm", "sglang", "llama_cpp", "transformers", "mlx_lm")
"""Named after the packages that they are."""


@cli.command()
@click.option("--engine", "name", type=click.Choice(ENGINES), required=True, help="Which one; it has to be installed.")
@click.option("--model", help="A built-in name, hub id, local folder or GGUF file; smollm2 if a model is to be loaded.")
@click.option("--url", help="Ask a running server, such as http://localhost:8000, instead of loading the model.")
@click.option(
    "--chain", "chains", multiple=True, required=True, help='Such as "temperature(1.3) | min_p(0.1)"; may be repeated.'
)
@click.option("--prompt", "prompts", multiple=True, help="A text to continue, instead of the built-in ten; may be repeated.")
@click.option("--answer", "answers", multiple=True, help="A valid answer, for chains with guided; may be repeated.")
@click.option("--generations", default=50, show_default=True, type=click.IntRange(0), help="Texts compared step by step.")
@click.option("--length", default=4, show_default=True, type=click.IntRange(1), help="Their tokens.")
@click.option("--draws", default=40, show_default=True, type=click.IntRange(0), help="First tokens drawn behind each prompt.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="The seed sent.")
@click.option("--set", "settings", multiple=True, help="An argument of the engine, as name=value; may be repeated.")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of a built-in model that asks for it.")
@click.option("--out", type=click.Path(path_type=Path), help="A JSON file for the report.")
def verify(
    name: str,
    model: str | None,
    url: str | None,
    chains: tuple[str, ...],
    prompts: tuple[str, ...],
    answers: tuple[str, ...],
    settings: tuple[str, ...],
    accept_licence: bool,
    out: Path | None,
    **asked: Any,
) -> None:
    """Ask a serving engine whether it does what chains say, and if not, what interferes.

    Loads the model into the engine, or asks a server, draws, and compares with the chain in plain torch: the tokens that can be
    drawn at every step and their probabilities, where the engine tells them; frequencies; and tokens drawn with a seed. Ends
    with exit code 1 if something differs.
    """
    from decal.eval import models
    from decal.eval.paths import atomic_write
    from decal.serving import verify as checks
    from decal.serving.request import as_params

    asked |= {key: value for key, value in (("prompts", prompts), ("answers", answers)) if value}
    parsed = [decal.parse(chain) for chain in chains]
    for chain in parsed:
        as_params(chain, answers=answers or checks.ANSWERS if "answers" in chain.needs else None)
    given = dict(_setting(text) for text in settings)
    if out is not None and out.is_dir():
        raise DecalError(f"--out must be a file, {out} is a folder")
    console = _console()
    engine = _engine(name, model, url, given, accept_licence)
    # A server may tell nothing but tokens.
    rows = checks.rows_of(models.load(model, accept_licence=accept_licence)) if url and model else None

    def tell(finding: Any) -> None:
        console.print(checks.describe(finding), highlight=False, markup=False, soft_wrap=True)

    try:
        report = checks.verify(engine, parsed, rows=rows, each=tell, **asked)
    finally:
        engine.close()
    console.print(f"{report.engine} {report.version}", *report.notes, sep="\n", highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        atomic_write(out, json.dumps(report.as_json(), indent=1, allow_nan=False))
    if not report.ok:
        sys.exit(1)


def _engine(name: str, model: str | None, url: str | None, given: dict[str, Any], accept_licence: bool) -> Any:
    """The ``Live`` of an engine: a server's, or one that loads the model."""
    from importlib import import_module
    from importlib.util import find_spec

    from decal.eval import models

    live = import_module(f"decal.serving.{name}").Live
    if url is not None and not url.startswith(("http://", "https://")):
        raise DecalError(f"--url must begin with http:// or https://, got {url}")
    if url is not None and not hasattr(live, "connect"):
        raise DecalError(f"{name} is no server to connect to; leave --url out")
    if url is None and find_spec(name) is None:
        raise DecalError(f"--engine {name} loads the model with the package {name}, which isn't installed here")
    where = model or models.DEFAULT
    try:
        if url is not None:
            return live.connect(url.rstrip("/").removesuffix("/v1"), **given)
        find = models.gguf_file if name == "llama_cpp" else models.folder
        return live.start(str(find(where, accept_licence=accept_licence)), **given)
    except DecalError:
        raise
    except (TypeError, ValueError, OSError) as error:  # of the engine, about what it was given, or files that aren't there
        raise DecalError(f"{name} refuses {url or where} with {given}: {str(error).splitlines()[0]}") from error


def _setting(text: str) -> tuple[str, Any]:
    """``name=value``; a value that is JSON counts as that."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise DecalError(f"--set takes name=value, such as max_model_len=512, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@cli.command()
@click.argument("chain")
def explain(chain: str) -> None:
    """Say what a chain does, in how many passes, and why.

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
    for heading in ("name", "answers", "family", "default", "few-shot label"):
        table.add_column(heading, no_wrap=heading != "few-shot label")
    for name in task.builtin_names():
        question = task.load(name)
        default = "yes" if name in task.DEFAULT_TASKS else ""
        table.add_row(name, str(question.valid.size), question.task.family, default, question.task.label)
    console = _console()
    console.print(table)
    console.print("\n--task also takes a YAML file of the same form; see the README.")


@cli.command(name="rules")
@click.option("--page", type=click.Path(path_type=Path), help="Write the page of all rules and its pictures to this folder.")
@click.option("--check", type=click.Path(path_type=Path), help="Say whether the page in this folder is what would be written.")
def rules_(page: Path | None, check: Path | None) -> None:
    """List the rules, of plugins too, or write their page."""
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


JUDGES = """

    \b
    Judges:
      json, python, brackets, smiles  well-formed text of that kind; smiles needs rdkit
      regex:PATTERN                   matches as a whole
      value:24                        an arithmetic expression with that value
      file.py:function                returns True or False for (prompt, completion)
      module:function                 the same, from a module that Python finds
      model:NAME                      a model, named as --model is, that grades from 1 to 10
      openai:MODEL@URL                the same behind an endpoint, such as openai:qwen3@http://localhost:8000/v1
    """


def _judges_completions(command: Any) -> Any:
    """Adds the options of commands that write completions of a prompt and have them judged, and help on judges."""
    command.__doc__ += JUDGES
    options = _options(
        click.option("--judge", "judge_name", required=True, help="Decides what is valid; see below."),
        click.option(
            "--model", default="smollm2", show_default=True, help="A built-in name, hub id, local folder or GGUF file."
        ),
        click.option(
            "--form", type=click.Choice(("completion", "chat")), default="completion", show_default=True, help="How to ask."
        ),
        click.option("--max-new-tokens", "most", default=48, show_default=True, help="Length of a completion."),
        click.option("--stop", multiple=True, help="Text that ends a completion, \\n for a line break; may be repeated."),
        click.option(
            "--threshold", default=9.0, show_default=True, help="Lowest grade of what is valid, where a model judges."
        ),
        click.option("--workers", default=8, show_default=True, help="Most requests to an endpoint at once."),
        click.option(
            "--key-variable", default="DECAL_JUDGE_KEY", show_default=True, help="Environment variable of an endpoint's key."
        ),
        click.option("--seed", default=0, show_default=True, help="Decides the drawn completions."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, or auto."),
        click.option("--dtype", default=None, help="float32 (default), bfloat16 or float16."),
        click.option("--accept-licence", is_flag=True, help="Accept the licence of a built-in model that asks for it."),
    )
    return options(command)


@dataclass(frozen=True)
class _Judging:
    """A judge by name, and how to load models; nothing is loaded yet."""

    judge: Judge
    load: Callable[[str], LoadedModel]

    @classmethod
    def asked(
        cls,
        judge_name: str,
        threshold: float,
        workers: int,
        key_variable: str,
        device: str,
        dtype: str | None,
        accept_licence: bool,
    ) -> _Judging:
        """From the options of `_judges_completions`."""
        import os
        from functools import cache, partial

        from decal.eval import judge, models

        load = cache(partial(models.load, device=device, dtype=dtype, accept_licence=accept_licence))
        key = os.environ.get(key_variable) or None
        return cls(judge.parse(judge_name, threshold=threshold, key=key, workers=workers, load=load), load)


def _marks(stop: Sequence[str]) -> tuple[str, ...]:
    """Texts that end a completion, as given on a command line."""
    return tuple(mark.replace("\\n", "\n") for mark in stop)


@cli.command()
@click.argument("prompt")
@_judges_completions
@click.option("--ranks", "ranks_", default="1-50,60-1000:10", show_default=True, help="Ranks of tokens to complete.")
@click.option("--depth", default=2, show_default=True, help="How many tokens deep to go.")
@click.option("--branch", default=2, show_default=True, help="Behind how many valid tokens of a prefix to go deeper.")
@click.option("--completions", type=int, default=None, help="Completions to draw for each token; without it one, greedily.")
@click.option("--sampler", default="temperature(1)", show_default=True, help="Chain that draws completions.")
@click.option("--share", type=float, default=None, help="Share of a token's completions that must be valid; without it one is.")
@click.option("--batch", default=32, show_default=True, help="Completions to write at once.")
@click.option("--out", default="decal-probe", show_default=True, type=click.Path(path_type=Path), help="Folder of the results.")
def probe(
    prompt: str,
    judge_name: str,
    model: str,
    form: Any,
    ranks_: str,
    depth: int,
    branch: int,
    completions: int | None,
    sampler: str,
    share: float | None,
    most: int,
    stop: tuple[str, ...],
    batch: int,
    seed: int,
    out: Path,
    **judging: Any,
) -> None:
    """Measure order where valid answers can't be listed, by a judge.

    At a prefix, tokens at the given ranks are completed and judged; a token is valid if one of its completions is. Then the
    same is done behind some of the valid tokens. Prints a table and writes tree.json, tokens.parquet, a figure and report.html.
    What is done is kept in the folder: run it again after an interruption, or with more ranks or depth, and nothing is done
    twice."""
    start = time.monotonic()
    from dataclasses import replace

    from decal.eval import probe as probes
    from decal.eval import probe_report

    # Everything that can be wrong with the request is found before the model is loaded.
    asked = _Judging.asked(judge_name, **judging)
    plan = probes.Plan(
        ranks=probes.ranks(ranks_),
        depth=depth,
        branch=branch,
        completions=completions,
        share=share,
        sampler=sampler,
        most=most,
        stop=_marks(stop),
        form=form,
        batch=batch,
        seed=seed,
    )
    _check_writable(out)

    loaded = asked.load(model)
    bars = _progress(plan.nodes)
    bars.bars.update(bars.overall, description="prefixes")
    with bars as (report_to, node_done):
        found = probes.probe(loaded, asked.judge, prompt, plan, out, report_to, node_done)
    about = _about_judged(loaded, judge_name, start)
    found = replace(found, about=about)
    files = probe_report.write(found, out)
    console = _console()
    console.print(f"{loaded.name}, judge {judge_name}, seed {seed}\n", highlight=False, markup=False, soft_wrap=True)
    probe_report.print_table(found, console)
    console.print(f"{len(files)} files in {out}, the one to open is {out / 'report.html'}", highlight=False, soft_wrap=True)


def _about_judged(loaded: LoadedModel, judge_name: str, start: float) -> dict[str, Any]:
    return {
        "decal": decal.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "note": loaded.note},
        "judge": judge_name,
    }


@cli.command(name="tune-prompt")
@click.argument("prompt")
@_judges_completions
@click.option("--calibration", required=True, type=click.Path(path_type=Path), help="A file that decal calibrate wrote.")
@click.option("--min-validity", "floor", default=0.8, show_default=True, help="Share of valid completions to be reached.")
@click.option("--drafts", default=50, show_default=True, type=click.IntRange(1), help="Completions to write and judge.")
@click.option("--each", default=5, show_default=True, type=click.IntRange(1), help="Drafts before the next chain is chosen.")
@click.option(
    "--also", "others", multiple=True, help="Another way to ask, to be read beside the prompt; as many as the calibration read."
)
@click.option(
    "--out", default="decal-drafts", show_default=True, type=click.Path(path_type=Path), help="Folder of the results."
)
def tune_prompt(
    prompt: str,
    calibration: Path,
    floor: float,
    drafts: int,
    each: int,
    others: tuple[str, ...],
    judge_name: str,
    model: str,
    form: Any,
    most: int,
    stop: tuple[str, ...],
    seed: int,
    out: Path,
    **judging: Any,
) -> None:
    """Find the chain to use on one prompt, by judging a few drafts.

    What chains gave on the prompts of a calibration says how they go together; a few drafts say where this prompt stands.
    Prints what was tried, the most diverse chain that should reach the validity asked for, and with what chance it does;
    writes tuned.json, drafts.jsonl and judged.jsonl. Run it again after an interruption, or for more drafts, and nothing is
    done twice."""
    start = time.monotonic()
    from decal.eval import tune_prompt as tuning

    # Everything that can be wrong with the request is found before the model is loaded.
    asked = _Judging.asked(judge_name, **judging)
    plan = tuning.Plan(drafts=drafts, each=each, most=most, stop=_marks(stop), form=form, seed=seed)
    decal.calibrated.load(calibration).search(floor, prompts=bool(others))
    _check_writable(out)
    tuning.refuse_another(out, prompt)

    loaded = asked.load(model)
    search = decal.calibrated.load(calibration, loaded.model, loaded.tokenizer).search(floor, prompts=bool(others))
    bars = _progress(1)
    bars.bars.update(bars.overall, visible=False)
    with bars as (report_to, _):
        found = tuning.tune(loaded, asked.judge, prompt, search, plan, out, others, report_to)
    told = {"prompt": prompt, "others": others, "calibration": str(calibration), **asdict(plan)}
    tuning.write(found, _about_judged(loaded, judge_name, start) | told, out)
    console = _console()
    console.print(f"{loaded.name}, judge {judge_name}, seed {seed}\n", highlight=False, markup=False, soft_wrap=True)
    tuning.print_table(found, console)
    console.print(f"\nwritten to {out / tuning.TUNED}", highlight=False, soft_wrap=True)


@cli.command(name="agreement")
@click.argument("labels", type=click.Path(path_type=Path))
@click.argument("judged", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Decides the resamples of the intervals.")
def agreement_(labels: Path, judged: Path, seed: int) -> None:
    """Say how far a judge agrees with people.

    LABELS has one JSON object a line: prompt, completion, valid (true or false), and rater if there are several. JUDGED is the
    judged.jsonl of a probe, or has the same keys, with judge in place of rater. Both are matched by prompt and completion.
    """
    from decal.eval import agreement

    if seed < 0:
        raise DecalError(f"--seed must be at least 0, got {seed}")
    people = agreement.load(labels, "rater")
    console = _console()
    for found in agreement.agreement(people, agreement.load(judged, "judge"), seed):
        console.print(found.judge, style="bold", highlight=False, markup=False, soft_wrap=True)
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, text in agreement.lines(found):
            table.add_row(name, text)
        console.print(table)
    if (among := agreement.between_people(people, seed)) is not None:
        console.print(f"Krippendorff's alpha of the people alone: {agreement.shown(among)}", highlight=False, markup=False)


@cli.command(name="score")
@click.argument("outputs", type=click.Path(path_type=Path))
@click.option("--task", "task_name", help="A built-in task or a YAML file that says which answers are valid.")
@click.option("--predicate", help="Says what is valid: module:function or file.py:function of the answer (and the prompt).")
@click.option("--same", help="Says which answers are the same: module:function or file.py:function of two of them.")
@click.option("--case", type=click.Choice(("exact", "any")), help="Whether case counts; by default as the task says.")
@click.option("--over", type=click.Choice(("all", "valid")), default="all", show_default=True, help="Outputs to measure.")
@click.option("--k", default=10, show_default=True, help="Outputs of distinct_k.")
@click.option("--common", type=int, help="Outputs to rarefy all prompts to; by default the smallest number there is.")
@click.option("--baseline", help="Group that the others are compared to, as 'model setting'; by default the first.")
@click.option("--embed/--no-embed", default=True, show_default=True, help="Measure distances of embeddings.")
@click.option("--embedder", help="A sentence-transformers id or folder; by default all-MiniLM-L6-v2, from PyPI.")
@click.option("--seed", default=0, show_default=True, help="Decides resamples and subsamples.")
@click.option("--out", default="decal-score", show_default=True, type=click.Path(path_type=Path), help="Folder of the results.")
def score_(
    outputs: Path,
    task_name: str | None,
    predicate: str | None,
    same: str | None,
    case: Literal["exact", "any"] | None,
    over: Literal["all", "valid"],
    k: int,
    common: int | None,
    baseline: str | None,
    embed: bool,
    embedder: str | None,
    seed: int,
    out: Path,
) -> None:
    """Measure validity and diversity of outputs of any model.

    OUTPUTS has one JSON object a line: prompt (or id) and output, and if you like model, setting, answer (what counts in the
    output) and valid (true or false). Prints a table and writes scores.json, scores.parquet and score.html.
    """
    from dataclasses import replace

    from decal.eval import score, score_report, task

    question = task.load(task_name) if task_name else None
    case = case or (question.task.case if question else "exact")
    options = score.Options(
        known=score.Known(question, case) if question else None,
        judge=score.judge_of(score.load_function(predicate, "--predicate")) if predicate else None,
        same=score.load_function(same, "--same") if same else None,
        case=case,
        over=over,
        k=k,
        m=common,
        baseline=baseline,
        seed=seed,
    )
    given = score.read(outputs)
    groups = score.sort(given, options)
    _check_writable(out)

    embedding, described = score.load_embedder(embedder) if embed else (None, "Embeddings are left out, as asked.")
    bars = _progress(1)
    bars.bars.update(bars.overall, visible=False)
    with bars as (report_to, _):
        results = score.measure(given, replace(options, embed=embedding), groups, report_to)
    if embedding is None:
        results = replace(results, notes=[*results.notes, described])
    about = {
        "decal": decal.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "file": str(outputs),
        "seed": seed,
        "embedder": described if embedding else None,
    }
    files = score_report.write(results, about, out)
    console = _console()
    score_report.print_table(results, console)
    console.print(f"{len(files)} files in {out}, the one to open is {out / 'score.html'}", highlight=False, soft_wrap=True)
