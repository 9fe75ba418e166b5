"""Chains in serving engines: whether each does what a chain says, and what that costs per decoding step.

Run in an environment with the engine, each in its own:

    python benchmarks/serving.py verify vllm
    python benchmarks/serving.py overhead vllm
    python benchmarks/serving.py page          # docs/serving.md, from docs/serving.json and serving.template.md

Overhead is the time of a decoding step with a chain, over that with the engine's own sampler at the same setting: whole steps
of the default model, in one process, in turns, medians over rounds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch

from decal.eval import models
from decal.eval.commands import ENGINES
from decal.eval.paths import atomic_write
from decal.samplers.chain import parse
from decal.serving.verify import verify as ask

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "serving.json"
TEMPLATE = Path(__file__).with_name("serving.template.md")

CHAINS = {
    "a cut": "min_p(0.1)",
    "a cut by mass": "top_p(0.9)",
    "two steps": "top_k(20) | temperature(0.7)",
    "temperature before the cut": "temperature(1.5) | min_p(0.1)",
    "temperature behind it": "min_p(0.1) | temperature(1.5)",
    "flattened": "temperature(1.4) | min_p(0.1) | flatten(0.7)",
    "tokens so far": "repetition_penalty(1.3) | top_n_sigma(1.0)",
    "tokens so far, coins": "dry(0.8) | xtc(0.1, 0.5) | min_p(0.02)",
    "memory": "mirostat(3.0)",
    "memory, calibrated": "risk_budget(0.8)",
    "calibrated": "min_validity(0.3)",
    "valid answers, uniform": "guided(1.0)",
    "valid answers, half way": "guided(0.5) | temperature(2)",
}
"""What is asked of every engine."""

NATIVE = {"temperature": 0.8, "min_p": 0.05, "top_k": 50, "top_p": 0.9}
CHAIN = "temperature(0.8) | min_p(0.05) | top_k(50) | top_p(0.9)"
"""The same, in the order of vLLM; others differ in which tokens they keep, not in what they have to do."""
BATCHES = (1, 16, 64)
LENGTH, ROUNDS = 16, 5
Measured = tuple[Callable[[int], None], Callable[[int], None]]


@click.group()
def cli() -> None:
    """Measure engines, or write docs/serving.md."""


def _keep(engine: str, **found: Any) -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept.setdefault(engine, {}).update(found)
    atomic_write(RESULTS, json.dumps(kept, indent=1, allow_nan=False) + "\n")


def _started(engine: str, url: str | None = None, **settings: Any) -> Any:
    if url is not None:
        return import_module(f"decal.serving.{engine}").Live.connect(url, **settings)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    find = models.gguf_file if engine == "llama_cpp" else models.folder
    if engine == "vllm":
        settings = {"dtype": "float32", "max_model_len": 512} | settings
    if engine == "sglang":
        asked = {"max_running_requests": max(BATCHES), "max_total_tokens": 8192, "random_seed": 1}
        settings = {"dtype": "float32", **asked} | settings
        if not torch.cuda.is_available():
            settings |= {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
    return import_module(f"decal.serving.{engine}").Live.start(str(find(models.DEFAULT)), **settings)


@cli.command()
@click.argument("engine", type=click.Choice(ENGINES))
@click.option("--generations", default=50, show_default=True)
@click.option("--draws", default=40, show_default=True, help="First tokens drawn behind each of ten prompts.")
@click.option("--url", default=None, help="Of a running server, to ask that.")
@click.option("--batching", default=None, help="Of transformers: generate or continuous.")
def verify(engine: str, generations: int, draws: int, url: str | None, batching: str | None) -> None:
    """Ask an engine about all chains."""
    live = _started(engine, url, **({"batching": batching} if batching else {}))
    try:
        report = ask(live, CHAINS.values(), generations=generations, draws=draws, each=lambda finding: click.echo(str(finding)))
    finally:
        live.close()
    told = report.as_json()
    _keep(
        " ".join([engine, *(["server"] if url else []), *([batching] if batching else [])]),
        verify=told,
        python=platform.python_version(),
    )
    click.echo(f"{report.engine} {report.version}: {'ok' if report.ok else 'FAILED'}")
    sys.exit(not report.ok)


def _vllm(live: Any, length: int) -> Measured:
    from vllm import SamplingParams

    from decal.serving.vllm import sampling_params

    def run(params: Any, count: int) -> None:
        live.llm.generate(["Once upon a time"] * count, params, use_tqdm=False)

    native = SamplingParams(**NATIVE, max_tokens=length, ignore_eos=True)
    ours = sampling_params(CHAIN, max_tokens=length, ignore_eos=True)
    return lambda count: run(native, count), lambda count: run(ours, count)


def _transformers(live: Any, length: int) -> Measured:
    import decal

    def run(count: int, **kwargs: Any) -> None:
        inputs = live.tokenizer(["Once upon a time"] * count, return_tensors="pt")
        size = {"min_new_tokens": length, "max_new_tokens": length, "pad_token_id": live.tokenizer.eos_token_id}
        live.model.generate(**inputs, **size, **kwargs)

    chain = decal.parse(CHAIN)
    return lambda count: run(count, do_sample=True, **NATIVE), lambda count: run(count, **chain.generate_kwargs())


def _sglang(live: Any, length: int) -> Measured:
    from decal.serving.sglang import request_fields

    prompt = list(live.tokenizer("Once upon a time")["input_ids"])
    size = {"max_new_tokens": length, "ignore_eos": True}

    def run(count: int, sampling_params: Any, **fields: Any) -> None:
        live._ask({"input_ids": [prompt] * count, "sampling_params": {**sampling_params, **size}, **fields})

    return lambda count: run(count, NATIVE), lambda count: run(count, **request_fields(CHAIN))


def _llama_cpp(live: Any, length: int) -> Measured:
    from decal.serving.llama_cpp import NEUTRAL, completion_kwargs

    def run(**kwargs: Any) -> None:
        live._llama.reset()
        live._llama.create_completion("Once upon a time", max_tokens=length, **kwargs)

    off = {name: values[0] for name, values in NEUTRAL.items()}
    return lambda _: run(**{**off, **NATIVE}), lambda _: run(**completion_kwargs(CHAIN))


def _mlx_lm(live: Any, length: int) -> Measured:
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    from decal.serving.mlx_lm import batch_kwargs

    prompt = live.tokenizer("Once upon a time")["input_ids"]
    sampler = make_sampler(NATIVE["temperature"], NATIVE["top_p"], NATIVE["min_p"], top_k=int(NATIVE["top_k"]))

    def run(count: int, **kwargs: Any) -> None:
        generator = BatchGenerator(live._model, completion_batch_size=max(count, 32))
        generator.insert([prompt] * count, max_tokens=[length] * count, **kwargs)
        while generator.next_generated():
            pass
        generator.close()

    return lambda count: run(count, samplers=[sampler] * count), lambda count: run(count, **batch_kwargs(CHAIN, count))


MEASURED: dict[str, Callable[[Any, int], Measured]] = {
    "vllm": _vllm,
    "transformers": _transformers,
    "sglang": _sglang,
    "llama_cpp": _llama_cpp,
    "mlx_lm": _mlx_lm,
}
ALONE = "llama_cpp"
"""The engine that writes one text at a time."""


@cli.command()
@click.argument("engine", type=click.Choice(sorted(MEASURED)))
@click.option("--batch", "batches", type=int, multiple=True, default=BATCHES, show_default=True)
@click.option("--length", default=LENGTH, show_default=True, help="Tokens of a text.")
@click.option("--rounds", default=ROUNDS, show_default=True)
def overhead(engine: str, batches: tuple[int, ...], length: int, rounds: int) -> None:
    """Time whole decoding steps with the engine's own sampler and with a chain, in turns."""
    live = _started(engine)
    kept = json.loads(RESULTS.read_text()).get(engine, {}).get("overhead", {}) if RESULTS.exists() else {}
    found = {one["batch"]: one for one in kept.get("steps", ())}
    try:
        native, ours = MEASURED[engine](live, length)
        for count in (1,) if engine == ALONE else batches:
            times: dict[str, list[float]] = {"native": [], "decal": []}
            for _ in range(rounds + 1):  # the first warms up
                for name, run in (("native", native), ("decal", ours)):
                    start = time.perf_counter()
                    run(count)
                    times[name].append((time.perf_counter() - start) / length)
            medians = {name: statistics.median(values[1:]) for name, values in times.items()}
            ratios = [d / n for d, n in zip(times["decal"][1:], times["native"][1:], strict=True)]
            spread = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            found[count] = {"batch": count, "length": length, "rounds": rounds, **medians, **spread}
            click.echo(json.dumps(found[count]))
    finally:
        live.close()
    _keep(engine, overhead={"chain": CHAIN, "native": NATIVE, "steps": [found[count] for count in sorted(found)]})


