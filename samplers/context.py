"""What a rule may know besides the logits: the tokens so far, whose turn it is, and what its chain was given (`GIVEN`)."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from decal.kernels.reference import wide
from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    from decal.samplers.guided import Guide
    from decal.samplers.views import Views


@dataclass(frozen=True, eq=False)
class History:
    """The tokens before each of B rows.

    Attributes:
        tokens: (B, L) token ids, the last one at the right; padding on the left.
        length: (B, 1) how many of them, from the right, are real.
        prompt: (B, 1) how many of those belong to the prompt; the rest was generated.
        request: (B, 1) what tells the requests of a seed apart; used for random choices alone.
    """

    tokens: Tensor
    length: Tensor
    prompt: Tensor
    request: Tensor

    @classmethod
    def of(
        cls,
        tokens: Tensor | Sequence[Sequence[int]],
        *,
        pad: int | None = None,
        prompt: int | Tensor | None = None,
        request: Tensor | Sequence[int] | None = None,
    ) -> History:
        """From token ids (B, L), or lists of them of any lengths.

        Args:
            pad: a run of this token on the left counts as padding.
            prompt: length of the prompt, one number or (B, 1); all of it, if not given.
            request: numbers of the requests, 0, 1, 2, ... if not given.

        Raises:
            DecalError: not of this form.
        """
        if not isinstance(tokens, Tensor):
            if not isinstance(tokens, Sequence) or not all(isinstance(t, Sequence) and not isinstance(t, str) for t in tokens):
                raise DecalError(f"a history holds a list of token ids for each row, such as [[5, 7], [5]], got {tokens!r}")
            if not all(isinstance(i, numbers.Integral) for t in tokens for i in t):
                raise DecalError(f"a history holds whole numbers, got {tokens!r}")
            longest = max(map(len, tokens), default=0)
            filled = [[-1] * (longest - len(t)) + [int(i) for i in t] for t in tokens]
            tokens, pad = torch.tensor(filled, dtype=torch.long).reshape(len(filled), longest), -1
        if tokens.dim() != 2 or tokens.is_floating_point() or not len(tokens):
            raise DecalError(f"a history holds token ids of shape (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
        rows = len(tokens)
        real = torch.ones_like(tokens, dtype=torch.bool) if pad is None else (tokens != pad).cummax(-1).values
        length = real.sum(-1, keepdim=True)
        prompt = length if prompt is None else torch.as_tensor(prompt, device=tokens.device).reshape(-1, 1)
        if len(prompt) not in (1, rows) or prompt.is_floating_point() or bool((prompt < 0).any()):
            raise DecalError(
                f"the prompt's length is one number, or one for each of {rows} rows, got {prompt.flatten().tolist()}"
            )
        number = torch.arange(rows) if request is None else torch.as_tensor(request)
        if number.numel() != rows or number.is_floating_point():
            raise DecalError(f"a history of {rows} rows needs as many whole request numbers, got {number.flatten().tolist()}")
        return cls(tokens, length, prompt.expand(rows, 1), number.to(tokens.device).reshape(-1, 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> History:
        """The same on another device."""
        if self.tokens.device == device:
            return self
        return History(*(part.to(device) for part in (self.tokens, self.length, self.prompt, self.request)))

    def rows(self, index: Tensor) -> History:
        """The rows ``index``."""
        return History(self.tokens[index], self.length[index], self.prompt[index], self.request[index])

    def split(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Prompt and generated tokens of each row, without padding."""
        sizes = zip(self.tokens.tolist(), self.length[:, 0].tolist(), self.prompt[:, 0].tolist(), strict=True)
        real = ((tuple(tokens[len(tokens) - int(length) :]), int(prompt)) for tokens, length, prompt in sizes)
        return [(text[:prompt], text[prompt:]) for text, prompt in real]

    @cached_property
    def real(self) -> Tensor:
        """(B, L) which places hold a real token."""
        return self.age < self.length

    @cached_property
    def age(self) -> Tensor:
        """(1, L) how many tokens came after."""
        size = self.tokens.shape[1]
        return torch.arange(size - 1, -1, -1, device=self.tokens.device)[None]

    def within(self, window: int, scope: str = "all") -> Tensor:
        """(B, L) the places of the last ``window`` real tokens (0: of all), of everything or of what was ``generated``."""
        inside = self.real if scope == "all" else self.age < (self.length - self.prompt).clamp(min=0)
        return inside & (self.age < window) if window else inside

    def counts(self, vocabulary: int, inside: Tensor) -> Tensor:
        """(B, V) how often each token stands at the places ``inside`` (B, L)."""
        counts = torch.zeros(len(self), vocabulary, dtype=wide(self.tokens.device), device=self.tokens.device)
        known = inside & (self.tokens >= 0) & (self.tokens < vocabulary)
        return counts.scatter_add_(1, self.tokens.clamp(0, vocabulary - 1), known.to(counts))


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's embeddings, (V, D) each: ``embedding`` of input tokens, ``head`` of output logits."""

    embedding: Tensor
    head: Tensor
    _directions: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: Any) -> Weights:
        """Of a transformers model. Raises DecalError if it is none, or has none."""
        if not hasattr(model, "get_output_embeddings"):
            raise DecalError(f"for_model takes a transformers model, got {type(model).__name__}")
        inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
        if inside is None or outside is None:
            raise DecalError(f"{type(model).__name__} has no input and output embeddings")
        return cls(inside.weight.detach(), outside.weight.detach())

    @cached_property
    def standardised(self) -> Tensor:
        """(V, D) input embeddings, each dimension with mean 0 and variance 1 over the vocabulary, each row of length 1."""
        x = self.embedding.float()
        variance, mean = torch.var_mean(x, 0, correction=0)
        x = (x - mean) / variance.clamp(min=1e-6).sqrt()
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def directions(self, rank: int) -> Tensor:
        """(V, rank) output embeddings along their first right singular vectors, scaled to a largest entry of 1."""
        if rank not in self._directions:
            x = self.head.to(wide(self.head.device))
            # The right singular vectors are the eigenvectors of a small matrix.
            vectors = torch.linalg.eigh(x.T @ x).eigenvectors.flip(-1)[:, :rank]
            projected = x @ vectors
            self._directions[rank] = projected / projected.abs().amax(0).clamp(min=1e-30)
        return self._directions[rank]


