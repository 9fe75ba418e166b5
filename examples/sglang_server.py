"""Chains on a running SGLang server, which needs decal, and was started so:

    python -m sglang.launch_server --model-path MODEL --enable-custom-logit-processor --disable-overlap-schedule

then, here, with decal alone:

    python examples/sglang_server.py http://localhost:30000
"""

import sys

from decal import DecalError, parse, temperature
from decal.serving.engine import http
from decal.serving.sglang import request_fields

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:30000"


def ask(text: str, fields: dict) -> str:
    """One request; the chain alone decides what is drawn from."""
    fields["sampling_params"]["max_new_tokens"] = 20
    return http(f"{url}/generate", {"text": text, **fields})["text"]


# A chain is a text or an object; each request has its own, and they share batches.
print(ask("Once upon a time", request_fields("temperature(1.4) | min_p(0.1)")))
print(ask("Once upon a time", request_fields(parse("dry(0.8) | mirostat(3.0)"))))

# With a seed decal draws, so a request gives the same text alone and in any batch.
print(ask("Once upon a time", request_fields("temperature(1.2) | top_p(0.95)", seed=17)))

# One of the valid answers, all of them equally probable.
print(ask("Random colour:", request_fields("guided(1)", answers=["red", "green", "light green", "blue"])))

# What would act beside the chain is refused, not ignored.
fields = request_fields(temperature(1.4) | parse("min_p(0.1)"))
fields["sampling_params"]["top_k"] = 50
try:
    ask("Once upon a time", fields)
except DecalError as error:
    print(error)
