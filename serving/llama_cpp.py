"""Chains in llama.cpp: through llama-cpp-python, and as the settings of a llama.cpp server.

    llm.create_completion(prompt, **decal.serving.llama_cpp.completion_kwargs("temperature(1.3) | min_p(0.1)", max_tokens=20))

Under these arguments the chain alone decides the distribution. llama-cpp-python writes one text at a time, so there are no
batches. It calls the chain on the model's logits, before its own penalties, grammar and samplers, which are at values that do
nothing. Its ``logprobs`` are the model's own, before the chain.

With a seed decal draws the tokens itself, the same as in any other engine, up to what the logits owe to the engine. Without one
llama.cpp draws, with its own ``seed``, which goes beside the arguments: ``create_completion(prompt, seed=7, **kwargs)``. If
that isn't given either, it counts on from the seed of the ``Llama`` object, which is the same in every run of a program.

A server of llama.cpp runs no foreign code, but has samplers of its own. `request_fields` says a chain in them, or refuses:

    fields, report = decal.serving.llama_cpp.request_fields(decal.parse("top_k(20) | temperature(0.7)"))
    httpx.post(f"{url}/completion", json={"prompt": "Once", **fields})
"""

from __future__ import annotations

import ctypes
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from decal.samplers.chain import Chain, parse
from decal.samplers.errors import DecalError
from decal.samplers.guided import Guide
from decal.samplers.presets import tokens_with
from decal.samplers.rule import Step
from decal.samplers.trie import Policy, TrieBuilder
from decal.samplers.vocabulary import Vocabulary
from decal.serving.batch import warm_up
from decal.serving.engine import Written, http
from decal.serving.request import Request, as_params, beside, valid_answers
from decal.serving.single import Follower

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "repeat_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "mirostat_mode": (0,),
}
"""Settings of llama-cpp-python that reshape the distribution, and their values that don't; the first is the one to send."""

IGNORED: Mapping[str, tuple[Any, ...]] = {"tfs_z": (1,), "mirostat_tau": (5,), "mirostat_eta": (0.1,)}
"""Settings that change nothing here, with the values they have by default."""

GRAMMARS = ("grammar", "response_format", "tools", "tool_choice", "functions", "function_call")
"""Arguments that come with a grammar, which would drop tokens behind the chain, or with another sampling loop."""


def _engine() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise DecalError(f"decal.serving.llama_cpp needs llama-cpp-python: {error}") from error
    return llama_cpp


