"""What speed.py and bench_chains.py time: rows, cases, and who else can do each case.

Rows are of two kinds. `flat` ones are 2.5 times standard normal numbers: thousands of tokens share the mass. `real` ones are
what a model gives at 64 places of texts.txt: smollm2 for its 49,152 tokens, gemma3-270m for its 262,144, and the first 32,000
or 131,072 columns of the latter for vocabularies in between.

A case is a chain, by which logits are masked or tokens drawn. Peers do the same with code of their own; what they need to
prepare, and would have ready in an engine, is done off the clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import logging
import math
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import decal

VOCABULARIES = (32_000, 49_152, 131_072, 262_144)
BATCHES = (1, 8, 64)
KINDS = ("real", "flat")
ROWS = 64
"""Rows of each kind and vocabulary; smaller batches are parts of them, so a batch of one isn't always the same row."""
SMOLLM2 = 49_152


# ---- rows


def rows(kind: str, vocabulary: int) -> Tensor:
    """(64, V) float32 logits."""
    if kind == "flat":
        return 2.5 * torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    source = real_rows("smollm2" if vocabulary == SMOLLM2 else "gemma3-270m")
    return source[:, :vocabulary].contiguous()


@cache
def real_rows(name: str) -> Tensor:
    """(64, V) rows of a model, spread over the texts; kept in decal's cache folder once read."""
    from safetensors.torch import load_file, save_file

    from decal.eval.paths import atomic_dir, cache_dir

    folder = cache_dir() / "benchmarks" / f"{name}-{ROWS}"
    if not folder.is_dir():
        from decal.eval import models

        kept_sets = beside("kept_sets")
        logits, _ = kept_sets.read(models.load(name, accept_licence=True), kept_sets.MODELS[name])
        chosen = torch.linspace(0, len(logits) - 1, ROWS).round().long()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_dir(folder) as fresh:
            save_file({"rows": logits[chosen].contiguous()}, fresh / "rows.safetensors")
    # Copied, since the file is mapped: whoever read a row first would be charged for it.
    return load_file(folder / "rows.safetensors")["rows"].clone()


def beside(name: str) -> Any:
    """A module of this folder, which is no package."""
    import sys

    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def batches(whole: Tensor, size: int) -> list[Tensor]:
    """The rows in batches of one size."""
    return list(whole.split(size))


# ---- implementations


@dataclass
class Implementation:
    """One way to do a case.

    Attributes:
        call: what is timed; takes what ``prepare`` made of the rows.
        prepare: what is done before, off the clock.
        outcome: what a call gave, as processed logits (B, V), or as tokens (B,) where the case draws.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = lambda x: x
    outcome: Callable[[Any], Tensor] = lambda result: result


Maker = Callable[["Case", int, int], "Implementation | None"]


@dataclass(frozen=True)
class Case:
    """A chain, and whether a token is drawn from what it leaves.

    Attributes:
        steps: names and parameters of its steps, as peers that take chains need them.
        peers: who is asked for it.
    """

    steps: tuple[tuple[str, float], ...]
    peers: tuple[str, ...]
    draw: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The chain, as decal writes it."""
        extra = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return " | ".join(f"{name}({value:g}{extra})" for name, value in self.steps)

    @property
    def name(self) -> str:
        """As in tables."""
        return self.text + (" + draw" if self.draw else "")

    @property
    def only_cuts(self) -> bool:
        return not self.draw and all(name != "temperature" for name, _ in self.steps)


TEMPERATURE, TOP_K, TOP_P, MIN_P = ("temperature", 1.3), ("top_k", 50), ("top_p", 0.9), ("min_p", 0.1)
ALL = ("transformers", "torch", "vllm", "llama.cpp", "llama.cpp, array ready")
NO_VLLM = tuple(name for name in ALL if name != "vllm")

CASES = (
    Case((TOP_K,), ALL),
    Case((TOP_P,), ALL),
    Case((MIN_P,), ALL),
    Case((("typical", 0.9),), ("transformers", "llama.cpp", "llama.cpp, array ready")),
    Case((("epsilon", 0.0009),), ("transformers", "torch")),
    Case((("eta", 0.002),), ("transformers",)),
    Case((("top_n_sigma", 1),), ("torch", "llama.cpp", "llama.cpp, array ready")),
    Case((("top_h", 0.4),), ()),
    Case((("top_h", 0.4),), ("transformers",), options={"variant": "cumulative"}),
    Case((TOP_K, TOP_P), ALL),
    Case((TEMPERATURE, TOP_K, TOP_P, MIN_P), NO_VLLM),
    Case((TEMPERATURE, TOP_K, TOP_P, MIN_P), NO_VLLM, draw=True),
    Case((TEMPERATURE, MIN_P, TOP_K, TOP_P), ("vllm",), draw=True),
    Case((TEMPERATURE, TOP_P), ALL, draw=True),
    Case((TEMPERATURE,), ALL, draw=True),
)


