"""Decoding along known valid answers: what comes next is weighed by how many answers lie behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decal.kernels.reference import wide
from decal.samplers.errors import DecalError
from decal.samplers.row import Map, Row
from decal.samplers.rule import Param, rule
from decal.samplers.trie import Policy, TokenTrie, TrieBuilder
from decal.samplers.valid_set import ValidSet
from decal.samplers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from decal.samplers.context import History


@dataclass(frozen=True, eq=False)
class Guide:
    """Valid answers as the tokens of a model.

    Attributes:
        trie: the answers, one token sequence each.
        stop: tokens to write when an answer has ended with another token, such as a line break, or has no end.
    """

    trie: TokenTrie
    stop: tuple[int, ...] = ()
    _choices: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        answers: ValidSet | Iterable[str],
        tokenizer: Any,
        *,
        ends: Sequence[str] = ("<eos>",),
        leading_space: bool = False,
    ) -> Guide:
        """Of answers in the tokenizer's own spelling, which are to be the whole generated text.

        Args:
            answers: a list of texts, or a `ValidSet` such as ``ValidSet.from_regex("[1-9][0-9]?")``.
            tokenizer: a fast tokenizer of transformers, byte-level or SentencePiece.
            ends: what may stand behind an answer: texts with which a token begins, and ``<eos>``, the tokenizer's end token;
                nothing, if no answer begins with another.
            leading_space: whether a space stands before the answer.

        Raises:
            DecalError: the set is empty or too large to list, an answer can't be written, or ends can't tell answers apart.
        """
        if isinstance(answers, str):
            raise DecalError(f"answers are a list of texts or a ValidSet, got the text {answers!r}")
        valid = answers if isinstance(answers, ValidSet) else ValidSet.from_list(list(answers))
        vocabulary = Vocabulary.of(tokenizer)
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        builder = TrieBuilder(lambda text: tokenizer.encode(text, add_special_tokens=False), vocabulary, eos)
        trie, _ = builder.build(valid, Policy(leading_space=leading_space, ends=tuple(ends)))
        if not (trie.ends or eos):
            raise DecalError("answers without an end need a tokenizer with an end token, which is written behind them")
        return cls(trie, eos)

    def completions(self, history: History, vocabulary: int) -> Tensor:
        """(B, V) how many answers lie behind each next token; the end of an answer is one, shared between the tokens that end
        it. All 0 where the generated text is no beginning of an answer."""
        counts = torch.zeros(len(history), vocabulary, dtype=wide(history.tokens.device))
        for row, text in enumerate(_generated(history)):
            tokens, behind = self._after(text)
            known = tokens < vocabulary
            counts[row, tokens[known]] = behind[known].to(counts)
        return counts.to(history.tokens.device)

    def _after(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Next tokens and what lies behind each, after generated tokens."""
        node = 0
        for place, token in enumerate(text):
            child = self.trie.children[node].get(token)
            if child is None:
                ended = self.trie.answer[node] >= 0 and token in self.trie.ends and place == len(text) - 1
                stop = self.stop if ended else ()
                return torch.tensor(stop, dtype=torch.long), torch.ones(len(stop), dtype=torch.float64)
            node = child
        if node not in self._choices:
            behind = {token: float(self.trie.count[child]) for token, child in self.trie.children[node].items()}
            ends = self.trie.ends if self.trie.answer[node] >= 0 else ()
            behind |= dict.fromkeys(ends, 1 / max(len(ends), 1))
            if self.trie.answer[node] >= 0 and not self.trie.ends and not behind:  # the answer counts as it stands
                behind = dict.fromkeys(self.stop, 1.0)
            counts = torch.tensor(list(behind.values()), dtype=torch.float64)
            self._choices[node] = torch.tensor(list(behind), dtype=torch.long), counts
        return self._choices[node]


def _generated(history: History) -> list[list[int]]:
    """What was written behind each prompt."""
    many = (history.length - history.prompt).clamp(min=0)[:, 0].tolist()
    width = history.tokens.shape[1]
    return [row[width - int(n) :] for row, n in zip(history.tokens.tolist(), many, strict=True)]


@rule(slow="it is told the valid answers", paper="arXiv:2605.11128")
def guided(row: Row, strength: Tensor = Param(1.0, low=0, high=1, off=0.0, sweep=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0))) -> Map:
    """Keep the tokens that lead to a valid answer, and share the mass between them the more by how many answers they lead to.

    Maps log p_i to (1 - strength) log p_i + strength ln N_i where N_i > 0, the number of valid answers that begin with the
    tokens so far and i (Definition 3.2); other tokens are dropped. Every answer is valid at any strength above 0; at 1 all
    valid ones are equally probable, exactly and whatever the model; at 0 the rule is off. Where no valid answer begins with the
    tokens so far, or earlier steps dropped all that do, the row is left alone: let it be the first step that drops.

    Elsewhere: masks of grammars (llguidance, xgrammar, outlines) keep the same tokens and leave their probabilities as they
    are, which says nothing of how many answers lie behind them.
    """
    row.history  # noqa: B018 (asked for at once, so that a missing one shows early)
    guide = row.guide

    def towards_uniform(z: Tensor) -> Tensor:
        behind = row.per_token(guide.completions).to(z)
        # 0 times -inf is no number: at strength 1 the model has no say.
        own = torch.where(strength < 1, (1 - strength) * (z - row.logz), 0.0)
        given = torch.where((behind > 0) & z.isfinite(), own + strength * behind.log(), -torch.inf)
        lost = ~given.isfinite().any(-1, keepdim=True)
        return torch.where(lost, z, given)

    return Map(towards_uniform, drops=True, monotone=False)