class Processor:
    """A logits processor of llama-cpp-python: applies a chain to the rows of one text; see `decal.serving.single.Follower`.

    Attributes:
        error: what went wrong. llama.cpp calls it from C, where an exception is printed and then lost; so it goes on to fail,
            and the stopping criterion of `completion_kwargs` raises the exception where Python can see it.
    """

    def __init__(self, request: Request, logit_bias: Mapping[int, float] | None = None):
        self.follower = Follower(request)
        self.error: BaseException | None = None
        self.length = 0
        self._biased = torch.tensor(list(logit_bias or ()), dtype=torch.long)
        self._bias = torch.tensor(list((logit_bias or {}).values()), dtype=torch.float32)

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The scores (V,) of the next token, float32, with the chain applied.

        Args:
            input_ids: (T,) the text so far, prompt included.
            scores: (V,) the model's logits.
        """
        try:
            if self.error is not None:
                raise self.error
            self.length = len(input_ids)
            # llama.cpp's scores are a column of a table, and chains read rows.
            row = torch.from_numpy(np.require(scores, np.float32, ["C", "W"]))[None]
            if len(self._biased):
                row = self._with_bias(row)
            return self.follower(row, input_ids)[0].numpy()
        except BaseException as error:  # an interrupt is lost like any other
            self.error = error
            # Otherwise llama.cpp would draw from the model's own distribution, as if nothing had happened.
            if scores.flags.writeable:
                scores[:] = -np.inf
            raise

    def _with_bias(self, row: Tensor) -> Tensor:
        if int(self._biased.max()) >= row.shape[1]:
            raise DecalError(f"logit_bias has the token {int(self._biased.max())}, the model {row.shape[1]} tokens")
        row = row.clone()
        row[0, self._biased] += self._bias
        return row


class Guard:
    """A stopping criterion that never stops, but raises what went wrong in a `Processor`."""

    def __init__(self, processor: Processor):
        self._processor = processor

    def __call__(self, input_ids: np.ndarray, logits: np.ndarray) -> bool:
        """Whether to stop.

        Args:
            input_ids: (T,) the text that a token was just drawn for.
        """
        if self._processor.error is not None:
            raise self._processor.error
        if self._processor.follower.reads_text and self._processor.length != len(input_ids):
            raise DecalError(
                f"decal: {self._processor.follower.request.chain} reads the text (or has a seed), but with a draft_model"
                " llama-cpp-python shows its processors tokens that may still be rejected; load the model without one"
            )
        return False


def processor(
    chain: Chain | str,
    *,
    seed: int | None = None,
    answers: Iterable[str] | None = None,
    regex: str | None = None,
    logit_bias: Mapping[int, float] | None = None,
    tokenizer: Any = None,
) -> Processor:
    """A logits processor that applies ``chain``, for one text at a time. `completion_kwargs` has what must go with it.

    Args:
        seed: decal draws; see `decal.serving.request.KEYS`, as for ``answers``; ``regex`` is another way to give them.
        logit_bias: what is added to the logits of tokens, before the chain; -inf bans one. llama-cpp-python's own argument of
            that name drops every logits processor.
        tokenizer: for answers: the ``Llama`` object, whose vocabulary is then used, or the model's fast tokenizer of
            transformers.

    Raises:
        DecalError: the chain can't be run by an engine, a value isn't allowed, or answers without a tokenizer.
    """
    request = _given(Request.of(as_params(chain, seed, answers, regex)), tokenizer)
    return Processor(request, _checked_bias(logit_bias))


def completion_kwargs(
    chain: Chain | str,
    *,
    seed: int | None = None,
    answers: Iterable[str] | None = None,
    regex: str | None = None,
    logit_bias: Mapping[int, float] | None = None,
    tokenizer: Any = None,
    chat: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Arguments of ``Llama.create_completion`` under which the chain alone decides the distribution, for one completion.

    Args:
        seed, answers, regex, logit_bias, tokenizer: as in `processor`.
        chat: for ``create_chat_completion``. It takes no stopping criteria, so an error within the chain is only printed, and
            the text that follows is noise; ``kwargs["logits_processor"][-1].error`` has it.
        kwargs: are added (``max_tokens=20``, ``logprobs=5``). Logits processors and stopping criteria among them come before
            decal's. With answers ``max_tokens`` is what the longest takes, unless given.

    Raises:
        DecalError: as `processor`; a keyword would act beside the chain; the longest answer takes more than ``max_tokens``; or
            llama-cpp-python isn't installed.
    """
    llama_cpp = _engine()
    acting = beside(kwargs, {**NEUTRAL, **IGNORED})
    if acting:
        raise DecalError(f"decal: {', '.join(acting)} would act beside the chain {chain}, or do nothing; put it into the chain")
    for name in GRAMMARS:
        if kwargs.get(name) is not None:
            raise DecalError(f"decal: {name} brings a grammar, which drops tokens behind the chain {chain}; use guided(...)")
    if chat and kwargs.get("stopping_criteria"):
        raise DecalError("decal: create_chat_completion takes no stopping_criteria")
    made = processor(chain, seed=seed, answers=answers, regex=regex, logit_bias=logit_bias, tokenizer=tokenizer)
    guide = made.follower.request.chain.guide
    if guide is not None:
        kwargs.setdefault("max_tokens", guide.longest)
        given = kwargs["max_tokens"]
        if given is not None and 0 < given < guide.longest:
            raise DecalError(f"decal: the longest answer takes {guide.longest} tokens, got max_tokens={given}")
    kwargs["logits_processor"] = llama_cpp.LogitsProcessorList([*(kwargs.get("logits_processor") or ()), made])
    if not chat:
        criteria = [*(kwargs.get("stopping_criteria") or ()), Guard(made)]
        kwargs["stopping_criteria"] = llama_cpp.StoppingCriteriaList(criteria)
    return {name: off[0] for name, off in NEUTRAL.items()} | kwargs


def _given(request: Request | None, tokenizer: Any) -> Request:
    """With the answers in the model's tokens."""
    assert request is not None
    if request.answers is None:
        return request
    if tokenizer is None:
        raise DecalError("decal: answers need the model's tokenizer; pass tokenizer=, the Llama object or one of transformers")
    if not hasattr(tokenizer, "token_eos"):
        return request.given(tokenizer)
    return Request(request.chain.for_answers(_guide(request.answers, tokenizer)), request.seed, request.answers)


