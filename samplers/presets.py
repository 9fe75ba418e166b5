"""The default chains of other inference stacks, and their settings as chains.

    chain, report = decal.from_llama_cpp({"top_k": 20, "temperature": 0.6})
    # top_k(20) | top_p(0.95) | min_p(0.05) | temperature(0.6)

A conversion gives the rules in the order in which the engine applies them, leaves out what the engine treats as off, and fills
in the engine's own defaults for what isn't given, since that is what the engine would do. Its report names what is lost.
"""

from __future__ import annotations

import ast
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from decal.samplers.chain import Chain, parse
from decal.samplers.errors import DecalError
from decal.samplers.rule import find


class Preset(NamedTuple):
    """What a version of an engine does by default."""

    engine: str
    version: str
    chain: str


PRESETS: Mapping[str, Preset] = {
    "transformers": Preset("transformers, generate(do_sample=True)", "5.23.0", "top_k(50)"),
    "vllm": Preset("vLLM, SamplingParams()", "0.33.0", "temperature(1.0)"),
    "llama.cpp": Preset(
        "llama.cpp, server and cli", "August 2026, #26524", "top_k(40) | top_p(0.95) | min_p(0.05) | temperature(0.8)"
    ),
    "mlx-lm": Preset("mlx-lm, command and server", "0.32.2", "temperature(0.0)"),
    "text-generation-webui": Preset("text-generation-webui, its preset Top-P", "4.7.3", "top_p(0.95)"),
}
"""The chain of each engine's own defaults, in its order of application; a model's own settings come on top in most of them."""


def preset(name: str) -> Chain:
    """The chain of an engine's own defaults, one of `PRESETS`. Raises DecalError listing them."""
    if not isinstance(name, str) or name.lower() not in PRESETS:
        raise DecalError(f"unknown preset {name!r} (known: {', '.join(sorted(PRESETS))})")
    return parse(PRESETS[name.lower()].chain)


class Conversion(NamedTuple):
    """A chain, and one line for everything that it does not do, or does differently: ``setting: what of it``."""

    chain: Chain
    report: tuple[str, ...]


class _Engine(NamedTuple):
    """Settings of an engine by name.

    Attributes:
        defaults: those that become a chain, with what the engine takes where they are missing.
        lost: those that change the next-token law in a way no rule does, with the value that switches them off.
        aside: those that don't change it.
    """

    name: str
    version: str
    defaults: Mapping[str, Any]
    lost: Mapping[str, Any]
    aside: tuple[str, ...]


