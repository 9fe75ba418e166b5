"""Chains in serving engines: one chain, every engine, per request.

``decal.serving.vllm``, ``sglang``, ``llama_cpp``, ``transformers``, ``mlx_lm`` and ``lm_eval`` are the adapters, and
``decal.serving.verify`` asks a running engine whether it does what the chain says. None imports its engine, or anything else
heavy, until it is used.
"""
