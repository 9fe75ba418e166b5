"""With which probability an answer that is complete ends, as it is and at temperature 2, as a table for the page.

python benchmarks/calibration/ends.py --model smollm2 --model gemma3-270m --accept-licence > results/ends.md
"""

from __future__ import annotations

import click
import numpy as np
from examples import TASKS

from decal.eval import models, task
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.eval.rows import Rows
from decal.samplers.rule import find
from decal.samplers.trie import TokenTrie

TEMPERATURES = (1.0, 2.0)


def ending(trie: TokenTrie, rows: Rows) -> list[float]:
    """Mean over answers of the probability of ending there, at each of `TEMPERATURES`."""
    found = []
    for nodes, logits in rows:
        for node, row in zip(nodes, logits.double(), strict=True):
            if trie.ended(node):
                laws = ((row / t).softmax(-1) for t in TEMPERATURES)
                found.append([float(law[list(trie.ends)].sum()) for law in laws])
    return np.mean(found, 0).tolist()


def measured(evaluation: Evaluation, name: str) -> np.ndarray:
    """Mean of `ending` over a task's prompts."""
    found: list[list[float]] = []
    evaluation.run(task.load(name, draws=3), lambda _, trie, rows: found.append(ending(trie, rows)))
    return np.mean(found, 0)


@click.command()
@click.option("--model", "names", multiple=True, default=["smollm2"], show_default=True)
@click.option("--accept-licence", is_flag=True)
def main(names: tuple[str, ...], accept_licence: bool) -> None:
    """Print the table."""
    plain = [Setting("temperature", find("temperature")(1.0))]
    every = [Evaluation(models.load(name, accept_licence=accept_licence), plain) for name in names]
    heads = ["task", *(f"{name}, temperature {t:g}" for name in names for t in TEMPERATURES)]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    lines = {name: np.concatenate([measured(one, name) for one in every]) for name in TASKS}
    lines["mean"] = np.mean(list(lines.values()), 0)
    for name, values in lines.items():
        print("| " + " | ".join([name, *(f"{value:.2f}" for value in values)]) + " |")


if __name__ == "__main__":
    main()