def ours(case: Case, size: int, vocabulary: int) -> Implementation:
    """decal."""
    chain = decal.parse(case.text)
    if not case.draw:
        return Implementation(lambda x: chain(x, check=False))
    seeds, steps = torch.arange(size), itertools.count()
    return Implementation(lambda x: chain.sample(x, seeds, next(steps), check=False))


def limits() -> dict[str, Implementation]:
    """What nothing that reads every logit and writes as many numbers can be much faster than."""
    return {"softmax": Implementation(lambda x: torch.softmax(x, -1)), "copy": Implementation(torch.clone)}


# ---- transformers


def transformers(case: Case, size: int, vocabulary: int) -> Implementation:
    """Its warpers, one after the other, then softmax and multinomial as in `generate`."""
    from transformers import generation as g
    from transformers.generation.logits_process import TopHLogitsWarper

    kinds = {
        "temperature": g.TemperatureLogitsWarper,
        "top_k": lambda k: g.TopKLogitsWarper(int(k)),
        "top_p": g.TopPLogitsWarper,
        "min_p": g.MinPLogitsWarper,
        "typical": g.TypicalLogitsWarper,
        "epsilon": g.EpsilonLogitsWarper,
        "eta": g.EtaLogitsWarper,
        "top_h": TopHLogitsWarper,
    }
    warpers = [kinds[name](value) for name, value in case.steps]

    def call(scores: Tensor) -> Tensor:
        for warper in warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if case.draw else scores

    return Implementation(call)


# ---- plain torch, as one would write it by hand


def torch_top_k(x: Tensor, k: float) -> Tensor:
    return x.masked_fill(x < torch.topk(x, int(k)).values[:, -1:], -math.inf)


def torch_top_p(x: Tensor, p: float) -> Tensor:
    values, ids = x.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    drop = probabilities.cumsum(-1) - probabilities >= p
    return x.masked_fill(drop.scatter(-1, ids, drop), -math.inf)


def torch_min_p(x: Tensor, share: float) -> Tensor:
    return torch.where(x >= x.amax(-1, keepdim=True) + math.log(share), x, -math.inf)


def torch_epsilon(x: Tensor, epsilon: float) -> Tensor:
    level = (x.logsumexp(-1, keepdim=True) + math.log(epsilon)).minimum(x.amax(-1, keepdim=True))
    return torch.where(x >= level, x, -math.inf)


def torch_top_n_sigma(x: Tensor, n: float) -> Tensor:
    return torch.where(x >= x.amax(-1, keepdim=True) - n * x.std(-1, keepdim=True, correction=0), x, -math.inf)


def torch_few(x: Tensor, settings: Mapping[str, float], draw: bool) -> Tensor:
    """Chains with a top-k of few tokens: only those are looked at from then on."""
    values, ids = torch.topk(x, int(settings["top_k"]))
    values = values / settings.get("temperature", 1.0)
    probabilities = values.softmax(-1)
    drop = probabilities.cumsum(-1) - probabilities >= settings.get("top_p", 1.0)
    drop |= probabilities < settings.get("min_p", 0.0) * probabilities[:, :1]
    if draw:
        return ids.gather(-1, torch.multinomial(probabilities.masked_fill(drop, 0.0), 1))[:, 0]
    return torch.full_like(x, -math.inf).scatter_(-1, ids, values.masked_fill(drop, -math.inf))


def torch_draw(x: Tensor, temperature: float) -> Tensor:
    """The largest p / E, E exponential, which is cheaper than multinomial."""
    probabilities = (x / temperature).softmax(-1)
    return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)


def torch_nucleus_draw(x: Tensor, temperature: float, p: float) -> Tensor:
    values, ids = (x / temperature).sort(-1, descending=True)
    probabilities = values.softmax(-1)
    drop = probabilities.cumsum(-1) - probabilities >= p
    return ids.gather(-1, torch.multinomial(probabilities.masked_fill(drop, 0.0), 1))[:, 0]


