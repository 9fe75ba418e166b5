"""Chains in mlx-lm, for one text and for a batch: python mlx_lm_generate.py [path/or/hub-id]"""

import sys

import mlx_lm
from mlx_lm.generate import BatchGenerator

import decal
from decal.eval import models
from decal.serving.mlx_lm import batch_kwargs, generate_kwargs


def main(path: str) -> None:
    """Write one text, follow answers, and write a batch in which every prompt has a chain of its own."""
    model, tokenizer = mlx_lm.load(path)

    # MLX draws from what the chain leaves; with seed=17 decal draws.
    chain = decal.temperature(1.4) | decal.min_p(0.1) | decal.flatten(0.7)
    print(repr(mlx_lm.generate(model, tokenizer, "Once upon a time", **generate_kwargs(chain, max_tokens=12))))

    # Every valid answer is equally probable. Make the arguments anew for each text.
    kwargs = generate_kwargs("guided(1.0)", answers=["red", "green", "light green"], tokenizer=tokenizer)
    print(repr(mlx_lm.generate(model, tokenizer, "Random colour:", **kwargs)))

    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The weather in London is")]
    generator = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
    asked = batch_kwargs(["min_p(0.1)", "dry(0.8) | mirostat(3.0)"], seeds=[17, 4])
    texts = {number: [] for number in generator.insert(prompts, max_tokens=[12, 12], **asked)}
    while responses := generator.next_generated():
        for one in responses:
            texts[one.uid].append(one.token)
    generator.close()
    print(*(repr(tokenizer.decode(tokens)) for tokens in texts.values()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(models.folder("smollm2")))
