"""Tokens that two further prompts re-rank most, rightly and wrongly, as a table for the page.

python benchmarks/calibration/examples.py --model smollm2 > results/examples.md
"""

from __future__ import annotations

import click
import torch

from decal.eval import models, task
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.samplers.rule import find

TASKS = ("weekdays", "planets", "zodiac_signs", "us_states", "css_colours", "primes")
HEAD = 40
SHOWN = 4


def moved(evaluation: Evaluation, name: str) -> list[str]:
    """A row of the table: what moved most at the first token of a task's first prompt."""
    question = task.load(name, draws=3)
    trie, _ = evaluation.builder.build(question.valid, question.policy)
    tokenizer, model = evaluation.model.tokenizer, evaluation.model.model
    rows = []
    for _, prompt in question.prompts(tokenizer, evaluation.seed):
        with torch.inference_mode():
            rows.append(model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1))
    before, after = (ranks(z) for z in (rows[0], torch.stack(rows).mean(0)))
    seen = sorted(set(before[:HEAD]) | set(after[:HEAD]))
    place = [{token: rank for rank, token in enumerate(order, 1)} for order in (before, after)]
    gain = {token: place[0][token] / place[1][token] for token in seen}
    valid = set(trie.children[0])
    groups = [
        [t for t in sorted(seen, key=lambda t: -gain[t]) if t in valid and gain[t] > 1],
        [t for t in sorted(seen, key=lambda t: gain[t]) if t not in valid and gain[t] < 1],
        [t for t in sorted(seen, key=lambda t: gain[t]) if t in valid and gain[t] < 1],
        [t for t in sorted(seen, key=lambda t: -gain[t]) if t not in valid and gain[t] > 1],
    ]

    def text(token: int) -> str:
        word = tokenizer.decode([token]).replace("\n", "⏎").replace("|", "\\|")
        return f"`{word}` {place[0][token]}→{place[1][token]}"

    return [name, *(", ".join(text(t) for t in group[:SHOWN]) for group in groups)]


def ranks(z: torch.Tensor) -> list[int]:
    """Tokens, the most probable first."""
    return z.argsort(descending=True, stable=True).tolist()


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option("--accept-licence", is_flag=True)
def main(model: str, accept_licence: bool) -> None:
    """Print the table."""
    loaded = models.load(model, accept_licence=accept_licence)
    evaluation = Evaluation(loaded, [Setting("temperature", find("temperature")(1.0))])
    print("| task | valid, raised | invalid, lowered | valid, lowered | invalid, raised |\n| --- | --- | --- | --- | --- |")
    for name in TASKS:
        print("| " + " | ".join(moved(evaluation, name)) + " |", flush=True)


if __name__ == "__main__":
    main()
