"""How truncation errors compound over steps: the sequence precision and recall of arXiv 2605.11128, as products.

A cutoff keeps a set of next tokens at every prefix. ``Q`` draws uniformly from the kept sets; precision is ``Q(Y in V)``,
recall the share of valid answers whose every step is kept. Theorem E.1: each is exactly the product over steps of its
expected local value, given that all went well so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from decal.eval.exact import Rows
from decal.samplers.errors import DecalError
from decal.samplers.trie import TokenTrie


@dataclass(frozen=True)
class Kept:
    """What a cutoff keeps at each of the n nodes of a trie.

    Attributes:
        size: (n,) number of tokens kept after the node; at least 1 where something depends on it.
        step: (n,) whether the node itself is kept, as a step from its parent; True at the root.
        ends: (n,) number of kept tokens that end an answer, at nodes where one ends.
    """

    size: np.ndarray
    step: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, trie: TokenTrie, rows: Rows, mask: Callable[[Tensor], Tensor]) -> Kept:
        """What ``mask``, such as `Chain.mask`, keeps of the given rows."""
        n = len(trie)
        size, step, ends = np.ones(n, dtype=np.int64), np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64)
        for nodes, logits in rows:
            kept = mask(logits).isfinite()
            for node, row in zip(nodes, kept, strict=True):
                size[node] = int(row.sum())
                for token, child in trie.children[node].items():
                    step[child] = bool(row[token])
                if trie.answer[node] >= 0 and trie.ends:
                    ends[node] = int(row[list(trie.ends)].sum())
        return cls(size, step, ends)


@dataclass(frozen=True)
class Compounding:
    """Local precision and recall by step, alpha_t and beta_t of Theorem E.1, each in [0, 1].

    Steps are those of the longest answer and its end; an answer that has ended stays valid.
    """

    alpha: np.ndarray
    beta: np.ndarray

    @property
    def precision(self) -> float:
        """Sequence precision, the product of alpha."""
        return float(self.alpha.prod())

    @property
    def recall(self) -> float:
        """Sequence recall, the product of beta."""
        return float(self.beta.prod())


def compounding(trie: TokenTrie, kept: Kept) -> Compounding:
    """Expected local precision and recall of each step, among sequences for which the steps before went well.

    A step at which nothing went well before counts as 0.

    Raises:
        DecalError: answers don't end with a token, or some answer has several token sequences.
    """
    if not trie.ends or sum(a >= 0 for a in trie.answer) != trie.size or not all(trie.count):
        raise DecalError("Theorem E.1 is about answers with an end and one token sequence each; this trie's are not")
    count = np.asarray(trie.count, dtype=float)
    ending = _endings(trie)
    reach = np.zeros(len(trie))  # under Q, given success so far
    share = np.zeros(len(trie))  # under the uniform law on V, likewise
    reach[0] = share[0] = 1.0
    ended_reach = ended_share = 0.0
    alpha, beta = [], []
    for level in trie.levels():
        local_precision, local_recall = np.zeros(len(trie)), np.zeros(len(trie))
        for node in level:
            children = [c for c in trie.children[node].values() if kept.step[c]]
            done = bool(kept.ends[node])
            local_precision[node] = (len(children) + kept.ends[node]) / kept.size[node]
            local_recall[node] = (sum(count[c] for c in children) + done * ending[node]) / count[node]
        a = ended_reach + float((reach[level] * local_precision[level]).sum())
        b = ended_share + float((share[level] * local_recall[level]).sum())
        alpha.append(a)
        beta.append(b)
        if a == 0 or b == 0:
            break
        ended_reach += float(sum(reach[n] * kept.ends[n] / kept.size[n] for n in level))
        ended_share += float(sum(share[n] * bool(kept.ends[n]) * ending[n] / count[n] for n in level))
        for node in level:
            for child in trie.children[node].values():
                reach[child] = kept.step[child] * reach[node] / kept.size[node] / a
                share[child] = kept.step[child] * share[node] * count[child] / count[node] / b
        ended_reach, ended_share = ended_reach / a, ended_share / b
    return Compounding(np.asarray(alpha), np.asarray(beta))


def _endings(trie: TokenTrie) -> np.ndarray:
    """(n,) number of answers that end at each node."""
    ending = np.asarray(trie.count, dtype=float)
    for node in range(1, len(trie)):
        ending[trie.parent[node]] -= trie.count[node]
    return ending
