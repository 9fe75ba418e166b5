"""What the full method costs in ``model.generate``: time of 32 tokens, as a ratio to one prompt, interleaved.

python benchmarks/calibration/cost.py --model smollm2
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import torch

import decal
from decal.eval import models, task

TOKENS = 32
ROUNDS = 9


def seconds(model: Any, inputs: Any, settings: dict[str, Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    model.generate(**inputs, **settings)
    return time.perf_counter() - start


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option("--accept-licence", is_flag=True)
def main(model: str, accept_licence: bool) -> None:
    """Print a line for each batch size."""
    loaded = models.load(model, accept_licence=accept_licence)
    network, tokenizer = loaded.model, loaded.tokenizer
    texts = [text for text, _ in task.load("weekdays", draws=3).prompts(tokenizer, 0)]
    views = decal.Prompts(network, tokenizer, {texts[0]: texts[1:]})
    cut = (decal.min_p(0.1) | decal.split_temperature(1.5, 0.5)).for_ends([tokenizer.eos_token_id])
    reading = decal.ensemble(0.67).for_prompts(views) | cut
    for batch in (1, 8):
        inputs = tokenizer([texts[0]] * batch, return_tensors="pt")
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": tokenizer.eos_token_id}
        chains = {"plain": cut.generate_kwargs(**length), "reading": reading.generate_kwargs(**length)}
        took: dict[str, list[float]] = {name: [] for name in chains}
        for _ in range(ROUNDS + 1):
            for name, settings in chains.items():
                torch.manual_seed(0)
                took[name].append(seconds(network, inputs, settings))
        plain, read = (statistics.median(took[name][1:]) for name in ("plain", "reading"))
        speed = [batch * TOKENS / time_ for time_ in (plain, read)]
        print(f"B = {batch}: {speed[0]:.0f} tokens a second plain, {speed[1]:.0f} reading: {read / plain:.2f} times as long")


if __name__ == "__main__":
    main()