def _guide(answers: tuple[str, ...], llama: Any) -> Guide:
    """Answers in the tokens of a ``Llama`` object, as it tokenizes them itself. Raises DecalError."""
    eos = (llama.token_eos(),) if llama.token_eos() >= 0 else ()
    if llama not in _vocabularies:
        _vocabularies[llama] = Vocabulary(_pieces(llama))

    def encode(text: str) -> list[int]:
        return list(llama.tokenize(text.encode(), add_bos=False, special=False))

    builder = TrieBuilder(encode, _vocabularies[llama], eos)
    trie, _ = builder.build(valid_answers(answers), Policy(ends=("<eos>",)))
    return Guide(trie, eos)


_vocabularies: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def _pieces(llama: Any) -> dict[int, bytes]:
    """``{token id: bytes it writes}``, control tokens left out."""
    lib, vocab, size = _engine(), llama._model.vocab, 1024
    buffer = ctypes.create_string_buffer(size)
    found: dict[int, bytes] = {}
    for token in range(llama.n_vocab()):
        if not lib.llama_vocab_is_control(vocab, token):
            written = lib.llama_token_to_piece(vocab, token, buffer, size, 0, False)
            if written > 0:
                found[token] = buffer.raw[:written]
    return found


def _checked_bias(given: Mapping[int, float] | None) -> dict[int, float]:
    """Token ids, which OpenAI writes as texts, with finite numbers or -inf. Raises DecalError."""
    if given is not None and not isinstance(given, Mapping):
        raise DecalError(f"logit_bias must be a mapping of token ids to numbers, got {given!r}")
    found: dict[int, float] = {}
    for token, bias in (given or {}).items():
        whole = isinstance(token, numbers.Integral) or (isinstance(token, str) and token.isdecimal())
        if isinstance(token, bool) or not whole or int(token) < 0:
            raise DecalError(f"logit_bias must be a mapping of token ids to numbers, got the token {token!r}")
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or math.isnan(bias) or bias == math.inf:
            raise DecalError(f"logit_bias must be finite or -inf, got {bias!r} for the token {token!r}")
        found[int(token)] = float(bias)
    return found


# ---- the settings of a server


class Fields(NamedTuple):
    """Fields of a request to a llama.cpp server, and one line for everything they do differently, or not at all."""

    fields: dict[str, Any]
    report: tuple[str, ...]


_OFF: Mapping[str, Any] = {
    "repeat_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "dry_multiplier": 0.0,
    "top_n_sigma": -1.0,
    "top_k": 0,
    "typical_p": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "xtc_probability": 0.0,
    "temperature": 1.0,
    "dynatemp_range": 0.0,
    "adaptive_target": -1.0,
    "mirostat": 0,
    "min_keep": 0,
    "ignore_eos": False,
    "logit_bias": [],
}
"""Every sampler at the value that switches it off: what a server of its own, or a GGUF file, has by default doesn't matter."""

_CUTS = {"top_n_sigma": ("top_n_sigma", "n"), "top_k": ("top_k", "k"), "typical": ("typ_p", "p"), "top_p": ("top_p", "p")}
_CUTS["min_p"] = ("min_p", "p")
_SPLITS_TIES = {"top_k": "top_k", "typ_p": "typical_p", "top_p": "top_p", "xtc": "xtc_threshold"}
_PENALTIES = {"repetition_penalty": "repeat_penalty", "frequency_penalty": "frequency_penalty"}
_PENALTIES["presence_penalty"] = "presence_penalty"
_LARGEST = 2**31 - 1


