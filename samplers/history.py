"""Rules that look at the tokens so far, at what they remember of earlier draws, or at a coin of their own.

Penalties of tokens seen (`Map`), bans (`Keep`), and the rules with feedback: pure functions ``init`` and ``update`` beside the
body, see `decal.samplers.rule.Feedback`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decal.kernels.reference import wide
from decal.samplers.context import History
from decal.samplers.reshaping import towards
from decal.samplers.row import Affine, Band, Keep, Map, Row
from decal.samplers.rule import Choice, Feedback, Param, State, Tokens, rule
from decal.samplers.truncation import zipf_size

LN2 = math.log(2)


def _counts(row: Row, window: int, scope: str) -> Tensor:
    """How often each token occurs in the last ``window`` tokens (0: in all), of everything or of what was generated."""
    return row.per_token(lambda history, vocabulary: history.counts(vocabulary, history.within(int(window), scope)))


@rule(paper="arXiv:1909.05858", side="before", shift=lambda form, **_: form != "legacy")
def repetition_penalty(
    row: Row,
    r: Tensor = Param(1.1, low=1e-3, off=1.0, sweep=(0.8, 1.05, 1.1, 1.2, 1.5, 2.0)),
    window: int = Param(0, low=0, integer=True, static=True),
    scope: str = Choice("all", "generated"),
    form: str = Choice("normalised", "legacy"),
) -> Map:
    """Make tokens that occurred less likely, by the factor ``r`` on their log-probability (in the legacy form, on the logit).

    Maps log p_i to r log p_i for the tokens of the last ``window`` (0: all) tokens, prompt included unless the scope is
    ``generated``. The form ``legacy`` is the published one on logits, z / r if z > 0, else z r, which depends on a constant
    that models leave open, so on nothing the model means. CTRL, Keskar et al. 2019; critique arXiv 2607.09791.

    Elsewhere: everywhere in the legacy form, as `repetition_penalty` or `repeat_penalty` (llama.cpp, with `repeat_last_n`);
    vLLM and transformers count prompt and output, mlx-lm the last 20 tokens.

    Differs: adding a constant to the logits changes nothing. Use ``form="legacy"`` for the numbers of other stacks.
    """
    row.history  # noqa: B018 (asked for at once, so that a missing one shows early)

    def penalise(z: Tensor) -> Tensor:
        seen = _counts(row, window, scope) > 0
        if form == "legacy":
            return torch.where(seen, torch.where(z > 0, z / r, z * r), z)
        return torch.where(seen, row.logz + r * (z - row.logz), z)

    return Map(penalise, monotone=False)


@rule(paper="platform.openai.com/docs/api-reference", side="before")
def presence_penalty(
    row: Row,
    a: Tensor = Param(0.5, low=-100, high=100, off=0.0, sweep=(-0.5, 0.25, 0.5, 1.0, 1.5, 2.0)),
    window: int = Param(0, low=0, integer=True, static=True),
    scope: str = Choice("generated", "all"),
) -> Map:
    """Lower the logits of tokens that occurred by ``a``.

    Maps z_i to z_i - a for the tokens among the last ``window`` (0: all) generated ones, or of the prompt too if the scope is
    ``all``. OpenAI, no paper.

    Elsewhere: vLLM and SGLang `presence_penalty` (generated tokens), llama.cpp, text-generation-webui and mlx-lm (prompt too,
    within a window).
    """
    row.history  # noqa: B018
    return Map(lambda z: z - a * (_counts(row, window, scope) > 0), monotone=False)


@rule(paper="platform.openai.com/docs/api-reference", side="before")
def frequency_penalty(
    row: Row,
    a: Tensor = Param(0.5, low=-100, high=100, off=0.0, sweep=(-0.5, 0.25, 0.5, 1.0, 1.5, 2.0)),
    window: int = Param(0, low=0, integer=True, static=True),
    scope: str = Choice("generated", "all"),
) -> Map:
    """Lower the logits of tokens that occurred by ``a`` for each time.

    Maps z_i to z_i - a c_i, c_i the number of times token i occurred among the last ``window`` (0: all) generated tokens, or in
    the prompt too if the scope is ``all``. OpenAI, no paper.

    Elsewhere: vLLM and SGLang `frequency_penalty` (generated tokens), llama.cpp, text-generation-webui and mlx-lm (prompt too,
    within a window).
    """
    row.history  # noqa: B018
    return Map(lambda z: z - a * _counts(row, window, scope), monotone=False)


@rule(paper="arXiv:2309.02772")
def adapt(
    row: Row,
    first: Tensor = Param(2.0, low=0, off=1.0, sweep=(1.5, 3.0, 5.0)),
    rest: Tensor = Param(0.7, low=0, off=1.0, sweep=(0.5, 0.9)),
) -> Affine:
    """Divide the logits by ``first`` for the first generated token and by ``rest`` for all others.

    Maps z to z / T. Where an answer begins, many are possible; behind that a surprise is more often a mistake, and mistakes add
    up. At 0 only the modes stay. Adaptive Temperature Sampling (AdapT), Zhu et al. 2023.

    Differs: the paper is about code, and calls every token that begins a block of it challenging; here it is the first of all.
    The paper has no cut; cut first if ``first`` is above 1.
    """
    history = row.history
    t = torch.where(history.length <= history.prompt, first, rest)
    return Affine(1 / t, torch.zeros_like(t))


@rule(paper="arXiv:1705.04304", scale=True)
def no_repeat_ngram(row: Row, n: int = Param(3, low=0, off=0, integer=True, static=True, sweep=(1, 2, 3, 4, 5, 6))) -> Keep:
    """Drop tokens that would complete a sequence of ``n`` tokens that occurred before.

    Dropped: v if the last n - 1 tokens and v stand together anywhere in the tokens so far, prompt included. A row in which that
    would be every token is left alone. A Deep Reinforced Model for Abstractive Summarization, Paulus et al. 2017.

    Elsewhere: transformers `no_repeat_ngram_size`, text-generation-webui, Aphrodite.

    Differs: padding on the left is no part of the text. transformers drops every token of a row if it comes to that.
    """
    row.history  # noqa: B018

    def free(z: Tensor) -> Tensor:
        return row.per_token(lambda history, v: _match_lengths(history, v, (), 0, most=int(n) - 1)) < n - 1

    return Keep(free)


@rule(paper="github.com/oobabooga/text-generation-webui/pull/5677", side="before")
def dry(
    row: Row,
    multiplier: Tensor = Param(0.8, low=0, off=0.0, sweep=(0.2, 0.4, 0.8, 1.6, 3.2, 6.4)),
    base: Tensor = Param(1.75, low=1),
    allowed_length: Tensor = Param(2, low=1, integer=True),
    window: int = Param(0, low=0, integer=True, static=True),
    breakers: tuple[int, ...] = Tokens(),
) -> Map:
    """Lower the logits of tokens that would prolong a repetition, the more the longer it already is.

    Maps z_i to z_i - multiplier base^(m - allowed_length) where m >= allowed_length, m the length of the longest end of the
    text that also stands earlier in the last ``window`` tokens (0: all), with token i behind it. A repetition does not reach
    over the tokens ``breakers``, and they are never penalised. DRY, p-e-w 2024, no paper.

    Elsewhere: llama.cpp `dry_multiplier`, `dry_base`, `dry_allowed_length`, `dry_penalty_last_n`, `dry_sequence_breakers`,
    text-generation-webui, KoboldCpp, Aphrodite; ExLlamaV2 multiplies by the number of repetitions.

    Differs: breakers are token ids, see `decal.tokens_with`. The exponent is limited to log(3.4e38) / log(base), as in
    llama.cpp; text-generation-webui limits m to 50.
    """
    row.history  # noqa: B018

    def penalise(z: Tensor) -> Tensor:
        length = row.per_token(lambda history, vocabulary: _match_lengths(history, vocabulary, breakers, int(window)))
        most = 88.7228391 / base.log().clamp(min=1e-6)
        penalty = multiplier * base ** (length - allowed_length).clamp(min=0).minimum(most.floor())
        return torch.where(length >= allowed_length, z - penalty, z)

    return Map(penalise, monotone=False)


def _match_lengths(
    history: History, vocabulary: int, breakers: tuple[int, ...], window: int, most: int | None = None
) -> Tensor:
    """(B, V) how long an end of the text stands earlier with each token behind it; -1 for tokens that never followed one.

    Lengths beyond ``most`` are not told apart from it.
    """
    tokens, inside = history.tokens, history.within(window)
    rows, size = tokens.shape
    table = torch.full((rows, vocabulary), -1.0, dtype=wide(tokens.device), device=tokens.device)
    if not size:
        return table
    broken = torch.isin(tokens, torch.tensor(breakers, dtype=tokens.dtype, device=tokens.device))
    # Place e stands for a repetition that ends there, and the token at e + 1 would prolong it.
    place = torch.arange(size, device=tokens.device)
    own = torch.iinfo(torch.long).min + place
    reach = _common_ends(torch.where(inside & ~broken, tokens.long(), own), most).to(table)
    follows = torch.roll(tokens, -1, 1)
    known = inside & torch.roll(inside & ~broken, -1, 1) & (follows >= 0) & (follows < vocabulary)
    known[:, -1] = False
    # Also a text of no common end has followers: a repetition of length 0 may begin anywhere, the first token included.
    table.scatter_reduce_(1, follows.clamp(0, vocabulary - 1), torch.where(known, reach, -1.0), "amax")
    first = (history.age == history.within(window).sum(-1, keepdim=True) - 1) & inside & ~broken
    start = torch.where(first & (tokens >= 0) & (tokens < vocabulary), 0.0, -1.0)
    return table.scatter_reduce_(1, tokens.clamp(0, vocabulary - 1), start.to(table), "amax")


SHORT = 128
"""Repetitions up to this length are followed token by token, which takes longer than doubling from about there on."""


def _common_ends(tokens: Tensor, most: int | None) -> Tensor:
    """(B, L) how many tokens before each place of a row, that one included, are those at the end of the row.

    Lengths beyond ``most`` are not told apart from it. The last place counts as 0.
    """
    size = tokens.shape[1]
    most = size if most is None else min(most, size)
    reach = torch.zeros_like(tokens)
    place = torch.arange(size, device=tokens.device)
    for back in range(min(most, SHORT)):
        longer = (reach == back) & (place >= back) & (torch.roll(tokens, back, 1) == tokens[:, size - 1 - back, None])
        longer[:, -1] = False
        if not longer.any():
            return reach
        reach += longer
    if most > SHORT:
        (long,) = torch.nonzero((reach == SHORT).any(-1), as_tuple=True)
        if len(long):
            reach[long] = _common_ends_by_doubling(tokens[long], most).clamp(max=most)
    return reach


def _common_ends_by_doubling(tokens: Tensor, most: int) -> Tensor:
    """`_common_ends`, in time L log(L)^2 whatever the text: what ends at each place in 1, 2, 4, ... tokens gets a number."""
    size = tokens.shape[1]
    place = torch.arange(size, device=tokens.device)
    numbers = [tokens]
    while 2 ** len(numbers) <= most:
        half = 2 ** (len(numbers) - 1)
        named = numbers[-1].unique(return_inverse=True)[1]
        both = named * named.numel() + torch.roll(named, half, 1)
        # Too near to the start to end anything so long: such a place is like no other.
        numbers.append(torch.where(place >= 2 * half - 1, both, -1 - place))
    reach = torch.zeros_like(tokens)
    for power in reversed(range(len(numbers))):
        here, end = place - reach, size - 1 - reach
        same = numbers[power].gather(1, here.clamp(min=0)) == numbers[power].gather(1, end.clamp(min=0))
        reach += torch.where(same & (here >= 0), 2**power, 0)
    reach[:, -1] = 0
    return reach


@rule(paper="github.com/oobabooga/text-generation-webui/pull/6335", side="before")
def xtc(
    row: Row,
    threshold: Tensor = Param(0.1, low=0, high=1, sweep=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3)),
    probability: Tensor = Param(0.5, low=0, high=1, off=0.0),
    seed: Tensor = Param(0, low=0, high=2**53, integer=True),
    spared: tuple[int, ...] = Tokens(),
) -> Band:
    """Now and then drop all tokens of probability at least ``threshold`` but the least probable of them.

    With ``probability``, once a row and step: dropped are p_i >= threshold, except the smallest of those; nothing where fewer
    than two are that probable. The tokens ``spared`` (the end of text, line breaks) always stay. The coin is a function of
    seed, request and position, so a text doesn't depend on who shares its batch. XTC, p-e-w 2024, no paper.

    Elsewhere: llama.cpp `xtc_threshold`, `xtc_probability`, text-generation-webui, KoboldCpp, mlx-lm, ExLlamaV2 and V3,
    Aphrodite.

    Differs: all tokens as probable as the one that stays do. text-generation-webui skips the step where a spared token would
    go, mlx-lm spares it, as here. ExLlamaV3 averages both outcomes instead of tossing a coin. mlx-lm asks for more than the
    threshold.
    """
    last = row.smallest_from(row.logz + torch.log(threshold))
    happens = row.chance(probability, seed)
    return Band(torch.full_like(last, -torch.inf), torch.where(happens, last, torch.inf), spared)


def _surprise_excess(logp: Tensor, tau: Tensor) -> Tensor:
    return -logp / LN2 - tau


@rule(
    paper="arXiv:2007.14966",
    side="after",
    feedback=Feedback(
        init=lambda tau, eta, version: {"mu": 2 * tau},
        update=lambda state, logp, tau, eta, version: {"mu": state["mu"] - eta * _surprise_excess(logp, tau)},
    ),
)
def mirostat(
    row: Row,
    tau: Tensor = Param(5.0, low=0, sweep=(1.0, 2.0, 3.0, 4.0, 5.0, 7.0)),
    eta: Tensor = Param(0.1, low=0),
    version: str = Choice("2", "1"),
) -> Tensor:
    """Keep tokens of a surprise of at most mu bits, and move mu so that the average surprise of drawn tokens becomes ``tau``.

    Kept: -log2 p_i <= mu; in version 1 the first k of ``mirostat_k(mu)``. mu begins at 2 tau and falls by eta (S - tau) after a
    token of surprise S. Mirostat, Basu et al. 2021.

    Elsewhere: llama.cpp `mirostat`, `mirostat_tau`, `mirostat_eta`, KoboldCpp; text-generation-webui, ExLlamaV2 and Aphrodite
    have version 2.

    Differs: S is the surprise in the row the rule was given, as in the authors' code; llama.cpp and others take it after the
    cut, renormalised, which is smaller. llama.cpp runs nothing else beside it but temperature.
    """
    mu = row.state["mu"]
    return row.logz - mu * LN2 if version == "2" else row.upper(count=zipf_size(row, mu))


def _adapt(state: State, logp: Tensor, target: Tensor, decay: Tensor) -> State:
    return {"sum": logp.exp() + decay * state["sum"], "weight": 1 + decay * state["weight"]}


@rule(
    paper="github.com/MrJackSpade/adaptive-p-docs",
    side="after",
    wants_cut=True,
    feedback=Feedback(
        init=lambda target, decay: {"sum": target / (1 - decay), "weight": 1 / (1 - decay) + 0 * target},
        update=_adapt,
    ),
)
def adaptive_p(
    row: Row,
    target: Tensor = Param(0.5, low=0, high=1, sweep=(0.1, 0.2, 0.3, 0.4, 0.5, 0.7)),
    decay: Tensor = Param(0.9, low=0, high=0.99),
) -> Map:
    """Prefer tokens whose probability is near a value, moved so that the probability of drawn tokens averages ``target``.

    ``power_law(a)`` with a = 2 target - average, in [0, 1]; the average is over the tokens drawn, each older one counting
    ``decay`` times less, and begins at the target. Their probability is the one before this rule. Every unlikely token gets
    about the same logit, so a cut must come before. MrJackSpade 2025, no paper.

    Elsewhere: llama.cpp `adaptive_target`, `adaptive_decay`, KoboldCpp, text-generation-webui, ExLlamaV3.
    """
    state, logz = row.state, row.logz
    wanted = (2 * target - state["sum"] / state["weight"]).clamp(0, 1)
    return Map(lambda z: towards(z, logz, wanted), monotone=False)
