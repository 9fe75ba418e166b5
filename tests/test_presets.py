"""Presets and conversions against what the engines compute: transformers itself, the others written out by hand."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from against import alive, fresh_rows, fresh_texts
from tiny import byte_level, llama, sentencepiece
from torch import Tensor
from transformers import GenerationConfig

import decal
from decal.samplers.presets import PRESETS, Conversion

V = 300
Converter = Callable[..., Conversion]
CONVERTERS: dict[str, Converter] = {
    "transformers": decal.from_transformers,
    "vllm": decal.from_vllm,
    "llama.cpp": decal.from_llama_cpp,
    "mlx-lm": decal.from_mlx_lm,
    "text-generation-webui": decal.from_text_generation_webui,
}


def text(conversion: Conversion) -> str:
    return str(conversion.chain)


def rows(seed: int) -> Tensor:
    """Without dropped tokens, which engines treat in ways of their own."""
    return fresh_rows(seed, count=20, size=V)[::2]


def history(seed: int, prompt: int = 12) -> tuple[Tensor, decal.History]:
    ids = fresh_texts(seed, count=20, length=40, size=V)[::2]
    return ids, decal.History.of(ids, prompt=prompt)


def check_same(ours: Tensor, theirs: Tensor) -> None:
    """The same kept tokens and the same probabilities."""
    assert torch.equal(alive(ours), alive(theirs))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-9, atol=1e-12)


# ---- the engines, written out


def cut(z: Tensor, keep: Tensor) -> Tensor:
    return z.masked_fill(~keep, -torch.inf)


def top_k(z: Tensor, k: int) -> Tensor:
    return cut(z, z >= z.topk(k).values[:, -1:])


def top_p(z: Tensor, p: float) -> Tensor:
    """As vLLM: ascending, what sums to at most 1 - p goes."""
    ascending, index = z.sort(-1)
    gone = ascending.softmax(-1).cumsum(-1) <= 1 - p
    gone[:, -1] = False
    return z.masked_fill(torch.zeros_like(gone).scatter(-1, index, gone), -torch.inf)


def min_p(z: Tensor, p: float) -> Tensor:
    q = z.softmax(-1)
    return cut(z, q >= p * q.amax(-1, keepdim=True))


def penalised(
    z: Tensor, ids: Tensor, repetition: float, frequency: float, presence: float, counted: slice, seen: slice
) -> Tensor:
    z = z.clone()
    for row, tokens in zip(z, ids.tolist(), strict=True):
        for t in set(tokens[seen]):
            row[t] = row[t] / repetition if row[t] > 0 else row[t] * repetition
        for t, count in Counter(tokens[counted]).items():
            row[t] -= frequency * count + presence
    return z


def vllm(z: Tensor, ids: Tensor, prompt: int, p: dict[str, Any]) -> Tensor:
    z = penalised(
        z,
        ids,
        p.get("repetition_penalty", 1.0),
        p.get("frequency_penalty", 0.0),
        p.get("presence_penalty", 0.0),
        counted=slice(prompt, None),
        seen=slice(None),
    )
    t = p.get("temperature", 1.0)
    if t < 1e-5:
        return cut(z, z == z.amax(-1, keepdim=True))
    z = min_p(z / t, p.get("min_p", 0.0))
    if p.get("top_k", 0) > 0:
        z = top_k(z, p["top_k"])
    return top_p(z, p["top_p"]) if p.get("top_p", 1.0) < 1 else z


REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "transformers": lambda z: top_k(z, 50),
    "vllm": lambda z: z,
    "llama.cpp": lambda z: min_p(top_p(top_k(z, 40), 0.95), 0.05) / 0.8,
    "mlx-lm": lambda z: cut(z, z == z.amax(-1, keepdim=True)),
    "text-generation-webui": lambda z: top_p(z, 0.95),
}

# ---- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_engine_does_by_default(name: str) -> None:
    z = rows(1)
    check_same(decal.preset(name)(z), REFERENCES[name](z))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_conversion_of_no_settings(name: str) -> None:
    # Sampling is asked for in transformers, and text-generation-webui starts with a preset file of one line.
    given = {"transformers": {"do_sample": True}, "text-generation-webui": {"top_p": 0.95}}.get(name, {})
    chain, report = CONVERTERS[name](given)
    assert chain == decal.preset(name)
    assert all("tied at the cutoff" in line for line in report)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_in_canonical_form_and_says_its_version(name: str) -> None:
    assert str(decal.preset(name)) == PRESETS[name].chain
    assert decal.preset(name.upper()) == decal.preset(name)
    assert PRESETS[name].version


@pytest.mark.parametrize("name", ["llama", "", 3, None])
def test_an_unknown_preset_lists_those_known(name: Any) -> None:
    with pytest.raises(decal.DecalError, match=r"unknown preset .*llama\.cpp, mlx-lm, .*transformers, vllm"):
        decal.preset(name)


def test_importing_decal_imports_no_transformers() -> None:
    code = "import decal, sys; decal.preset('vllm'); decal.from_vllm({}); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- transformers

HF_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.4, 0.9, 1.0, 1.7),
    "top_h": (0.2, 0.6, 0.9),
    "top_k": (0, 3, 20, 1000),
    "top_p": (0.3, 0.9, 1.0),
    "min_p": (0.0, 0.01, 0.2),
    "typical_p": (0.4, 0.95, 1.0),
    "epsilon_cutoff": (0.0, 1e-3, 0.05),
    "eta_cutoff": (0.0, 1e-3, 0.05),
    "repetition_penalty": (0.8, 1.0, 1.3),
    "no_repeat_ngram_size": (0, 2, 3),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(V)


def by_transformers(model: Any, config: GenerationConfig, ids: Tensor, z: Tensor) -> Tensor:
    """What ``generate`` would do with the logits."""
    prepared, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(prepared, device=torch.device("cpu"))
    processors = model._get_logits_processor(
        generation_config=prepared, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids, device="cpu", model_kwargs={}
    )
    return processors(ids, z.clone())


@pytest.mark.parametrize("seed", range(60))
def test_from_transformers_is_what_generate_does(seed: int, model: Any) -> None:
    choose = random.Random(seed)
    given = {key: choose.choice(values) for key, values in HF_VALUES.items() if choose.random() < 0.45}
    z, (ids, past) = rows(seed), history(seed)
    config = GenerationConfig(do_sample=True, **given)
    conversion = decal.from_transformers(config)
    assert conversion == decal.from_transformers({"do_sample": True, **given})
    assert all("tied at the cutoff" in line or "bans every token" in line for line in conversion.report)
    check_same(conversion.chain(z, history=past), by_transformers(model, config, ids, z))


def test_from_transformers_top_h_of_1_is_a_cut_to_100_tokens(model: Any) -> None:
    z, (ids, _) = rows(4), history(4)
    config = GenerationConfig(do_sample=True, top_h=1.0, top_k=0)
    chain, report = decal.from_transformers(config)
    assert str(chain) == "top_k(100)"
    assert [line.split(":")[0] for line in report] == ["top_h"]
    ours, theirs = alive(chain(z)), alive(by_transformers(model, config, ids, z))
    assert not (theirs & ~ours).any()
    assert ((ours & ~theirs).sum(-1) <= 1).all()


def test_from_transformers_fills_in_its_defaults() -> None:
    assert text(decal.from_transformers({"do_sample": True, "temperature": 0.7})) == "temperature(0.7) | top_k(50)"
    assert text(decal.from_transformers({"do_sample": True, "top_k": 0})) == "temperature(1.0)"
    assert text(decal.from_transformers({"do_sample": True, "top_k": None})) == "top_k(50)"
    assert text(decal.from_transformers(GenerationConfig())) == "temperature(0.0)"


def test_from_transformers_is_greedy_unless_it_samples(model: Any) -> None:
    chain, report = decal.from_transformers({"temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.2})
    assert str(chain) == "repetition_penalty(1.2, 0, form='legacy') | temperature(0.0)"
    assert report == ("temperature: no effect, since do_sample isn't set, which means greedy decoding",)
    z, (ids, past) = rows(3), history(3)
    theirs = by_transformers(model, GenerationConfig(repetition_penalty=1.2), ids, z)
    assert torch.equal(chain(z, history=past).argmax(-1), theirs.argmax(-1))
    chain, report = decal.from_transformers({"temperature": 0.0, "do_sample": True, "top_p": 0.5})
    assert str(chain) == "temperature(0.0)"
    assert [line.split(":")[0] for line in report] == ["temperature", "top_p"]


def test_from_transformers_reports_what_no_rule_does() -> None:
    lost = {
        "encoder_repetition_penalty": 1.3,
        "encoder_no_repeat_ngram_size": 2,
        "bad_words_ids": [[3]],
        "forced_eos_token_id": 0,
    }
    config = GenerationConfig(do_sample=True, max_new_tokens=5, **lost)
    report = decal.from_transformers(config).report
    assert {line.split(":")[0] for line in report if "changes the next-token law" in line} == set(lost)
    assert "max_new_tokens: not part of a chain" in report
    off = {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beams": 1, "bad_words_ids": [], "min_length": 0}
    assert decal.from_transformers({"do_sample": True, **off}).report == ()


def test_every_setting_of_transformers_is_known() -> None:
    for key in vars(GenerationConfig()):
        if not key.startswith("_"):
            engine = decal.samplers.presets._TRANSFORMERS
            assert key in engine.defaults or key in engine.lost or key in engine.aside, key


# ---- vLLM

VLLM_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 0.5, 1.0, 1.8),
    "min_p": (0.0, 0.02, 0.3),
    "top_k": (-1, 0, 2, 30),
    "top_p": (0.4, 0.9, 1.0),
    "repetition_penalty": (0.7, 1.0, 1.2),
    "frequency_penalty": (-0.5, 0.0, 0.4),
    "presence_penalty": (-0.5, 0.0, 1.5),
}


@pytest.mark.parametrize("seed", range(40))
def test_from_vllm_is_what_vllm_does(seed: int) -> None:
    choose = random.Random(seed)
    given = {key: choose.choice(values) for key, values in VLLM_VALUES.items() if choose.random() < 0.6}
    z, (ids, past) = rows(seed), history(seed, prompt=25)
    check_same(decal.from_vllm(given).chain(z, history=past), vllm(z, ids, 25, given))


def test_from_vllm_keeps_its_order() -> None:
    given = {"top_p": 0.9, "top_k": 20, "min_p": 0.1, "temperature": 0.7, "presence_penalty": 1.0, "repetition_penalty": 1.1}
    assert text(decal.from_vllm(given)) == (
        "repetition_penalty(1.1, 0, form='legacy') | presence_penalty(1.0, 0) | "
        "temperature(0.7) | min_p(0.1) | top_k(20) | top_p(0.9)"
    )
    assert any("History.of(..., prompt=)" in line for line in decal.from_vllm(given).report)
    z, (_, past) = rows(5), history(5)
    other = decal.parse("temperature(0.7) | top_k(20) | top_p(0.9) | min_p(0.1)")
    mine = decal.from_vllm({key: given[key] for key in ("top_p", "top_k", "min_p", "temperature")}).chain
    assert not torch.equal(alive(mine(z, history=past)), alive(other(z, history=past)))


def test_from_vllm_reads_objects() -> None:
    class SamplingParams:
        def __init__(self, **given: Any):
            self.temperature, self.top_p, self.max_tokens, self.stop, self._eos_token_id = 1.0, 1.0, 16, [], None
            vars(self).update(given)

    assert decal.from_vllm(SamplingParams()) == (decal.preset("vllm"), ())
    chain, report = decal.from_vllm(SamplingParams(top_p=0.9, max_tokens=99, logit_bias={3: 1.0}))
    assert str(chain) == "top_p(0.9)"
    assert [line.split(":")[0] for line in report] == ["top_p", "max_tokens", "logit_bias"]
    assert text(decal.from_vllm(SimpleNamespace(min_p=0.2))) == "min_p(0.2)"


def test_from_vllm_is_greedy_at_temperature_0_and_lifts_tiny_ones() -> None:
    chain, report = decal.from_vllm({"temperature": 0, "top_p": 0.9})
    assert (str(chain), report) == ("temperature(0.0)", ("top_p: no effect, since temperature is 0",))
    chain, report = decal.from_vllm({"temperature": 0.001})
    assert (str(chain), report) == ("temperature(0.01)", ("temperature: vLLM raises 0.001 to 0.01",))


# ---- llama.cpp


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"samplers": ["temperature", "top_k"], "temperature": 2}, "temperature(2.0) | top_k(40)"),
        ({"samplers": ["min_p", "top_p", "temp"], "min_p": 0.2}, "min_p(0.2) | top_p(0.95) | temperature(0.8)"),
        ({"samplers": "tmk", "top_k": 5}, "temperature(0.8) | min_p(0.05) | top_k(5)"),
        ({"samplers": ["Top-K", "typ-p", "nucleus"], "typical_p": 0.7}, "top_k(40) | typical(0.7) | top_p(0.95)"),
        ({"samplers": []}, "temperature(1.0)"),
        ({"samplers": ["top_n_sigma"], "top_n_sigma": 1.5}, "top_n_sigma(1.5)"),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}, "temperature(1.0)"),
        ({"top_k": -1, "top_p": 2, "min_p": -1, "temperature": -3}, "temperature(0.0)"),
        (
            {"samplers": ["temperature", "xtc"], "xtc_probability": 0.5, "dynatemp_range": 0.3, "dynatemp_exponent": 2},
            "dynamic_temperature(0.8, 0.3, 2.0) | xtc(0.1, 0.5, 0)",
        ),
        ({"samplers": ["xtc", "top_k"], "xtc_probability": 0.5, "xtc_threshold": 0.6}, "top_k(40)"),
        (
            {"samplers": ["penalties"], "repeat_penalty": 1.1, "presence_penalty": 0.5, "repeat_last_n": 32},
            "repetition_penalty(1.1, 32, form='legacy') | presence_penalty(0.5, 32, scope='all')",
        ),
        ({"samplers": ["penalties"], "repeat_penalty": 1.1, "repeat_last_n": 0}, "temperature(1.0)"),
        ({"samplers": ["penalties"], "frequency_penalty": 1, "repeat_last_n": -1}, "frequency_penalty(1.0, 0, scope='all')"),
        ({"samplers": ["dry"], "dry_multiplier": 0.8}, "dry(0.8, 1.75, 2, 64)"),
        ({"samplers": ["dry"], "dry_multiplier": 0.8, "dry_base": 0.5}, "dry(0.8, 1.75, 2, 64)"),
        ({"samplers": ["dry"], "dry_multiplier": 0.8, "dry_penalty_last_n": 0}, "temperature(1.0)"),
        ({"mirostat": 2, "top_k": 5}, "temperature(0.8) | mirostat(5.0, 0.1)"),
        ({"mirostat": 1, "temperature": 1, "mirostat_tau": 3}, "mirostat(3.0, 0.1, version='1')"),
        (
            {"samplers": ["adaptive_p", "min_p"], "adaptive_target": 0.4, "adaptive_decay": 0.5},
            "min_p(0.05) | adaptive_p(0.4, 0.5)",
        ),
        ({"samplers": ["adaptive_p", "min_p"]}, "min_p(0.05)"),
    ],
)
def test_from_llama_cpp(request_: dict[str, Any], expected: str) -> None:
    assert text(decal.from_llama_cpp(request_)) == expected
    assert decal.parse(expected) == decal.from_llama_cpp(request_).chain


def test_from_llama_cpp_applies_what_it_names_in_its_order() -> None:
    z, (ids, past) = rows(7), history(7)
    given = {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "repeat_last_n": 9, "top_k": 12, "temperature": 1.5}
    window = slice(-9, None)
    penalty = penalised(z, ids, 1.3, 0.2, 0.0, counted=window, seen=window)
    usual = min_p(top_p(top_k(penalty, 12), 0.95), 0.05) / 1.5
    check_same(decal.from_llama_cpp(given).chain(z, history=past), usual)
    hot = min_p(top_p(top_k(penalty / 1.5, 12), 0.95), 0.05)
    order = ["penalties", "temperature", "top_k", "top_p", "min_p"]
    check_same(decal.from_llama_cpp({**given, "samplers": order}).chain(z, history=past), hot)
    assert not torch.equal(alive(usual), alive(hot))


def test_from_llama_cpp_reports_what_is_idle_or_lost() -> None:
    given = {
        "samplers": ["top_k", "infill", "warp"],
        "temperature": 0.3,
        "mirostat_tau": 4,
        "grammar": "root ::= x",
        "logit_bias": [],
        "n_predict": 5,
        "adaptive_target": 0.5,
    }
    chain, report = decal.from_llama_cpp(given)
    assert str(chain) == "top_k(40)"
    assert report == (
        "samplers: llama.cpp knows no 'warp' and skips it",
        "top_k: llama.cpp keeps only some of the tokens tied at the cutoff, decal keeps all",
        "samplers: infill has no rule in decal; left out",
        "temperature: no effect, since samplers doesn't name temperature",
        "adaptive_target: no effect, since samplers doesn't name adaptive_p",
        "mirostat_tau: no effect, since mirostat is off",
        "grammar: changes the next-token law in a way no rule of decal does; not carried over",
        "n_predict: not part of a chain",
    )
    report = decal.from_llama_cpp({"mirostat": 2, "top_k": 5, "top_p": 0.95}).report
    assert [line for line in report if "no effect" in line] == [
        "top_k: no effect, since mirostat replaces every sampler but temperature"
    ]
    assert any(line.startswith("mirostat: llama.cpp takes the surprise") for line in report)
    assert any("whole context" in line for line in decal.from_llama_cpp({"repeat_last_n": -1}).report)


def test_from_llama_cpp_finds_breakers_with_a_tokenizer() -> None:
    tokenizer = byte_level(["ab: cd\n" * 20], merges=6)
    given = {"samplers": ["dry"], "dry_multiplier": 0.8}
    assert any("pass tokenizer=" in line for line in decal.from_llama_cpp(given).report)
    chain, report = decal.from_llama_cpp(given, tokenizer=tokenizer)
    assert chain == decal.RULES["dry"](0.8, window=64, breakers=decal.tokens_with(tokenizer, "\n", ":", '"', "*"))
    assert report == ()
    chain, report = decal.from_llama_cpp({**given, "dry_sequence_breakers": ["\n", "zzz"]}, tokenizer=tokenizer)
    assert chain.steps[0].values["breakers"] == decal.tokens_with(tokenizer, "\n")
    assert report == ("dry_sequence_breakers: 'zzz' breaks a repetition only where one token contains all of it",)
    # What its server takes for none, as it refuses an empty list.
    chain, report = decal.from_llama_cpp({**given, "dry_sequence_breakers": [""]}, tokenizer=tokenizer)
    assert "breakers" not in str(chain)
    assert not report


# ---- mlx-lm


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temp": 1.0}, "temperature(1.0)"),
        ({"temperature": 0.7, "top_p": 1.0}, "temperature(0.7)"),
        (
            {"temp": 0.7, "top_p": 0.9, "min_p": 0.1, "top_k": 9, "xtc_probability": 0.5, "xtc_special_tokens": [3, 4]},
            "top_p(0.9) | min_p(0.1) | xtc(0.1, 0.5, 0, spared=(3, 4)) | top_k(9) | temperature(0.7)",
        ),
        (
            {"repetition_penalty": 1.2, "presence_penalty": 0.5, "presence_context_size": 0, "frequency_penalty": 0.1},
            "repetition_penalty(1.2, 20, form='legacy') | presence_penalty(0.5, 0, scope='all') | "
            "frequency_penalty(0.1, 20, scope='all') | temperature(0.0)",
        ),
        ({"repetition_penalty": 1.0, "temp": 1}, "temperature(1.0)"),
        ({"repetition_penalty": None, "temp": 1}, "temperature(1.0)"),
    ],
)
def test_from_mlx_lm(settings: dict[str, Any], expected: str) -> None:
    assert text(decal.from_mlx_lm(settings)) == expected


def test_from_mlx_lm_applies_them_in_its_order() -> None:
    z, (ids, past) = rows(8), history(8)
    given = {"temp": 1.6, "top_p": 0.9, "top_k": 7, "min_p": 0.02, "repetition_penalty": 1.3}
    window = slice(-20, None)
    penalty = penalised(z, ids, 1.3, 0, 0, counted=slice(0, 0), seen=window)
    check_same(decal.from_mlx_lm(given).chain(z, history=past), top_k(min_p(top_p(penalty, 0.9), 0.02), 7) / 1.6)
    assert decal.from_mlx_lm({"top_p": 0.5}).report == ("top_p: no effect, since temp is 0",)


# ---- text-generation-webui


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "temperature(1.0)"),
        ({"min_p": 0.02, "xtc_probability": 0.5}, "min_p(0.02) | xtc(0.1, 0.5, 0)"),
        ({"do_sample": False, "top_k": 1}, "temperature(0.0)"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "repetition_penalty(1.1, 1024, form='legacy') | temperature(0.0)"),
        ({"temperature": 1.3, "min_p": 0.1, "top_p": 0.9}, "temperature(1.3) | top_p(0.9) | min_p(0.1)"),
        ({"temperature": 1.3, "min_p": 0.1, "temperature_last": True}, "min_p(0.1) | temperature(1.3)"),
        (
            {"temperature": 1.3, "min_p": 0.1, "top_k": 5, "sampler_priority": "min_p\ntop_k,temperature"},
            "min_p(0.1) | top_k(5) | temperature(1.3)",
        ),
        # What no priority is given for comes first.
        ({"temperature": 1.3, "min_p": 0.1, "sampler_priority": ["temperature"]}, "min_p(0.1) | temperature(1.3)"),
        ({"epsilon_cutoff": 3, "eta_cutoff": 20}, "epsilon(0.0003) | eta(0.002)"),
        (
            {"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5, "smoothing_factor": 0.3},
            "dynamic_temperature(1.0, 0.5, 1.0) | quadratic(0.3, 1.0)",
        ),
        (
            {"presence_penalty": 1, "repetition_penalty": 1.2, "repetition_penalty_range": 0, "no_repeat_ngram_size": 3},
            "repetition_penalty(1.2, 0, form='legacy') | presence_penalty(1.0, 0, scope='all') | no_repeat_ngram(3)",
        ),
        (
            {"dry_multiplier": 0.8, "top_n_sigma": 1, "tfs": 0.9, "top_a": 0.2},
            "dry(0.8, 1.75, 2, 1024) | top_n_sigma(1.0) | tail_free(0.9) | top_a(0.2)",
        ),
        ({"mirostat_mode": 2, "temperature": 0.9, "xtc_probability": 0.5}, "temperature(0.9) | mirostat(5.0, 0.1)"),
        ({"mirostat_mode": 1}, "temperature(1.0)"),
        ({"adaptive_target": 0.4, "min_p": 0.1, "mirostat_mode": 2}, "min_p(0.1) | adaptive_p(0.4, 0.9)"),
    ],
)
def test_from_text_generation_webui(settings: dict[str, Any], expected: str) -> None:
    assert text(decal.from_text_generation_webui(settings)) == expected


def test_from_text_generation_webui_reports_what_is_behind_a_draw() -> None:
    report = decal.from_text_generation_webui({"mirostat_mode": 2, "xtc_probability": 0.5}).report
    assert "xtc_probability: no effect, since mirostat comes before it and draws the token" in report
    report = decal.from_text_generation_webui({"do_sample": False, "top_k": 1, "guidance_scale": 1}).report
    assert report == ("top_k: no effect, since do_sample is off or temperature 0",)
    report = decal.from_text_generation_webui(
        {"sampler_priority": "top_q", "guidance_scale": 2, "custom_token_bans": ""}
    ).report
    assert [line.split(":")[0] for line in report] == ["sampler_priority", "guidance_scale"]


def test_from_text_generation_webui_finds_tokens_with_a_tokenizer() -> None:
    tokenizer = byte_level()
    given = {"dry_multiplier": 1, "xtc_probability": 0.5, "dry_sequence_breakers": '["\\n", "*"]'}
    chain, report = decal.from_text_generation_webui(given, tokenizer=tokenizer)
    line, star = (tokenizer.encode(c)[0] for c in "\n*")
    assert chain.steps[0].values["breakers"] == tuple(sorted((line, star)))
    assert chain.steps[1].values["spared"] == tuple(sorted((line, tokenizer.eos_token_id)))
    assert not any("tokenizer=" in text for text in report)


# ---- all of them


@pytest.mark.parametrize("name", CONVERTERS)
def test_unknown_keys_are_reported_and_those_of_a_request_are_told_apart(name: str) -> None:
    given = {"top_kk": 3, "seed": 1, "prompt": "a", "warp": None}
    if name == "transformers":
        given = {"top_kk": 3, "max_length": 20, "warp": None, "do_sample": True}
    report = CONVERTERS[name](given).report
    unknown = [line for line in report if "no setting of" in line]
    assert len(unknown) == 1
    assert unknown[0].startswith("top_kk: ")
    assert sum("not part of a chain" in line for line in report) == (1 if name == "transformers" else 2)


@pytest.mark.parametrize("name", CONVERTERS)
@pytest.mark.parametrize("value", ["warm", True, math.nan, math.inf, [0.7], 10**400])
def test_a_bad_temperature_names_engine_and_key(name: str, value: Any) -> None:
    engine = PRESETS[name].engine.split(",")[0]
    with pytest.raises(decal.DecalError, match=rf"^{engine}: temp(erature)? must be [^\n]*$"):
        CONVERTERS[name]({"temperature": value, "do_sample": True})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("transformers", {"do_sample": 1}, "transformers: do_sample must be true or false, got 1"),
        ("transformers", {"do_sample": True, "min_p": 2}, "transformers: min_p must be in [0, 1] (0 = off), got 2"),
        ("transformers", "top_k", "transformers: settings are a dict or an object that holds them, got 'top_k'"),
        ("transformers", GenerationConfig, "transformers: settings are a dict or an object"),
        ("vllm", {"temperature": -1}, "vLLM: temperature must be in [0, inf) (1 = off), got -1"),
        ("vllm", {"top_k": 2.5}, "vLLM: top_k must be an integer in [1, inf) (or 0 = off), got 2.5"),
        ("llama.cpp", {"mirostat": 3}, "llama.cpp: mirostat must be 0, 1 or 2, got 3"),
        ("llama.cpp", {"samplers": [1]}, "llama.cpp: samplers must be a list of strings, got [1]"),
        ("llama.cpp", {"repeat_last_n": -2}, "llama.cpp: repeat_last_n must be an integer in [0, inf), got -2"),
        (
            "llama.cpp",
            {"dry_multiplier": 1, "dry_allowed_length": 0},
            "dry_allowed_length must be an integer in [1,",
        ),
        ("mlx-lm", {"temp": 1, "xtc_probability": 1, "xtc_special_tokens": "a"}, "mlx-lm: xtc_special_tokens must be a tuple"),
        ("mlx-lm", {"repetition_penalty": -1}, "mlx-lm: repetition_penalty must be in [0.001, inf) (1 = off), got -1"),
        (
            "text-generation-webui",
            {"mirostat_tau": -1, "mirostat_mode": 2},
            "webui: mirostat_tau must be in [0,",
        ),
        ("text-generation-webui", {"sampler_priority": 3}, "webui: sampler_priority must be a list of strings"),
        (
            "text-generation-webui",
            {"dry_sequence_breakers": "a", "dry_multiplier": 1},
            "dry_sequence_breakers must be strings",
        ),
        (
            "text-generation-webui",
            {"dynamic_temperature": True, "dynatemp_low": 2},
            "dynatemp_high must be at least dynatemp",
        ),
    ],
)
def test_bad_values_name_engine_and_key(name: str, given: Any, message: str) -> None:
    with pytest.raises(decal.DecalError) as caught:
        CONVERTERS[name](given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CONVERTERS)
def test_values_from_numpy_are_numbers(name: str) -> None:
    given = {"temperature": np.float32(0.5), "top_k": np.int64(7), "do_sample": True}
    assert {"temperature(0.5)", "top_k(7)"} <= set(text(CONVERTERS[name](given)).split(" | "))


# ---- tokens


def test_tokens_with_finds_all_tokens_that_contain_a_text() -> None:
    tokenizer = byte_level(["a:: b\n\n\nc:: d\n"] * 30, merges=12)
    found = decal.tokens_with(tokenizer, "\n", ":")
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    assert found == tuple(i for i, own in texts.items() if "\n" in own or ":" in own)
    assert len(found) > 2, "no merge of this test holds a breaker"
    assert tokenizer.eos_token_id in decal.tokens_with(tokenizer, "<|end|>")
    assert decal.tokens_with(tokenizer, "zzz") == ()
    assert decal.tokens_with(tokenizer) == ()
    assert decal.RULES["dry"](breakers=found).steps[0].values["breakers"] == found


def test_tokens_with_sees_leading_spaces_and_byte_tokens() -> None:
    tokenizer = sentencepiece(["a b"], newlines=2)
    pieces = tokenizer.get_vocab()
    assert pieces["\u2581"] in decal.tokens_with(tokenizer, " ")
    assert set(decal.tokens_with(tokenizer, "\n")) == {pieces["<0x0A>"], pieces["\n"], pieces["\n\n"]}


@pytest.mark.parametrize("wrong", ["", 3, None])
def test_tokens_with_refuses_empty_texts(wrong: Any) -> None:
    with pytest.raises(decal.DecalError, match="at least one character"):
        decal.tokens_with(byte_level(), wrong)
