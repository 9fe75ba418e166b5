"""How fast chains run on a CPU beside everything else that does the same: docs/speed.json, docs/speed.md and docs/speed.png.

    python benchmarks/speed.py                                  # all of it, about ten minutes; --quick for a look
    python benchmarks/speed.py --part ratios --only "real.*top_p"  # part of it again, into the numbers that are there
    python benchmarks/speed.py --part page                      # the page and the figure from the numbers that are there

Needs the extra `eval`; real rows of gemma3-270m need accelerate. vLLM and llama-cpp-python take part if they can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
from cases import CASES, Case, Implementation

import decal

HERE = Path(__file__).parent
PARTS = ("ratios", "alone", "start", "decode", "page")
CHAIN = "temperature(1.3) | top_k(50) | top_p(0.9) | min_p(0.1)"
NAMES = {
    "transformers": "transformers",
    "torch": "torch by hand",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
    "llama.cpp, array ready": "llama.cpp, array ready",
}
DRAWN_AT = 131_072
"""Vocabulary of the figure."""
ALONE = ("top_p(0.9)", "min_p(0.1)", CHAIN, f"{CHAIN} + draw")
"""Cases that are also measured in loops of their own."""


# ---- measuring


def rounds(
    implementations: Mapping[str, Implementation], parts: Sequence[torch.Tensor], seconds: float, least: int, most: int
) -> dict[str, list[float]]:
    """Seconds of every call. In each round all have a turn on the same rows; who begins moves on by one."""
    names = list(implementations)
    taken: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()  # before the clock runs: with vLLM imported it takes longer than many a case
    gc.disable()
    end = time.perf_counter() + seconds
    try:
        for number in range(most):
            if number >= least and time.perf_counter() > end:
                break
            x = parts[number % len(parts)]
            first = number % len(names)
            for name in names[first:] + names[:first]:
                one = implementations[name]
                argument = one.prepare(x)
                start = time.perf_counter()
                result = one.call(argument)
                taken[name].append(time.perf_counter() - start)
                del result, argument
    finally:
        gc.enable()
    return taken


def ratio(theirs: Sequence[float], mine: Sequence[float]) -> list[float]:
    """The ratio of medians, and what 95 % of it are between when rounds are drawn again."""
    a, b = np.array(theirs), np.array(mine)
    again = np.random.default_rng(0).integers(0, len(a), (1000, len(a)))
    low, high = np.percentile(np.median(a[again], 1) / np.median(b[again], 1), [2.5, 97.5])
    return [float(f"{v:.4g}") for v in (np.median(a) / np.median(b), low, high)]


def cell(case: Case, kind: str, vocabulary: int, size: int, rows: torch.Tensor, options: Any, missing: dict[str, str]) -> Any:
    """One case on one kind of rows: everybody's results are compared, and then their times."""
    parts = cases.batches(rows, size)
    mine = cases.ours(case, size, vocabulary)
    peers = cases.peers(case, size, vocabulary, missing)
    differences, left_out = {}, {}
    ours = mine.outcome(mine.call(mine.prepare(parts[0])))
    for name, peer in list(peers.items()):
        theirs = peer.outcome(peer.call(peer.prepare(parts[0])))
        try:
            differences[name] = cases.compare(case, parts[0], ours, theirs)
        except cases.Different as error:
            left_out[name] = str(error)
            del peers[name]
    if options.strict and left_out:
        raise SystemExit(f"{kind}, V = {vocabulary}, B = {size}: {left_out}")
    limits = cases.limits()
    for limit in limits.values():
        limit.call(parts[0])
    everybody = {"decal": mine, **peers, **limits}
    taken = rounds(everybody, parts, options.seconds, options.least, options.most)
    return {
        "kind": kind,
        "vocabulary": vocabulary,
        "batch": size,
        "case": case.name,
        "rounds": len(taken["decal"]),
        "median_us": {name: round(statistics.median(t) * 1e6, 1) for name, t in taken.items()},
        "least_us": {name: round(min(t) * 1e6, 1) for name, t in taken.items()},
        "ratio": {name: ratio(t, taken["decal"]) for name, t in taken.items() if name != "decal"},
        "difference": differences,
        "left_out": left_out,
    }