def request_fields(chain: Chain | str, *, tokenizer: Any = None, context: int | None = None, partial: bool = False) -> Fields:
    """Fields of a request to llama.cpp's server (``/completion`` and the OpenAI-like routes) that do what the chain does.

    Its samplers run in the order of the chain; those that aren't in it are switched off. `decal.from_llama_cpp` is the inverse.
    The draws are llama.cpp's.

    Args:
        tokenizer: of transformers, the model's, to write the tokens ``dry(breakers=...)`` as texts.
        context: the server's context size, for penalties with ``window=0``: llama.cpp wants a number.
        partial: leave out the steps that llama.cpp can't do, and report them, instead of raising.

    Returns:
        The fields, JSON values, and a report: ties, where coins come from, steps left out.

    Raises:
        DecalError: llama.cpp can't do some step, or not at its place; it lists each and why.
    """
    chain = parse(chain) if isinstance(chain, str) else chain
    if chain.per_row is not None:
        raise DecalError(f"a request has one value for each parameter, got a list of {chain.per_row} in {chain}")
    translation = _Translation(tokenizer, context)
    steps = [step for step in chain.steps if not step.is_off]
    if any(step.rule.name == "mirostat" for step in steps):
        translation.mirostat(steps)
    else:
        for place, step in enumerate(steps):
            translation.add(step, last=place == len(steps) - 1)
    if translation.lost and not partial:
        raise DecalError(
            f"llama.cpp's server can't do {chain}: {'; '.join(translation.lost)}. request_fields(..., partial=True) leaves such"
            " steps out"
        )
    return Fields(translation.fields, (*translation.report, *(f"{line}; left out" for line in translation.lost)))


