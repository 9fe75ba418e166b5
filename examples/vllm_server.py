"""Chains of requests to a server of vLLM, with nothing but the standard library.

    vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --logits-processors decal.serving.vllm:Processor --generation-config vllm
    python examples/vllm_server.py [http://localhost:8000]

With the OpenAI client: client.completions.create(..., extra_body=request_fields("min_p(0.1)")).
"""

import sys

from decal import DecalError
from decal.serving.engine import http
from decal.serving.vllm import request_fields


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    model = http(f"{url}/v1/models")["data"][0]["id"]
    chains = ["temperature(1.3) | min_p(0.1)", "repetition_penalty(1.2) | mirostat(4.0)", "top_k(1)"]
    for chain in chains:
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 30, **request_fields(chain, seed=17)}
        print(f"{chain}\n  {http(f'{url}/v1/completions', body)['choices'][0]['text']!r}\n")
    try:  # what the server says to a chain that makes no sense
        http(f"{url}/v1/completions", {"model": model, "prompt": "a", "temperature": 1, "vllm_xargs": {"decal": "min_p(7)"}})
    except DecalError as error:
        print(error)


if __name__ == "__main__":
    main()