class Given(NamedTuple):
    """Something that a chain has to be given before a rule can read it.

    Attributes:
        name: of the attribute that holds it, in `Context` and `Chain`.
        what: it is, in words.
        several: what two chains differ in that were given different ones.
        how: the method of `Chain` that gives it, with arguments.
    """

    name: str
    what: str
    several: str
    how: str

    @property
    def missing(self) -> str:
        """What to say of a chain without it."""
        return f"reads {self.what}: use chain.{self.how}"


GIVEN = {
    "model": Given("weights", "the model's embeddings", "models", "for_model(model)"),
    "answers": Given("guide", "the valid answers", "answers", "for_answers(answers, tokenizer)"),
    "ends": Given("ends", "the tokens that end a text", "tokens that end a text", "for_ends(tokens)"),
    "prompts": Given("views", "other prompts", "prompts", "for_prompts(decal.Prompts(model, tokenizer, ...))"),
}
"""By what `Rule.needs` calls it."""


@dataclass(frozen=True, eq=False)
class Context:
    """Everything besides logits, parameters and state; None where it isn't known.

    Attributes:
        history: the tokens so far.
        weights: the model's embeddings.
        guide: the valid answers.
        views: logits behind other prompts.
        ends: tokens that end a text.
        coin: forces every random choice, for computing with both outcomes.
        toss: which random choice of the chain it is.
    """

    history: History | None = None
    weights: Weights | None = None
    guide: Guide | None = None
    views: Views | None = None
    ends: tuple[int, ...] | None = None
    coin: bool | None = None
    toss: int = 0

    @classmethod
    def probe(cls) -> Context:
        """The smallest context that has everything, for two tokens."""
        from decal.samplers.guided import Guide
        from decal.samplers.trie import TokenTrie
        from decal.samplers.views import NoViews

        two = torch.eye(2, dtype=torch.float64)
        return cls(History.of([[0]]), Weights(two, two), Guide(TokenTrie(1)), NoViews(), (0,))
