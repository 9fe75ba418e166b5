"""What a request to an engine asks of decal, and what of the engine's own settings must not act beside it.

A request carries plain values under the keys `KEYS`, whatever the engine calls the place for them (``extra_args``,
``vllm_xargs``, ``custom_params``):

    {"decal": "temperature(1.3) | min_p(0.1)", "decal_seed": 17}
    {"decal": "guided(0.5)", "decal_answers": ["red", "green"]}
"""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from decal.kernels.mass import MOST_TOKENS
from decal.samplers.chain import Chain, from_json, parse
from decal.samplers.errors import DecalError
from decal.samplers.guided import Guide
from decal.samplers.rule import TokensParameter
from decal.samplers.trie import TokenTrie
from decal.samplers.valid_set import ValidSet, refuse_schema

KEYS = {
    "decal": "the chain, as text such as 'temperature(1.3) | min_p(0.1)' or in its JSON form",
    "decal_seed": "a whole number: decal draws the tokens, as a function of it, the length of the text and the logits",
    "decal_answers": "the valid answers that guided follows, a list of texts",
}
"""Keys of a request, and what stands there."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
"""Settings by which an engine reshapes the distribution itself, and their values that don't; the first is the one to send."""

MOST_STEPS = 16
"""Nobody needs more, and one request must not hold up a batch."""

MOST_MEMORIES = 2
"""Steps with a memory: each keeps rows of the vocabulary for every request."""

MOST_ROUNDS = 1000
"""Of rules that take ``steps`` to their answer."""

MOST_CHARACTERS = 100_000
"""Of all answers; each takes half a kilobyte."""

MOST_ANSWERS = 10_000
"""To prepare so many takes a second, for which the engine stands still."""