def measure_ratios(results: dict[str, Any], options: Any, save: Any) -> None:
    cells = results.setdefault("cells", {})
    for kind in cases.KINDS:
        for vocabulary in options.vocabularies:
            wanted = {
                (size, case.name): case
                for size in options.batches
                for case in CASES
                if re.search(options.only, key(kind, vocabulary, size, case.name))
                and not (options.resume and key(kind, vocabulary, size, case.name) in cells)
            }
            if not wanted:
                continue
            try:
                rows = cases.rows(kind, vocabulary)
            except (decal.DecalError, ImportError) as error:
                results["missing"][f"{kind} rows, V = {vocabulary}"] = str(error)
                continue
            for (size, name), case in progress(wanted.items(), f"{kind} rows, V = {vocabulary}"):
                found = cell(case, kind, vocabulary, size, rows, options, results["missing"])
                cells[key(kind, vocabulary, size, name)] = found
                save()


def key(kind: str, vocabulary: int, size: int, name: str) -> str:
    return f"{kind} V={vocabulary} B={size} {name}"


def progress(items: Any, label: str) -> Iterator[Any]:
    """The items, with a bar on a terminal and a line elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    items = list(items)
    if console.is_terminal:
        yield from track(items, label, console=console)
    else:
        print(f"{time.strftime('%H:%M:%S')} {label}: {len(items)} cases", file=sys.stderr, flush=True)
        yield from items


def measure_alone(options: Any) -> list[dict[str, Any]]:
    """Seconds of calls on the same rows over and over, each library in a loop of its own."""
    found = []
    for kind in cases.KINDS:
        rows = cases.rows(kind, DRAWN_AT)
        for size in options.batches:
            x = cases.batches(rows, size)[0]
            for case in (case for case in CASES if case.name in ALONE):
                both = {
                    "decal": cases.ours(case, size, DRAWN_AT),
                    "transformers": cases.peers(case, size, DRAWN_AT, {})["transformers"],
                    **cases.limits(),
                }
                medians_us = {}
                for name, one in both.items():
                    one.call(one.prepare(x))  # the first call of all loads the compiled code
                    taken = rounds({name: one}, [x], options.seconds, options.least, 1000)[name]
                    medians_us[name] = round(statistics.median(taken) * 1e6, 1)
                found.append({"kind": kind, "batch": size, "case": case.name, "median_us": medians_us})
    return found


IMPORTS = """
import json, sys, time
t = [time.perf_counter()]
import torch; t.append(time.perf_counter())
import numpy; from transformers import LogitsProcessor; t.append(time.perf_counter())
import decal; t.append(time.perf_counter())
print(json.dumps({"torch": t[1] - t[0], "transformers": t[2] - t[1], "decal": t[3] - t[2], "numba": "numba" in sys.modules}))
"""

FIRST_CALLS = f"""
import json, time, torch, decal
chain, x, t = decal.parse("{CHAIN}"), torch.randn(1, 49152), [time.perf_counter()]
chain(x, check=False); t.append(time.perf_counter())
chain(x, check=False); t.append(time.perf_counter())
decal.parse("typical(0.9)").sample(x, 0, 0); t.append(time.perf_counter())
print(json.dumps(dict(zip(("first", "second", "other"), (b - a for a, b in zip(t, t[1:]))))))
"""


def script(text: str, **environment: str) -> dict[str, float]:
    """What a fresh Python prints, as JSON."""
    # In an empty folder: in the root of the repository, other packages would take our kernels/ for the package of that name.
    with tempfile.TemporaryDirectory() as empty:
        command, variables = [sys.executable, "-c", text], {**os.environ, **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=empty)
    return json.loads(done.stdout.splitlines()[-1])


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in found), 5) for name in found[0]}


def measure_start(options: Any) -> dict[str, Any]:
    """Seconds to import, and of the first calls of a process, without and with what numba keeps on disk."""
    repeats = 2 if options.quick else 5
    script(IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        cold = script(FIRST_CALLS, NUMBA_CACHE_DIR=folder)
        warm = [script(FIRST_CALLS, NUMBA_CACHE_DIR=folder) for _ in range(repeats)]
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    imports = medians([script(IMPORTS) for _ in range(repeats)])
    return {"imports": imports, "cold": medians([cold]), "warm": medians(warm), "cache_mb": round(size / 1e6, 1)}


@torch.no_grad()
def measure_decode(options: Any) -> dict[str, Any]:
    """Seconds of a token of smollm2 with a cache of keys and values, and of what is done to its logits."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from decal.eval import models

    loaded = models.load("smollm2")
    text = cases.beside("kept_sets").passages()[0][1]
    prompt = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :64]
    steps = 10 if options.quick else 40
    found = {}
    for size in (1, 8):
        ids = prompt.repeat(size, 1)
        chain = decal.parse(CHAIN)
        warpers = [TemperatureLogitsWarper(1.3), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)]
        processors = {"decal": chain.processor(), "transformers": LogitsProcessorList(warpers)}
        out = loaded.model(ids, use_cache=True)
        taken: dict[str, list[float]] = {"forward": [], **{name: [] for name in processors}}
        for step in range(steps + 3):
            scores = out.logits[:, -1].float()
            order = list(processors) if step % 2 else list(processors)[::-1]
            for name in order:
                given = scores.clone()
                start = time.perf_counter()
                processors[name](ids, given)
                taken[name].append(time.perf_counter() - start)
            tokens = chain.sample(scores, torch.arange(size), step)
            ids = torch.cat([ids, tokens[:, None]], 1)
            start = time.perf_counter()
            out = loaded.model(tokens[:, None], past_key_values=out.past_key_values, use_cache=True)
            taken["forward"].append(time.perf_counter() - start)
        found[str(size)] = {name: round(statistics.median(t[3:]), 7) for name, t in taken.items()}
    return found


