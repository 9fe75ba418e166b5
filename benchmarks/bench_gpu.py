"""Decal's Triton kernels beside what else does the same on a GPU, on the same rows.

    python benchmarks/bench_gpu.py --bandwidth 3.35

Each line is one task at one vocabulary and batch: median time in microseconds of each implementation, measured in turns with
events, and the share of the memory bandwidth (TB/s, looked up by the device's name unless given) that decal reaches if logits
were read once and, for masks, written once. transformers' warpers are there always, FlashInfer and vLLM where installed.
FlashInfer draws from, and renormalises, probabilities: its softmax is timed with it.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

BANDWIDTHS = {"H200": 4.8, "H100 PCIe": 2.0, "H100": 3.35, "A100-SXM4-80GB": 2.04, "A100": 1.56, "B200": 8.0, "L40S": 0.86,
              "L4": 0.3, "RTX 4090": 1.01, "MI300X": 5.3}  # fmt: skip
"""Peak of the memory in TB/s by a part of the device's name, the more special first."""

TASKS = {
    "min_p": "min_p(0.05)",
    "top_k": "top_k(50)",
    "top_p": "top_p(0.9)",
    "typical": "typical(0.9)",
    "chain": "temperature(1.5) | top_k(50) | top_p(0.9) | min_p(0.05)",
    "draw": "top_k(50) | top_p(0.9)",
}

Call = Callable[[], Any]


def optional(name: str) -> Any:
    """A module, or None if it isn't installed or doesn't load."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"without {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def decal_call(task: str, logits: torch.Tensor) -> Call:
    import decal
    from decal.kernels import gpu
    from decal.samplers.trace import trace

    program = trace(decal.parse(TASKS[task]).steps).program
    if task == "draw":
        seeds = torch.arange(len(logits), device=logits.device)
        return lambda: gpu.sample(program, logits, seeds, seeds)
    return lambda: gpu.transform(program, logits)


def transformers_call(task: str, logits: torch.Tensor) -> Call:
    from transformers import generation as g

    warpers = {
        "min_p": [g.MinPLogitsWarper(0.05)],
        "top_k": [g.TopKLogitsWarper(50)],
        "top_p": [g.TopPLogitsWarper(0.9)],
        "typical": [g.TypicalLogitsWarper(0.9)],
        "chain": [g.TemperatureLogitsWarper(1.5), g.TopKLogitsWarper(50), g.TopPLogitsWarper(0.9), g.MinPLogitsWarper(0.05)],
        "draw": [g.TopKLogitsWarper(50), g.TopPLogitsWarper(0.9)],
    }[task]

    def run() -> Any:
        z = logits
        for warper in warpers:
            z = warper(None, z)
        return torch.multinomial(z.softmax(-1), 1) if task == "draw" else z

    return run


def flashinfer_call(flashinfer: Any, task: str, logits: torch.Tensor) -> Call | None:
    if task == "top_k":
        return lambda: flashinfer.sampling.top_k_mask_logits(logits, 50)
    if task == "top_p":
        return lambda: flashinfer.sampling.top_p_renorm_probs(logits.softmax(-1), 0.9)
    if task == "draw":
        return lambda: flashinfer.sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.9)
    return None


def vllm_call(vllm: Any, task: str, logits: torch.Tensor) -> Call | None:
    k = torch.full((len(logits),), 50, dtype=torch.int32, device=logits.device)
    p = torch.full((len(logits),), 0.9, device=logits.device)
    wanted = {"top_k": (k, None), "top_p": (None, p)}.get(task)
    return None if wanted is None else lambda: vllm.apply_top_k_top_p_triton(logits.clone(), *wanted)


def medians(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Microseconds; the calls take turns, so that what disturbs one disturbs all."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(1000 * start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def captured(call: Call) -> Call:
    """The same as a CUDA graph, without the time that Python takes to launch kernels."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main() -> int:
    parser = argparse.ArgumentParser(description="decal's kernels beside others on a GPU")
    parser.add_argument("--bandwidth", type=float, help="peak of the memory, TB/s")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[32000, 128256, 256000])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu needs a GPU that torch can use, and there is none: nothing was measured", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    bandwidth = arguments.bandwidth or next((b for part, b in BANDWIDTHS.items() if part in name), None)
    flashinfer, vllm = optional("flashinfer"), optional("vllm.v1.sample.ops.topk_topp_triton")
    print(f"{name}, torch {torch.__version__}, {arguments.dtype}, peak {bandwidth or 'unknown'} TB/s; microseconds")
    columns = ["decal", "decal graph", "transformers", "FlashInfer", "vLLM"]
    print(f"{'task':<8} {'V':>7} {'B':>4} " + " ".join(f"{c:>12}" for c in columns) + "  of peak")
    for task in arguments.tasks:
        for width in arguments.vocabularies:
            for rows in arguments.batches:
                generator = torch.Generator("cuda").manual_seed(0)
                logits = 2.5 * torch.randn(rows, width, device="cuda", generator=generator)
                logits = logits.to(getattr(torch, arguments.dtype))
                calls: dict[str, Call | None] = {"decal": decal_call(task, logits)}
                calls["decal graph"] = captured(decal_call(task, logits))
                calls["transformers"] = transformers_call(task, logits)
                if flashinfer:
                    calls["FlashInfer"] = flashinfer_call(flashinfer, task, logits)
                if vllm and arguments.dtype == "float32":
                    calls["vLLM"] = vllm_call(vllm, task, logits)
                found = medians({k: c for k, c in calls.items() if c}, arguments.repeats)
                moved = logits.numel() * logits.element_size() * (1 if task == "draw" else 2)
                share = f"{moved / (bandwidth * 1e6) / found['decal graph']:8.1%}" if bandwidth else "       -"
                cells = " ".join(f"{found[c]:12.1f}" if c in found else f"{'-':>12}" for c in columns)
                print(f"{task:<8} {width:>7} {rows:>4} {cells} {share}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
