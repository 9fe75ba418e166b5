"""A task of lm-evaluation-harness, with texts drawn by a chain (`pip install lm_eval accelerate "decal[eval]"`).

    python examples/lm_eval_chain.py

The same from a shell, on the harness's own tasks:

    python -m decal.serving.lm_eval --model decal --tasks gsm8k --batch_size 16 \
        --model_args pretrained=path/or/hub-id "chain=temperature(1.3) | min_p(0.1)" seed=17
"""

import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from decal.eval import models
from decal.serving.lm_eval import LM

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Greece": "Athens", "Cuba": "Havana"}

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "The capital of Norway is Oslo.\\nThe capital of {{country}} is"
doc_to_target: "{{capital}}"
# As in most tasks; the chain takes the place of greedy decoding, and says so.
generation_kwargs: {do_sample: false, temperature: 0.0, until: ["."], max_gen_toks: 5}
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""

loaded = models.load("smollm2")
with tempfile.TemporaryDirectory() as folder:
    lines = [json.dumps({"country": country, "capital": capital}) for country, capital in CAPITALS.items()]
    Path(folder, "capitals.jsonl").write_text("\n".join(lines))
    Path(folder, "capitals.yaml").write_text(TASK.replace("FOLDER", folder))
    tasks = TaskManager(include_path=folder, include_defaults=False)
    for chain in ("temperature(0)", "temperature(1.2) | min_p(0.1)", "temperature(2)"):
        # The score does not depend on the batch size, as every request has its own seed.
        for batch_size in (1, 4):
            lm = LM(pretrained=loaded.model, tokenizer=loaded.tokenizer, chain=chain, seed=17, batch_size=batch_size)
            found = lm_eval.simple_evaluate(lm, tasks=["capitals"], task_manager=tasks, bootstrap_iters=0)
            print(chain, batch_size, found["results"]["capitals"]["exact_match,stripped"])