def plain_torch(case: Case, size: int, vocabulary: int) -> Implementation:
    settings = dict(case.steps)
    if "top_k" in settings and len(settings) > 1:
        return Implementation(lambda x: torch_few(x, settings, case.draw))
    if case.draw and "top_p" in settings:
        return Implementation(lambda x: torch_nucleus_draw(x, p=settings["top_p"], temperature=settings["temperature"]))
    if case.draw:
        return Implementation(lambda x: torch_draw(x, settings["temperature"]))
    ((name, value),) = case.steps
    function = {
        "top_k": torch_top_k,
        "top_p": torch_top_p,
        "min_p": torch_min_p,
        "epsilon": torch_epsilon,
        "top_n_sigma": torch_top_n_sigma,
    }[name]
    return Implementation(lambda x: function(x, value))


# ---- vLLM


class Missing(Exception):
    """A peer that isn't there, and why."""


def module(name: str) -> Any:
    """A module, or Missing."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return importlib.import_module(name)
    except Exception as error:  # a package that is there may lack others, or be unfit for this torch
        raise Missing(f"{name.split('.')[0]} can't be imported: {type(error).__name__}: {error}") from error


@cache
def vllm_parts() -> SimpleNamespace:
    """Its functions for CPUs."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    before, level = torch.get_num_threads(), logging.getLogger().level
    sampler = module("vllm.v1.sample.ops.topk_topp_sampler")
    min_p = module("vllm.v1.sample.logits_processor.builtin").MinPLogitsProcessor
    # Importing it must not change what the others run with.
    torch.set_num_threads(before)
    logging.getLogger().setLevel(level)
    return SimpleNamespace(cut=sampler.apply_top_k_top_p_pytorch, draw=sampler.random_sample, min_p=min_p)


def vllm(case: Case, size: int, vocabulary: int) -> Implementation:
    """Its temperature, min-p, top-k and top-p, and draw, in its order; in place, on a copy made off the clock."""
    parts, settings = vllm_parts(), dict(case.steps)
    k = torch.full((size,), int(settings["top_k"]), dtype=torch.int32) if "top_k" in settings else None
    p = torch.full((size,), settings["top_p"]) if "top_p" in settings else None
    temperature = torch.full((size, 1), settings["temperature"]) if "temperature" in settings else None
    processor = None
    if "min_p" in settings:
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=size))
        processor = parts.min_p(config, torch.device("cpu"), False)
        processor.min_p_count, processor.min_p = size, torch.full((size, 1), settings["min_p"])

    def call(z: Tensor) -> Tensor:
        if temperature is not None:
            z = z.div_(temperature)
        if processor is not None:
            z = processor.apply(z)
        # What vLLM passes on CPUs.
        z = parts.cut(z, k, p, allow_cpu_sync=True)
        return parts.draw(z.softmax(dim=-1, dtype=torch.float32), {}) if case.draw else z

    return Implementation(call, prepare=Tensor.clone)


# ---- llama.cpp

TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class LlamaCpp:
    """Sampler chains of llama.cpp, one per row, as it has one per sequence, and the array of candidates they work on."""

    def __init__(self, case: Case, size: int, vocabulary: int):
        self.lib = lib = module("llama_cpp")
        self.draw, self.chains = case.draw, []
        kinds = {
            "temperature": lib.llama_sampler_init_temp,
            "top_k": lambda k: lib.llama_sampler_init_top_k(int(k)),
            "top_p": lambda p: lib.llama_sampler_init_top_p(p, 1),
            "min_p": lambda p: lib.llama_sampler_init_min_p(p, 1),
            "typical": lambda p: lib.llama_sampler_init_typical(p, 1),
            "top_n_sigma": lib.llama_sampler_init_top_n_sigma,
        }
        for row in range(size):
            chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
            for name, value in case.steps:
                lib.llama_sampler_chain_add(chain, kinds[name](value))
            if case.draw:
                lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(row))
            self.chains.append(chain)
        weakref.finalize(self, self.free, lib, self.chains)
        self.table = np.zeros((size, vocabulary), TOKEN)
        self.ids = np.arange(vocabulary, dtype=np.int32)
        self.starts = [row.ctypes.data_as(ctypes.POINTER(lib.llama_token_data)) for row in self.table]

    def fill(self, x: Tensor) -> None:
        self.table["id"] = self.ids
        self.table["logit"] = x.numpy()

    def apply(self, _: None) -> list[Any]:
        lib, width = self.lib, self.table.shape[1]
        arrays = []
        for chain, start in zip(self.chains, self.starts, strict=True):
            array = lib.llama_token_data_array(data=start, size=width, selected=-1, sorted=False)
            lib.llama_sampler_apply(chain, ctypes.byref(array))
            arrays.append(array)
        return arrays

    def outcome(self, arrays: Sequence[Any]) -> Tensor:
        kept = torch.full(self.table.shape, -math.inf)
        tokens = []
        for row, array in enumerate(arrays):
            # A sampler may have moved it.
            address = ctypes.addressof(array.data.contents)
            left = np.frombuffer((ctypes.c_char * (array.size * TOKEN.itemsize)).from_address(address), TOKEN)
            kept[row, torch.from_numpy(left["id"].astype(np.int64))] = torch.from_numpy(left["logit"].copy())
            tokens.append(int(left["id"][array.selected]) if array.selected >= 0 else -1)
        return torch.tensor(tokens) if self.draw else kept

    @staticmethod
    def free(lib: Any, chains: Sequence[Any]) -> None:
        for chain in chains:
            lib.llama_sampler_free(chain)