class _Translation:
    """Steps of a chain on their way to fields."""

    def __init__(self, tokenizer: Any, context: int | None):
        if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
            raise DecalError(f"context must be a number of tokens, at least 1, got {context!r}")
        self.tokenizer, self.context = tokenizer, context
        self.fields: dict[str, Any] = {"samplers": [], **_OFF}
        self.report: list[str] = []
        self.lost: list[str] = []
        self._own: dict[str, dict[str, Any]] = {}
        self._leftover: str | None = None  # what has left tokens at -inf among llama.cpp's candidates

    @property
    def samplers(self) -> list[str]:
        return list(self.fields["samplers"])

    def lose(self, step: Step, why: str) -> None:
        self.lost.append(f"{step}: {why}")

    def note(self, line: str) -> None:
        if line not in self.report:
            self.report.append(line)

    def put(self, step: Step, sampler: str, **fields: Any) -> bool:
        """Another sampler in the order, at these settings, if that can be said."""
        unfit = next((name for name, value in fields.items() if not _sayable(name, value)), None)
        if unfit is not None:
            self.lose(step, f"{unfit}={fields[unfit]!r} is no value that llama.cpp, in float32 and JSON, tells from another")
            return False
        if self._own.setdefault(sampler, fields) != fields:
            self.lose(step, f"llama.cpp has one setting for all {sampler} steps, and an earlier one has {self._own[sampler]}")
            return False
        self.fields["samplers"] = [*self.samplers, sampler]
        self.fields |= fields
        if sampler in _SPLITS_TIES:
            self.note(f"{_SPLITS_TIES[sampler]}: llama.cpp keeps only some of the tokens tied at the cutoff, decal keeps all")
        return True

    def add(self, step: Step, last: bool) -> None:
        """One step, the last of the chain or not."""
        name, values = step.rule.name, step.values
        if name in _PENALTIES:
            self._penalty(step)
        elif name == "dry":
            self._dry(step)
        elif name == "top_n_sigma" and not values["n"]:
            self.lose(step, "at 0 it is off in llama.cpp")
        elif name == "typical" and self._leftover:
            self.lose(step, f"behind {self._leftover}, which leaves tokens at -inf, llama.cpp computes a NaN entropy")
        elif name in _CUTS:
            sampler, param = _CUTS[name]
            field = "typical_p" if sampler == "typ_p" else sampler
            if self.put(step, sampler, **{field: values[param]}):
                self._leftover = {"top_n_sigma": name, "top_k": self._leftover}.get(name)
        elif name == "xtc":
            self._xtc(step)
        elif name in ("temperature", "dynamic_temperature"):
            self._temperature(step)
        elif name == "adaptive_p":
            if not last:
                self.lose(step, "it draws the token in llama.cpp, so it must come last")
            else:
                self.put(step, name, adaptive_target=values["target"], adaptive_decay=values["decay"])
        elif name == "flatten":
            self.lose(
                step, "llama.cpp has no such sampler; if it is the only temperature, temperature(1 / (1 - strength)) is it"
            )
        else:
            self.lose(step, "llama.cpp has no such sampler")

    def mirostat(self, steps: Sequence[Step]) -> None:
        """A chain with mirostat, which replaces all of llama.cpp's other samplers but a temperature before it."""
        own = next(place for place, step in enumerate(steps) if step.rule.name == "mirostat")
        before = own and steps[own - 1].rule.name == "temperature"
        for place, step in enumerate(steps):
            if place == own:
                version = int(str(step.values["version"]))
                fields = {"mirostat": version, "mirostat_tau": step.values["tau"], "mirostat_eta": step.values["eta"]}
                if self.put(step, "mirostat", **fields):
                    self.note(
                        "mirostat: llama.cpp takes the surprise of a token after the cut, decal before it, as in the paper"
                    )
                    if version == 1:
                        self.note(
                            "mirostat: version 1 rounds the number of tokens down in llama.cpp, to the nearest plus 1 here"
                        )
            elif before and place == own - 1:
                self._temperature(step)
            else:
                self.lose(step, "llama.cpp runs nothing beside mirostat but a temperature right before it")
        self.fields["samplers"] = []

    def _penalty(self, step: Step) -> None:
        name, values = step.rule.name, step.values
        group = self._own.get("penalties", {})
        window = self._window(step)
        if values.get("form", "legacy") != "legacy":
            self.lose(step, 'llama.cpp has the form on logits; say form="legacy"')
        elif values["scope"] != "all":
            self.lose(step, 'llama.cpp counts the prompt too; say scope="all"')
        elif window is None:
            return
        elif group and self.samplers[-1] != "penalties":
            self.lose(step, "llama.cpp's penalties stand together")
        elif _PENALTIES[name] in group or (group and name == "repetition_penalty"):
            self.lose(step, "llama.cpp's penalties are one repetition_penalty, then one frequency_ and one presence_penalty")
        elif group and group["repeat_last_n"] != window:
            self.lose(step, f"llama.cpp's penalties have one window, and an earlier one has {group['repeat_last_n']}")
        else:
            if group and name == "frequency_penalty" and "presence_penalty" in group:
                self.note("frequency_penalty: before presence_penalty in llama.cpp, which makes no difference")
            amount = values["r" if name == "repetition_penalty" else "a"]
            fields = {_PENALTIES[name]: amount, "repeat_last_n": window}
            if not group:
                self.put(step, "penalties", **fields)
            elif _sayable(_PENALTIES[name], amount):
                group |= fields
                self.fields |= fields
            else:
                self.lose(step, f"{amount!r} is no value that llama.cpp, in float32 and JSON, tells from another")

    def _window(self, step: Step) -> int | None:
        """How far back to look, if that can be said."""
        window = int(step.values["window"])  # type: ignore[arg-type]
        if window:
            return window
        if self.context is None:
            self.lose(step, "llama.cpp wants a number of tokens for the window; say window=, or context= for all there are")
            return None
        self.note(f"window: {self.context} tokens, which are all as long as the context has no more")
        return self.context

    def _dry(self, step: Step) -> None:
        values, window = step.values, self._window(step)
        if window is None:
            return
        breakers = tuple(values["breakers"])  # type: ignore[arg-type]
        # A server refuses an empty list, and passes over an empty text.
        texts = [""]
        if breakers:
            if self.tokenizer is None:
                self.lose(step, "llama.cpp wants its breakers as texts; pass tokenizer=")
                return
            found = _texts_of(breakers, self.tokenizer)
            if found is None:
                self.lose(step, "no texts are contained in its breakers and in no other token")
                return
            texts = found
            if any(len(text.encode()) > 1 for text in texts):
                self.note("dry_sequence_breakers: break a repetition in llama.cpp also where several tokens write one of them")
        self.put(
            step,
            "dry",
            dry_multiplier=values["multiplier"],
            dry_base=values["base"],
            dry_allowed_length=values["allowed_length"],
            dry_penalty_last_n=window,
            dry_sequence_breakers=texts,
        )

    def _xtc(self, step: Step) -> None:
        values = step.values
        if values["spared"]:
            self.lose(step, "llama.cpp spares no tokens")
        elif values["seed"]:
            self.lose(step, "llama.cpp's coins follow the request's seed; say seed=0")
        elif "xtc" in self.samplers:
            self.lose(step, "llama.cpp would toss one coin for both xtc")
        elif float(values["threshold"]) > 0.5:  # type: ignore[arg-type]
            self.note("xtc_threshold: above one half xtc does nothing; left out")
        elif self.put(step, "xtc", xtc_threshold=values["threshold"], xtc_probability=values["probability"]):
            self.note("xtc_probability: llama.cpp's coins are its own, decal's a function of seed, request and position")

    def _temperature(self, step: Step) -> None:
        t, spread = step.values["t"], step.values.get("spread", 0.0)
        if spread and self._leftover:
            self.lose(step, f"behind {self._leftover}, llama.cpp counts the tokens that it left at -inf among those still kept")
        elif spread:
            exponent = step.values["exponent"]
            self.put(step, "temperature", temperature=t, dynatemp_range=spread, dynatemp_exponent=exponent)
        elif self.put(step, "temperature", temperature=t, dynatemp_range=0.0):
            if step.rule.name == "dynamic_temperature":
                self.note("dynatemp_range: 0 makes it a plain temperature")
            if t == 0:
                self.note("temperature: at 0 llama.cpp keeps one of the most probable tokens, decal all that tie")
                self._leftover = str(step)


