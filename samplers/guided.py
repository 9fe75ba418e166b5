"""Decoding along known valid answers: what comes next is weighed by how many answers lie behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decal.kernels.reference import wide
from decal.samplers.errors import DecalError
from decal.samplers.free_text import STAYS, Options
from decal.samplers.row import Map, Row
from decal.samplers.rule import Param, rule
from decal.samplers.token_graph import FREE_TOKENS, TokenGraph
from decal.samplers.trie import MOST_ANSWERS, Policy, TokenTrie, TrieBuilder
from decal.samplers.valid_set import ValidSet, refuse_schema
from decal.samplers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from decal.samplers.context import History


@dataclass(frozen=True, eq=False)
class Guide:
    """Valid answers as the tokens of a model.

    Attributes:
        trie: the answers, one token sequence each; a graph, where they are too many to list.
        stop: tokens to write when an answer has ended with another token, such as a line break, or has no end.
    """

    trie: TokenTrie | TokenGraph
    stop: tuple[int, ...] = ()
    _choices: dict[int, Options] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        answers: ValidSet | Iterable[str],
        tokenizer: Any,
        *,
        ends: Sequence[str] = ("<eos>",),
        leading_space: bool = False,
        free_tokens: int = FREE_TOKENS,
    ) -> Guide:
        """Of answers in the tokenizer's own spelling, which are to be the whole generated text.

        Args:
            answers: a list of texts, or a `ValidSet` such as ``ValidSet.from_regex("[1-9][0-9]?")``.
            tokenizer: a fast tokenizer of transformers, byte-level or SentencePiece.
            ends: what may stand behind an answer: texts with which a token begins, and ``<eos>``, the tokenizer's end token;
                nothing, if no answer begins with another. All tokens that begin so share the probability of ending, also those
                that go on, such as a line break with spaces behind it.
            leading_space: whether a space stands before the answer.
            free_tokens: how many tokens each text may take that the answers leave to the model
                (``ValidSet.from_json_schema(..., free=True)``).

        Raises:
            DecalError: no tokenizer; the set is empty, or too large to follow; an answer can't be written; or ends can't tell
                answers apart.
        """
        refuse_schema(answers)
        if isinstance(answers, (str, bytes)) or not isinstance(answers, (ValidSet, Iterable)):
            raise DecalError(f"answers are a list of texts or a ValidSet, such as ValidSet.from_regex(...), got {answers!r}")
        if isinstance(ends, str) or not isinstance(ends, Sequence) or not all(isinstance(end, str) for end in ends):
            raise DecalError(f"ends are a list of texts, such as ['<eos>'], got {ends!r}")
        if tokenizer is None:
            raise DecalError("to follow answers takes the model's tokenizer: for_answers(answers, tokenizer)")
        valid = answers if isinstance(answers, ValidSet) else ValidSet.from_list(list(answers))
        vocabulary = _vocabulary(tokenizer, len(tokenizer) if hasattr(tokenizer, "__len__") else 0)
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        builder = TrieBuilder(lambda text: tokenizer.encode(text, add_special_tokens=False), vocabulary, eos)
        policy = Policy(leading_space=leading_space, ends=tuple(ends))
        trie: TokenTrie | TokenGraph
        if isinstance(free_tokens, bool) or not isinstance(free_tokens, int) or free_tokens < 1:
            raise DecalError(f"free_tokens is a whole number of at least 1, got {free_tokens!r}")
        if valid.size <= MOST_ANSWERS and not valid.free:
            trie, _ = builder.build(valid, policy)
        else:
            special = next((text for text in tokenizer.all_special_tokens if valid.may_contain(text)), None)
            if special is not None:
                raise DecalError(f"{valid.source}: an answer has {special!r} in it, which is a special token, no text")
            trie = TokenGraph.of(valid, vocabulary, _encode(tokenizer), builder.ends(policy), leading_space, free_tokens)
        if not (trie.ends or eos):
            raise DecalError("answers without an end need a tokenizer with an end token, which is written behind them")
        return cls(trie, eos)

    @cached_property
    def largest(self) -> int:
        """The largest token id there is."""
        return max((*self.trie.token, *self.trie.ends, *self.stop))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest answer, with its end and what stops the text."""
        stops = not self.trie.ends or bool(set(self.trie.ends) - set(self.stop))
        return self.trie.deepest + bool(self.trie.ends) + (stops and bool(self.stop))

    @property
    def free(self) -> bool:
        """Whether answers leave some of their text to the model."""
        return isinstance(self.trie, TokenGraph) and bool(self.trie.passages)

    def choices(self, history: History) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every next token of every row that some answer continues with: rows (M,), tokens (M,), answers behind (M,), and
        clusters (M,), see `decal.samplers.free_text.Options`."""
        found = [self._after(text) for _, text in history.split()]
        rows = torch.tensor([row for row, options in enumerate(found) for _ in range(len(options.tokens))], dtype=torch.long)
        tokens, behind, cluster = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, tokens, behind, cluster

    def completions(self, history: History, vocabulary: int) -> Tensor:
        """(B, V) how many answers lie behind each next token; the end of an answer is one, shared between the tokens that end
        it. All 0 where the generated text is no beginning of an answer."""
        return self.options(history, vocabulary)[..., 0]

    def options(self, history: History, vocabulary: int) -> Tensor:
        """(B, V, 2) how many answers lie behind each next token, and its cluster; see `decal.samplers.free_text.Options`."""
        table = torch.zeros(len(history), vocabulary, 2, dtype=wide(history.tokens.device))
        rows, tokens, behind, cluster = self.choices(history)
        known = tokens < vocabulary
        table[rows[known], tokens[known]] = torch.stack([behind, cluster.to(behind)], -1)[known].to(table)
        return table.to(history.tokens.device)

    def _after(self, text: Sequence[int]) -> Options:
        """What may be written after generated tokens."""
        at: Any = 0  # a node, or a place in a free text
        for place, token in enumerate(text):
            following = self.trie.follow(at, token)
            if following is None:
                done = self.trie.ended(at) and token in (self.trie.ends or self.stop)
                stop = self.stop if done and all(t in self.stop for t in text[place + 1 :]) else ()
                return _fixed(dict.fromkeys(stop, 1.0))
            at = following
        free: Options | None = self.trie.free(at)
        if free is not None and not isinstance(at, int):
            return free
        if at not in self._choices:
            behind = {token: float(self.trie.count[child]) for token, child in self.trie.children[at].items()}
            ends = self.trie.ends if self.trie.ended(at) else ()
            behind |= dict.fromkeys(ends, 1 / max(len(ends), 1))
            if self.trie.ended(at) and not self.trie.ends and not behind:  # the answer counts as it stands
                behind = dict.fromkeys(self.stop, 1.0)
            self._choices[at] = _fixed(behind)
        known = self._choices[at]
        return known if free is None else Options(*(torch.cat(parts) for parts in zip(known, free, strict=True)))


def _fixed(behind: Mapping[int, float]) -> Options:
    """Where answers part."""
    counts = torch.tensor(list(behind.values()), dtype=torch.float64)
    return Options(torch.tensor(list(behind), dtype=torch.long), counts, torch.zeros(len(behind), dtype=torch.long))


def _encode(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Many texts to token ids, three times as fast as ``tokenizer`` itself does it."""
    backend = tokenizer.backend_tokenizer
    own = type(backend).from_str(backend.to_str())
    own.no_padding()
    own.no_truncation()
    return lambda texts: [found.ids for found in own.encode_batch_fast(texts, add_special_tokens=False)]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Of a tokenizer with so many tokens, as some may be added: it takes a second, and an engine asks for every request."""
    return Vocabulary.of(tokenizer)


def _weighed(own: Tensor, behind: Tensor, strength: Tensor) -> Tensor:
    """Log-probabilities, up to a constant of the row, drawn to the logarithms of how many answers lie behind."""
    # 0 times -inf is no number: at strength 1 the model has no say.
    share = torch.where(strength < 1, (1 - strength) * own, 0.0) + strength * behind.log()
    return torch.where(own.isfinite() & (behind > 0), share, -torch.inf)


def _beside_free_text(own: Tensor, behind: Tensor, cluster: Tensor, strength: Tensor) -> Tensor:
    """The same of one row (W,), where the model has its way within a free text, and with when to end it.

    Tokens that end it in the same way share what they have under the model, as answers part there. All of a free text counts
    as one token where answers part at whether to begin it.
    """
    law = _weighed(own, behind, strength)
    free = (cluster != 0) & law.isfinite()
    if not free.any():
        return law
    share = own.clone()
    for number in cluster[free & (cluster != STAYS)].unique():
        exits = free & (cluster == number)
        share[exits] = own[exits].logsumexp(0) + law[exits].log_softmax(0)
    # All answers behind the text are behind a token that goes on in it, or behind those together that end it alike.
    first = cluster[cluster != 0].min()
    count = behind[cluster == first].max() if first == STAYS else behind[cluster == first].sum()
    return torch.where(free, share + strength * (count.log() - share[free].logsumexp(0)), law)


@rule(slow="no rival of other samplers, as it is told the valid answers", paper="arXiv:2605.11128")
def guided(row: Row, strength: Tensor = Param(1.0, low=0, high=1, off=0.0, sweep=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0))) -> Map:
    """Keep the tokens that lead to a valid answer, and share the mass between them the more by how many answers they lead to.

    Maps log p_i to (1 - strength) log p_i + strength ln N_i where N_i > 0, the number of valid answers that begin with the
    tokens so far and i (Definition 3.2); other tokens are dropped. Every answer is valid at any strength above 0; at 1 all
    valid ones are equally probable whatever the model, to the precision of the logits; at 0 the rule is off. The answers are
    given by ``chain.for_answers``: a list, or a `ValidSet` of a regular expression, a JSON schema or a grammar. Texts that a
    schema leaves to the model are written as the model has them, among the tokens that keep the form; N counts them as one.
    Where no valid answer begins with the tokens so far, or earlier steps dropped all that do, the row is left alone: let it be
    the first step that drops.

    Elsewhere: masks of grammars (llguidance, xgrammar, outlines) keep the same tokens and leave their probabilities as they
    are, which says nothing of how many answers lie behind them.
    """
    history, guide = row.history, row.guide

    def towards_uniform(z: Tensor) -> Tensor:
        own = z - row.max
        if guide.free:
            behind, cluster = row.per_token(guide.options).to(z).unbind(-1)
            parts = zip(own, behind, cluster, strength.expand(len(z), 1), strict=True)
            given = torch.stack([_beside_free_text(*part) for part in parts])
        elif row.tokens is None and len(history) == len(z):
            # A few tokens of each row matter.
            rows, tokens, few, _ = (t.to(z.device) for t in guide.choices(history))
            given = torch.full_like(z, -torch.inf)
            given[rows, tokens] = _weighed(own[rows, tokens], few.to(z), strength.expand(len(z), 1)[rows, 0])
        else:
            given = _weighed(own, row.per_token(guide.completions).to(z), strength)
        lost = ~given.isfinite().any(-1, keepdim=True)
        # The largest is 0, as logarithms of many answers would lose their digits in short floats.
        return torch.where(lost, z, given - given.amax(-1, keepdim=True))

    return Map(towards_uniform, drops=True, monotone=False)