# ---- about the machine


def processor() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1).strip()  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    git = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()
    for name in ("decal", "torch", "numpy", "numba", "transformers", "vllm", "llama-cpp-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# ---- the page


def seconds(value: float) -> str:
    unit, size = ("s", 1.0) if value >= 1 else ("ms", 1e-3) if value >= 1e-3 else ("µs", 1e-6)
    return f"{value / size:.3g} {unit}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def shown(triple: Sequence[float]) -> str:
    """A ratio; bold if decal is slower, and in brackets if the interval has 1 in it."""
    middle, low, high = triple
    text = f"**{number(middle)}**" if middle < 1 else number(middle)
    return f"({text})" if low <= 1 <= high else text


def code(case: str) -> str:
    chain, plus, draw = case.partition(" + ")
    return f"`{chain.replace('|', chr(92) + '|')}`{plus}{draw}"


def settings(results: Mapping[str, Any]) -> list[tuple[int, int]]:
    return sorted({(one["vocabulary"], one["batch"]) for one in results["cells"].values()})


def ratio_table(results: Mapping[str, Any], kind: str) -> str:
    grid = settings(results)
    lines = []
    for case in CASES:
        for name in case.peers:
            found = [results["cells"].get(key(kind, v, b, case.name), {}).get("ratio", {}).get(name) for v, b in grid]
            if any(found):
                lines.append([f"{code(case.name)}, {NAMES[name]}", *(shown(one) if one else "–" for one in found)])
    return table(["case, peer", *(f"{v / 1000:.0f}k × {b}" for v, b in grid)], lines)


def limit_table(results: Mapping[str, Any], kind: str) -> str:
    grid = settings(results)
    lines = []
    for case in CASES:
        found = [results["cells"].get(key(kind, v, b, case.name)) for v, b in grid]
        if any(found):
            for limit in cases.limits():
                ratios = (one["ratio"].get(limit) if one else None for one in found)
                lines.append([f"{code(case.name)}, {limit}", *(number(1 / one[0]) if one else "–" for one in ratios)])
    return table(["case, limit", *(f"{v / 1000:.0f}k × {b}" for v, b in grid)], lines)


def absolute_table(results: Mapping[str, Any]) -> str:
    columns = [(kind, b) for kind in cases.KINDS for b in cases.BATCHES]
    lines = []
    for case in CASES:
        found = [results["cells"].get(key(kind, DRAWN_AT, b, case.name)) for kind, b in columns]
        if any(found):
            lines.append([code(case.name), *(seconds(one["median_us"]["decal"] * 1e-6) if one else "–" for one in found)])
    return table(["case", *(f"{kind}, {b}" for kind, b in columns)], lines)


def overview(results: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A table of medians over all sizes, and sentences on everything in which decal is slower."""
    lines, losses = [], []
    for case in CASES:
        for name in case.peers:
            entries = [one for one in results["cells"].values() if one["case"] == case.name and name in one["ratio"]]
            if not entries:
                continue
            line = [f"{code(case.name)}, {NAMES[name]}"]
            for kind in cases.KINDS:
                found = sorted(one["ratio"][name][0] for one in entries if one["kind"] == kind)
                line += [number(statistics.median(found)), f"{number(found[0])} – {number(found[-1])}"] if found else ["–", "–"]
            slower = [one for one in entries if one["ratio"][name][2] < 1]
            lines.append([*line, f"{len(slower)} of {len(entries)}"])
            if slower:
                worst = min(slower, key=lambda one: one["ratio"][name][0])
                size = f"V = {worst['vocabulary']:,}, B = {worst['batch']}"
                losses.append(
                    f"- {code(case.name)}, {NAMES[name]}: in {len(slower)} of {len(entries)}, "
                    f"at worst {worst['ratio'][name][0]:.2g} ({worst['kind']} rows, {size})."
                )
    head = ["case, peer", "real: median", "range", "flat: median", "range", "decal slower"]
    return table(head, lines), losses


PAGE = """# Speed on a CPU

Written by `python benchmarks/speed.py` from [speed.json](speed.json); measured on {date} on {processor}, {cores} cores,
{system}, threads: {threads}, {why} (the samplers of llama.cpp use one). {versions}.

The load of the machine was {load_before} before and {load_after} after, of which the benchmark itself is up to {threads}.
Times are as in use, not of a loop that runs one thing over and over: others have just worked, as a model has in use, and what
was in the caches is not. How much that matters shows the time of one softmax, which is measured again with every case: its
medians differ by a factor of {control_median} (median over the sizes) to {control_most} (the worst), by what ran before.

![Time of others divided by decal's](speed.png)

A ratio is the time of the other divided by decal's: 2 means that decal takes half as long, **0.5** that it takes twice as
long. In brackets: the 95 % interval has 1 in it.

## What is compared

- *Rows.* `flat`: 2.5 times standard normal numbers. `real`: next-token logits at 64 places of `benchmarks/texts.txt`, of
  smollm2 for V = 49,152 and of gemma3-270m for V = 262,144; V = 32,000 and 131,072 are the first columns of the latter.
  All float32.
- *transformers*: its warpers one after the other, then `softmax` and `multinomial` where a token is drawn. It has no
  `top_n_sigma`. Its `top_h` is decal's variant `cumulative`.
- *torch by hand*: what one would write oneself: `topk`, `where`, a sort for top-p; after a top-k only on the tokens that
  are left.
- *vLLM*: its functions `apply_top_k_top_p_pytorch`, `MinPLogitsProcessor.apply` and `random_sample`, called as on its CPU
  platform. They write in place; the copy that makes up for it is off the clock. vLLM's builds for CPUs draw by a compiled
  operator, which is not in its wheel on PyPI and not measured here. The chain with min-p is in vLLM's order.
- *llama.cpp*: its sampler chain through llama-cpp-python, row by row. It takes an array of structures, which every step
  has to fill from the logits; *array ready* leaves that out. It gives an array of candidates, not logits: where nothing
  is drawn it does less than the others, since it writes no row.
- *softmax*: one `torch.softmax` of the same float32 rows, and *copy*: one `torch.clone` of them, as the limits of what reads
  and writes every logit.

Before anything is timed, results are compared: kept sets are the same but for one token and {tolerance} of the
probability, which float32 sums of the others cost; the largest differences found: {widest}. decal sums in integers. Kept
logits agree to 1e-5, and drawn tokens are among the kept.

In each round everybody has a turn on the same rows, and who begins moves on by one; {least} to {most} rounds, medians.
Batches of 1 and 8 go through the 64 rows. Results are allocated as each library does: torch takes fresh memory from the
system for large ones, decal keeps the memory of outputs of 16 MiB or more for the next one. decal is called with
`check=False`.

## Overview

Over all vocabularies and batch sizes. The last column counts the settings in which decal is slower, with 1 outside the
interval.

{overview}

## Where decal is slower

{losses}

## decal beside one softmax and one copy

Time of decal divided by that of one softmax and of one copy of the same rows (V in thousands × B), on real rows:

{limit_real}

On flat rows:

{limit_flat}

## Ratios on real rows

{real}

## Ratios on flat rows

{flat}

## Times of decal at V = {drawn_at}

By kind of rows and B.

{absolute}
"""


def page(results: Mapping[str, Any]) -> str:
    overall, losses = overview(results)
    apart: dict[str, float] = {}
    left_out = set()
    for one in results["cells"].values():
        for name, difference in one["difference"].items():
            apart[name] = max(apart.get(name, 0.0), difference["probability"])
        left_out |= {f"- {one['case']}, {NAMES[name]}: {why}" for name, why in one["left_out"].items()}
    counts = [one["rounds"] for one in results["cells"].values()]
    spread = control(results)
    text = PAGE.format(
        **results["machine"],
        date=results["date"],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        control_median=number(statistics.median(spread)) if spread else "?",
        control_most=number(max(spread)) if spread else "?",
        tolerance=cases.TOLERANCE,
        why="as told" if results["machine"]["told"] else "torch's default",
        widest=", ".join(f"{NAMES[name]} {value:.1g}" for name, value in apart.items()),
        least=min(counts),
        most=max(counts),
        overview=overall,
        losses="\n".join(losses) or "In no setting that was measured.",
        limit_real=limit_table(results, "real"),
        limit_flat=limit_table(results, "flat"),
        real=ratio_table(results, "real"),
        flat=ratio_table(results, "flat"),
        drawn_at=f"{DRAWN_AT:,}",
        absolute=absolute_table(results),
    )
    more = alone_page(results.get("alone")) + start_page(results.get("start")) + decode_page(results.get("decode"))
    title, intro, rest = text.split("\n\n", 2)
    for only, one in results.get("again", {}).items():
        told = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        intro += f"\nCells that match `{only}` were measured again on {one['date']}: {told}."
    text = "\n\n".join((title, intro, rest))
    absent = [*(f"- {name}: {why}" for name, why in results["missing"].items()), *sorted(left_out)]
    if absent:
        more += ["## Left out", "\n".join(absent)]
    return "\n\n".join([text.rstrip(), *more]) + "\n"


def control(results: Mapping[str, Any]) -> list[float]:
    """For each kind and size with five cases or more, how far apart the medians of the same softmax are that belong to them."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for one in results["cells"].values():
        found.setdefault((one["kind"], one["vocabulary"], one["batch"]), []).append(one["median_us"]["softmax"])
    return [max(times) / min(times) for times in found.values() if len(times) >= 5]


def alone_page(alone: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not alone:
        return []
    columns = list(dict.fromkeys((one["kind"], one["batch"]) for one in alone))
    lines = []
    for name in dict.fromkeys(one["case"] for one in alone):
        times = {(one["kind"], one["batch"]): one["median_us"] for one in alone if one["case"] == name}
        lines.append([f"{code(name)}, transformers", *(number(times[c]["transformers"] / times[c]["decal"]) for c in columns)])
        lines.append([f"{code(name)}, time of decal", *(seconds(times[c]["decal"] * 1e-6) for c in columns)])
    return [
        "## In loops of their own",
        f"The same rows over and over, V = {DRAWN_AT:,}, each library by itself, so that what fits is in the caches: as\n"
        "often quoted, and better than in use. Ratios to transformers as above, by kind of rows and B.",
        table(["case", *(f"{kind}, {size}" for kind, size in columns)], lines),
    ]


def start_page(start: Mapping[str, Any] | None) -> list[str]:
    if not start:
        return []
    imports, cold, warm = start["imports"], start["cold"], start["warm"]
    return [
        "## Import and first calls",
        f"`import decal` takes {seconds(imports['decal'])} after torch ({seconds(imports['torch'])})\n"
        f"and transformers' base class of logits processors ({seconds(imports['transformers'])}), which it needs. numba is "
        + ("imported with it." if imports["numba"] else "imported by the first call."),
        table(
            [f"`{CHAIN}`, V = 49,152, B = 1".replace(" | ", " \\| "), "nothing on disk", "compiled before"],
            [
                ["first call of a process", seconds(cold["first"]), seconds(warm["first"])],
                ["second call", seconds(cold["second"]), seconds(warm["second"])],
                ["first call of another chain, with a draw", seconds(cold["other"]), seconds(warm["other"])],
            ],
        ),
        f"Compiled code is kept on disk ({start['cache_mb']} MB), and is the same for all chains.",
    ]


def decode_page(decode: Mapping[str, Any] | None) -> list[str]:
    if not decode:
        return []
    lines = []
    for size, found in decode.items():
        line = [size, seconds(found["forward"])]
        for name in ("decal", "transformers"):
            line += [seconds(found[name]), f"{100 * found[name] / (found[name] + found['forward']):.1f} %"]
        lines.append(line)
    return [
        "## Share of a decoding step",
        f"One token of smollm2 (135M parameters, float32) with a cache of keys and values, then\n`{CHAIN}` as a logits "
        "processor; shares are of both together.",
        table(["B", "forward pass", "decal", "share", "transformers", "share"], lines),
    ]


def draw(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    colours = dict(zip(NAMES, ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#7FCFB6"), strict=True))
    cells = [one for one in results["cells"].values() if one["vocabulary"] == DRAWN_AT and len(one["ratio"]) > 1]
    if not cells:
        return
    listed = [case for case in CASES if any(one["case"] == case.name for one in cells)]
    sizes = sorted({one["batch"] for one in cells})
    heights, places = [], 0.0
    for case in listed:
        heights.append(places)
        places += len(case.peers) + 1.0
    figure, axes = plt.subplots(1, len(sizes), figsize=(11, 0.62 * len(listed) + 2.1), sharey=True, sharex=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for number, (case, top) in enumerate(zip(listed, heights, strict=True)):
            if number % 2 == 0:
                axis.axhspan(top - 1, top + len(case.peers), color="#f4f4f4", zorder=0, linewidth=0)
            for place, name in enumerate(case.peers):
                y = top + place
                for one in cells:
                    if one["case"] != case.name or one["batch"] != size or name not in one["ratio"]:
                        continue
                    middle, low, high = one["ratio"][name]
                    real = one["kind"] == "real"
                    axis.plot([low, high], [y, y], color=colours[name], linewidth=1.2, alpha=0.6, zorder=2)
                    axis.plot(
                        middle, y, "o" if real else "D", color=colours[name], markersize=5.5 if real else 4.5,
                        markerfacecolor=colours[name] if real else "white", zorder=3,
                    )  # fmt: skip
        axis.axvline(1, color="black", linewidth=1, zorder=1)
        axis.set_xscale("log")
        axis.set_title(f"B = {size}", fontsize=10)
        axis.xaxis.set_major_locator(LogLocator(10))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    first = axes[0][0]
    first.set_yticks([top + (len(case.peers) - 1) / 2 for case, top in zip(listed, heights, strict=True)])
    first.set_yticklabels([wrapped(case.name) for case in listed], fontsize=8)
    first.set_ylim(places - 0.5, -1.0)
    first.set_xlim(min(0.5, first.get_xlim()[0]), None)
    used = [name for name in NAMES if any(name in one["ratio"] for one in cells)]
    handles = [Line2D([], [], color=colours[n], marker="o", linestyle="", label=NAMES[n]) for n in used]
    handles += [
        Line2D([], [], color="#555555", marker="o", linestyle="", label="rows of a model"),
        Line2D([], [], color="#555555", marker="D", markerfacecolor="white", linestyle="", label="flat rows"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    title = f"Time divided by decal's, V = {DRAWN_AT:,}, {results['machine']['threads']} threads; right of 1 decal is faster"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def wrapped(name: str) -> str:
    """A long chain on two lines."""
    steps = name.split(" | ")
    return name if len(steps) < 3 else f"{' | '.join(steps[:2])} |\n{' | '.join(steps[2:])}"


# ---- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer vocabularies, batch sizes and rounds")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cells like 'real V=131072 B=8 top_p(0.9)' that match")
    parser.add_argument("--resume", action="store_true", help="keep cells that are there")
    parser.add_argument("--strict", action="store_true", help="stop where a peer keeps something else")
    parser.add_argument("--seconds", type=float, help="time for the rounds of a cell, of which there are at least three")
    parser.add_argument("--threads", type=int, help="instead of torch's default; 1 is less disturbed on a busy machine")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder of speed.json, speed.md and speed.png")
    options = parser.parse_args()
    options.part = options.part or list(PARTS)
    options.vocabularies = (49_152, 131_072) if options.quick else cases.VOCABULARIES
    options.batches = (1, 8) if options.quick else cases.BATCHES
    options.seconds = options.seconds or (0.15 if options.quick else 0.5)
    options.least, options.most = 3, 60
    return options


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    file = options.out / "speed.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if options.part == list(PARTS) and not options.only and not options.resume:
        results = {}
    results.setdefault("missing", {})

    def save() -> None:
        cells = results.get("cells", {})
        outer = json.dumps({name: value for name, value in results.items() if name != "cells"}, indent=1, ensure_ascii=False)
        inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in cells.items())
        part = file.with_suffix(".part")
        part.write_text(f'{outer[:-2]},\n "cells": {{\n{inner}\n }}\n}}\n')
        part.replace(file)

    options.out.mkdir(parents=True, exist_ok=True)
    if options.part != ["page"]:
        before = load()
        now = {"date": date.today().isoformat(), "versions": versions()}
        again = bool(options.only and results.get("cells"))
        if again:
            # What else is there keeps the date, the versions and the machine that it was measured with.
            results.setdefault("again", {})[options.only] = now
        else:
            results.update(now, again={})
            results["machine"] = {
                "processor": processor(),
                "cores": os.cpu_count(),
                "system": platform.system(),
                "threads": torch.get_num_threads(),
                "told": options.threads is not None,
                "load_before": before,
                "load_after": None,
            }
        if "ratios" in options.part:
            measure_ratios(results, options, save)
        if "alone" in options.part:
            print("in loops of their own", file=sys.stderr, flush=True)
            results["alone"] = measure_alone(options)
            save()
        if "start" in options.part:
            print("imports and first calls", file=sys.stderr, flush=True)
            results["start"] = measure_start(options)
            save()
        if "decode" in options.part:
            print("decoding", file=sys.stderr, flush=True)
            results["decode"] = measure_decode(options)
        if not again:
            results["machine"]["load_after"] = load()
        save()
    if "page" in options.part and results.get("cells"):
        (options.out / "speed.md").write_text(page(results))
        draw(results, options.out / "speed.png")


if __name__ == "__main__":
    main()