def _sayable(name: str, value: Any) -> bool:
    """Whether llama.cpp takes the value for what it is: its numbers are float32, or int32."""
    if isinstance(value, float):
        single = float(np.float32(value))
        return math.isfinite(value) and math.isfinite(single) and (single == _OFF.get(name)) == (value == _OFF.get(name))
    return not isinstance(value, int) or value <= _LARGEST


def _texts_of(tokens: Sequence[int], tokenizer: Any) -> list[str] | None:
    """Texts that are contained in these tokens and in no other, so that ``tokens_with`` gives them back; None if none are."""
    wanted = set(tokens)
    written = {i: text for i, text in _written(tokenizer).items() if text}
    texts: list[str] = []
    left = sorted((i for i in wanted), key=lambda i: len(written.get(i, "")))
    for token in left:
        own = written.get(token, "")
        if any(text in own for text in texts):
            continue
        parts = sorted(
            {own[a:b] for a in range(len(own)) for b in range(a + 1, len(own) + 1)}, key=lambda part: (len(part), part)
        )
        fit = next((part for part in parts if all(i in wanted for i, text in written.items() if part in text)), None)
        if fit is None:
            return None
        texts.append(fit)
    return texts if set(tokens_with(tokenizer, *texts)) == wanted else None


def _written(tokenizer: Any) -> dict[int, str]:
    """What each token writes behind another, as in `decal.tokens_with`."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    lead = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    return {i: text.removeprefix(lead) for i, text in zip(ids, texts, strict=True)}


# ---- for decal verify

SEEN = 2**28
"""Bytes of logits that are kept to be asked for."""


class Live:
    """A model in llama-cpp-python, as `decal.serving.engine.Engine`. It writes texts one after another.

    The laws that it tells are read from llama.cpp's list of candidates as its last sampler, which draws, finds it: after the
    chain and after everything else of llama.cpp's.
    """

    name = "llama.cpp, through llama-cpp-python"
    takes_seeds = True

    def __init__(self, llama: Any, tokenizer: Any, version: str):
        self._llama, self.tokenizer, self.version = llama, tokenizer, version

    @classmethod
    def start(cls, model: str, *, tokenizer: Any = None, **kwargs: Any) -> Live:
        """Load a GGUF file.

        Args:
            tokenizer: a fast one of transformers, or where to load it from; read from the file itself if not given.
            kwargs: of ``Llama``, such as ``n_ctx=2048``.
        """
        lib = _engine()
        warm_up()
        try:
            llama = _recorder(lib)(model_path=str(model), **{"verbose": False, **kwargs})
        except ValueError as error:
            raise DecalError(f"llama.cpp can't load {model}: {error}") from error
        return cls(llama, _tokenizer(str(model), tokenizer), str(lib.__version__))

    @staticmethod
    def connect(url: str, *, tokenizer: Any = None) -> Server:
        """To a server of llama.cpp at ``url``; see `Server`.

        Args:
            tokenizer: as in `start`; read from the server's own GGUF file, which must be on this machine, if not given.

        Raises:
            DecalError: there is no server, or its file isn't here.
        """
        return Server(url.rstrip("/"), tokenizer)

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, V) the model's logits behind each text: those it last drew from there, or else with the text as a prompt.

        The two are far apart where weights are quantised: up to a nat was seen between a token evaluated with others and alone.
        """
        return torch.stack([self._row(text) for text in texts])

    def _row(self, text: Sequence[int]) -> Tensor:
        known = self._llama.seen.get(tuple(text))
        if known is not None:
            return known
        self._llama.reset()
        self._llama.eval(list(text))
        row = np.ctypeslib.as_array(self._llama._ctx.get_logits_ith(-1), shape=(self._llama.n_vocab(),))
        return torch.from_numpy(row.copy())

    def notes(self) -> list[str]:
        """See `decal.serving.engine.Engine`."""
        return []

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """Continue every prompt by at most ``length`` tokens; see `decal.serving.engine.Engine`."""
        return [self._write(list(prompt), asked, length, laws) for prompt in prompts]

    def _write(self, prompt: list[int], asked: Mapping[str, Any], length: int, laws: bool) -> Written:
        request = Request.of(asked)
        if request is None:
            kwargs: dict[str, Any] = {name: off[0] for name, off in NEUTRAL.items()}
        else:
            kwargs = completion_kwargs(
                asked["decal"],
                seed=request.seed,
                answers=asked.get("decal_answers"),
                tokenizer=self._llama,
            )
        self._llama.drawn, self._llama.laws = [], [] if laws else None
        if self._llama._input_ids.tolist() != prompt:
            # A prompt evaluated behind a part of it that is cached gives other logits, by rounding.
            self._llama.reset()
        self._llama.create_completion(prompt, **{**kwargs, "max_tokens": length})
        drawn, found = self._llama.drawn, self._llama.laws
        if laws and len(found) < len(drawn):
            raise DecalError(f"llama.cpp showed the candidates of {len(found)} of {len(drawn)} tokens")
        return Written(drawn, torch.stack(found[: len(drawn)]) if laws and drawn else None)


