"""A chain in llama-cpp-python, and as the settings of a llama.cpp server: python llama_cpp_generate.py [model.gguf]"""

import json
import sys

from llama_cpp import Llama

import decal
from decal.eval import models
from decal.serving.llama_cpp import completion_kwargs, request_fields


def main(path: str) -> None:
    """Complete, chat, follow answers, and print a request to a server."""
    llm = Llama(path, n_ctx=512, verbose=False)

    # llama.cpp draws from what the chain leaves. Its own top_k, top_p, min_p and temperature do nothing.
    chain = decal.temperature(1.4) | decal.min_p(0.1) | decal.flatten(0.7)
    answer = llm.create_completion("Once upon a time", **completion_kwargs(chain, max_tokens=12))
    print(repr(answer["choices"][0]["text"]))

    # With a seed decal draws: the same text in every run and in every other engine, as far as the logits are the same.
    kwargs = completion_kwargs("dry(0.8) | xtc(0.1, 0.5) | min_p(0.02)", seed=17, chat=True, max_tokens=12)
    chat = llm.create_chat_completion([{"role": "user", "content": "Tell me a story."}], **kwargs)
    print(repr(chat["choices"][0]["message"]["content"]))

    # Every valid answer is equally probable. Make the arguments anew for each completion.
    kwargs = completion_kwargs("guided(1.0)", answers=["red", "green", "light green"], tokenizer=llm)
    print(repr(llm.create_completion("Random colour:", **kwargs)["choices"][0]["text"]))

    # A server of llama.cpp has samplers of its own; what it can't do is refused, what differs is reported.
    fields, report = request_fields("top_k(20) | temperature(0.7) | min_p(0.05)")
    print(json.dumps(fields), *report, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(models.gguf_file("smollm2")))