def llama_cpp(case: Case, size: int, vocabulary: int) -> Implementation:
    """With what every step needs: copying the logits into an array of candidates."""
    samplers = LlamaCpp(case, size, vocabulary)
    return Implementation(lambda x: samplers.apply(samplers.fill(x)), outcome=samplers.outcome)


def llama_cpp_ready(case: Case, size: int, vocabulary: int) -> Implementation:
    """The samplers alone."""
    samplers = LlamaCpp(case, size, vocabulary)
    return Implementation(samplers.apply, prepare=samplers.fill, outcome=samplers.outcome)


PEERS: dict[str, Maker] = {
    "transformers": transformers,
    "torch": plain_torch,
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "llama.cpp, array ready": llama_cpp_ready,
}


def peers(case: Case, size: int, vocabulary: int, missing: dict[str, str]) -> dict[str, Implementation]:
    """Those that are installed; the others go into ``missing``."""
    found = {}
    for name in case.peers:
        try:
            made = PEERS[name](case, size, vocabulary)
        except Missing as error:
            missing[re.sub(",.*", "", name)] = str(error)
        else:
            assert made is not None
            found[name] = made
    return found


# ---- what they give

TOLERANCE = 1e-3
"""Probability of the tokens in which kept sets may differ: float32 sums over flat rows of 262,144 tokens are off by as much."""


class Different(Exception):
    """A peer keeps something else."""


def compare(case: Case, x: Tensor, mine: Tensor, theirs: Tensor) -> dict[str, float]:
    """In how many tokens of a row, and in how much of its probability besides one token, two results
    differ at most.

    Raises:
        Different: in more than one token and, besides it, `TOLERANCE`, or the logits that both keep differ, or a token was
            drawn that decal doesn't keep.
    """
    if case.draw:
        cut = decal.parse(case.text)(x, check=False)
        for tokens in (mine, theirs):
            if not cut.gather(-1, tokens[:, None]).isfinite().all():
                raise Different(f"{case.name}: a token was drawn that decal drops")
        return {"tokens": 0, "probability": 0.0}
    ours, other = mine.isfinite(), theirs.isfinite()
    apart = ours ^ other
    count = apart.sum(-1)
    share = torch.zeros(len(x), dtype=torch.float64)
    if (odd := count > 0).any():
        law = (x[odd].double() / dict(case.steps).get("temperature", 1.0)).softmax(-1)
        inside = law * apart[odd]
        # One token at the threshold may be a likely one: a cut from both sides has two ends.
        share[odd] = (inside.sum(-1) - inside.amax(-1)) / (law * (ours | other)[odd]).sum(-1)
    if (share > TOLERANCE).any():
        raise Different(
            f"{case.name}: kept sets differ in {int(count.max())} tokens, {float(share.max()):.2g} of the probability"
        )
    both = ours & other
    # llama.cpp writes logits of candidates, others the whole row.
    if not torch.allclose(mine[both], theirs[both], rtol=1e-5, atol=1e-5):
        raise Different(f"{case.name}: logits of kept tokens differ")
    return {"tokens": int(count.max()), "probability": float(share.max())}