class Server:
    """A running server of llama.cpp, as `decal.serving.engine.Engine`, which does chains with samplers of its own.

    It tells either what it drew from or what its model gave, so every text is written twice, with one seed. Texts are written
    one after another: in a batch of others they would get other logits.
    """

    name = "llama.cpp, its server"
    takes_seeds = False

    def __init__(self, url: str, tokenizer: Any = None):
        props, served = http(f"{url}/props"), http(f"{url}/v1/models")
        try:
            model, self.version = str(props["model_path"]), str(props["build_info"])
            self._context = int(props["default_generation_settings"]["n_ctx"])
            self._vocabulary = int(served["data"][0]["meta"]["n_vocab"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DecalError(f"{url} is no server of llama.cpp with a model: it doesn't tell {error}") from error
        if tokenizer is None and not Path(model).is_file():
            raise DecalError(f"the server's model {model} isn't on this machine; name its tokenizer with tokenizer=")
        self._url, self.tokenizer = url, _tokenizer(model, tokenizer)
        self._seen: dict[tuple[int, ...], Tensor] = {}
        self._report: dict[str, None] = {}

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(texts, V) log-probabilities of the model behind each text: those last drawn from there, or else of the text as a
        prompt."""
        return torch.stack([self._row(tuple(text)) for text in texts])

    def _row(self, text: tuple[int, ...]) -> Tensor:
        if text not in self._seen:
            self._seen[text] = self._ask(text, {"samplers": [], **_OFF}, 1, laws="logprob")[1][0]
        return self._seen[text]

    def notes(self) -> list[str]:
        """What its samplers are known to do differently from the chains that it was asked about."""
        return list(self._report)

    def close(self) -> None:
        """It goes on running."""

    def write(self, prompts: Sequence[Sequence[int]], asked: Mapping[str, Any], length: int, laws: bool) -> list[Written]:
        """Continue every prompt by at most ``length`` tokens; see `decal.serving.engine.Engine`."""
        if "decal_seed" in asked:
            raise DecalError("a server of llama.cpp draws itself; it knows no decal_seed")
        fields = {"samplers": [], **_OFF}
        if asked:
            chain = parse(asked["decal"])
            if not all(step.ignores_shift for step in chain.steps):
                raise DecalError(f"{chain} depends on a constant of the logits, which a server of llama.cpp doesn't tell")
            fields, report = request_fields(asked["decal"], tokenizer=self.tokenizer, context=self._context)
            self._report |= dict.fromkeys(report)
        if laws:
            self._seen.clear()
        return [self._write(tuple(prompt), {**fields, "seed": seed}, length, laws) for seed, prompt in enumerate(prompts)]

    def _write(self, prompt: tuple[int, ...], fields: dict[str, Any], length: int, laws: bool) -> Written:
        if not laws:
            return Written(self._ask(prompt, fields, length)[0], None)
        tokens, found = self._ask(prompt, fields, length, laws="prob")
        again, rows = self._ask(prompt, fields, length, laws="logprob")
        if again != tokens:
            raise DecalError(f"the server wrote {tokens} and then {again} with one seed; is it busy with other requests?")
        self._seen |= {(*prompt, *tokens[:size]): row for size, row in enumerate(rows)}
        return Written(tokens, torch.stack(found) if found else None)

    def _ask(
        self, prompt: tuple[int, ...], fields: Mapping[str, Any], length: int, laws: str = ""
    ) -> tuple[list[int], list[Tensor]]:
        """New tokens, and log-probabilities (V,) for each: of the model ("logprob"), or what was drawn from ("prob")."""
        body = {"prompt": list(prompt), **fields, "n_predict": length, "return_tokens": True, "cache_prompt": False}
        if laws:
            body |= {"n_probs": self._vocabulary, "post_sampling_probs": laws == "prob"}
        told = http(f"{self._url}/completion", body)
        try:
            tokens = [int(token) for token in told["tokens"]]
            found = [self._law(step[f"top_{laws}s"], laws) for step in told["completion_probabilities"]] if laws else []
        except (KeyError, IndexError, TypeError) as error:
            raise DecalError(f"{self._url}/completion answered what no server of llama.cpp does: {error!r}") from error
        if laws and not 0 < len(found) == len(tokens):
            raise DecalError(f"{self._url}/completion told of {len(found)} laws for {len(tokens)} tokens")
        return tokens, found

    def _law(self, told: Sequence[Mapping[str, Any]], kind: str) -> Tensor:
        values = torch.tensor([one[kind] for one in told], dtype=torch.float64)
        law = torch.full((self._vocabulary,), -torch.inf, dtype=torch.float64)
        law[torch.tensor([one["id"] for one in told], dtype=torch.long)] = values.log() if kind == "prob" else values
        return law


def _tokenizer(model: str, given: Any) -> Any:

    from transformers import AutoTokenizer

    if given is not None and not isinstance(given, str):
        return given
    if given is not None:
        return AutoTokenizer.from_pretrained(given)
    return AutoTokenizer.from_pretrained(str(Path(model).parent), gguf_file=Path(model).name)


def _recorder(lib: Any) -> Any:
    """A ``Llama`` that notes the tokens it draws in ``drawn``, in ``laws``, if that is a list, what from, and in ``seen`` the
    model's logits by the text before them."""

    class Recorder(lib.Llama):
        def __init__(self, *args: Any, **kwargs: Any):
            self.drawn: list[int] = []
            self.laws: list[Tensor] | None = None
            self.seen: dict[tuple[int, ...], Tensor] = {}
            super().__init__(*args, **kwargs)

        def generate(self, *args: Any, **kwargs: Any) -> Iterator[int]:
            for token in super().generate(*args, **kwargs):
                self.drawn.append(token)
                yield token

        def _see(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            if len(self.seen) * scores.nbytes > SEEN:
                del self.seen[next(iter(self.seen))]
            self.seen[tuple(input_ids.tolist())] = torch.from_numpy(scores.copy())
            return scores

        def _init_sampler(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
            processors = lib.LogitsProcessorList([self._see, *(logits_processor or ())])
            sampler = super()._init_sampler(*args, logits_processor=processors, **kwargs)
            if self.laws is not None:
                last = lib.llama_sampler_chain_remove(sampler.sampler, lib.llama_sampler_chain_n(sampler.sampler) - 1)
                sampler.add_custom(self._note)
                lib.llama_sampler_chain_add(sampler.sampler, last)
            return sampler

        def _note(self, candidates: Any) -> None:
            size, start = candidates.contents.size, ctypes.addressof(candidates.contents.data.contents)
            kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
            table = np.frombuffer((ctypes.c_char * (size * kind.itemsize)).from_address(start), kind)
            row = torch.full((self.n_vocab(),), -torch.inf, dtype=torch.float64)
            row[torch.from_numpy(table["id"].astype(np.int64))] = torch.from_numpy(table["logit"].astype(np.float64))
            assert self.laws is not None
            self.laws.append(row.log_softmax(-1))

    return Recorder