class _Settings:
    """Settings of one engine on their way to a chain."""

    def __init__(self, engine: _Engine, source: Any):
        self.engine, self.given = engine, _given(engine.name, source)
        self.chains: list[Chain] = []
        self.report: list[str] = []

    def get(self, key: str) -> Any:
        return self.given.get(key, self.engine.defaults[key])

    def wrong(self, key: str, wanted: str) -> DecalError:
        return DecalError(f"{self.engine.name}: {key} must be {wanted}, got {self.get(key)!r}")

    def number(self, key: str) -> Any:
        value = self.get(key)
        try:
            good = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
        except OverflowError:
            good = False
        if not good:
            raise self.wrong(key, "a finite number")
        return value

    def flag(self, key: str) -> bool:
        if not isinstance(self.get(key), bool):
            raise self.wrong(key, "true or false")
        return bool(self.get(key))

    def words(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
            raise self.wrong(key, "a list of strings")
        return list(value)

    def add(self, name: str, keys: Mapping[str, str], *, ties: bool = False, **values: Any) -> None:
        """Another step. Its parameters are ``values``, or the settings that ``keys`` names for them.

        With ``ties`` the engine breaks ties at the cutoff, which no rule does.
        """
        rule = find(name)
        for param, key in keys.items():
            value = values[param] if param in values else self.number(key)
            values[param] = rule.params[param].check(f"{self.engine.name}: {key}", value)
        self.chains.append(rule(**values))
        if ties:
            key = next(iter(keys.values()))
            self.report.append(f"{key}: {self.engine.name} keeps only some of the tokens tied at the cutoff, decal keeps all")

    def penalties(self, repetition: str, window: int = 0, scope: str = "all") -> None:
        """Repetition, frequency and presence penalty, in this order; the last two commute."""
        if self.number(repetition) != 1:
            self.add("repetition_penalty", {"r": repetition}, window=window, form="legacy")
        for name in ("frequency_penalty", "presence_penalty"):
            if self.number(name):
                self.add(name, {"a": name}, window=window, scope=scope)

    def idle(self, keys: Iterable[str], why: str) -> None:
        """Report those of ``keys`` that were set to something, though it makes no difference."""
        for key in keys:
            if key in self.given and not _same(self.given[key], self.engine.defaults[key]):
                self.report.append(f"{key}: no effect, since {why}")

    def done(self) -> Conversion:
        for key, value in self.given.items():
            if key in self.engine.lost:
                empty = value is False or (hasattr(value, "__len__") and not len(value))
                if not empty and not _same(value, self.engine.lost[key]):
                    self.report.append(f"{key}: changes the next-token law in a way no rule of decal does; not carried over")
            elif key in self.engine.aside:
                self.report.append(f"{key}: not part of a chain")
            elif key not in self.engine.defaults:
                self.report.append(f"{key}: no setting of {self.engine.name} {self.engine.version} that decal knows; left out")
        chain = self.chains[0] if self.chains else parse("temperature(1.0)")
        for other in self.chains[1:]:
            chain = chain | other
        return Conversion(chain, tuple(self.report))


def _given(engine: str, source: Any) -> dict[str, Any]:
    """What was set: of a mapping every key, of an object the public attributes that aren't as in a fresh one; None is unset."""
    if isinstance(source, Mapping):
        settings = {str(key): value for key, value in source.items()}
    else:
        names = getattr(type(source), "__struct_fields__", None) or getattr(source, "__dict__", None)
        if names is None or isinstance(source, type):
            raise DecalError(f"{engine}: settings are a dict or an object that holds them, got {source!r}")
        try:
            fresh = type(source)()
        except Exception:  # whatever it asks for, then everything counts as set
            fresh = None
        settings = {
            name: getattr(source, name)
            for name in names
            if not name.startswith("_") and not _same(getattr(source, name), getattr(fresh, name, None))
        }
    return {key: value for key, value in settings.items() if value is not None}


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # arrays have no one answer
        return one is other


def tokens_with(tokenizer: Any, *texts: str) -> tuple[int, ...]:
    """Ids of all tokens whose text contains one of ``texts``, for ``dry(breakers=...)`` and ``xtc(spared=...)``.

        dry(breakers=tokens_with(tokenizer, "\\n", ":", '"', "*"))

    A text spread over several tokens is not found.

    Args:
        tokenizer: any tokenizer of transformers.

    Raises:
        DecalError: a text is empty or no string.
    """
    for text in texts:
        if not isinstance(text, str) or not text:
            raise DecalError(f"tokens_with takes texts of at least one character, got {text!r}")
    ids = sorted(set(tokenizer.get_vocab().values()))
    # Some tokenizers strip the space before the first token, so that none comes first.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    lead = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    written = tokenizer.batch_decode([[*anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    return tuple(i for i, own in zip(ids, written, strict=True) if any(text in own.removeprefix(lead) for text in texts))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _table(text: str) -> dict[str, Any]:
    """``name=value`` pairs; a name alone has the value None."""
    pairs = (word.partition("=") for word in text.split())
    return {name: ast.literal_eval(value) if value else None for name, _, value in pairs}


_REQUEST = _words(
    """model prompt messages suffix echo stream stream_options user n best_of seed stop max_tokens max_completion_tokens
    logprobs top_logprobs tools tool_choice parallel_tool_calls functions function_call chat_template chat_template_kwargs
    metadata store add_generation_prompt service_tier reasoning_effort"""
)
"""What a request to an OpenAI-like server holds beside sampling."""


# ---- transformers

_TRANSFORMERS = _Engine(
    "transformers",
    "5.23.0",
    _table(
        """do_sample=False temperature=1.0 top_h top_k=50 top_p=1.0 min_p=0.0 typical_p=1.0 epsilon_cutoff=0.0
        eta_cutoff=0.0 repetition_penalty=1.0 no_repeat_ngram_size=0"""
    ),
    _table(
        """encoder_repetition_penalty=1 encoder_no_repeat_ngram_size=0 guidance_scale=1 num_beams=1 num_beam_groups=1
        diversity_penalty=0 penalty_alpha=0 min_length=0 min_new_tokens=0 forced_eos_token_id sequence_bias constraints
        watermarking_config dola_layers token_healing forced_bos_token_id suppress_tokens force_words_ids
        exponential_decay_length_penalty bad_words_ids begin_suppress_tokens"""
    ),
    _words(
        """max_length max_new_tokens early_stopping max_time stop_strings use_mtp use_cache cache_implementation
        cache_config max_cache_len length_penalty renormalize_logits remove_invalid_values num_return_sequences
        output_attentions output_hidden_states output_scores output_logits return_dict_in_generate return_legacy_cache
        pad_token_id bos_token_id eos_token_id decoder_start_token_id is_assistant num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
        assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type
        compile_config disable_compile continuous_batching_config low_memory prefill_chunk_size transformers_version
        _from_model_config generation_kwargs"""
    ),
)
_WARPERS = _words("temperature top_h top_k top_p min_p typical_p epsilon_cutoff eta_cutoff")


def from_transformers(generation_config: Any) -> Conversion:
    """The chain of a ``GenerationConfig``, or of a dict such as a model's ``generation_config.json``.

    What isn't set has the default of ``generate`` in transformers 5.23: greedy decoding unless ``do_sample`` is true, and
    ``top_k`` 50 if it is.

    Raises:
        DecalError: a value is not allowed; it names the setting.
    """
    # A model is what one has at hand.
    s = _Settings(_TRANSFORMERS, getattr(generation_config, "generation_config", generation_config))
    if s.number("repetition_penalty") != 1:
        s.add("repetition_penalty", {"r": "repetition_penalty"}, form="legacy")
    if s.number("no_repeat_ngram_size") > 0:
        s.add("no_repeat_ngram", {"n": "no_repeat_ngram_size"})
        s.report.append("no_repeat_ngram_size: where it bans every token transformers keeps none, decal all")
    if not s.flag("do_sample"):
        s.add("temperature", {}, t=0.0)
        s.idle(_WARPERS, "do_sample is off" if "do_sample" in s.given else "do_sample isn't set, which means greedy decoding")
        return s.done()
    if s.number("temperature") == 0:
        s.report.append("temperature: transformers refuses 0 and asks for do_sample=False instead; taken as that")
        s.add("temperature", {"t": "temperature"})
        s.idle(_WARPERS[1:], "temperature is 0")
        return s.done()
    if s.number("temperature") != 1:
        s.add("temperature", {"t": "temperature"})
    if s.get("top_h") is not None:
        if s.number("top_h") == 1:
            s.add("top_k", {}, k=100)
            s.report.append("top_h: at 1 transformers keeps the 100 most probable tokens, by rounding 99 of them; decal 100")
        else:
            s.add("top_h", {"alpha": "top_h"}, variant="cumulative")
    if s.number("top_k") != 0:
        s.add("top_k", {"k": "top_k"})
    if s.number("top_p") < 1:
        s.add("top_p", {"p": "top_p"}, ties=True)
    if s.number("min_p") != 0:
        s.add("min_p", {"p": "min_p"})
    if s.number("typical_p") < 1:
        s.add("typical", {"p": "typical_p"})
    for rule in ("epsilon", "eta"):
        if 0 < s.number(f"{rule}_cutoff") < 1:
            s.add(rule, {"eps": f"{rule}_cutoff"})
    return s.done()


# ---- vLLM

_VLLM = _Engine(
    "vLLM",
    "0.33.0",
    _table(
        """repetition_penalty=1.0 frequency_penalty=0.0 presence_penalty=0.0 temperature=1.0 min_p=0.0 top_k=0
        top_p=1.0"""
    ),
    _table(
        """min_tokens=0 guided_regex watermarking response_format thinking_token_budget logits_processors extra_args
        vllm_xargs guided_choice guided_decoding structured_outputs bad_words allowed_token_ids guided_json guided_grammar
        logit_bias use_beam_search trace_decode_token_ids"""
    ),
    _REQUEST
    + _words(
        """stop_token_ids ignore_eos prompt_logprobs prompt_logprob_token_ids prompt_logprob_start logprob_token_ids
        flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind
        stream_interval skip_clone output_text_buffer_length skip_reading_prefix_cache repetition_detection
        routed_experts_prompt_start length_penalty truncate_prompt_tokens truncation_side prompt_embeds add_special_tokens
        priority request_id session_id return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params"""
    ),
)


def from_vllm(sampling_params: Any) -> Conversion:
    """The chain of a ``SamplingParams`` of vLLM, or of a dict of its fields.

    Penalties, temperature, min_p, top_k, top_p, in this order. What isn't set has the default of vLLM 0.33, which is off; a
    server of vLLM takes the model's ``generation_config.json`` instead, so merge that in first.

    Raises:
        DecalError: a value is not allowed; it names the field.
    """
    s = _Settings(_VLLM, sampling_params)
    s.penalties("repetition_penalty", scope="generated")
    for name in ("frequency_penalty", "presence_penalty"):
        if s.number(name):
            s.report.append(
                f"{name}: counts generated tokens alone, so tell the history where they begin: History.of(..., prompt=)"
            )
    t = s.number("temperature")
    if 0 <= t < 1e-5:
        s.add("temperature", {}, t=0.0)
        s.idle(("min_p", "top_k", "top_p"), "temperature is 0")
        return s.done()
    if 0 < t < 0.01:
        s.report.append(f"temperature: vLLM raises {t!r} to 0.01")
        t = 0.01
    if t != 1:
        s.add("temperature", {"t": "temperature"}, t=t)
    if s.number("min_p"):
        s.add("min_p", {"p": "min_p"})
    if s.number("top_k") not in (0, -1):
        s.add("top_k", {"k": "top_k"})
    if s.number("top_p") != 1:
        s.add("top_p", {"p": "top_p"}, ties=True)
    return s.done()


# ---- llama.cpp

_LLAMA_SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "penalties": ("repeat_last_n", "repeat_penalty", "frequency_penalty", "presence_penalty"),
    "dry": ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    "top_n_sigma": ("top_n_sigma",),
    "top_k": ("top_k",),
    "typ_p": ("typical_p",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "xtc": ("xtc_probability", "xtc_threshold"),
    "temperature": ("temperature", "dynatemp_range", "dynatemp_exponent"),
    "adaptive_p": ("adaptive_target", "adaptive_decay"),
    "infill": (),
}
"""Names of samplers with the settings each reads, in the default order; the last two are off by default."""
_LLAMA_LETTERS = dict(zip("edskypmxtai", _LLAMA_SAMPLERS, strict=True))
_LLAMA_ALIASES = {
    **{name.replace("_", ""): name for name in _LLAMA_SAMPLERS},
    "nucleus": "top_p",
    "temp": "temperature",
    "typ": "typ_p",
}

_LLAMA = _Engine(
    "llama.cpp",
    "of August 2026",
    _table(
        """repeat_last_n=64 repeat_penalty=1.0 frequency_penalty=0.0 presence_penalty=0.0 dry_multiplier=0.0 dry_base=1.75
        dry_allowed_length=2 dry_penalty_last_n=64 top_n_sigma=-1.0 top_k=40 typical_p=1.0 top_p=0.95 min_p=0.05
        xtc_probability=0.0 xtc_threshold=0.1 temperature=0.8 dynatemp_range=0.0 dynatemp_exponent=1.0
        adaptive_target=-1.0 adaptive_decay=0.9 mirostat=0 mirostat_tau=5.0 mirostat_eta=0.1"""
    )
    | {"samplers": list(_LLAMA_SAMPLERS)[:-2], "dry_sequence_breakers": ["\n", ":", '"', "*"]},
    _table("min_keep=0 reasoning_budget_tokens=-1 response_format ignore_eos json_schema grammar logit_bias"),
    _REQUEST
    + _words(
        """verbose timings_per_token cache_prompt return_tokens return_progress sse_ping_interval n_predict n_indent
        n_keep n_discard n_cmpl n_cache_reuse t_max_predict_ms t_max_prompt_ms response_fields n_probs backend_sampling
        post_sampling_probs lora grammar_lazy grammar_triggers grammar_type preserved_tokens chat_format reasoning_format
        generation_prompt parse_tool_calls chat_parser continue_final_message reasoning_control reasoning_budget_start_tag
        reasoning_budget_end_tags reasoning_budget_end_tag reasoning_budget_message id_slot input_prefix input_suffix
        input_extra image_data"""
    ),
)


def from_llama_cpp(request: Any, *, tokenizer: Any = None) -> Conversion:
    """The chain of a completion request to llama.cpp's server.

    The order is that of ``samplers``, temperature last by default; ``mirostat`` replaces all of it but temperature. What isn't
    set has the default of llama.cpp since August 2026: top_k 40, top_p 0.95, min_p 0.05, temperature 0.8. In older builds
    ``dry_penalty_last_n`` is the whole context by default. A GGUF file may carry other defaults.

    Args:
        request: a dict, or an object that holds the settings.
        tokenizer: of transformers, to find the tokens of ``dry_sequence_breakers``.

    Raises:
        DecalError: a value is not allowed; it names the setting.
    """
    s = _Settings(_LLAMA, request)
    mirostat = s.number("mirostat")
    if mirostat in (1, 2):
        if s.number("temperature") != 1:
            s.add("temperature", {"t": "temperature"}, t=max(s.number("temperature"), 0))
        _add_mirostat(s, str(int(mirostat)))
        others = [key for keys in _LLAMA_SAMPLERS.values() for key in keys if key != "temperature"]
        s.idle(["samplers", *others], "mirostat replaces every sampler but temperature")
        return s.done()
    if mirostat != 0:
        raise s.wrong("mirostat", "0, 1 or 2")
    order = _llama_order(s)
    for name in order:
        _add_llama(s, name, tokenizer)
    # It draws the token, so it is last wherever it is named.
    if "adaptive_p" in order and s.number("adaptive_target") >= 0:
        s.add("adaptive_p", {"target": "adaptive_target", "decay": "adaptive_decay"})
    for name, keys in _LLAMA_SAMPLERS.items():
        if name not in order:
            s.idle(keys, f"samplers doesn't name {name}")
    s.idle(("mirostat_tau", "mirostat_eta"), "mirostat is off")
    return s.done()


def _llama_order(s: _Settings) -> list[str]:
    """The samplers by their canonical names."""
    given = s.get("samplers")
    if isinstance(given, str):
        found = [(letter, _LLAMA_LETTERS.get(letter)) for letter in given]
    else:
        found = [(word, _LLAMA_ALIASES.get(word.lower().replace("-", "").replace("_", ""))) for word in s.words("samplers")]
    s.report += [f"samplers: llama.cpp knows no {word!r} and skips it" for word, name in found if name is None]
    return [name for _, name in found if name is not None]


def _window(s: _Settings, key: str) -> int | None:
    """How far back llama.cpp looks, as a rule's ``window``; None if it doesn't."""
    last = s.number(key)
    if last == -1:
        s.report.append(f"{key}: -1, the whole context, which llama.cpp refuses since August 2026; taken as before")
        return 0
    if last < 0 or last != int(last):
        raise s.wrong(key, "an integer in [0, inf)")
    return int(last) or None


def _add_llama(s: _Settings, name: str, tokenizer: Any) -> None:
    """The steps of a sampler of llama.cpp, if it is on."""
    if name == "penalties":
        window = _window(s, "repeat_last_n")
        if window is not None:
            s.penalties("repeat_penalty", window)
        else:
            s.idle(("repeat_penalty", "frequency_penalty", "presence_penalty"), "repeat_last_n is 0")
    elif name == "dry":
        window = _window(s, "dry_penalty_last_n")
        if s.number("dry_multiplier") and window is not None:
            base = s.number("dry_base")
            keys = {"multiplier": "dry_multiplier", "base": "dry_base", "allowed_length": "dry_allowed_length"}
            breakers = _breakers(s, s.words("dry_sequence_breakers"), tokenizer)
            # The server takes its default for a base below 1.
            s.add("dry", keys, base=base if base >= 1 else s.engine.defaults["dry_base"], window=window, breakers=breakers)
    elif name == "top_n_sigma":
        if s.number("top_n_sigma") > 0:
            s.add("top_n_sigma", {"n": "top_n_sigma"})
    elif name == "top_k":
        if s.number("top_k") > 0:
            s.add("top_k", {"k": "top_k"}, ties=True)
    elif name == "typ_p":
        if s.number("typical_p") < 1:
            s.add("typical", {"p": "typical_p"}, ties=True)
    elif name == "top_p":
        if s.number("top_p") < 1:
            s.add("top_p", {"p": "top_p"}, ties=True, p=max(s.number("top_p"), 0))
    elif name == "min_p":
        if s.number("min_p") > 0:
            s.add("min_p", {"p": "min_p"}, p=min(s.number("min_p"), 1))
    elif name == "xtc":
        if s.number("xtc_probability") > 0 and s.number("xtc_threshold") <= 0.5:
            keys = {"threshold": "xtc_threshold", "probability": "xtc_probability"}
            values = {param: min(max(s.number(key), 0), 1) for param, key in keys.items()}
            s.add("xtc", keys, ties=True, **values)
    elif name == "temperature":
        t = max(s.number("temperature"), 0)
        if s.number("dynatemp_range") > 0:
            keys = {"t": "temperature", "spread": "dynatemp_range", "exponent": "dynatemp_exponent"}
            s.add("dynamic_temperature", keys, t=t)
        elif t != 1:
            s.add("temperature", {"t": "temperature"}, t=t)
    elif name == "infill":
        s.report.append("samplers: infill has no rule in decal; left out")


def _breakers(s: _Settings, texts: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """Single-token breakers of DRY."""
    texts = [text for text in texts if text]  # llama.cpp passes over empty ones
    if tokenizer is None:
        s.report.append("dry_sequence_breakers: are texts, so pass tokenizer=; without it repetitions reach over them")
        return ()
    for text in texts:
        if len(text.encode()) > 1:
            s.report.append(f"dry_sequence_breakers: {text!r} breaks a repetition only where one token contains all of it")
    return tokens_with(tokenizer, *texts) if texts else ()


def _add_mirostat(s: _Settings, version: str) -> None:
    s.add("mirostat", {"tau": "mirostat_tau", "eta": "mirostat_eta"}, version=version)
    s.report.append(f"mirostat: {s.engine.name} takes the surprise of a token after the cut, decal before it, as in the paper")


# ---- mlx-lm

_MLX = _Engine(
    "mlx-lm",
    "0.32.2",
    _table(
        """temp=0.0 top_p=0.0 min_p=0.0 top_k=0 xtc_probability=0.0 xtc_threshold=0.1 repetition_penalty=0.0
        repetition_context_size=20 presence_penalty=0.0 presence_context_size=20 frequency_penalty=0.0
        frequency_context_size=20"""
    )
    | {"xtc_special_tokens": []},
    _table("min_tokens_to_keep=1 logit_bias"),
    _REQUEST + _words("adapters draft_model num_draft_tokens role_mapping"),
)


def from_mlx_lm(settings: Any) -> Conversion:
    """The chain of the arguments of ``make_sampler`` and ``make_logits_processors``, or of a request to mlx-lm's server.

    Penalties, top_p, min_p, xtc, top_k, temperature, in this order. What isn't set has the default of mlx-lm 0.32, so without a
    ``temp`` (or ``temperature``) decoding is greedy. ``xtc_special_tokens`` are ids; the server adds its own.

    Raises:
        DecalError: a value is not allowed; it names the setting.
    """
    s = _Settings(_MLX, settings)
    if "temperature" in s.given:
        s.given["temp"] = s.given.pop("temperature")
    # 0 is off, and a repetition penalty of 1 changes nothing.
    if s.number("repetition_penalty") not in (0, 1):
        keys = {"r": "repetition_penalty", "window": "repetition_context_size"}
        s.add("repetition_penalty", keys, form="legacy")
    for kind in ("presence", "frequency"):
        if s.number(f"{kind}_penalty"):
            s.add(f"{kind}_penalty", {"a": f"{kind}_penalty", "window": f"{kind}_context_size"}, scope="all")
    if s.number("temp") == 0:
        s.add("temperature", {"t": "temp"})
        s.idle(("top_p", "min_p", "xtc_probability", "top_k"), "temp is 0")
        return s.done()
    if 0 < s.number("top_p") < 1:
        s.add("top_p", {"p": "top_p"})
    if s.number("min_p"):
        s.add("min_p", {"p": "min_p"})
    if s.number("xtc_probability") > 0:
        special = find("xtc").params["spared"].check("mlx-lm: xtc_special_tokens", s.get("xtc_special_tokens"))
        s.add("xtc", {"threshold": "xtc_threshold", "probability": "xtc_probability"}, spared=special)
    if s.number("top_k") > 0:
        s.add("top_k", {"k": "top_k"}, ties=True)
    if s.number("temp") != 1:
        s.add("temperature", {"t": "temp"})
    return s.done()


# ---- text-generation-webui

_WEBUI_SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "no_repeat_ngram": ("no_repeat_ngram_size",),
    "temperature": ("temperature",),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "typical_p": ("typical_p",),
    "epsilon_cutoff": ("epsilon_cutoff",),
    "eta_cutoff": ("eta_cutoff",),
    "dry": ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers"),
    "repetition_penalty": ("repetition_penalty",),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "tfs": ("tfs",),
    "top_a": ("top_a",),
    "top_n_sigma": ("top_n_sigma",),
    "adaptive_p": ("adaptive_target", "adaptive_decay"),
    "xtc": ("xtc_probability", "xtc_threshold"),
    "dynamic_temperature": ("dynamic_temperature", "dynatemp_low", "dynatemp_high", "dynatemp_exponent"),
    "quadratic_sampling": ("smoothing_factor", "smoothing_curve"),
    "mirostat": ("mirostat_mode", "mirostat_tau", "mirostat_eta"),
}
"""Names of samplers with the settings each reads, in the order in which those that no priority is given for come first."""
_WEBUI_GREEDY = _words("temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff")
"""Samplers that run only with do_sample."""
_WEBUI_PRIORITY = _words(
    """repetition_penalty presence_penalty frequency_penalty dry top_n_sigma temperature dynamic_temperature
    quadratic_sampling top_k top_p typical_p epsilon_cutoff eta_cutoff tfs top_a min_p adaptive_p mirostat xtc
    encoder_repetition_penalty no_repeat_ngram"""
)

_WEBUI = _Engine(
    "text-generation-webui",
    "4.7.3",
    _table(
        """temperature=1 dynatemp_low=1 dynatemp_high=1 dynatemp_exponent=1 smoothing_factor=0 smoothing_curve=1 top_p=1
        top_k=0 min_p=0 top_n_sigma=0 typical_p=1 xtc_threshold=0.1 xtc_probability=0 epsilon_cutoff=0 eta_cutoff=0 tfs=1
        top_a=0 adaptive_target=0 adaptive_decay=0.9 dry_multiplier=0 dry_allowed_length=2 dry_base=1.75
        repetition_penalty=1 frequency_penalty=0 presence_penalty=0 no_repeat_ngram_size=0 repetition_penalty_range=1024
        mirostat_mode=0 mirostat_tau=5 mirostat_eta=0.1 do_sample=True dynamic_temperature=False temperature_last=False"""
    )
    | {"sampler_priority": _WEBUI_PRIORITY, "dry_sequence_breakers": '"\\n", ":", "\\"", "*"'},
    _table(
        """encoder_repetition_penalty=1 guidance_scale=1 penalty_alpha=0 grammar_string logit_bias custom_token_bans
        ban_eos_token"""
    ),
    _REQUEST
    + _words(
        """max_new_tokens auto_max_new_tokens max_tokens_second truncation_length prompt_lookup_num_tokens static_cache
        add_bos_token skip_special_tokens custom_stopping_strings negative_prompt preset mode grammar_file_row"""
    ),
)


def from_text_generation_webui(settings: Any, *, tokenizer: Any = None) -> Conversion:
    """The chain of a preset file or an API request of text-generation-webui, for its loaders Transformers and ExLlamav3_HF.

    The order is that of ``sampler_priority``; what that doesn't name comes first, and after ``adaptive_p`` or ``mirostat``
    nothing is left to do. What isn't set is neutral, as in a preset file of version 4.7. The loader llama.cpp renames the
    settings and works as `from_llama_cpp`.

    Args:
        settings: a dict, or an object that holds the settings.
        tokenizer: of transformers, to find the tokens of ``dry_sequence_breakers``, and the line break and the end for xtc.

    Raises:
        DecalError: a value is not allowed; it names the setting.
    """
    s = _Settings(_WEBUI, settings)
    priority = _webui_priority(s)
    sampled = s.flag("do_sample") and s.number("temperature") != 0
    order = sorted(_WEBUI_SAMPLERS, key=lambda name: priority.index(name) if name in priority else -1)
    drawn = None
    for name in order:
        if drawn:
            s.idle(_WEBUI_SAMPLERS[name], f"{drawn} comes before it and draws the token")
        elif not sampled and name in _WEBUI_GREEDY:
            s.idle(set(_WEBUI_SAMPLERS[name]) - {"temperature"}, "do_sample is off or temperature 0")
        else:
            before = len(s.chains)
            _add_webui(s, name, tokenizer)
            drawn = name if name in ("adaptive_p", "mirostat") and len(s.chains) > before else None
    if not sampled and not drawn:
        s.add("temperature", {}, t=0.0)
    return s.done()


def _webui_priority(s: _Settings) -> list[str]:
    if isinstance(s.get("sampler_priority"), str):
        priority = [word.strip() for word in s.get("sampler_priority").replace("\n", ",").split(",") if word.strip()]
    else:
        priority = s.words("sampler_priority")
    priority = priority or list(_WEBUI_PRIORITY)
    for word in priority:
        if word not in _WEBUI_PRIORITY:
            s.report.append(f"sampler_priority: text-generation-webui knows no {word!r} and skips it")
    if s.flag("temperature_last"):
        last = ["temperature", "dynamic_temperature", "quadratic_sampling"]
        priority = [word for word in priority if word not in last] + last
    return priority


def _add_webui(s: _Settings, name: str, tokenizer: Any) -> None:
    """The step of a sampler of text-generation-webui, if it is on."""
    window = s.number("repetition_penalty_range")
    if name == "repetition_penalty":
        if s.number(name) != 1:
            s.add(name, {"r": name, "window": "repetition_penalty_range"}, form="legacy")
    elif name in ("presence_penalty", "frequency_penalty"):
        if s.number(name):
            s.add(name, {"a": name, "window": "repetition_penalty_range"}, scope="all")
    elif name == "dry":
        if s.number("dry_multiplier") > 0:
            keys = {"multiplier": "dry_multiplier", "base": "dry_base", "allowed_length": "dry_allowed_length"}
            breakers = _webui_breakers(s, tokenizer)
            s.add("dry", keys, window=max(window, 0), breakers=breakers)
    elif name == "top_n_sigma":
        if s.number(name) > 0:
            s.add(name, {"n": name})
            s.report.append("top_n_sigma: text-generation-webui divides by n - 1, and counts dropped tokens as logits of 0")
    elif name == "temperature":
        if s.number(name) != 1:
            s.add(name, {"t": name})
    elif name == "dynamic_temperature":
        if s.flag(name):
            low, high = s.number("dynatemp_low"), s.number("dynatemp_high")
            keys = {"t": "dynatemp_low", "spread": "dynatemp_high", "exponent": "dynatemp_exponent"}
            if high < low:
                raise s.wrong("dynatemp_high", f"at least dynatemp_low = {low!r}")
            s.add(name, keys, t=(low + high) / 2, spread=(high - low) / 2)
    elif name == "quadratic_sampling":
        if s.number("smoothing_factor") > 0:
            s.add("quadratic", {"factor": "smoothing_factor", "curve": "smoothing_curve"})
    elif name == "top_k":
        if s.number(name) != 0:
            s.add(name, {"k": name})
    elif name == "top_p":
        if s.number(name) < 1:
            s.add(name, {"p": name}, ties=True)
    elif name == "typical_p":
        if s.number(name) < 1:
            s.add("typical", {"p": name})
    elif name in ("epsilon_cutoff", "eta_cutoff"):
        # In units of 1e-4.
        if 0 < s.number(name) < 1e4:
            s.add(name.removesuffix("_cutoff"), {"eps": name}, eps=s.number(name) / 1e4)
    elif name == "tfs":
        if 0 <= s.number(name) < 1:
            s.add("tail_free", {"z": name}, ties=True)
    elif name == "top_a":
        if 0 < s.number(name) <= 1:
            s.add(name, {"a": name})
    elif name == "min_p":
        if s.number(name):
            s.add(name, {"p": name})
    elif name == "adaptive_p":
        if s.number("adaptive_target") > 0:
            s.add(name, {"target": "adaptive_target", "decay": "adaptive_decay"}, decay=min(s.number("adaptive_decay"), 0.99))
    elif name == "mirostat":
        if s.number("mirostat_mode") == 2:
            _add_mirostat(s, "2")
    elif name == "xtc":
        if s.number("xtc_probability") > 0:
            _add_webui_xtc(s, tokenizer)
    elif s.number("no_repeat_ngram_size") > 0:
        s.add("no_repeat_ngram", {"n": "no_repeat_ngram_size"})


def _webui_breakers(s: _Settings, tokenizer: Any) -> tuple[int, ...]:
    """The last token of each text, behind a letter."""
    texts = s.get("dry_sequence_breakers")
    if isinstance(texts, str):
        try:
            texts = json.loads(texts if texts.startswith("[") else f"[{texts}]")
        except ValueError:
            texts = None
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise s.wrong("dry_sequence_breakers", "strings in quotes with commas between them")
    if tokenizer is None:
        return _breakers(s, texts, None)
    return tuple(sorted({tokenizer.encode(f"a{text}")[-1] for text in texts}))


def _add_webui_xtc(s: _Settings, tokenizer: Any) -> None:
    spared: set[int] = set()
    if tokenizer is None:
        s.report.append("xtc_probability: pass tokenizer= to spare the line break and the end of text")
    else:
        spared = {tokenizer.encode("\n")[-1], *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        s.report.append("xtc_probability: where a spared token would go text-generation-webui drops nothing, decal the others")
    s.add("xtc", {"threshold": "xtc_threshold", "probability": "xtc_probability"}, ties=True, spared=tuple(sorted(spared)))