@cli.command()
@click.option("--check", is_flag=True, help="Only say whether the page is what would be written.")
def page(check: bool) -> None:
    """Write docs/serving.md from what was found."""
    kept = json.loads(RESULTS.read_text())
    text = TEMPLATE.read_text().replace("{verified}", _verified(kept)).replace("{overhead}", _overhead(kept))
    if check:
        sys.exit((DOCS / "serving.md").read_text() != text)
    atomic_write(DOCS / "serving.md", text)


def _verified(kept: dict[str, Any]) -> str:
    """A table of chains by engines."""
    engines = {name: found["verify"] for name, found in kept.items() if "verify" in found}
    heads = [f"{found['engine']} {found['version']}" for found in engines.values()]
    lines = [["chain", *heads], ["---"] * (1 + len(heads))]
    for what, chain in CHAINS.items():
        cells = [_cell(found, chain) for found in engines.values()]
        lines.append([f"{what}: `{chain}`".replace("|", "\\|"), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(found: dict[str, Any], chain: str) -> str:
    of = {str(parse(one["chain"])): one for one in found["findings"]}
    one = of.get(str(parse(chain)))
    if one is None:
        return "not asked"
    if one["refused"]:
        return "refused"
    if not (one["steps"] or one["seeded"]):
        return "not compared, its coins are its own"
    steps = f"{one['steps']} steps" if one["steps"] else "seeds alone"
    seeds = f", {one['same']}/{one['seeded']} seeded" if one["seeded"] else ""
    return f"{'yes' if one['ok'] else '**no**'}: {steps}{seeds}"


def _overhead(kept: dict[str, Any]) -> str:
    """A table of batch sizes by engines."""
    lines = [["engine", *(f"B = {count}" for count in BATCHES)], ["---"] * (1 + len(BATCHES))]
    for name, found in kept.items():
        if "overhead" in found:
            steps = {one["batch"]: one for one in found["overhead"]["steps"]}
            cells = [_timed(steps[count]) if count in steps else "one text at a time" for count in BATCHES]
            lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _timed(one: dict[str, Any]) -> str:
    less = "" if (one["rounds"], one["length"]) == (ROUNDS, LENGTH) else f"; {one['rounds']} rounds of {one['length']} tokens"
    return f"{one['ratio']:.3f} ({one['lowest']:.2f} to {one['highest']:.2f}; {one['native'] * 1e3:.1f} ms{less})"


if __name__ == "__main__":
    cli()