@dataclass(frozen=True)
class Request:
    """What one request asks for.

    Attributes:
        chain: with one value for each parameter.
        seed: of its draws, if decal draws.
        answers: what `guided` follows, if the chain does, without the tokens they are in.
    """

    chain: Chain
    seed: int | None = None
    answers: tuple[str, ...] | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Request | None:
        """What ``params`` ask for, or None if they have no key of decal's.

        Raises:
            DecalError: an unknown key that begins with ``decal``, a value that isn't allowed, or a chain that an engine can't
                run; it names the key.
        """
        given = {key: value for key, value in (params or {}).items() if isinstance(key, str) and key.startswith("decal")}
        if not given:
            return None
        for key in given:
            if key not in KEYS:
                near = difflib.get_close_matches(key, KEYS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
                raise DecalError(f"unknown key {key!r}; {hint}")
        if "decal" not in given:
            raise DecalError(f"{', '.join(given)} without a chain; send it as 'decal'")
        return cls(_chain(given["decal"], given), _seed(given.get("decal_seed")), _answers(given))

    def given(self, tokenizer: Any) -> Request:
        """With the answers in the tokens of the engine's model, for a chain that follows some. Raises DecalError."""
        if self.answers is None:
            return self
        return Request(self.chain.for_answers(_guide(self.answers, tokenizer)), self.seed, self.answers)

    def refuse_copies(self, count: int) -> None:
        """Raise DecalError if several answers are wanted that would be the same."""
        if self.seed is not None and count > 1:
            raise DecalError(
                f"decal_seed: n={count} texts with one seed would be the same; send requests with seeds of their own"
            )


def as_params(
    chain: Chain | str, seed: int | None = None, answers: Iterable[str] | None = None, regex: str | None = None
) -> dict[str, Any]:
    """The keys and values of a request for ``chain``, checked: what a client sends. See `KEYS`.

    Args:
        answers: a list, or a `ValidSet`, which is listed here.
        regex: a regular expression of the answers. It is listed here, as a pattern can be made to keep a server busy.

    Raises:
        DecalError: as `Request.of`.
    """
    if regex is not None and answers is not None:
        raise DecalError("answers and regex: give one of them")
    if regex is not None:
        answers = ValidSet.from_regex(regex)
    refuse_schema(answers)
    if isinstance(answers, ValidSet):
        answers = list(_bounded(answers))
    params = {
        "decal": str(chain) if isinstance(chain, Chain) else chain,
        "decal_seed": seed,
        "decal_answers": list(answers) if answers is not None and not isinstance(answers, str) else answers,
    }
    params = {key: value for key, value in params.items() if value is not None}
    Request.of(params)
    return params


def beside(settings: Any, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL) -> list[str]:
    """The engine's own settings that would act beside a chain, each with the value to send instead.

    Args:
        settings: an object or a mapping; what isn't there, or None, counts as off.
        neutral: the engine's settings, with their values that change nothing.
    """
    get = settings.get if isinstance(settings, Mapping) else lambda name: getattr(settings, name, None)
    found = {name: get(name) for name in neutral}
    return [
        f"{name}={value!r} (send {neutral[name][0]!r})"
        for name, value in found.items()
        if value is not None and value not in neutral[name]
    ]


def refuse_beside(request: Request, settings: Any, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL) -> None:
    """Raise DecalError if the engine's own settings would act beside the request's chain."""
    found = beside(settings, neutral)
    if found:
        raise DecalError(
            f"decal: the engine would apply {', '.join(found)} beside the chain {request.chain}; put it into the chain"
            " instead. What wasn't sent may come from the model's generation config."
        )


def _chain(given: Any, params: Mapping[str, Any]) -> Chain:
    if not isinstance(given, str):
        raise DecalError(f"decal: the chain is a text such as 'temperature(1.3) | min_p(0.1)', got {given!r}")
    chain = _parsed(given)
    if len(chain.steps) > MOST_STEPS:
        raise DecalError(f"decal: a request may have {MOST_STEPS} steps, got {len(chain.steps)}")
    if chain.per_row is not None:
        raise DecalError(f"decal: a request has one value for each parameter, got a list of {chain.per_row} in {given!r}")
    remember = sum(step.rule.feedback is not None for step in chain.steps)
    if remember > MOST_MEMORIES:
        raise DecalError(f"decal: a request may have {MOST_MEMORIES} steps with a memory, got {remember}")
    for step in chain.steps:
        rounds = step.values.get("steps", 0)
        if isinstance(rounds, int) and rounds > MOST_ROUNDS:
            raise DecalError(f"decal: {step.rule.name}: a request may ask for {MOST_ROUNDS} steps, got {rounds}")
        for name, param in step.rule.params.items():
            ids = step.values[name]
            if isinstance(param, TokensParameter) and isinstance(ids, tuple) and max(ids, default=0) >= MOST_TOKENS:
                raise DecalError(f"decal: {step.rule.name}: {name} has {max(ids)}, which is no token of any model")
    for need, one in chain.missing.items():
        if need == "ends":
            raise DecalError(f"decal: {chain} reads {one.what}; write their ids into it, such as ends=(2, 198)")
        if need != "answers":
            raise DecalError(f"decal: {chain} reads {one.what}, which an engine doesn't give to its processors")
        if "decal_answers" not in params:
            raise DecalError(f"decal: {chain} follows valid answers; send decal_answers, in Python answers=")
    return chain


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Chain:
    try:
        return from_json(text) if text.lstrip().startswith("{") else parse(text)
    except DecalError as error:
        raise DecalError(f"decal: {error}") from None


def _seed(given: Any) -> int | None:
    if given is None:
        return None
    # JSON that passed through another program may have made a float of it.
    whole = isinstance(given, numbers.Integral) or (isinstance(given, float) and given.is_integer())
    if isinstance(given, bool) or not whole or not -(2**63) <= given < 2**63:
        raise DecalError(f"decal_seed must be a whole number below 2**63, got {given!r}")
    return int(given)


def _answers(params: Mapping[str, Any]) -> tuple[str, ...] | None:
    chain, texts = _parsed(params["decal"]), params.get("decal_answers")
    if texts is None:
        return None
    if "answers" not in chain.needs:
        raise DecalError(f"decal_answers: no step of {chain} follows answers; put guided(...) first")
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise DecalError(f"decal_answers must be a list of texts, got {texts!r}")
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise DecalError(f"decal_answers may have {MOST_CHARACTERS} characters in all, got {sum(map(len, texts))}")
    answers = tuple(texts)
    valid_answers(answers)
    return answers


@lru_cache(maxsize=64)
def valid_answers(answers: tuple[str, ...]) -> ValidSet:
    """The answers of a request. Raises DecalError if they are no valid set, or too many."""
    return _bounded(ValidSet.from_list(answers, "decal_answers"))


def _bounded(valid: ValidSet) -> ValidSet:
    if valid.size > MOST_ANSWERS:
        raise DecalError(f"{valid.source}: a request may have {MOST_ANSWERS} answers, got {valid.size}")
    return valid


@lru_cache(maxsize=64)
def _guide(answers: tuple[str, ...], tokenizer: Any) -> Guide:
    return Guide.of(valid_answers(answers), tokenizer)


def ending(end: int | list[int] | None) -> Request:
    """What writes nothing but the end token, for a request that can't be done and was not refused in time."""
    token = end if isinstance(end, int) else (end or [0])[0]
    trie = TokenTrie(1)
    trie.insert([token], 0)
    return Request(replace(parse("guided(1)"), guide=Guide(trie, (token,))))


def fresh_number() -> int:
    """A number that no other request has, for random choices of a request without a seed."""
    return int.from_bytes(os.urandom(8), "little") >> 1
