"""The next tokens after a prefix, most probable first, with what each of them is; at many temperatures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from decal.eval import shape
from decal.eval.exact import Rows
from decal.eval.order import Prefix
from decal.eval.ranked import plain
from decal.samplers.trie import TokenTrie
from decal.samplers.vocabulary import Vocabulary

TOKENS = 120
"""Tokens of a ribbon that are shown."""
DEEPEST = 3
"""Length of the longest prefix for which there is a ribbon."""
TEMPERATURES = tuple(float(f"{t:.3g}") for t in np.geomspace(0.2, 5, 57))
KINDS = ("frequent", "rare", "invalid")


@dataclass(frozen=True)
class Ribbon:
    """Next tokens after a prefix.

    Attributes:
        prefix: what has been written, as text.
        valid: number of valid steps.
        tokens: the first `TOKENS` tokens, as text, an end of the text as such.
        logits: theirs, less the largest.
        kinds: of each: ``frequent``, a valid step with at least the share of the valid probability that is due to it by its
            completions; ``rare``, one with less; ``invalid``.
        log_total: log of the sum of exp(logit / T) over all tokens, at each of `TEMPERATURES`.
        mass: at each of them the probability of each of `KINDS`.
        ranks, sorted_logits: the sorted logits at some ranks.
        fit: what was fitted to them.
    """

    prefix: str
    valid: int
    tokens: list[str]
    logits: list[float]
    kinds: list[str]
    log_total: list[float]
    mass: list[list[float]]
    ranks: list[int]
    sorted_logits: list[float]
    fit: shape.LogitFit


def ribbons(trie: TokenTrie, rows: Rows, found: Sequence[Prefix], vocabulary: Vocabulary) -> list[Ribbon]:
    """One for the empty prefix, and one at each of the next depths, for the prefix most answers begin with."""
    chosen: dict[int, Prefix] = {}
    for p in found:
        if p.depth <= DEEPEST and (p.depth not in chosen or p.count.sum() > chosen[p.depth].count.sum()):
            chosen[p.depth] = p
    by_node = {p.node: p for p in chosen.values()}
    made = {}
    for nodes, logits in rows:
        for place, node in enumerate(nodes):
            if node in by_node:
                made[node] = _ribbon(trie, by_node[node], plain(logits[place]).double(), vocabulary)
    return [made[p.node] for _, p in sorted(chosen.items())]


def _ribbon(trie: TokenTrie, p: Prefix, row: torch.Tensor, vocabulary: Vocabulary) -> Ribbon:
    kind = _kinds(trie, p)
    ranked, order = (row - row.max()).sort(descending=True)
    ranked = ranked[ranked.isfinite()]
    shown = order[: min(TOKENS, len(ranked))].tolist()
    known = torch.tensor(sorted(kind))
    log_total = [float((ranked / t).logsumexp(0)) for t in TEMPERATURES]
    mass = []
    for t, total in zip(TEMPERATURES, log_total, strict=True):
        share = ((row[known] - row.max()) / t - total).exp().tolist()
        by_kind = [math.fsum(s for s, token in zip(share, known.tolist(), strict=True) if kind[token] == k) for k in KINDS[:2]]
        mass.append([round(v, 6) for v in (*by_kind, max(0.0, 1 - sum(by_kind)))])
    ranks = shape.fitted_ranks(len(ranked))
    sorted_logits = ranked[torch.from_numpy(ranks) - 1].numpy()
    return Ribbon(
        prefix=b"".join(vocabulary.bytes_of.get(t, b"") for t in trie.path(p.node)).decode(errors="replace"),
        valid=len(p.count),
        tokens=[vocabulary.bytes_of.get(t, b"<end>").decode(errors="replace") for t in shown],
        logits=[round(v, 4) for v in ranked[: len(shown)].tolist()],
        kinds=[kind.get(t, "invalid") for t in shown],
        log_total=[round(v, 6) for v in log_total],
        mass=mass,
        ranks=ranks.tolist(),
        sorted_logits=[round(v, 4) for v in sorted_logits.tolist()],
        fit=shape.fit_logits(ranks, sorted_logits),
    )


def _kinds(trie: TokenTrie, p: Prefix) -> dict[int, str]:
    """What each token of a valid step is."""
    enough = p.share / max(p.share.sum(), 1e-300) >= p.count / p.count.sum() * (1 - 1e-9)
    by_target = {int(to): KINDS[0] if much else KINDS[1] for to, much in zip(p.to, enough, strict=True)}
    kinds = {token: by_target[child] for token, child in trie.children[p.node].items() if child in by_target}
    if -1 in by_target:
        kinds |= dict.fromkeys(trie.ends, by_target[-1])
    return kinds
