"""Evaluate baselines and methods on every task, exactly, as README.md in this folder says; ``report.py`` makes the page.

    python benchmarks/calibration/run.py --model smollm2 --out results/smollm2

One file for each task. A second run goes on where the first stopped, and adds the families that a file lacks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from decal.eval import calibrate, grid, models, task
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.eval.paths import atomic_write
from decal.eval.task import Question
from decal.samplers.errors import DecalError
from decal.samplers.rule import find

HERE = Path(__file__).parent
BASELINES = ("temperature", "top_k", "top_p", "min_p", "top_n_sigma", "typical", "eta", "p_less", "min_k", "top_h")
FITTED = ("min_validity", "risk_budget")
ROW_ONLY = (*FITTED, "min_p | adapt", "min_p | split_temperature")
DRAWS = 3


def group_of(name: str) -> str:
    """Tasks that are siblings share a name."""
    groups: dict[str, list[str]] = json.loads((HERE / "groups.json").read_text())
    return next((group for group, members in groups.items() if name in members), name)


def settings(methods: bool) -> list[Setting]:
    """Baselines as in the grid ``quick``; with ``methods`` those too, the same number of settings each."""
    quick = [s for s in grid.load("quick") if s.family in BASELINES or (methods and s.family in ROW_ONLY)]
    read = [s for s in grid.drawn(grid.BUDGET, prompts=True, rules=grid.READ) if s.family.startswith("ensemble")]
    return quick + (read if methods else [])


def affordable(evaluation: Evaluation, question: Question, most: int) -> bool:
    """Whether a task has one spelling of each answer, and not too many prefixes."""
    if not question.policy.one_path_each or question.valid.size > most:
        return False
    return len(evaluation.builder.build(question.valid, question.policy)[0]) <= most


def weights_without(samples: dict[str, list[calibrate.Sample]], name: str) -> dict[str, float]:
    """The validity estimate fitted on tasks that are no siblings of a task."""
    others = [one for other, some in samples.items() if group_of(other) != group_of(name) for one in some]
    return calibrate.fit(others, ("gap", "entropy"))


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option("--most-prefixes", default=300, show_default=True)
@click.option("--shots", type=int, help="Exemplars in a prompt, for comparing with prompts that hold more; baselines only.")
@click.option("--families", help="Only these families, separated by commas.")
@click.option("--accept-licence", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(model: str, most_prefixes: int, shots: int | None, families: str | None, accept_licence: bool, out: Path) -> None:
    """Evaluate every setting on every task of a model."""
    loaded = models.load(model, accept_licence=accept_licence)
    plain = Evaluation(loaded, [Setting("temperature", find("temperature")(1.0))])
    chosen = [s for s in settings(methods=shots is None) if families is None or s.family in families.split(",")]
    questions = []
    for name in task.builtin_names():
        question = task.load(name, draws=DRAWS)
        if shots is not None:
            question = task.load(name, draws=DRAWS, shots=min(shots, question.valid.size))
        if affordable(plain, question, most_prefixes):
            questions.append(question)
        else:
            print(f"{name} left out", flush=True)
    samples: dict[str, list[calibrate.Sample]] = {}
    if any(s.family in FITTED for s in chosen):
        for question in questions:
            here: list[calibrate.Sample] = []
            plain.run(question, lambda _, trie, rows, here=here: here.append(calibrate.Sample.of(trie, rows)))
            samples[question.task.name] = here
    for question in questions:
        file = out / f"{question.task.name}.npz"
        known = dict(np.load(file)) if file.exists() else {}
        missing = [s for s in chosen if s.family not in set(known.get("family", []))]
        if missing:
            one(loaded, question, missing, samples, file, known)
            print(question.task.name, flush=True)


def one(
    loaded: models.LoadedModel,
    question: Question,
    chosen: Sequence[Setting],
    samples: dict[str, list[calibrate.Sample]],
    file: Path,
    known: dict[str, np.ndarray],
) -> None:
    """Evaluate a task and keep everything, behind what is known of it."""
    import io

    try:
        own = weights_without(samples, question.task.name) if samples else {}
    except DecalError as error:
        raise SystemExit(f"{question.task.name}: {error}") from None
    mine = [replace(s, chain=calibrate.with_weights(s.chain, own)) for s in chosen] if own else list(chosen)
    result = Evaluation(loaded, mine).run(question)
    buffer = io.BytesIO()
    names = [str(s.chain) for s in chosen] + result.setting[len(chosen) :]
    found = {
        "family": np.asarray(result.family),
        "setting": np.asarray(names),
        "validity": result.validity,
        "diversity": np.nan_to_num(result.diversity),
    }
    if known:
        # Settings first, then the oracles, which were there before.
        split = int(np.flatnonzero(np.char.startswith(known["family"], "oracle"))[0])
        found = {
            name: np.concatenate([known[name][:split], new[: len(chosen)], known[name][split:]]) for name, new in found.items()
        }
    weights = json.dumps(own) if own or not known else known["weights"]
    np.savez_compressed(buffer, **found, size=question.valid.size, prefixes=result.nodes, weights=weights)
    atomic_write(file, buffer.getvalue())


if __name__ == "__main__":
    main()
